"""Where each layer looks, early to late (the paper's Fig. 2a): language model, action expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from safe_pruner_node.evaluation.figure_file import save_small
from safe_pruner_node.evaluation.letterbox import map_over_image
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord, Single
from safe_pruner_node.types import FloatArray

_WHITE = 8.0
"""Multiple of the mean saliency that is drawn white."""


def effective_tokens(saliency: FloatArray) -> FloatArray:
    """exp(entropy): over how many tokens a map [..., N] spreads evenly spread attention."""
    p = saliency / saliency.sum(-1, keepdims=True)
    return np.asarray(np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum(-1)))


def layer_figure(records: Sequence[SaliencyRecord], path: Path) -> None:
    """One moment of each episode: every layer's map over the first camera.

    Args:
        records: Episodes, one per task.
        path: PNG to write.
    """
    layers = records[0].deep.shape[1]
    rows = 2 * len(records)
    figure, grid = plt.subplots(
        rows, layers, figsize=(1.75 * layers + 0.6, 1.25 * rows + 0.7), squeeze=False
    )
    figure.subplots_adjust(left=0.045, right=0.995, top=0.91, bottom=0.01, wspace=0.04, hspace=0.22)
    for number, record in enumerate(records):
        query = int(record.about["moment"])
        words = f"{record.about['task']}\n{record.time_s[query]:.1f} s"
        text, expert = grid[2 * number], grid[2 * number + 1]
        _row(text, record, query, record.prefill, "text rows")
        _row(expert, record, query, record.deep[query], "actions")
        text[0].set_ylabel(f"{words}\ntext rows", fontsize=7.5)
    for layer, axes in enumerate(grid[0]):
        axes.set_title(f"layer {layer}\n{axes.get_title() or '–'}", fontsize=8, pad=2)
    camera = records[0].cameras[0][0]
    figure.suptitle(
        f"Saliency of the {camera} camera's tokens by layer: dark none, white {_WHITE:g} times the "
        "mean over all cameras. “text rows”: language model, “actions”: action expert. "
        "Numbers: tokens it spreads over (exp entropy)",
        fontsize=9.5,
    )
    save_small(figure, path, dpi=90)


def _row(row: Sequence[Axes], record: SaliencyRecord, query: int, maps: Single, words: str) -> None:
    camera = record.cameras[0][0]
    span, image = record.camera_slices[camera], record.image(camera, query)
    height, width = record.about["resolution"][camera]
    spread = effective_tokens(np.asarray(maps, np.float64))
    for layer, axes in enumerate(row):
        axes.set_xticks([])
        axes.set_yticks([])
        if layer >= len(maps):
            axes.axis("off")
            continue
        heat = map_over_image(image, maps[layer, span].astype(np.float64), (height, width))
        heat = np.minimum(heat / (_WHITE * maps[layer].mean()), 1.0)
        grey = image.mean(-1, keepdims=True) / 255.0
        colour = plt.get_cmap("inferno")(np.sqrt(heat))[..., :3]
        axes.imshow(np.clip(0.4 * grey + 0.85 * colour, 0, 1))
        axes.set_title(f"{spread[layer]:.0f}", fontsize=8, pad=2)
    row[0].set_ylabel(words, fontsize=7.5)
