"""How far each selection moves the chunk from the full-token one, same images and same noise.

Attention says what the policy looks at; this says whether it minds losing it. The reference is a
fixed number of queries old, so the numbers do not depend on gamma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safe_pruner_node.evaluation.core_loss import (
    EARLY_ONLY,
    FASTV,
    FORECAST_ONLY,
    IDENTITY,
    LATE_LAYERS,
    NO_FLOOR,
    ORACLE,
    RANDOM,
    SAFE,
    SAFE_PROBE,
    keep_tokens,
)
from safe_pruner_node.evaluation.forecast_accuracy import MeanInterval
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.evaluation.saliency_recorder import QuerySaliency, RecordingEngine
from safe_pruner_node.evaluation.saliency_replay import Replay
from safe_pruner_node.robot.layout import Layout
from safe_pruner_node.types import FloatArray

AGE = 5
"""Queries since the keyframe: about the middle of a SAFE cycle at 8 % keyframes."""
EVERY = 2
"""Every second query is measured."""

MEASURED = (
    RANDOM,
    FASTV,
    EARLY_ONLY,
    SAFE,
    NO_FLOOR,
    IDENTITY,
    LATE_LAYERS,
    FORECAST_ONLY,
    SAFE_PROBE,
    ORACLE,
)
OTHER_NOISE = "other_noise"
"""All tokens, other flow noise: how far apart two good chunks are."""


@dataclass(frozen=True)
class ActionError:
    """Mean over episodes.

    Attributes:
        arms_mrad: RMS difference of the arm joints over the played part, mrad.
        gripper: Share of the played gripper commands on the other side of half closed.
        beyond_safe_mrad: `arms_mrad` less SAFE's in the same episode; at rho 0 of no meaning, NaN.
    """

    arms_mrad: MeanInterval
    gripper: MeanInterval
    beyond_safe_mrad: MeanInterval


def measure_actions(
    replay: Replay,
    engine: RecordingEngine,
    queries: Sequence[QuerySaliency],
    layout: Layout,
    rhos: Sequence[float],
) -> dict[str, Any]:
    """Run the measured queries once per selection.

    Args:
        replay: The episode under the pruner's settings.
        engine: What recorded it.
        queries: What it recorded.
        layout: Layout and units.
        rhos: Shares of the tokens that are dropped.

    Returns:
        JSON values: per measured query and rho the selections' errors, and the chunks' own motion.
    """
    rollout = replay.record.about["rollout"]
    played_s = rollout["query_period_s"] + rollout["latency_s"]  # then the next chunk is there
    played = max(1, round(played_s * layout.policy.action_rate_hz))
    rows: list[dict[str, Any]] = []
    for current in range(AGE, len(replay), EVERY):
        query = queries[current]
        # Grippers are absolute and arms may be: in robot units, arms relative to the state.
        state = layout.to_robot_actions(query.inputs.state[None], 0.0 * query.inputs.state)[0]

        def chunk(keep: Any, noise: FloatArray | None) -> FloatArray:  # noqa: ANN401 - a tensor
            actions = engine.act(query.inputs, noise, keep)  # noqa: B023 - called in this turn
            return layout.to_robot_actions(actions, state)[:played]  # noqa: B023 - likewise

        full = chunk(None, query.noise)
        other = np.random.default_rng([replay.record.about["seed"], current])
        noise = None if query.noise is None else other.standard_normal(query.noise.shape)
        arms = layout.commanded & ~layout.gripper
        motion = float(np.sqrt(np.mean((full - state)[:, arms] ** 2)))
        rows.append(
            {"query": current, "rho": 0.0, "motion_mrad": 1e3 * motion}
            | {OTHER_NOISE: difference(full, chunk(None, noise), layout)}
        )
        for rho in rhos:
            errors = {
                name: difference(
                    full,
                    chunk(keep_tokens(replay, name, rho, current - AGE, current), query.noise),
                    layout,
                )
                for name in MEASURED
            }
            rows.append({"query": current, "rho": rho} | errors)
    return {"age": AGE, "every": EVERY, "rhos": list(rhos), "played": played, "rows": rows}


def action_errors(records: Sequence[SaliencyRecord]) -> dict[float, dict[str, ActionError]]:
    """Rho to selection to its error, mean over episodes; rho 0 holds `OTHER_NOISE`."""
    found: dict[float, dict[str, ActionError]] = {}
    rhos = {float(rho) for record in records for rho in record.about["actions"]["rhos"]}
    for rho, names in ((0.0, (OTHER_NOISE,)), *((rho, MEASURED) for rho in sorted(rhos))):
        found[rho] = {}
        safe = _episode_means(records, rho, SAFE)
        for name in names:
            means = _episode_means(records, rho, name)
            arms, gripper = (MeanInterval.of(column.tolist()) for column in means.T)
            beyond = MeanInterval.of((means - safe)[:, 0].tolist())
            found[rho][name] = ActionError(arms, gripper, beyond)
    return found


def motion_mrad(records: Sequence[SaliencyRecord]) -> MeanInterval:
    """RMS of the full-token chunks' own motion of the arms, mrad."""
    rows = [[r["motion_mrad"] for r in _rows(record.about["actions"], 0.0)] for record in records]
    return MeanInterval.of([float(np.mean(row)) if row else float("nan") for row in rows])


def _rows(actions: Mapping[str, Any], rho: float) -> list[Mapping[str, Any]]:
    return [row for row in actions["rows"] if row["rho"] == rho]


def _episode_means(records: Sequence[SaliencyRecord], rho: float, name: str) -> FloatArray:
    """Mean pair of errors in each episode, [episodes, 2]; NaN where nothing was measured."""
    means = np.full((len(records), 2), np.nan)
    for number, record in enumerate(records):
        pairs = [row[name] for row in _rows(record.about["actions"], rho) if name in row]
        if pairs:
            means[number] = np.mean(pairs, axis=0)
    return means


def difference(a: FloatArray, b: FloatArray, layout: Layout) -> list[float]:
    """RMS of the arms, mrad, and share of gripper commands that disagree, of chunks [n, dof]."""
    arms = layout.commanded & ~layout.gripper
    rms = float(np.sqrt(np.mean((a - b)[:, arms] ** 2)))
    disagree = (a[:, layout.gripper] > 50.0) != (b[:, layout.gripper] > 50.0)
    return [1e3 * rms, float(disagree.mean())]
