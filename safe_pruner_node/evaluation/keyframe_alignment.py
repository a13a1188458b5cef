"""Whether keyframes come where the episode turns: distances to events, against random keyframes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.evaluation.saliency_replay import KeyframeTrace
from safe_pruner_node.types import FloatArray

PERMUTATIONS = 2000


@dataclass(frozen=True)
class Alignment:
    """Distance from each event to the nearest keyframe, in policy queries.

    Attributes:
        events: Events of all episodes.
        keyframes: Keyframes, the first of each episode left out: it is forced.
        median: Median distance; NaN without an event.
        mean: Mean distance.
        random_median: The median of random keyframes of equal number, mean over the draws.
        random_mean: Likewise of the mean.
        p_median: Share of the draws whose median is as small, one-sided, (1 + n) / (1 + draws);
            NaN where nothing could be drawn otherwise.
        p_mean: Likewise of the mean.
    """

    events: int
    keyframes: int
    median: float
    mean: float
    random_median: float
    random_mean: float
    p_median: float
    p_mean: float


def align(
    events_s: Sequence[FloatArray],
    times_s: Sequence[FloatArray],
    traces: Sequence[KeyframeTrace],
    *,
    seed: int = 0,
) -> Alignment:
    """Measure, and draw keyframes at random among the same queries.

    The first query stays a keyframe in every draw.

    Args:
        events_s: Event times of each episode, s.
        times_s: Query times of each episode, s.
        traces: Keyframes of each episode.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    measured, drawn, keyframes, free = [], [], 0, False
    for events, times, trace in zip(events_s, times_s, traces, strict=True):
        later = np.flatnonzero(trace.keyframe[1:]) + 1
        keyframes += len(later)
        free = free or (len(events) > 0 and 0 < len(later) < len(times) - 1)
        places = np.interp(events, times, np.arange(len(times)))  # in queries
        measured.append(_distances(places, np.r_[0, later][None])[0])
        order = random.random((PERMUTATIONS, len(times) - 1)).argsort(1)[:, : len(later)] + 1
        chosen = np.concatenate([np.zeros((PERMUTATIONS, 1), np.int64), order], 1)
        drawn.append(_distances(places, chosen))
    found, others = np.concatenate(measured), np.concatenate(drawn, 1)
    if not len(found):
        return Alignment(0, keyframes, *[float("nan")] * 6)
    medians, means = np.median(others, 1), others.mean(1)
    median, mean = float(np.median(found)), float(found.mean())
    nan = float("nan")
    return Alignment(
        events=len(found),
        keyframes=keyframes,
        median=median,
        mean=mean,
        random_median=float(medians.mean()),
        random_mean=float(means.mean()),
        p_median=_p(medians, median) if free else nan,
        p_mean=_p(means, mean) if free else nan,
    )


def _distances(events: FloatArray, keyframes: NDArray[np.int64]) -> FloatArray:
    """From [E] events to the nearest of [D, K] keyframes, [D, E]."""
    return np.asarray(np.abs(events[None, :, None] - keyframes[:, None, :]).min(-1))


def _p(draws: FloatArray, value: float) -> float:
    return float((1 + np.sum(draws <= value + 1e-9)) / (1 + len(draws)))
