"""An episode as in the paper's Fig. 3: what is attended to, kappa, keyframes, gripper events."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from safe_pruner_node.evaluation.core_loss import ORACLE, SAFE, keep_tokens
from safe_pruner_node.evaluation.figure_file import save_small
from safe_pruner_node.evaluation.figures import KAPPA_COLOUR, KEYFRAME_COLOUR, SUCCESS_COLOUR
from safe_pruner_node.evaluation.gripper_events import GripperEvent, gripper_events
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.evaluation.saliency_replay import KeyframeTrace, Replay
from safe_pruner_node.inference.overlay import draw_overlay
from safe_pruner_node.types import RgbImage

MOMENTS = 6
SHOWN_RHO = 0.75
_HANDS = ("#8e44ad", "#d68910")
_MOMENT = "0.45"


def episode_figure(replay: Replay, trace: KeyframeTrace, path: Path) -> None:
    """Draw one episode.

    Args:
        replay: The episode; needs at least two queries.
        trace: Its keyframes.
        path: PNG to write.
    """
    record = replay.record
    events = gripper_events(record.tick_time_s, record.gripper)
    moments = pick_moments(record, trace, events)
    cameras = [name for name, _ in record.cameras]
    rows = len(cameras) + 1
    figure = plt.figure(figsize=(2.35 * MOMENTS + 0.8, 1.42 * rows + 3.6))
    top = figure.add_gridspec(
        rows,
        len(moments),
        left=0.045,
        right=0.99,
        top=0.925,
        bottom=0.385,
        wspace=0.03,
        hspace=0.05,
    )
    below = figure.add_gridspec(
        2, 1, left=0.07, right=0.975, top=0.325, bottom=0.055, height_ratios=(1.5, 1), hspace=0.12
    )
    for column, query in enumerate(moments):
        for row in range(rows):
            axes = figure.add_subplot(top[row, column])
            kept_by = ORACLE if row < len(cameras) else SAFE
            axes.imshow(_picture(replay, trace, query, cameras[row % len(cameras)], kept_by))
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                words = cameras[row].replace("_", " ") if row < len(cameras) else "head, SAFE keeps"
                axes.set_ylabel(words, fontsize=9)
            if row == 0:
                key = "  keyframe" if trace.keyframe[query] else ""
                colour = KEYFRAME_COLOUR if key else "black"
                axes.set_title(
                    f"{column + 1}   {record.time_s[query]:.1f} s{key}", fontsize=10, color=colour
                )
    kappa = figure.add_subplot(below[0])
    _kappa(kappa, replay, trace, moments)
    hands = figure.add_subplot(below[1], sharex=kappa)
    _hands(hands, record, events)
    for axes in (kappa, hands):
        _marks(axes, record, trace, moments)
    kappa.tick_params(labelbottom=False)
    _legend(kappa, record)
    outcome = "success" if record.about["success"] else f"progress {record.about['progress']:.0f}"
    about = record.about
    figure.suptitle(
        f"{about['task']}, seed {about['seed']}: “{about['prompt']}” ({outcome})   "
        "bright: the 25 % of all tokens with the highest late saliency",
        fontsize=10.5,
        y=0.98,
    )
    save_small(figure, path, photos=True)


def pick_moments(
    record: SaliencyRecord, trace: KeyframeTrace, events: list[GripperEvent]
) -> list[int]:
    """Queries worth a picture: first, last, after gripper events, keyframes; then fill the gaps."""
    last = record.queries - 1
    after = [int(np.searchsorted(record.time_s, event.time_s)) for event in events]
    wanted = [0, last, *after, *np.flatnonzero(trace.keyframe).tolist()]
    moments: list[int] = []
    apart = max(1, last // (2 * MOMENTS))
    for query in wanted:
        if query <= last and all(abs(query - known) >= apart for known in moments):
            moments.append(query)
    moments = sorted(moments[:MOMENTS])
    while len(moments) < min(MOMENTS, record.queries):
        gaps = np.diff(moments)
        widest = int(gaps.argmax())
        moments.insert(widest + 1, moments[widest] + int(gaps[widest]) // 2)
    return moments


def _picture(
    replay: Replay, trace: KeyframeTrace, query: int, camera: str, kept_by: str
) -> RgbImage:
    record, span = replay.record, replay.record.camera_slices[camera]
    image = record.image(camera, query)
    if kept_by == SAFE and trace.keyframe[query]:
        keep = np.arange(replay.n_visual)
    else:
        reference = int(trace.reference[query])
        keep = keep_tokens(replay, kept_by, SHOWN_RHO, reference, query).numpy()
    own = keep[(keep >= span.start) & (keep < span.stop)] - span.start
    return draw_overlay(image, own, span.stop - span.start)


def _kappa(axes: Axes, replay: Replay, trace: KeyframeTrace, moments: list[int]) -> None:
    time_s = replay.record.time_s
    axes.plot(time_s, trace.kappa, "-o", color=KAPPA_COLOUR, lw=1.6, ms=3.5)
    axes.axhline(replay.settings.gamma, ls="--", color="0.35", lw=1)
    known = trace.kappa[np.isfinite(trace.kappa)]
    low = min([*known, replay.settings.gamma]) if len(known) else 0.0
    room = max(1.0 - low, 1e-3)
    axes.set_ylim(low - 0.12 * room, 1.0 + 0.05 * room)
    axes.set_ylabel("kappa (Eq. 6)")
    for number, query in enumerate(moments):
        axes.annotate(
            str(number + 1),
            (time_s[query], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            weight="bold",
            color=_MOMENT,
        )


def _hands(axes: Axes, record: SaliencyRecord, events: list[GripperEvent]) -> None:
    for hand, colour in zip(range(record.hand_speed_m_s.shape[1]), _HANDS, strict=False):
        axes.plot(record.tick_time_s, record.hand_speed_m_s[:, hand], color=colour, lw=1)
    top = max(float(record.hand_speed_m_s.max(initial=0.0)), 0.1)
    axes.set_ylim(0, 1.45 * top)
    for event in events:
        marker = "v" if event.closes else "^"
        y = 1.28 * top
        axes.plot(event.time_s, y, marker, color=_HANDS[event.hand % 2], ms=9, mec="black", mew=0.6)
    axes.set_ylabel("hand, m/s")
    axes.set_xlabel("time, s", labelpad=1)


def _marks(axes: Axes, record: SaliencyRecord, trace: KeyframeTrace, moments: list[int]) -> None:
    for query in moments:
        axes.axvline(record.time_s[query], color="0.8", lw=5, zorder=0)
    for query in np.flatnonzero(trace.keyframe).tolist():
        axes.axvline(record.time_s[query], color=KEYFRAME_COLOUR, lw=1.8)
    for at_s, progress in record.stages:
        if progress > 0:
            axes.axvline(at_s, color=SUCCESS_COLOUR, lw=1.6, ls=":")
    axes.set_xlim(-0.2, float(record.tick_time_s[-1]) + 0.2)
    axes.grid(axis="y", alpha=0.3)


def _legend(axes: Axes, record: SaliencyRecord) -> None:
    entries = [
        Line2D([], [], color=KEYFRAME_COLOUR, label="keyframe"),
        Line2D([], [], color="0.35", ls="--", label="gamma"),
        Line2D([], [], color=SUCCESS_COLOUR, ls=":", lw=1.6, label="progress: a stage is reached"),
        Line2D([], [], color="0.8", lw=5, label="pictures"),
    ]
    for hand, colour in zip(record.about["hands"], _HANDS, strict=False):
        entries.append(Line2D([], [], color=colour, label=f"{hand} hand"))
    for marker, words in (("v", "closes"), ("^", "opens")):
        entries.append(Line2D([], [], color="0.7", marker=marker, ls="", mec="black", label=words))
    axes.legend(
        handles=entries,
        ncols=len(entries),
        fontsize=8.5,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.1),
        frameon=False,
        borderpad=0,
        columnspacing=1.2,
    )
