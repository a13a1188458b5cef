"""The study in numbers: one JSON value, and the same as Markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from safe_pruner_node.evaluation.action_error import (
    OTHER_NOISE,
    ActionError,
    action_errors,
    motion_mrad,
)
from safe_pruner_node.evaluation.core_loss import SELECTIONS, CoreLoss, core_loss
from safe_pruner_node.evaluation.forecast_accuracy import (
    PREDICTORS,
    ForecastAccuracy,
    MeanInterval,
    forecast_accuracy,
)
from safe_pruner_node.evaluation.gripper_events import gripper_events
from safe_pruner_node.evaluation.keyframe_alignment import Alignment, align
from safe_pruner_node.evaluation.layer_figure import effective_tokens
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.evaluation.saliency_replay import KeyframeTrace, Replay, gamma_for_rate
from safe_pruner_node.pruning.settings import QUERY_ROWS, PrunerSettings
from safe_pruner_node.types import FloatArray

REMARK = (
    "The policy is small and trained on scripted demonstrations in the twin; the episodes are "
    "full-token ones in the twin. Nothing here is measured on a robot or on the published model."
)
KEYFRAME_RATES = (0.08, 0.2)
"""Keyframes per query, the forced first ones left out, that early modes are compared at: what SAFE
is calibrated to, and enough of them for a test on a handful of episodes."""


@dataclass(frozen=True)
class ModeStudy:
    """What kappa by one early mode would make of the episodes, at one keyframe rate.

    Attributes:
        mode: The early mode.
        gamma: Threshold at which one of `KEYFRAME_RATES` of the later queries are keyframes.
        rate: Keyframes per query at that gamma, first ones included.
        gripper: Keyframes at that gamma against gripper events.
        boundaries: Against gripper events and new stages of progress.
    """

    mode: str
    gamma: float
    rate: float
    gripper: Alignment
    boundaries: Alignment


@dataclass(frozen=True)
class Study:
    """Everything that was measured.

    Attributes:
        records: The episodes.
        settings: Pruner they were replayed with.
        traces: Their keyframes.
        accuracy: Of the forecast.
        loss: Of the core.
        actions: By rho and selection, how far the chunk moves.
        gripper: Keyframes against gripper events.
        boundaries: Keyframes against gripper events and new stages of progress.
        modes: Early modes, rate by rate.
        revision: Of the code.
        seed: Of everything drawn here.
    """

    records: Sequence[SaliencyRecord]
    settings: PrunerSettings
    traces: Sequence[KeyframeTrace]
    accuracy: ForecastAccuracy
    loss: CoreLoss
    actions: Mapping[float, Mapping[str, ActionError]]
    gripper: Alignment
    boundaries: Alignment
    modes: Sequence[ModeStudy]
    revision: str
    seed: int

    @property
    def keyframe_rate(self) -> float:
        """Keyframes per query, first ones included."""
        return sum(int(t.keyframe.sum()) for t in self.traces) / self.queries

    @property
    def queries(self) -> int:
        """Policy queries of all episodes."""
        return sum(record.queries for record in self.records)


def make_study(
    replays: Sequence[Replay],
    rhos: Sequence[float],
    *,
    horizon: int,
    seed: int,
    revision: str,
) -> Study:
    """Measure everything.

    Args:
        replays: The episodes under the pruner's settings.
        rhos: Shares of the tokens that are dropped.
        horizon: Largest t of the forecast.
        seed: Of everything drawn here.
        revision: Of the code.

    Raises:
        ConfigError: The camera floor does not fit a rho.
    """
    records = [replay.record for replay in replays]
    traces = [replay.keyframes() for replay in replays]
    accuracy = forecast_accuracy(replays, horizon=horizon, seed=seed)
    gripper = [_gripper_times(record) for record in records]
    turns = [np.union1d(g, _stage_times(r)) for g, r in zip(gripper, records, strict=True)]

    def aligned(events: Sequence[FloatArray], which: Sequence[KeyframeTrace]) -> Alignment:
        return align(events, [record.time_s for record in records], which, seed=seed)

    modes = []
    for target, mode in itertools.product(KEYFRAME_RATES, QUERY_ROWS):
        gamma = gamma_for_rate(replays, target, mode)
        own = [replay.keyframes(gamma, mode) for replay in replays]
        rate = sum(int(t.keyframe.sum()) for t in own) / sum(map(len, replays))
        modes.append(ModeStudy(mode, gamma, rate, aligned(gripper, own), aligned(turns, own)))
    return Study(
        records,
        replays[0].settings,
        traces,
        accuracy,
        core_loss(replays, traces, rhos),
        action_errors(records),
        aligned(gripper, traces),
        aligned(turns, traces),
        modes,
        revision,
        seed,
    )


def _gripper_times(record: SaliencyRecord) -> FloatArray:
    return np.array([e.time_s for e in gripper_events(record.tick_time_s, record.gripper)])


def _stage_times(record: SaliencyRecord) -> FloatArray:
    return np.asarray(record.stages[record.stages[:, 1] > 0, 0])


def to_json(study: Study) -> dict[str, Any]:
    """Everything but the maps; NaN is None."""
    accuracy, first = study.accuracy, study.records[0].about
    settings = {k: v for k, v in asdict(study.settings).items() if k not in {"name", "source"}}
    value = {
        "remark": REMARK,
        "policy": first["policy"],
        "checkpoint": first["checkpoint"],
        "recorded_with": first["git"],
        "git": study.revision,
        "split": first["split"],
        "rollout": first["rollout"],
        "preset": study.settings.name,
        "pruner": settings,
        "seed": study.seed,
        "queries": study.queries,
        "episodes": [
            {key: record.about[key] for key in ("task", "index", "seed", "success", "progress")}
            | {"queries": record.queries, "keyframes": int(trace.keyframe.sum())}
            for record, trace in zip(study.records, study.traces, strict=True)
        ],
        "keyframe_rate": study.keyframe_rate,
        "kappa_percentiles": _percentiles(study.traces),
        "alignment": {"gripper": asdict(study.gripper), "boundaries": asdict(study.boundaries)},
        "modes": [asdict(mode) for mode in study.modes],
        "early_cosine": {
            mode: asdict(MeanInterval.of(list(values)))
            for mode, values in accuracy.early_cosine.items()
        },
        "forecast": {
            "t": list(accuracy.horizons),
            "pairs": list(accuracy.pairs),
            "cosine": {n: _series(accuracy.cosine[n]) for n in PREDICTORS},
            "kl": {n: _series(accuracy.kl[n]) for n in PREDICTORS},
            "cosine_by_task": _by_task(study),
            "in_operation": asdict(MeanInterval.of(list(accuracy.in_operation))),
        },
        "core": {
            "steps": study.loss.steps,
            "black_tokens": study.loss.black_tokens,
            "core_black": study.loss.core_black,
            "scores": {
                f"{rho:g}": {name: asdict(score) for name, score in scores.items()}
                for rho, scores in study.loss.scores.items()
            },
        },
        "actions": {
            "age": study.records[0].about["actions"]["age"],
            "played": study.records[0].about["actions"]["played"],
            "motion_mrad": asdict(motion_mrad(study.records)),
            "errors": {
                f"{rho:g}": {name: asdict(error) for name, error in errors.items()}
                for rho, errors in study.actions.items()
            },
        },
        "effective_tokens": _effective(study.records),
    }
    return dict(_plain(value))


def _series(values: FloatArray) -> list[dict[str, Any]]:
    return [asdict(MeanInterval.of(list(column))) for column in values.T]


def _by_task(study: Study) -> dict[str, dict[str, list[float]]]:
    """Task to predictor to mean cosine per t."""
    tasks = [str(record.about["task"]) for record in study.records]
    return {
        task: {
            name: [
                MeanInterval.of(
                    [v for v, own in zip(column, tasks, strict=True) if own == task]
                ).mean
                for column in study.accuracy.cosine[name].T
            ]
            for name in PREDICTORS
        }
        for task in dict.fromkeys(tasks)
    }


def _percentiles(traces: Sequence[KeyframeTrace]) -> dict[str, float]:
    kappas = np.concatenate([trace.kappa[np.isfinite(trace.kappa)] for trace in traces])
    if not len(kappas):
        return {}
    return {f"p{q}": float(np.percentile(kappas, q)) for q in (1, 5, 10, 25, 50, 75, 90)}


def _effective(records: Sequence[SaliencyRecord]) -> dict[str, list[float]]:
    """exp(entropy) per layer: text rows at one query per episode, actions at every query."""
    text = np.mean([effective_tokens(record.prefill.astype(np.float64)) for record in records], 0)
    actions = np.mean(
        [effective_tokens(record.deep.astype(np.float64)).mean(0) for record in records], 0
    )
    return {"text_rows": text.tolist(), "actions": actions.tolist()}


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def headline(study: Study) -> str:
    """One line: does the forecast help?"""
    rho = min(study.loss.scores, key=lambda known: abs(known - 0.75))
    scores = study.loss.scores[rho]
    losses = ", ".join(
        f"{SELECTIONS[name].title} {100 * scores[name].core_loss.mean:.0f}"
        for name in ("random", "fastv", "without_forecast", "safe")
    )
    return (
        f"{len(study.records)} episodes, {study.queries} queries, "
        f"{100 * study.keyframe_rate:.1f} % keyframes at gamma {study.settings.gamma:g}; core "
        f"tokens lost at rho {rho:g}, %: {losses}; forecast cosine at t = 1: "
        f"{_span(MeanInterval.of(list(study.accuracy.cosine['matched'][:, 0])))}"
    )


def markdown(study: Study) -> str:
    """The tables."""
    parts = [_about(study), _episodes(study), _forecast(study), _core(study), _keyframes(study)]
    parts += [_actions(study), _layers(study)]
    return "\n\n".join(parts) + "\n"


def _about(study: Study) -> str:
    about, settings = study.records[0].about, study.settings
    rollout = about["rollout"]
    solved = sum(bool(record.about["success"]) for record in study.records)
    return (
        "# Is late saliency worth forecasting?\n\n"
        f"{REMARK}\n\n"
        f"- policy: {about['policy']}; checkpoint {about['checkpoint']}\n"
        f"- {len(study.records)} full-token episodes ({about['split']} seeds), {solved} solved, "
        f"{study.queries} policy queries, {rollout['query_period_s']:g} s apart at least, latency "
        f"{rollout['latency_s']:g} s, noise seed {rollout['noise_seed']}\n"
        f"- preset `{settings.name}`: ls {settings.layer}, query rows {settings.query_rows}, deep "
        f"set {list(settings.deep)}, lambda {settings.lambda_:g}, gamma {settings.gamma:g}, "
        f"matching {'within a camera' if settings.match_within_camera else 'over all cameras'}, "
        f"camera floor {settings.camera_floor}\n"
        f"- recorded with {about['git']}, measured with {study.revision}, seed {study.seed}\n"
        "- intervals: Student's 95 % over episodes"
    )


def _episodes(study: Study) -> str:
    rows = [
        [
            record.about["task"],
            record.about["seed"],
            "yes" if record.about["success"] else f"no ({record.about['progress']:.0f})",
            record.queries,
            int(trace.keyframe.sum()),
        ]
        for record, trace in zip(study.records, study.traces, strict=True)
    ]
    return _table(["task", "seed", "success (progress)", "queries", "keyframes"], rows)


def _forecast(study: Study) -> str:
    accuracy = study.accuracy
    header = ["t", "pairs", *(f"cos {name}" for name in PREDICTORS)]
    header += [f"KL {name}" for name in PREDICTORS]
    rows: list[list[Any]] = []
    for i, t in enumerate(accuracy.horizons):
        spans = [MeanInterval.of(list(accuracy.cosine[name][:, i])) for name in PREDICTORS]
        kls = [MeanInterval.of(list(accuracy.kl[name][:, i])) for name in PREDICTORS]
        rows.append([t, accuracy.pairs[i], *map(_span, spans), *map(_span, kls)])
    early = ", ".join(
        f"{mode} {_span(MeanInterval.of(list(values)))}"
        for mode, values in accuracy.early_cosine.items()
    )
    return (
        "## Forecast of the deep saliency (Fig. A)\n\n"
        "Every query once as the keyframe. matched: tokens matched, as SAFE does. identity: same "
        "position, no matching. other_frame: a random frame of another episode, matched. prior: "
        "mean map of the other episodes of the task.\n\n"
        + _table(header, rows)
        + f"\n\nThe early map alone against the deep map, cosine: {early}. Forecast in operation "
        f"(pruned steps, keyframe in force): {_span(MeanInterval.of(list(accuracy.in_operation)))}."
    )


def _core(study: Study) -> str:
    loss = study.loss
    cameras = [name for name, _ in study.records[0].cameras]
    header = ["selection", "core lost, %", "late layers' cores lost, %", "late mass kept, %"]
    header += ["kept in black bands, %", f"kept by camera, % ({' / '.join(cameras)})"]
    text = (
        "## Core tokens lost (Fig. 2b)\n\n"
        f"Core: the top 10 % of the deep saliency. {loss.steps} steps that are no keyframes. "
        f"{100 * loss.black_tokens:.1f} % of all tokens lie fully in a letterbox band; of the core "
        f"{100 * loss.core_black:.1f} % do."
    )
    parts = [text]
    for rho, scores in loss.scores.items():
        rows = [
            [
                SELECTIONS[name].title,
                *(_percent(span) for span in (s.core_loss, s.late_loss, s.mass, s.black)),
                " / ".join(f"{100 * share:.0f}" for share in s.cameras.values()),
            ]
            for name, s in scores.items()
        ]
        parts.append(f"### rho {rho:g}\n\n" + _table(header, rows))
    return "\n\n".join(parts)


def _actions(study: Study) -> str:
    about = study.records[0].about["actions"]
    rhos = [rho for rho in study.actions if rho > 0]
    header = ["selection"]
    header += [
        f"{what}, rho {rho:g}"
        for rho in rhos
        for what in ("arms, mrad", "beyond SAFE", "gripper, %")
    ]
    rows = [
        [SELECTIONS[name].title]
        + [
            text
            for rho in rhos
            for error in [study.actions[rho][name]]
            for text in (
                _span(error.arms_mrad, 1.0, 1),
                _span(error.beyond_safe_mrad, 1.0, 1),
                _percent(error.gripper),
            )
        ]
        for name in study.actions[rhos[0]]
    ]
    noise = study.actions[0.0][OTHER_NOISE]
    measured = sum(row["rho"] == 0 for r in study.records for row in r.about["actions"]["rows"])
    return (
        "## How far the chunk moves\n\n"
        f"Full-token chunk against the pruned one, same images and noise, {measured} queries, "
        f"forecast from {about['age']} queries before; RMS over the arm joints in the "
        f"{about['played']} actions that are played, the difference from SAFE's in the same "
        "episodes, and the share of gripper commands that disagree. For scale: the chunk's own "
        "motion "
        f"{_span(motion_mrad(study.records), 1.0, 1)} mrad; all tokens with other flow noise "
        f"{_span(noise.arms_mrad, 1.0, 1)} mrad, {_percent(noise.gripper)} %.\n\n"
        + _table(header, rows)
    )


def _keyframes(study: Study) -> str:
    rows = [
        [
            f"{what}, gamma {study.settings.gamma:g}",
            f"{100 * study.keyframe_rate:.1f}",
            *_aligned(a),
        ]
        for what, a in (("gripper events", study.gripper), ("all boundaries", study.boundaries))
    ]
    rows += [
        [
            f"{what}, kappa by {mode.mode}, gamma {mode.gamma:g}",
            f"{100 * mode.rate:.1f}",
            *_aligned(a),
        ]
        for mode in study.modes
        for what, a in (("gripper events", mode.gripper), ("all boundaries", mode.boundaries))
    ]
    header = ["events", "keyframes, %", "events (n)", "keyframes (n)", "median", "random", "p"]
    header += ["mean", "random", "p"]
    kappa = ", ".join(f"{name} {value:.4f}" for name, value in _percentiles(study.traces).items())
    return (
        "## Keyframes and boundaries (Fig. 3)\n\n"
        "Distance from an event to the nearest keyframe, policy queries, against as many keyframes "
        "drawn at random (one-sided permutation p; the forced first keyframe is in every draw). "
        "The rows of early modes take the gamma that makes about "
        f"{' or '.join(f'{100 * rate:.0f}' for rate in KEYFRAME_RATES)} % of the queries after the "
        "first keyframes; they are many tests, so a single small p among them says little.\n\n"
        + _table(header, rows)
        + f"\n\nkappa: {kappa}."
    )


def _aligned(a: Alignment) -> list[Any]:
    values = [a.median, a.random_median, a.p_median, a.mean, a.random_mean, a.p_mean]
    return [
        a.events,
        a.keyframes,
        *(f"{v:.2f}" if i % 3 < 2 else f"{v:.3f}" for i, v in enumerate(values)),
    ]


def _layers(study: Study) -> str:
    effective = _effective(study.records)
    depth = len(effective["actions"])
    rows = [
        [words, *(f"{v:.0f}" for v in values), *[""] * (depth - len(values))]
        for words, values in effective.items()
    ]
    return (
        "## Concentration by layer (Fig. 2a)\n\nexp(entropy) of the saliency, tokens.\n\n"
        + _table(["rows", *range(depth)], rows)
    )


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _span(span: MeanInterval, scale: float = 1.0, digits: int = 3) -> str:
    if not math.isfinite(span.mean):
        return "-"
    text = f"{scale * span.mean:.{digits}f}"
    if math.isfinite(span.low):
        text += f" [{scale * span.low:.{digits}f}, {scale * span.high:.{digits}f}]"
    return text


def _percent(span: MeanInterval) -> str:
    bounded = replace(span, low=max(0.0, span.low), high=min(1.0, span.high))
    return _span(bounded if math.isfinite(span.low) else span, 100.0, 1)
