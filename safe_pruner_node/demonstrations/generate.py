"""Scripted demonstrations in the twin, written as a LeRobot dataset.

    python -m safe_pruner_node.demonstrations.generate --episodes 1000 --workers 16

Episode k of a task is the same whatever the number of workers, and the dataset's order is that of
the seeds. An interrupted run goes on where it was when it is called again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from safe_pruner_node.demonstrations.parts import Part
from safe_pruner_node.demonstrations.recording import Recording, twin_spec
from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.demonstrations.workers import Job, WorkerPool, failure_file
from safe_pruner_node.demonstrations.writer import PARTS_FOLDER, assemble, check_new
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.robot.strict import did_you_mean
from safe_pruner_node.twin.tasks.registry import TASKS
from safe_pruner_node.twin.tasks.seeds import episode_seed

ROOMS = ("control", "demonstrations", "robot", "twin")
"""The code that a demonstration comes from."""

SETTINGS = "settings.json"
GENERATION = "meta/generation.json"
"""Where the numbers of a dataset come from; LeRobot passes over it."""


@dataclass(frozen=True)
class GenerateOptions:
    """Lets the scripted experts do episodes and writes them as a LeRobot dataset."""

    tasks: tuple[str, ...] = ("all",)
    """Names of tasks, or all."""
    episodes: int = 1000
    """Episodes of each task; those that the expert fails are left out of the dataset."""
    start: int = 0
    """Number of the first episode within the split."""
    split: Literal["demonstration", "validation"] = "demonstration"
    """Whose seeds: those to train on, or those to watch the training with."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes."""
    minutes: float | None = None
    """Begin no new episode after this time, and finish the dataset with those that are there."""
    out: Path = Path("datasets/s1_twin")
    """Folder of the dataset."""
    image_size: int = 224
    """Longer side of the images, pixels: the policy's own input size."""
    robot_config: Path | None = None
    """Robot file; by default the shipped one."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("episodes", 1, 1_000_000),
            ("workers", 1, 1024),
            ("image_size", 32, 1024),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError("parameter", key, value, f"{low}..{high}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError("parameter", "minutes", self.minutes, "more than 0")
        for name in self.tasks:
            if name != "all" and name not in TASKS:
                raise ConfigError("parameter", "tasks", name, did_you_mean(name, ["all", *TASKS]))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks meant, each once."""
        return tuple(TASKS) if "all" in self.tasks else tuple(dict.fromkeys(self.tasks))


@dataclass
class _Tally:
    """What has been recorded so far."""

    tried: Counter[str] = field(default_factory=Counter)
    failed_seeds: dict[str, list[int]] = field(default_factory=dict)
    fresh: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def count(self, task: str, seed: int, *, success: bool) -> None:
        self.tried[task] += 1
        failed = self.failed_seeds.setdefault(task, [])
        if not success:
            failed.append(seed)

    def add(self, recording: Recording) -> None:
        self.count(recording.task, recording.seed, success=recording.success)
        self.fresh += 1
        self.seconds.update(recording.seconds)

    def kept(self, task: str) -> int:
        return self.tried[task] - len(self.failed_seeds.get(task, []))

    @property
    def success_share(self) -> float:
        kept = sum(self.kept(task) for task in self.tried)
        return kept / max(sum(self.tried.values()), 1)


