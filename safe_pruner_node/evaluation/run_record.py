"""What a run left behind, in plain arrays, and the summary drawn from it. No ROS."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_node.evaluation.statistics import wilson


@dataclass(frozen=True)
class StepRecord:
    """One policy step as the node published it; milliseconds unless the name says otherwise.

    Attributes:
        time_s: When the message arrived, seconds since the policy took the arms.
        query: Number of the step.
        keyframe: Every token was kept.
        kappa: Eq. 6; NaN where there was no reference.
        gamma: Threshold in force.
        stage_ms: Stage to milliseconds, in order.
        step_ms: The whole step in the worker.
        end_to_end_ms: Oldest camera stamp to the first command of the chunk.
        visual_tokens: Visual tokens before pruning.
        kept_tokens: Visual tokens after pruning.
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
    flops: tuple[float, float, float]


@dataclass(frozen=True)
class CameraWindow:
    """One camera between the first and the last policy step of an episode.

    Attributes:
        first_stamp_ns: Stamp of the frame that the first step used.
        last_stamp_ns: Stamp of the frame that the last step used.
        received: Frames that the node got in between, the last included.
        used: Frames that the policy was given in between, the last included.
    """

    first_stamp_ns: int
    last_stamp_ns: int
    received: int
    used: int


@dataclass(frozen=True)
class ControlRecord:
    """The control loop's totals over one activation of the node, and every period in it.

    Attributes:
        rate_hz: Nominal control rate.
        ticks: Control ticks run.
        ticks_expected: Ticks that the nominal rate asks for in the same time.
        starved_ticks: Ticks in POLICY without an action to play.
        clamped_ticks: Ticks on which a limit changed the command.
        holds: Falls from POLICY to HOLD.
        worker_deaths: Worker processes lost since the node was configured.
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


Pictures = dict[str, list[tuple[float, bytes]]]
"""Camera to (arrival in seconds since the policy took the arms, JPEG bytes)."""


@dataclass
class EpisodeRecord:
    """Everything recorded of one episode, from when the policy took the arms.

    Attributes:
        task: Name of the task.
        prompt: What the policy was told.
        seed: Seed of the episode.
        time_limit_s: What the policy had, simulated s.
        control: Control totals of the node's activation.
        checkpoint: Checkpoint id that the node reported.
        pruner: Method that the node reported.
        success: The job was done in time.
        progress: Furthest stage, 0 to 100.
        seconds: Until the job was done, else until the end, simulated s.
        simulated_s: Simulated length of the recording, s.
        wall_s: Length of the recording, s.
        steps: Policy steps in order.
        stages: (time in s, progress) at the start and at every change.
        cameras: Camera to its frames during the episode.
        images: What the cameras sent.
        overlays: What the policy kept of it.
    """

    task: str
    prompt: str
    seed: int
    time_limit_s: float
    control: ControlRecord
    checkpoint: str = ""
    pruner: str = ""
    success: bool = False
    progress: float = 0.0
    seconds: float = 0.0
    simulated_s: float = 0.0
    wall_s: float = 0.0
    steps: list[StepRecord] = field(default_factory=list)
    stages: list[tuple[float, float]] = field(default_factory=list)
    cameras: dict[str, CameraWindow] = field(default_factory=dict)
    images: Pictures = field(default_factory=dict)
    overlays: Pictures = field(default_factory=dict)


@dataclass
class RunRecord:
    """Everything recorded of one run.

    Attributes:
        episodes: In order, each with at least one policy step.
    """

    episodes: list[EpisodeRecord] = field(default_factory=list)

    @property
    def checkpoint(self) -> str:
        """Checkpoint id that the node reported."""
        return self.episodes[-1].checkpoint

    @property
    def pruner(self) -> str:
        """Method that the node reported."""
        return self.episodes[-1].pruner

    @property
    def starts_s(self) -> list[float]:
        """Where each episode begins when they are put one after the other, s."""
        ends_s = itertools.accumulate(episode.wall_s for episode in self.episodes)
        return [0.0, *ends_s][:-1]


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


def success_by_task(episodes: Sequence[EpisodeRecord]) -> dict[str, dict[str, Any]]:
    """Successes of each task with the Wilson interval of their rate, 95 %."""
    table = {}
    for task in dict.fromkeys(episode.task for episode in episodes):
        outcomes = [episode.success for episode in episodes if episode.task == task]
        interval = wilson(sum(outcomes), len(outcomes))
        table[task] = {
            "successes": sum(outcomes),
            "episodes": len(outcomes),
            "wilson_95": [round(interval.low, 4), round(interval.high, 4)],
        }
    return table


def camera_frames(
    episodes: Sequence[EpisodeRecord], stamps_ns: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, int]]:
    """Frames per camera while the policy ran.

    Args:
        episodes: The run.
        stamps_ns: Camera to the stamps of every frame that the twin sent: a frame that it sent
            between two steps and that the node did not get counts as dropped.
    """
    frames: dict[str, dict[str, int]] = {}
    for episode in episodes:
        for camera, window in episode.cameras.items():
            count = frames.setdefault(
                camera, dict.fromkeys(("published", "received", "used", "dropped"), 0)
            )
            published = sum(
                window.first_stamp_ns < stamp <= window.last_stamp_ns for stamp in stamps_ns[camera]
            )
            count["published"] += published
            count["received"] += window.received
            count["used"] += window.used
            count["dropped"] += max(0, published - window.received)
    return frames


def summarise(
    record: RunRecord, frames: Mapping[str, Mapping[str, int]], git: str
) -> dict[str, Any]:
    """The figures of ``summary.json``.

    Args:
        record: The run.
        frames: Camera to ``published``, ``received``, ``used`` and ``dropped`` frames.
        git: Revision of the code.

    Raises:
        ValueError: The run has no policy step to summarise.
    """
    episodes = record.episodes
    steps = [step for episode in episodes for step in episode.steps]
    if not steps:
        raise ValueError("nothing to summarise: no policy step was recorded")
    return {
        "episodes": [_episode_figures(episode) for episode in episodes],
        "success": success_by_task(episodes),
        "real_time_factor": round(
            sum(e.simulated_s for e in episodes) / sum(e.wall_s for e in episodes), 4
        ),
        **_control_figures([episode.control for episode in episodes]),
        **_step_figures(steps),
        "camera_frames": {name: dict(counts) for name, counts in frames.items()},
        "checkpoint": record.checkpoint,
        "pruner": record.pruner,
        "git": git,
    }


def _episode_figures(episode: EpisodeRecord) -> dict[str, Any]:
    return {
        "task": episode.task,
        "seed": episode.seed,
        "prompt": episode.prompt,
        "success": episode.success,
        "progress": episode.progress,
        "seconds": round(episode.seconds, 2),
        "time_limit_s": episode.time_limit_s,
        "real_time_factor": round(episode.simulated_s / episode.wall_s, 4),
        "policy_steps": len(episode.steps),
        "keyframes": sum(step.keyframe for step in episode.steps),
        "starved_ticks": episode.control.starved_ticks,
        "holds": episode.control.holds,
    }


def _control_figures(controls: Sequence[ControlRecord]) -> dict[str, Any]:
    periods_ms = [period for control in controls for period in control.periods_ms]
    joints = np.max([control.max_step[:14] for control in controls], axis=0)
    return {
        "control_rate_hz": controls[-1].rate_hz,
        "control_ticks": sum(control.ticks for control in controls),
        "control_ticks_expected": sum(control.ticks_expected for control in controls),
        "control_period_ms": percentiles(periods_ms, {"p50": 50.0, "p99": 99.0, "max": 100.0}),
        "starved_ticks": sum(control.starved_ticks for control in controls),
        "clamped_ticks": sum(control.clamped_ticks for control in controls),
        "holds": sum(control.holds for control in controls),
        "worker_deaths": controls[-1].worker_deaths,
        "max_joint_step_rad": round(float(joints.max()), 6) if len(joints) else None,
        "final_mode": controls[-1].mode_name,
    }


def _step_figures(steps: Sequence[StepRecord]) -> dict[str, Any]:
    tail = {"p50": 50.0, "p99": 99.0}
    stages = dict.fromkeys(name for step in steps for name in step.stage_ms)
    pruned = [step.kept_tokens for step in steps if not step.keyframe]
    return {
        "policy_steps": len(steps),
        "keyframes": sum(step.keyframe for step in steps),
        "step_ms": percentiles([step.step_ms for step in steps], tail),
        "step_ms_keyframe": percentiles([s.step_ms for s in steps if s.keyframe], tail),
        "step_ms_pruned": percentiles([s.step_ms for s in steps if not s.keyframe], tail),
        "stage_ms": {
            name: percentiles([s.stage_ms.get(name, np.nan) for s in steps], {"p50": 50.0})["p50"]
            for name in stages
        },
        "end_to_end_ms": percentiles([step.end_to_end_ms for step in steps], tail),
        "tokens": {
            "visual": steps[-1].visual_tokens,
            "kept_p50": percentiles(pruned or [s.kept_tokens for s in steps], {"p": 50.0})["p"],
        },
        "kappa": percentiles([step.kappa for step in steps], {"p50": 50.0, "min": 0.0}),
        "flops_exact_mean": float(np.mean([step.flops[2] for step in steps])),
    }
