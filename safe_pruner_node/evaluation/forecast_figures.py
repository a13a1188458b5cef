"""The forecast's accuracy over time, and what each selection loses of the core, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from safe_pruner_node.evaluation.action_error import OTHER_NOISE, ActionError
from safe_pruner_node.evaluation.core_loss import (
    EARLY_ONLY,
    FASTV,
    IDENTITY,
    ORACLE,
    RANDOM,
    SAFE,
    SELECTIONS,
    CoreLoss,
)
from safe_pruner_node.evaluation.figure_file import save_small
from safe_pruner_node.evaluation.forecast_accuracy import IDENTITY as SAME_POSITION
from safe_pruner_node.evaluation.forecast_accuracy import (
    MATCHED,
    OTHER_FRAME,
    PRIOR,
    ForecastAccuracy,
    MeanInterval,
)

_PREDICTORS = {
    MATCHED: ("keyframe, tokens matched (SAFE)", "#1e8449"),
    SAME_POSITION: ("keyframe, same position", "#2471a3"),
    PRIOR: ("mean map of other episodes", "#7d3c98"),
    OTHER_FRAME: ("random frame of another episode, matched", "#ca6f1e"),
}
_EARLY = {
    "text": ("early map alone: text rows", "-"),
    "action_probe": ("early map alone: action probe", "--"),
    "last_text": ("early map alone: last text row", ":"),
}
SHOWN = (RANDOM, FASTV, EARLY_ONLY, IDENTITY, SAFE, ORACLE)
"""Selections in the figure; the table has all."""
_COLOURS = dict(
    zip(SHOWN, ("0.55", "#ca6f1e", "#7d3c98", "#2471a3", "#1e8449", "black"), strict=True)
)
_CAMERAS = ("#34495e", "#a569bd", "#e59866", "#5dade2")


def accuracy_figure(accuracy: ForecastAccuracy, path: Path, title: str) -> None:
    """Cosine and KL against t with 95 % intervals over episodes (Fig. A).

    Args:
        accuracy: What was measured.
        path: PNG to write.
        title: Above the figure.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.9), layout="constrained")
    for axes, values in ((left, accuracy.cosine), (right, accuracy.kl)):
        for name, (label, colour) in _PREDICTORS.items():
            spans = [
                MeanInterval.of(list(values[name][:, i])) for i in range(len(accuracy.horizons))
            ]
            mean = [span.mean for span in spans]
            lw, alpha = _line(name == SAME_POSITION)
            axes.plot(
                accuracy.horizons, mean, "-o", ms=4, lw=lw, alpha=alpha, color=colour, label=label
            )
            low, high = [span.low for span in spans], [span.high for span in spans]
            axes.fill_between(accuracy.horizons, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_xlabel("t, policy queries after the keyframe")
        axes.set_xticks(accuracy.horizons)
        axes.grid(alpha=0.3)
    for mode, (label, style) in _EARLY.items():
        span = MeanInterval.of(list(accuracy.early_cosine[mode]))
        left.axhline(span.mean, color="0.4", ls=style, lw=1.2, label=label)
    left.set_ylabel("cosine with the true late saliency")
    left.set_ylim(top=1.0)
    right.set_ylabel("KL(true || forecast), nats")
    right.set_ylim(bottom=0.0)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5
    )
    figure.suptitle(title, fontsize=10)
    save_small(figure, path)