def main() -> int:
    """Entry point; returns the exit status."""
    console = Console()
    try:
        summary = generate(tyro.cli(GenerateOptions), console)
    except ConfigError as error:
        console.print(f"[red]demonstrations failed:[/red] {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130
    console.print(summary, soft_wrap=True, highlight=False)
    return 0


def generate(options: GenerateOptions, console: Console) -> str:
    """Records demonstrations and writes the dataset.

    Returns:
        The summary line.

    Raises:
        ConfigError: Options do not fit, or recording failed.
    """
    started = time.monotonic()
    check_new(options.out)
    robot_config = options.robot_config or resource("config/astribot_s1.yaml")
    spec = twin_spec(load_robot_config(robot_config), options.image_size)
    jobs = _jobs(options)
    code = code_fingerprint(robot_config)
    _keep_only_if_same(options.out / PARTS_FOLDER, options, spec, code)
    tally = _Tally()
    missing = [job for job in jobs if not _found(job, tally)]
    if missing:
        pool = WorkerPool(missing, options.workers, robot_config, options.image_size)
        limit_s = None if options.minutes is None else started + 60.0 * options.minutes
        try:
            _watch(pool, tally, len(jobs), limit_s, console)
        finally:
            pool.close()
    recorded_s = time.monotonic() - started
    with console.status("writing the dataset"):
        parts = [Part.load(job.folder) for job in jobs if job.folder.exists()]
        size = assemble(parts, options.out, spec)
        _write_generation(options, tally, code)
    frames = sum(part.length for part in parts)
    return _summary(options, tally, len(parts), frames, size, recorded_s, started)


def _jobs(options: GenerateOptions) -> list[Job]:
    """Seed by seed and task by task, so that whatever is done when time is up is balanced."""
    folder = options.out / PARTS_FOLDER
    jobs = []
    for index in range(options.start, options.start + options.episodes):
        seed = episode_seed(options.split, index)
        jobs += [Job(task, seed, folder / f"{task}-{seed:08d}") for task in options.task_names]
    return jobs


def _found(job: Job, tally: _Tally) -> bool:
    """Counts a job that an earlier run has done."""
    success, failure = job.folder.exists(), failure_file(job.folder).exists()
    if success or failure:
        tally.count(job.task, job.seed, success=success)
    return success or failure


def code_fingerprint(robot_config: Path) -> str:
    """Changes with everything that decides what a seed's demonstration looks like."""
    package = Path(__file__).parents[1]
    files = [path for room in ROOMS for path in sorted((package / room).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in [*files, robot_config]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _keep_only_if_same(
    folder: Path, options: GenerateOptions, spec: DatasetSpec, code: str
) -> None:
    """Refuses to mix parts of another kind of run into this one."""
    settings = {
        "fps": spec.fps,
        "joint_names": list(spec.joint_names),
        "cameras": {key: list(size) for key, size in spec.cameras.items()},
        "split": options.split,
        "code": code,
    }
    path = folder / SETTINGS
    if path.exists():
        earlier = json.loads(path.read_text())
        for key, value in settings.items():
            if earlier.get(key) != value:
                expected = f"{value}, or another --out, or {folder} removed"
                raise ConfigError(path, key, earlier.get(key), expected)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")


def _watch(
    pool: WorkerPool, tally: _Tally, total: int, limit_s: float | None, console: Console
) -> None:
    """Shows the progress until the processes are done; Ctrl-C lets begun episodes finish."""
    columns = (
        TextColumn("demonstrations"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f}/min, {task.fields[share]:.0%} successful"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        done = sum(tally.tried.values())
        bar = progress.add_task("", total=total, completed=done, rate=0.0, share=0.0)
        try:
            for recording in pool.outcomes():
                if recording is not None:
                    tally.add(recording)
                if limit_s is not None and time.monotonic() > limit_s:
                    pool.stop()
                progress.update(
                    bar,
                    completed=sum(tally.tried.values()),
                    rate=60.0 * tally.fresh / (time.monotonic() - began),
                    share=tally.success_share,
                )
        except KeyboardInterrupt:
            pool.stop()
            raise


def _write_generation(options: GenerateOptions, tally: _Tally, code: str) -> None:
    about = {
        "made_by": "safe_pruner_node: scripted experts in the MuJoCo twin",
        "code": code,
        "split": options.split,
        "start": options.start,
        "tasks": {
            task: {
                "tried": tally.tried[task],
                "kept": tally.kept(task),
                "failed_seeds": sorted(tally.failed_seeds.get(task, [])),
            }
            for task in options.task_names
        },
    }
    (options.out / GENERATION).write_text(json.dumps(about, indent=2) + "\n")


def _summary(
    options: GenerateOptions,
    tally: _Tally,
    episodes: int,
    frames: int,
    size: int,
    recorded_s: float,
    started: float,
) -> str:
    wall_s = time.monotonic() - started
    tasks = ", ".join(
        f"{task} {tally.kept(task)}/{tally.tried[task]}" for task in options.task_names
    )
    spent = sum(tally.seconds.values())
    shares = ", ".join(f"{stage} {s / spent:.0%}" for stage, s in tally.seconds.items())
    rate = 60.0 * tally.fresh / recorded_s
    return (
        f"{options.out}: {episodes} episodes, {frames} frames, {size / 1e6:.0f} MB; "
        f"success {tasks}; {wall_s:.0f} s with {options.workers} workers, of it "
        f"{wall_s - recorded_s:.0f} s writing; {rate:.0f} episodes/min"
        + (f" ({shares})" if spent else "")
    )


if __name__ == "__main__":
    sys.exit(main())
