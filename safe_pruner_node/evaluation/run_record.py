"""What a run left behind, in plain arrays, and the summary drawn from it. No ROS."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StepRecord:
    """One policy step as the node published it; milliseconds unless the name says otherwise.

    Attributes:
        time_s: When the message arrived, seconds since the start of the recording.
        query: Number of the step.
        keyframe: Every token was kept.
        kappa: Eq. 6; NaN where there was no reference.
        gamma: Threshold in force.
        stage_ms: Stage to milliseconds, in order.
        step_ms: The whole step in the worker.
        end_to_end_ms: Oldest camera stamp to the first command of the chunk.
        visual_tokens: Visual tokens before pruning.
        kept_tokens: Visual tokens after pruning.
        cameras: Camera to (received, used, dropped, stamp not needed) counts.
        flops: Prefill, (paper padded, paper trimmed, exact).
    """

    time_s: float
    query: int
    keyframe: bool
    kappa: float
    gamma: float
    stage_ms: Mapping[str, float]
    step_ms: float
    end_to_end_ms: float
    visual_tokens: int
    kept_tokens: int
    cameras: Mapping[str, tuple[int, int, int]]
    flops: tuple[float, float, float]


@dataclass(frozen=True)
class ControlRecord:
    """The control loop's totals, as of its last message, and every period since the first.

    Attributes:
        rate_hz: Nominal control rate.
        ticks: Control ticks run.
        ticks_expected: Ticks that the nominal rate asks for in the same time.
        starved_ticks: Ticks in POLICY without an action to play.
        clamped_ticks: Ticks on which a limit changed the command.
        holds: Falls from POLICY to HOLD.
        worker_deaths: Worker processes lost.
        max_step: Largest change between two ticks of each joint, layout order, robot units.
        mode_name: Last mode.
        periods_ms: Every control period.
    """

    rate_hz: float
    ticks: int
    ticks_expected: int
    starved_ticks: int
    clamped_ticks: int
    holds: int
    worker_deaths: int
    max_step: tuple[float, ...]
    mode_name: str
    periods_ms: tuple[float, ...]


@dataclass
class RunRecord:
    """Everything recorded of one run.

    Attributes:
        steps: Policy steps in order.
        control: Control totals; None before the first message.
        overlays: Camera to (arrival time in s, JPEG bytes).
        checkpoint: Checkpoint id that the node reported.
        pruner: Method that the node reported.
    """

    steps: list[StepRecord] = field(default_factory=list)
    control: ControlRecord | None = None
    overlays: dict[str, list[tuple[float, bytes]]] = field(default_factory=dict)
    checkpoint: str = ""
    pruner: str = ""


def percentiles(values: Sequence[float], names: Mapping[str, float]) -> dict[str, float | None]:
    """Percentiles by name, rounded to microseconds or the like; None where there is nothing.

    Args:
        values: Samples; NaN ones are left out.
        names: Name to percentile, 0..100.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return dict.fromkeys(names)
    return {name: round(float(np.percentile(finite, q)), 4) for name, q in names.items()}


def git_revision(folder: Path) -> str:
    """Revision of the checkout, with ``-dirty`` when it has changes; ``unknown`` outside git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def summarise(
    record: RunRecord, camera_loss: Mapping[str, Mapping[str, int]], git: str
) -> dict[str, Any]:
    """The figures of ``summary.json``.

    Args:
        record: The run.
        camera_loss: Camera to ``published``, ``received``, ``used`` and ``dropped`` frames.
        git: Revision of the code.

    Raises:
        ValueError: The run has no control message or no policy step to summarise.
    """
    control, steps = record.control, record.steps
    if control is None or not steps:
        raise ValueError("nothing to summarise: no control state or no policy step was recorded")
    tail = {"p50": 50.0, "p99": 99.0}
    stages = dict.fromkeys(name for step in steps for name in step.stage_ms)
    pruned = [step.kept_tokens for step in steps if not step.keyframe]
    keyframes = sum(step.keyframe for step in steps)
    joints = control.max_step[:14]
    return {
        "control_rate_hz": control.rate_hz,
        "control_ticks": control.ticks,
        "control_ticks_expected": control.ticks_expected,
        "control_period_ms": percentiles(control.periods_ms, {**tail, "max": 100.0}),
        "policy_steps": len(steps),
        "keyframes": keyframes,
        "step_ms": percentiles([step.step_ms for step in steps], tail),
        "step_ms_keyframe": percentiles([s.step_ms for s in steps if s.keyframe], tail),
        "step_ms_pruned": percentiles([s.step_ms for s in steps if not s.keyframe], tail),
        "stage_ms": {
            name: percentiles([s.stage_ms.get(name, np.nan) for s in steps], {"p50": 50.0})["p50"]
            for name in stages
        },
        "end_to_end_ms": percentiles([step.end_to_end_ms for step in steps], tail),
        "camera_frames": {name: dict(counts) for name, counts in camera_loss.items()},
        "tokens": {
            "visual": steps[-1].visual_tokens,
            "kept_p50": percentiles(pruned or [s.kept_tokens for s in steps], {"p": 50.0})["p"],
        },
        "kappa": percentiles([step.kappa for step in steps], {"p50": 50.0, "min": 0.0}),
        "flops_exact_mean": float(np.mean([step.flops[2] for step in steps])),
        "starved_ticks": control.starved_ticks,
        "clamped_ticks": control.clamped_ticks,
        "holds": control.holds,
        "worker_deaths": control.worker_deaths,
        "max_joint_step_rad": round(float(max(joints)), 6) if joints else None,
        "final_mode": control.mode_name,
        "checkpoint": record.checkpoint,
        "pruner": record.pruner,
        "git": git,
    }
