"""Which of the tokens that late layers look at each selection throws away (the paper's Fig. 2b)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from safe_pruner_node.evaluation.forecast_accuracy import MeanInterval
from safe_pruner_node.evaluation.letterbox import black_tokens
from safe_pruner_node.evaluation.saliency_replay import KeyframeTrace, Replay
from safe_pruner_node.pruning.forecast import deep_forecast, fuse
from safe_pruner_node.pruning.selection import top_k_with_floors

CORE_SHARE = 0.1
"""The core: so many of the visual tokens, those of the highest deep saliency."""

RANDOM, FASTV, EARLY_ONLY, SAFE = "random", "fastv", "without_forecast", "safe"
SAFE_PROBE, EARLY_PROBE = "safe_action_probe", "early_action_probe"
IDENTITY, FORECAST_ONLY, NO_FLOOR, GLOBAL = "safe_identity", "forecast_only", "no_floor", "global"
LATE_LAYERS, ORACLE = "safe_late_layers", "oracle"

Scores = Callable[[Replay, int, int], Tensor]


@dataclass(frozen=True)
class Selection:
    """A way of choosing tokens.

    Attributes:
        title: For tables and figures.
        scores: Replay, keyframe in force and query to token scores, [N].
        floor: Whether every camera keeps the settings' least number.
    """

    title: str
    scores: Scores
    floor: bool = True


def _fused(mode: str | None, *, within: bool | None = None) -> Scores:
    def scores(replay: Replay, reference: int, query: int) -> Tensor:
        early = replay.early[mode or replay.settings.query_rows][query]
        forecast = replay.forecast(reference, query, within=within)
        return fuse(early, forecast, replay.settings.lambda_)

    return scores


def _early(mode: str | None) -> Scores:
    return lambda replay, _, query: replay.early[mode or replay.settings.query_rows][query]


def _late_layers(replay: Replay, reference: int, query: int) -> Tensor:
    """As SAFE, with every expert layer from ls on in the deep set."""
    early = replay.early[replay.settings.query_rows][query]
    late = replay.layers[reference, replay.settings.layer :]
    forecast = deep_forecast(late, replay.pi(reference, query))
    return fuse(early, forecast, replay.settings.lambda_)


def _identity(replay: Replay, reference: int, query: int) -> Tensor:
    early = replay.early[replay.settings.query_rows][query]
    return fuse(early, replay.deep[reference], replay.settings.lambda_)


SELECTIONS: Mapping[str, Selection] = {
    RANDOM: Selection("Random", lambda r, _, q: _random_scores(r, q), floor=False),
    FASTV: Selection("FastV", _early("fastv"), floor=False),
    EARLY_ONLY: Selection("SAFE without forecast", _early(None)),
    SAFE: Selection("SAFE", _fused(None)),
    NO_FLOOR: Selection("SAFE, no camera floor", _fused(None), floor=False),
    GLOBAL: Selection("SAFE, matched over all cameras", _fused(None, within=False)),
    IDENTITY: Selection("SAFE, same position instead of matching", _identity),
    LATE_LAYERS: Selection("SAFE, deep set of all layers from ls", _late_layers),
    FORECAST_ONLY: Selection("forecast alone (lambda 1)", lambda r, k, q: r.forecast(k, q)),
    EARLY_PROBE: Selection("action probe without forecast", _early("action_probe")),
    SAFE_PROBE: Selection("SAFE with the action probe", _fused("action_probe")),
    ORACLE: Selection("oracle: the true deep map", lambda r, _, q: r.deep[q], floor=False),
}


@dataclass(frozen=True)
class SelectionScore:
    """What a selection keeps on the steps that SAFE would have pruned, mean over episodes.

    Attributes:
        core_loss: Share of the core that is dropped.
        late_loss: The same with each expert layer from ls on having a core of its own.
        mass: Share of the deep saliency on the kept tokens.
        black: Share of the kept tokens that see nothing but a letterbox band.
        cameras: Camera to its share of the kept tokens.
    """

    core_loss: MeanInterval
    late_loss: MeanInterval
    mass: MeanInterval
    black: MeanInterval
    cameras: Mapping[str, float]


@dataclass(frozen=True)
class CoreLoss:
    """Every selection at every rho, on the same steps.

    Attributes:
        scores: Rho to selection to its score.
        steps: Steps measured; keyframes keep everything and are not among them.
        black_tokens: Share of all tokens that see nothing but a letterbox band.
        core_black: Share of the core that does.
    """

    scores: Mapping[float, Mapping[str, SelectionScore]]
    steps: int
    black_tokens: float
    core_black: float


def core_loss(
    replays: Sequence[Replay], traces: Sequence[KeyframeTrace], rhos: Sequence[float]
) -> CoreLoss:
    """Measure every selection.

    Args:
        replays: The episodes.
        traces: Their keyframes; forecasts come from the one in force.
        rhos: Shares of the tokens that are dropped.
    """
    scores: dict[float, dict[str, SelectionScore]] = {rho: {} for rho in rhos}
    for rho in rhos:
        for name in SELECTIONS:
            rows = [
                _episode(replay, trace, name, rho)
                for replay, trace in zip(replays, traces, strict=True)
            ]
            scores[rho][name] = _mean([row for row in rows if row is not None], replays[0])
    black = [black_tokens(replay.record) for replay in replays]
    in_core = [
        float(mask[_core(deep)].mean())
        for replay, mask in zip(replays, black, strict=True)
        for deep in replay.deep
    ]
    return CoreLoss(
        scores,
        sum(int((~trace.keyframe).sum()) for trace in traces),
        float(np.mean([mask.mean() for mask in black])),
        float(np.mean(in_core)),
    )


def keep_tokens(replay: Replay, name: str, rho: float, reference: int, query: int) -> Tensor:
    """Ascending indices of what a selection keeps, [K].

    Args:
        replay: The episode.
        name: In `SELECTIONS`.
        rho: Share of the tokens that is dropped.
        reference: Keyframe in force.
        query: The query.

    Raises:
        ConfigError: Rho, or the floor at this rho, does not fit.
    """
    selection = SELECTIONS[name]
    floor = replay.settings.camera_floor if selection.floor else 0
    settings = replace(replay.settings, rho=rho, camera_floor=floor)
    settings.check_tokens(dict(replay.record.cameras))
    scores = selection.scores(replay, reference, query)
    return top_k_with_floors(scores, settings.kept(replay.n_visual), replay.cameras, floor)


def _episode(replay: Replay, trace: KeyframeTrace, name: str, rho: float) -> np.ndarray | None:
    """Means over the pruned steps: loss, late loss, mass, black, then the cameras' shares."""
    layer = int(replay.record.about["layer"])
    black, rows = black_tokens(replay.record), []
    for query in np.flatnonzero(~trace.keyframe).tolist():
        keep = keep_tokens(replay, name, rho, int(trace.reference[query]), query)
        kept = torch.zeros(replay.n_visual, dtype=torch.bool)
        kept[keep] = True
        deep = replay.deep[query]
        late = [_lost(kept, values) for values in replay.layers[query, layer:]]
        mass = float(deep[kept].sum() / deep.sum())
        shares = [float(kept[span].sum()) / len(keep) for span in replay.cameras]
        in_black = float(black[keep.numpy()].mean())
        rows.append([_lost(kept, deep), float(np.mean(late)), mass, in_black, *shares])
    return np.mean(rows, axis=0) if rows else None


def _core(deep: Tensor) -> np.ndarray:
    count = max(1, round(CORE_SHARE * len(deep)))
    return np.asarray(top_k_with_floors(deep, count, ()).numpy())


def _lost(kept: Tensor, deep: Tensor) -> float:
    return 1.0 - float(kept[_core(deep)].float().mean())


def _random_scores(replay: Replay, query: int) -> Tensor:
    """Drawn anew for every episode and query, the same in every run."""
    key = [int(replay.record.about["seed"]), query]
    return torch.from_numpy(np.random.default_rng(key).random(replay.n_visual))


def _mean(rows: Sequence[np.ndarray], replay: Replay) -> SelectionScore:
    names = [name for name, _ in replay.record.cameras]
    loss, late, mass, black = (MeanInterval.of([row[i] for row in rows]) for i in range(4))
    shares = np.mean([row[4:] for row in rows], axis=0) if rows else [np.nan] * len(names)
    cameras = dict(zip(names, map(float, shares), strict=True))
    return SelectionScore(loss, late, mass, black, cameras)
