"""Milliseconds of many steps: events on the stream, the wall clock, and every stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.evaluation import bench_report
from safe_pruner_node.evaluation.bench_gpu.queries import Query

VISION, PREFILL, PRUNER, DENOISE = "vision", "prefill", "pruner", "denoise"
GROUPS = {
    VISION: ("vision",),
    PREFILL: bench_report.PREFILL,
    PRUNER: bench_report.OVERHEAD,
    DENOISE: ("denoise",),
}
"""Groups of stages. Prefill is all between the projector and the complete cache, the pruner's own
stages included; these alone are the group `PRUNER`."""

WARM_UP_STEPS = 10
"""Untimed steps after the captures: the clocks of an idle GPU need a moment to rise."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of S steps.

    Attributes:
        wall: From the call until its actions are there, on the steady clock, [S].
        device: From the first kernel to the last, by events; on a CPU the same as `wall`, [S].
        stages: Stage to its own, by events, [S] each.
    """

    wall: NDArray[np.float64]
    device: NDArray[np.float64]
    stages: Mapping[str, NDArray[np.float64]]

    def to_json(self) -> dict[str, Any]:
        """Percentiles, and how many steps they are of."""
        return {
            "steps": len(self.wall),
            "wall_ms": percentiles(self.wall),
            "device_ms": percentiles(self.device),
            "stage_ms": {name: percentiles(values) for name, values in self.stages.items()},
            "group_ms": {name: percentiles(values) for name, values in self.groups().items()},
        }

    def groups(self) -> dict[str, NDArray[np.float64]]:
        """Group of stages to its milliseconds, [S] each."""
        zero = np.zeros(len(self.wall))
        return {
            group: sum((self.stages[name] for name in names if name in self.stages), zero)
            for group, names in GROUPS.items()
        }


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """p50 and p99."""
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}


def time_steps(
    session: PolicySession, queries: Sequence[Query], steps: int, at_most_s: float
) -> Times:
    """Time steps of a session that is warm.

    Args:
        session: Has run each kind of step that is to come.
        queries: Take turns.
        steps: Steps to time.
        at_most_s: Stop earlier, though not before a tenth of the steps, once this has passed.
    """
    for i in range(min(WARM_UP_STEPS, steps)):
        queries[i % len(queries)].run(session)
    wall, device, stages = [], [], []
    began_s = time.perf_counter()
    for i in range(steps):
        if i >= steps // 10 and time.perf_counter() - began_s > at_most_s:
            break
        one = _time_step(session, queries[i % len(queries)])
        wall.append(one[0])
        device.append(one[1])
        stages.append(one[2])
    return Times(
        np.array(wall),
        np.array(device),
        {name: np.array([of_step.get(name, 0.0) for of_step in stages]) for name in stages[0]},
    )


def _time_step(session: PolicySession, query: Query) -> tuple[float, float, dict[str, float]]:
    """Wall and device milliseconds of one step, and those of its stages."""
    timer = StageTimer(query.noise.device)
    whole = StageTimer(query.noise.device)
    synchronize(query.noise.device)
    started_s = time.perf_counter()
    with whole.stage("step"):
        query.run(session, timer)
    synchronize(query.noise.device)
    wall_ms = (time.perf_counter() - started_s) * 1e3
    return wall_ms, whole.milliseconds()["step"], timer.milliseconds()


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
