"""How well late saliency is forecast t queries ahead, with controls (the paper's Fig. A)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import cosine_similarity

from safe_pruner_node.evaluation.saliency_record import EARLY
from safe_pruner_node.evaluation.saliency_replay import Replay
from safe_pruner_node.types import FloatArray

MATCHED, IDENTITY, OTHER_FRAME, PRIOR = "matched", "identity", "other_frame", "prior"
PREDICTORS = (MATCHED, IDENTITY, OTHER_FRAME, PRIOR)
"""Token matching, same position, a random frame of another episode with matching, and the mean map
of the other episodes without any frame."""

_FLOOR = 1e-12


@dataclass(frozen=True)
class MeanInterval:
    """A mean over episodes with Student's 95 % interval; NaN bounds with fewer than two."""

    mean: float
    low: float
    high: float
    episodes: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanInterval:
        """Of one value per episode; NaNs are left out."""
        known = np.array([value for value in values if np.isfinite(value)])
        if not len(known):
            return cls(float("nan"), float("nan"), float("nan"), 0)
        mean = float(known.mean())
        if len(known) < 2:
            return cls(mean, float("nan"), float("nan"), 1)
        half = float(student.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
        return cls(mean, mean - half, mean + half, len(known))


@dataclass(frozen=True)
class ForecastAccuracy:
    """Every query is taken as a keyframe once; episodes are the samples.

    Attributes:
        horizons: t, policy queries, [T].
        cosine: Predictor to [episodes, T], mean over an episode's keyframes; NaN past its end.
        kl: The same of KL(true || forecast), nats.
        early_cosine: Early mode to its cosine with the true deep map, [episodes].
        in_operation: Cosine of the forecast on the steps that SAFE would have pruned, from the
            keyframe then in force, [episodes].
        pairs: Keyframe and target pairs per t, [T].
    """

    horizons: tuple[int, ...]
    cosine: Mapping[str, FloatArray]
    kl: Mapping[str, FloatArray]
    early_cosine: Mapping[str, FloatArray]
    in_operation: FloatArray
    pairs: tuple[int, ...]


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two maps, [N] each."""
    return float(cosine_similarity(a, b, dim=0))


def kl_divergence(true: Tensor, forecast: Tensor) -> float:
    """KL(true || forecast) in nats, both scaled to sum to 1, [N] each."""
    p = (true.double() + _FLOOR) / (true.double() + _FLOOR).sum()
    q = (forecast.double() + _FLOOR) / (forecast.double() + _FLOOR).sum()
    return float((p * (p / q).log()).sum())


def forecast_accuracy(
    replays: Sequence[Replay], *, horizon: int = 10, seed: int = 0
) -> ForecastAccuracy:
    """Measure every predictor at every distance.

    Args:
        replays: The episodes, same cameras and model.
        horizon: Largest t.
        seed: Draws the random other frames.
    """
    shape = (len(replays), horizon)
    cosines = {name: np.full(shape, np.nan) for name in PREDICTORS}
    kls = {name: np.full(shape, np.nan) for name in PREDICTORS}
    pairs = [0] * horizon
    for e, replay in enumerate(replays):
        without_frame = _without_own_frame(replays, e, seed)
        for t in range(1, horizon + 1):
            scores: dict[str, list[tuple[float, float]]] = {name: [] for name in PREDICTORS}
            for current in range(t, len(replay)):
                true = replay.deep[current]
                forecasts = {
                    MATCHED: replay.forecast(current - t, current),
                    IDENTITY: replay.deep[current - t],
                    **{name: maps[current] for name, maps in without_frame.items()},
                }
                for name, forecast in forecasts.items():
                    scores[name].append((cosine(true, forecast), kl_divergence(true, forecast)))
            pairs[t - 1] += len(scores[MATCHED])
            for name, values in scores.items():
                if values:
                    cosines[name][e, t - 1], kls[name][e, t - 1] = np.mean(values, axis=0)
    return ForecastAccuracy(
        tuple(range(1, horizon + 1)),
        cosines,
        kls,
        {mode: np.array([_early(replay, mode) for replay in replays]) for mode in EARLY},
        np.array([_in_operation(replay) for replay in replays]),
        tuple(pairs),
    )


def _without_own_frame(replays: Sequence[Replay], own: int, seed: int) -> dict[str, Tensor]:
    """Forecasts of every query from other episodes alone, of its task if possible, [Q, N]."""
    replay = replays[own]
    others = [other for e, other in enumerate(replays) if e != own]
    if not others:
        return {}
    task = replay.record.about["task"]
    kin = [other for other in others if other.record.about["task"] == task] or others
    random = np.random.default_rng([seed, own])
    drawn = []
    for current in range(len(replay)):
        other = kin[random.integers(len(kin))]
        reference = int(random.integers(len(other)))
        drawn.append(other.deep[reference][replay.pi_from(other, reference, current)])
    prior = torch.stack([other.deep.mean(0) for other in kin]).mean(0)
    return {OTHER_FRAME: torch.stack(drawn), PRIOR: prior.expand(len(replay), -1)}


def _early(replay: Replay, mode: str) -> float:
    maps = replay.early[mode]
    return float(np.mean([cosine(a, b) for a, b in zip(maps, replay.deep, strict=True)]))


def _in_operation(replay: Replay) -> float:
    trace = replay.keyframes()
    values = [
        cosine(replay.deep[query], replay.forecast(int(trace.reference[query]), query))
        for query in np.flatnonzero(~trace.keyframe).tolist()
    ]
    return float(np.mean(values)) if values else float("nan")
