"""Pictures of a run: where the time went, and how regular the control loop was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from safe_pruner_node.evaluation.run_record import RunRecord, StepRecord

KEYFRAME_COLOUR = "#c0392b"
KAPPA_COLOUR = "#2471a3"
SUCCESS_COLOUR = "#1e8449"
_STAGE_COLOURS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]


def latency_figure(record: RunRecord, path: Path, title: str) -> None:
    """Stages stacked over time with keyframes marked, kappa, and the control periods.

    The episodes stand one after the other.

    Args:
        record: The run; needs at least one step.
        path: PNG to write.
        title: First line of the picture.
    """
    figure, axes = plt.subplots(
        3, 1, figsize=(12, 11), height_ratios=[3, 1.2, 1.6], constrained_layout=True
    )
    starts_s = record.starts_s
    steps = [
        replace(step, time_s=start_s + step.time_s)
        for start_s, episode in zip(starts_s, record.episodes, strict=True)
        for step in episode.steps
    ]
    _stages(axes[0], steps)
    _kappa(axes[1], steps)
    axes[1].sharex(axes[0])
    _episodes(axes[0], axes[1], record, starts_s)
    controls = [episode.control for episode in record.episodes]
    _periods(axes[2], [p for c in controls for p in c.periods_ms], controls[0].rate_hz)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _episodes(top: Axes, below: Axes, record: RunRecord, starts_s: list[float]) -> None:
    """Where each episode begins, and how it ended."""
    for start_s, episode in zip(starts_s, record.episodes, strict=True):
        for axes in (top, below):
            axes.axvline(start_s, color="0.6", lw=1)
        outcome = "success" if episode.success else f"progress {episode.progress:.0f}"
        top.annotate(
            f"{episode.task}\n{outcome}",
            (start_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=SUCCESS_COLOUR if episode.success else "0.3",
        )


def _stages(axes: Axes, steps: list[StepRecord]) -> None:
    """Stacked stage times of every policy step; keyframes as red ticks on top."""
    time_s = np.array([step.time_s for step in steps])
    names = list(dict.fromkeys(name for step in steps for name in step.stage_ms))
    bottom = np.zeros(len(steps))
    # As wide as the step took, ending where its report arrived: gaps are time without a step.
    width = np.array([step.step_ms * 1e-3 for step in steps])
    for index, name in enumerate(names):
        height = np.array([step.stage_ms.get(name, 0.0) for step in steps])
        colour = _STAGE_COLOURS[index % len(_STAGE_COLOURS)]
        axes.bar(
            time_s - width,
            height,
            0.94 * width,
            bottom=bottom,
            label=name,
            color=colour,
            align="edge",
        )
        bottom += height
    key = np.array([step.keyframe for step in steps])
    if key.any():
        axes.plot(
            (time_s - width / 2)[key],
            bottom[key] * 1.03,
            "v",
            color=KEYFRAME_COLOUR,
            ms=7,
            label="keyframe",
        )
    axes.plot(
        time_s,
        [s.end_to_end_ms for s in steps],
        ".",
        color="black",
        ms=4,
        label="end to end (camera stamp to command)",
    )
    axes.set_ylabel("ms per policy step")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    axes.grid(axis="y", alpha=0.3)


def _kappa(axes: Axes, steps: list[StepRecord]) -> None:
    """kappa against its threshold, with the kept tokens on the right axis."""
    time_s = [step.time_s for step in steps]
    kept = [step.kept_tokens for step in steps]
    right = axes.twinx()
    right.step(time_s, kept, where="mid", color="0.75", lw=1)
    right.set_ylabel("tokens kept", color="0.5")
    right.set_ylim(0, 1.1 * max(step.visual_tokens for step in steps))
    axes.plot(time_s, [s.kappa for s in steps], "-o", ms=3, color=KAPPA_COLOUR, label="kappa")
    axes.plot(time_s, [step.gamma for step in steps], "--", color="0.3", label="gamma")
    for step in steps:
        if step.keyframe:
            axes.axvline(step.time_s, color=KEYFRAME_COLOUR, lw=0.8, alpha=0.7)
    axes.set_ylabel("kappa (Eq. 6)")
    axes.set_xlabel("time, s")
    axes.legend(fontsize=8, loc="lower left")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def _periods(axes: Axes, periods_ms: list[float], rate_hz: float) -> None:
    """Histogram of the control periods, logarithmic so that single late ticks show."""
    nominal_ms = 1e3 / rate_hz
    periods = np.asarray(periods_ms)
    top = max(2.0 * nominal_ms, float(periods.max(initial=0.0)) * 1.02)
    axes.hist(periods, bins=np.linspace(0.0, top, 121).tolist(), color=SUCCESS_COLOUR, log=True)
    axes.axvline(nominal_ms, color="black", lw=1, label=f"nominal {nominal_ms:g} ms")
    axes.axvline(1.5 * nominal_ms, color=KEYFRAME_COLOUR, ls="--", lw=1, label="1.5 x nominal")
    if len(periods):
        p99 = float(np.percentile(periods, 99))
        axes.axvline(p99, color="#d68910", lw=1, label=f"p99 {p99:.2f} ms")
    axes.set_xlabel("control period, ms")
    axes.set_ylabel("ticks")
    axes.legend(fontsize=8)