def core_loss_figure(
    loss: CoreLoss,
    actions: Mapping[float, Mapping[str, ActionError]],
    path: Path,
    title: str,
) -> None:
    """Loss of the core against rho (Fig. 2b); what is kept instead; and what it does to actions.

    Args:
        loss: What was measured.
        actions: By rho and selection, how far the chunk moves; rho 0 holds the noise's own.
        path: PNG to write.
        title: Above the figure.
    """
    figure, (lost, cameras, black, moved) = plt.subplots(
        1, 4, figsize=(16, 4.9), width_ratios=(1.5, 1.1, 0.8, 1), layout="constrained"
    )
    rhos = sorted(loss.scores)
    for name in SHOWN:
        spans = [loss.scores[rho][name].core_loss for rho in rhos]
        y = np.array([100 * span.mean for span in spans])
        low, high = (
            np.array([100 * getattr(span, end) for span in spans]) for end in ("low", "high")
        )
        colour, style = _COLOURS[name], "--" if name == ORACLE else "-"
        lw, alpha = _line(name == IDENTITY)
        lost.plot(
            rhos,
            y,
            style,
            marker="o",
            ms=4,
            lw=lw,
            alpha=alpha,
            color=colour,
            label=SELECTIONS[name].title,
        )
        lost.fill_between(rhos, low, high, color=colour, alpha=0.12, lw=0)
    lost.set_xticks(rhos)
    lost.set_xlabel("rho, share of the tokens dropped")
    lost.set_ylabel("core tokens dropped, %\n(top 10 % of the late saliency)")
    lost.set_ylim(-2, 102)
    lost.grid(alpha=0.3)
    handles, labels = lost.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(SHOWN), fontsize=8.5)
    _bars(cameras, black, loss, min(rhos, key=lambda rho: abs(rho - 0.75)))
    _moved(moved, actions)
    figure.suptitle(title, fontsize=10)
    save_small(figure, path)


def _moved(axes: Axes, actions: Mapping[float, Mapping[str, ActionError]]) -> None:
    """RMS of the arms by selection, pale for the highest rho."""
    names = list(reversed(SHOWN))
    rhos = sorted((rho for rho in actions if rho > 0), reverse=True)
    for rho, height, alpha in zip(rhos, (0.8, 0.45), (0.35, 1.0), strict=False):
        spans = [actions[rho][name].arms_mrad for name in names]
        mean = [span.mean for span in spans]
        colours = [_COLOURS[name] for name in names]
        axes.barh(names, mean, height, color=colours, alpha=alpha)
    noise = actions[0.0][OTHER_NOISE].arms_mrad.mean
    axes.axvline(noise, color="0.4", ls=":", lw=1.2)
    axes.annotate(
        "  all tokens, other flow noise",
        (noise, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8.5,
        ha="left",
    )
    axes.set_yticks([])
    words = ", pale: ".join(f"{rho:g}" for rho in reversed(rhos))
    axes.set_xlabel(f"arms' chunk moved by, mrad RMS\nrho {words}")


def _line(wide: bool) -> tuple[float, float]:
    """Width and opacity; a wide pale line shows where SAFE's lies on it."""
    return (5.0, 0.45) if wide else (1.6, 1.0)


def _bars(cameras: Axes, black: Axes, loss: CoreLoss, rho: float) -> None:
    scores, names = loss.scores[rho], list(reversed(SHOWN))
    left = np.zeros(len(names))
    for number, camera in enumerate(scores[SAFE].cameras):
        share = np.array([100 * scores[name].cameras[camera] for name in names])
        colour = _CAMERAS[number % len(_CAMERAS)]
        cameras.barh(names, share, left=left, color=colour, label=camera.replace("_", " "))
        left += share
    labels = {IDENTITY: "SAFE, same position", ORACLE: "oracle"}
    words = [labels.get(name, SELECTIONS[name].title) for name in names]
    cameras.set_yticks(range(len(names)), words, fontsize=8.5)
    cameras.set_xlabel(f"kept by camera, %\nrho {rho:g}")
    cameras.set_xlim(0, 100)
    cameras.legend(
        fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False
    )
    share = np.array([100 * scores[name].black.mean for name in names])
    black.barh(names, share, color=[_COLOURS[name] for name in names])
    black.axvline(100 * loss.black_tokens, color="0.4", ls=":", lw=1.2)
    black.annotate(
        "share of all tokens",
        (100 * loss.black_tokens, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8.5,
        ha="center",
    )
    for y, value in enumerate(share):
        black.text(value, y, f" {value:.0f}", va="center", fontsize=8.5)
    black.set_yticks([])
    black.set_xlim(0, max(100 * loss.black_tokens, float(np.nanmax(share, initial=1.0))) * 1.2)
    black.set_xlabel(f"kept in black bands, %\nrho {rho:g}")
