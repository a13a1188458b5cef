"""Pictures of a run: where the time went, and what the policy saw and kept."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from safe_pruner_node.evaluation.run_record import RunRecord

KEYFRAME_COLOUR = "#c0392b"
_STAGE_COLOURS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]


def latency_figure(record: RunRecord, path: Path, title: str) -> None:
    """Stages stacked over time with keyframes marked, kappa, and the control periods.

    Args:
        record: The run; needs at least one step and the control totals.
        path: PNG to write.
        title: First line of the picture.
    """
    assert record.control is not None  # noqa: S101 - summarise has checked the run
    figure, axes = plt.subplots(
        3, 1, figsize=(12, 11), height_ratios=[3, 1.2, 1.6], constrained_layout=True
    )
    _stages(axes[0], record)
    _kappa(axes[1], record)
    axes[1].sharex(axes[0])
    _periods(axes[2], record.control.periods_ms, record.control.rate_hz)
    axes[0].set_title(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _stages(axes: Axes, record: RunRecord) -> None:
    """Stacked stage times of every policy step; keyframes as red ticks on top."""
    steps = record.steps
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


def _kappa(axes: Axes, record: RunRecord) -> None:
    """kappa against its threshold, with the kept tokens on the right axis."""
    steps = record.steps
    time_s = [step.time_s for step in steps]
    kept = [step.kept_tokens for step in steps]
    right = axes.twinx()
    right.step(time_s, kept, where="mid", color="0.75", lw=1)
    right.set_ylabel("tokens kept", color="0.5")
    right.set_ylim(0, 1.1 * max(step.visual_tokens for step in steps))
    axes.plot(time_s, [step.kappa for step in steps], "-o", ms=3, color="#2471a3", label="kappa")
    axes.plot(time_s, [step.gamma for step in steps], "--", color="0.3", label="gamma")
    for step in steps:
        if step.keyframe:
            axes.axvline(step.time_s, color=KEYFRAME_COLOUR, lw=0.8, alpha=0.7)
    axes.set_ylabel("kappa (Eq. 6)")
    axes.set_xlabel("time, s")
    axes.legend(fontsize=8, loc="lower left")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def _periods(axes: Axes, periods_ms: tuple[float, ...], rate_hz: float) -> None:
    """Histogram of the control periods, logarithmic so that single late ticks show."""
    nominal_ms = 1e3 / rate_hz
    periods = np.asarray(periods_ms)
    top = max(2.0 * nominal_ms, float(periods.max(initial=0.0)) * 1.02)
    axes.hist(periods, bins=np.linspace(0.0, top, 121).tolist(), color="#1e8449", log=True)
    axes.axvline(nominal_ms, color="black", lw=1, label=f"nominal {nominal_ms:g} ms")
    axes.axvline(1.5 * nominal_ms, color=KEYFRAME_COLOUR, ls="--", lw=1, label="1.5 x nominal")
    if len(periods):
        p99 = float(np.percentile(periods, 99))
        axes.axvline(p99, color="#d68910", lw=1, label=f"p99 {p99:.2f} ms")
    axes.set_xlabel("control period, ms")
    axes.set_ylabel("ticks")
    axes.legend(fontsize=8)
