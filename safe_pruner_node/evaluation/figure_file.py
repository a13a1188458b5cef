"""Figures with pictures in them as small PNGs."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image


def save_small(figure: Figure, path: Path, *, dpi: int = 100, photos: bool = False) -> None:
    """Write a figure with 256 colours, and close it.

    Args:
        figure: What to write.
        path: PNG.
        dpi: Pixels per inch.
        photos: Dither, for what has soft shades; plain areas would get a grain.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    buffer.seek(0)
    picture = Image.open(buffer).convert("RGB")
    # Thin lines count for as much as large areas: their colours carry the meaning.
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    dither = Image.Dither.FLOYDSTEINBERG if photos else Image.Dither.NONE
    picture.quantize(palette=palette, dither=dither).save(path, optimize=True)
