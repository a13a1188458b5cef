"""Figures with pictures in them as small PNGs."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image


def save_small(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Write a figure with 256 colours, and close it.

    Args:
        figure: What to write.
        path: PNG.
        dpi: Pixels per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    buffer.seek(0)
    picture = Image.open(buffer).convert("RGB")
    # Thin lines count for as much as large areas: their colours carry the meaning.
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
