"""What a worker process of the evaluation does: one engine, then episode after episode."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2

from safe_pruner_node.engine.build import load_policy, policy_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.results import pruner_to_json
from safe_pruner_node.evaluation.rollout import Query, Rollout, RolloutSettings, roll_out
from safe_pruner_node.inference.policy_step import InputError, PolicyStep
from safe_pruner_node.inference.process import die_with_parent, yield_to_control
from safe_pruner_node.pruning.flops import PrefillSize
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.seeds import Split, episode_seed


@dataclass(frozen=True)
class Job:
    """One episode to run.

    Attributes:
        method: Name of the method, as filed.
        rho: Rho of its table, as filed.
        task: Name of the task.
        split: Whose seeds.
        index: Number within the split.
        pruner: The method's settings.
    """

    method: str
    rho: float
    task: str
    split: Split
    index: int
    pruner: PrunerSettings


@dataclass(frozen=True)
class WorkerPlan:
    """What every job of an evaluation shares; picklable.

    Attributes:
        engine: Checkpoint, device, threads.
        robot_config: The robot file.
        rollout: Rates and times.
    """

    engine: EngineSettings
    robot_config: Path
    rollout: RolloutSettings


@dataclass(frozen=True)
class Refusal:
    """A job that cannot be done, in one line; a ConfigError does not travel between processes."""

    line: str


class Bench:
    """The engine of this process and everything around it that episodes share.

    Args:
        plan: What to load.

    Raises:
        ConfigError: Robot file, checkpoint, tokenizer or device do not fit.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan = plan
        robot = load_robot_config(plan.robot_config)
        checkpoint, tokenizer = load_policy(plan.engine)
        engine = policy_engine(checkpoint, tokenizer, plan.engine)
        self.policy = PolicyStep(engine, robot)
        engine.warm_up(lambda _text, _fraction: None, cameras=len(robot.cameras))
        self.policy.rehearse()
        self.checkpoint_id = checkpoint.identity
        self.noise_shape = (checkpoint.config.horizon, checkpoint.config.action_dim)
        vlm = checkpoint.config.vlm
        self.prefill = PrefillSize(
            vlm.width, vlm.mlp, vlm.depth, vlm.heads, vlm.kv_heads, vlm.head_dim
        )

    def run(self, job: Job) -> dict[str, Any]:
        """One episode, as a line of the results but for what the caller knows.

        Raises:
            ConfigError: Pruner and model or cameras do not fit.
        """
        seed = episode_seed(job.split, job.index)
        task = build_task(job.task, seed)
        try:
            rollout = roll_out(
                self.policy,
                job.pruner,
                task,
                job.index,
                self.plan.rollout,
                noise_shape=self.noise_shape,
            )
        except InputError as error:
            raise ConfigError(
                "episode", f"{job.task} {job.index}", error, "inputs that fit"
            ) from None
        return {
            "method": job.method,
            "rho": job.rho,
            "task": job.task,
            "split": job.split,
            "index": job.index,
            "seed": seed,
            "prompt": task.prompt,
            **outcome(rollout),
            "checkpoint": self.checkpoint_id,
            "engine": self.policy.engine.describe(),
            "prefill": asdict(self.prefill),
            "pruner": pruner_to_json(job.pruner),
        }


def outcome(rollout: Rollout) -> dict[str, Any]:
    """What happened in an episode: sums over its policy steps, and lists where order matters."""
    reports = [query.report for query in rollout.queries]
    pruned = [report for report in reports if sum(report.kept_tokens.values()) < _visual(report)]
    keyframes = [report.query for report in reports if report.keyframe]
    return {
        "success": rollout.success,
        "progress": rollout.progress,
        "seconds": rollout.seconds,
        "queries": len(reports),
        "keyframes": len(keyframes),
        "keyframe_queries": keyframes,
        "kappas": [_number(report.kappa) for report in reports],
        "visual_tokens": dict(reports[0].visual_tokens) if reports else {},
        "text_tokens": sum(report.text_tokens for report in reports),
        "kept_tokens": _sums([report.kept_tokens for report in reports]),
        "pruned_steps": len(pruned),
        "pruned_kept_tokens": _sums([report.kept_tokens for report in pruned]),
        "flops": _sums([asdict(report.flops) for report in reports]),
        "step_ms": [round(query.step_ms, 2) for query in rollout.queries],
        "stage_ms": _mean_stages(rollout.queries),
        "control": asdict(rollout.control),
        "wall_s": {name: round(seconds, 4) for name, seconds in rollout.wall_s.items()},
    }


def _visual(report: Any) -> int:  # noqa: ANN401 - a StepReport
    return int(sum(report.visual_tokens.values()))


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 7) if math.isfinite(value) else None


def _sums(rows: list[Any]) -> dict[str, Any]:
    return {key: sum(row[key] for row in rows) for key in (rows[0] if rows else {})}


def _mean_stages(queries: tuple[Query, ...]) -> dict[str, float]:
    names = dict.fromkeys(name for query in queries for name in query.report.stage_ms)
    return {
        name: round(sum(q.report.stage_ms.get(name, 0.0) for q in queries) / len(queries), 3)
        for name in names
    }


_bench: Bench | None = None


def begin_process(parent_pid: int) -> None:
    """What a worker process does to itself: end with its parent, leave Ctrl-C to it."""
    die_with_parent(parent_pid)
    yield_to_control(0)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software GL draws in the calling thread
    cv2.setNumThreads(1)


def work(plan: WorkerPlan, job: Job) -> dict[str, Any] | Refusal:
    """Run a job in this process; the first one builds the engine."""
    global _bench  # noqa: PLW0603 - a process has one engine
    try:
        if _bench is None or _bench.plan != plan:
            _bench = Bench(plan)
        return _bench.run(job)
    except ConfigError as error:
        return Refusal(str(error))
