"""``ros2 run safe_pruner_node evaluate``: how often a policy succeeds in the twin, pruned and not.

    python -m safe_pruner_node.evaluation.evaluate [--episodes 20] [--rho 0.75] [--methods ...] ...

Episodes run in lock-step in worker processes and go, one JSON line each, into
`<out>/<split>.jsonl`. The same call again goes on where the last one ended. At the end, and with
`--table-only` at any time, the tables are drawn from that file.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from safe_pruner_node.engine.build import choose_device
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.calibration import (
    Trial,
    evidence,
    find_gamma,
    preset_line,
    write_evidence,
)
from safe_pruner_node.evaluation.methods import (
    AFTER_SAFE,
    METHODS,
    SAFE,
    Presets,
    check_methods,
    method_settings,
    table_rho,
)
from safe_pruner_node.evaluation.progress import EpisodeProgress
from safe_pruner_node.evaluation.results import EpisodeKey, Results, read_lines
from safe_pruner_node.evaluation.rollout import RolloutSettings
from safe_pruner_node.evaluation.run_record import git_revision
from safe_pruner_node.evaluation.schedule import Entrant, Submit, ordered_jobs, run_jobs
from safe_pruner_node.evaluation.table import make_tables, markdown
from safe_pruner_node.evaluation.worker import Bench, Job, WorkerPlan, begin_process, work
from safe_pruner_node.pi05.checkpoint import WEIGHTS, checkpoint_id
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import RobotConfig, load_robot_config
from safe_pruner_node.twin.settings import CAMERA_SCALE
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import Split, episode_seed

ROBOT_FILE = "config/astribot_s1.yaml"
CALIBRATION: Split = "calibration"


@dataclass(frozen=True)
class EvaluateOptions:
    """Runs a policy on the twin's tasks, method by method on the same scenes and noise."""

    checkpoint: Path = Path("checkpoints/nano")
    """Policy to evaluate."""
    out: Path = Path("runs/evaluate")
    """Where results, tables and evidence go; one checkpoint and one set of settings per folder."""
    methods: tuple[str, ...] = METHODS
    """Methods of the table; other presets of the pruners file may join."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks to run."""
    episodes: int = 20
    """Episodes per method and task."""
    first: int = 0
    """Number of the first episode within the split."""
    split: str = "evaluation"
    """Whose seeds: evaluation, calibration, validation, demonstration."""
    rho: tuple[float, ...] = (0.75,)
    """Shares of the visual tokens that are dropped; one table each."""
    pruners_config: Path | None = None
    """Pruner presets; None: config/pruners.yaml."""
    gamma: float | None = None
    """Keyframe threshold of SAFE; None: the preset's."""
    robot_config: Path | None = None
    """Robot description; None: config/astribot_s1.yaml."""
    control_rate_hz: float = 100.0
    """Joint commands per second."""
    query_period_s: float = 0.5
    """Simulated time between policy queries at least; each waits until it shows the last chunk."""
    latency_s: float = 0.1
    """Simulated time from a query to its chunk: a GPU's. The demo on two cores takes 0.3 to 0.4."""
    jpeg_quality: int = 90
    """Quality of the images on their way to the policy; 0: no JPEG."""
    noise_seed: int = 0
    """Seed of the flow noise."""
    time_limit_s: float = 0.0
    """End episodes early; 0: the task's own limit."""
    flow_steps: int = 0
    """Euler steps of the flow; 0: the checkpoint's."""
    workers: int = 0
    """Worker processes; 0: one per core."""
    threads: int = 1
    """CPU threads of each worker."""
    device: str = "auto"
    """auto, cpu or cuda; with CUDA the workers share the GPU."""
    dtype: str = "auto"
    """auto, fp32, bf16, or fp8 for a checkpoint calibrated for it."""
    minutes: float = 0.0
    """Begin no episode after so many minutes; 0: no limit. The same call later goes on."""
    revision: str = ""
    """Revision to record where the code is no git checkout."""
    table_only: bool = False
    """Draw the tables from the results that are there, run nothing."""
    calibrate_gamma: bool = False
    """Find the gamma that makes `keyframe_rate` of SAFE's steps keyframes, on calibration seeds."""
    keyframe_rate: float = 0.08
    """What --calibrate-gamma aims at, first steps of episodes included."""
    video: Path | None = None
    """Only write this MP4: episode `first` of every task, by SAFE where it takes part."""

    def __post_init__(self) -> None:
        check_methods(self.methods, self.pruners_config)
        for task in self.tasks:
            build_task(task, 0)
        for key, low, high in (
            ("episodes", 1, 100_000),
            ("first", 0, 900_000),
            ("workers", 0, 256),
            ("threads", 1, 256),
            ("flow_steps", 0, 100),
            ("minutes", 0.0, 1e6),
            ("keyframe_rate", 0.001, 1.0),
        ):
            if not low <= getattr(self, key) <= high:
                option = f"--{key.replace('_', '-')}"
                raise ConfigError("parameter", option, getattr(self, key), f"{low} to {high}")
        for name, values in (("tasks", self.tasks), ("rho", self.rho)):
            if not values or len(set(values)) != len(values):
                raise ConfigError("parameter", f"--{name}", list(values), "each one once")
        episode_seed(self.split, self.first + self.episodes - 1)  # type: ignore[arg-type]
        self.rollout  # noqa: B018 - validates

    @property
    def rollout(self) -> RolloutSettings:
        """How an episode is run."""
        names = RolloutSettings.__dataclass_fields__
        return RolloutSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Evaluation:
    """What every mode of this program shares.

    Attributes:
        options: What was asked for.
        robot: The robot file, read.
        plan: What the workers load.
        checkpoint: Identity of the weights.
        common: What every line says beside its episode.
        workers: Episodes at the same time.
        deadline_s: Steady time after which no episode is begun; inf for never.
    """

    options: EvaluateOptions
    robot: RobotConfig
    plan: WorkerPlan
    checkpoint: str
    common: dict[str, Any]
    workers: int
    deadline_s: float

    @classmethod
    def of(cls, options: EvaluateOptions) -> Evaluation:
        """Check everything that can be checked before a worker starts.

        Raises:
            ConfigError: Robot file, checkpoint or device is wrong.
        """
        robot = load_robot_config(options.robot_config or resource(ROBOT_FILE))
        if not (options.checkpoint / WEIGHTS).is_file():
            found = f"no {WEIGHTS} in {options.checkpoint}"
            raise ConfigError("parameter", "--checkpoint", found, "a checkpoint directory")
        engine = EngineSettings(
            options.checkpoint,
            device=options.device,
            dtype=options.dtype,
            flow_steps=options.flow_steps or None,
            threads=options.threads,
            state_in_prompt=robot.policy.state_in_prompt,
            state_dim=robot.layout.dof,
            action_dim=robot.layout.dof,
        )
        workers = options.workers or os.cpu_count() or 1
        common = {
            "policy": _title(options.checkpoint),
            "settings": _settings(options, robot),
            "git": options.revision or git_revision(Path(__file__).parent),
            "workers": workers,
        }
        minutes = options.minutes or float("inf")
        return cls(
            options,
            robot,
            WorkerPlan(engine, robot.path, options.rollout),
            checkpoint_id(options.checkpoint),
            common,
            workers,
            time.monotonic() + 60.0 * minutes,
        )

    @property
    def presets(self) -> Presets:
        """Where the methods' settings come from."""
        return Presets(self.options.pruners_config, self.options.gamma)

    def results(self, name: str) -> Results:
        """A results file in the output folder, opened for this checkpoint and these settings.

        Raises:
            ConfigError: It holds others.
        """
        return Results(self.options.out / name, self.checkpoint, self.common["settings"])

    def complete(
        self, jobs: Sequence[Job], results: Results, submit: Submit, progress: EpisodeProgress
    ) -> bool:
        """Run the jobs that the results lack; False when the time is up before they are done.

        Raises:
            ConfigError: A worker refuses one.
        """

        def take(line: dict[str, Any]) -> None:
            results.append({**line, **self.common})
            progress.take(line)

        missing = [job for job in jobs if key_of(job) not in results]
        return run_jobs(
            missing, submit, self.workers, take, lambda: time.monotonic() > self.deadline_s
        )


def key_of(job: Job) -> EpisodeKey:
    """What the results call a job's episode."""
    return EpisodeKey(job.method, job.rho, job.task, job.split, job.index)


def _title(checkpoint: Path) -> str:
    """First heading of the model card; the folder's name where there is none."""
    card = checkpoint / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line[2:] for line in lines if line.startswith("# ")), checkpoint.name)


def _settings(options: EvaluateOptions, robot: RobotConfig) -> dict[str, Any]:
    """Everything that decides what an episode comes to, but for checkpoint, method and seed."""
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if choose_device(options.device).type == "cuda" else "fp32"
    control = {k: v for k, v in vars(robot.control).items() if not k.endswith("rate_hz")}
    limits = {name: values.tolist() for name, values in vars(robot.limits).items()}
    told = repr((robot.layout.name, robot.policy, control, limits))
    return {
        **asdict(options.rollout),
        "camera_scale": CAMERA_SCALE,
        "flow_steps": options.flow_steps,
        "dtype": dtype,
        "robot": f"{robot.layout.name} {hashlib.sha256(told.encode()).hexdigest()[:8]}",
    }


@contextmanager
def process_pool(plan: WorkerPlan, workers: int) -> Iterator[Submit]:
    """Worker processes that each build the engine once; they end with this one, however it ends.

    Raises:
        ConfigError: A worker died.
    """
    pool: Executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_process,
        initargs=(os.getpid(),),
    )
    try:
        yield lambda job: pool.submit(work, plan, job)
    except BrokenProcessPool:
        found = "a worker process died (out of memory?); finished episodes are kept"
        raise ConfigError("evaluate", "--workers", found, "fewer workers perhaps") from None
    except BaseException:
        for process in multiprocessing.active_children():  # an episode takes long to finish
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def evaluate(evaluation: Evaluation, results: Results, submit: Submit, console: Console) -> bool:
    """Run every episode of every method; False when the time was up before.

    Raises:
        ConfigError: The results are of other settings, or a worker refuses a job.
    """
    options = evaluation.options
    named = dict.fromkeys((m, table_rho(m, rho)) for rho in options.rho for m in options.methods)
    keys = [
        EpisodeKey(method, rho, task, options.split, index)
        for method, rho in named
        for task in options.tasks
        for index in _indices(options)
    ]
    missing = sum(key not in results for key in keys)
    console.print(
        f"{len(keys)} episodes, {len(keys) - missing} there already; {evaluation.workers} workers"
    )
    with EpisodeProgress(console, missing, options.split) as progress:
        for after_safe in (False, True):
            entrants = [
                _entrant(evaluation, results, method, rho)
                for method, rho in named
                if (method in AFTER_SAFE) == after_safe
            ]
            jobs = ordered_jobs(entrants, options.tasks, _split(options), _indices(options))
            if not evaluation.complete(jobs, results, submit, progress):
                break
        else:
            speed = f" ({progress.per_minute:.1f} per minute)" if missing else ""
            console.print(f"all episodes are there{speed}")
            return True
        console.print(f"time is up ({progress.per_minute:.1f} per minute); the same call goes on")
    return False


def _entrant(evaluation: Evaluation, results: Results, method: str, rho: float) -> Entrant:
    """A method with its settings; those that follow from SAFE's episodes stay once they are set."""
    known = results.pruner_of(method, rho) if method in AFTER_SAFE else None
    if known is not None:
        return Entrant(method, rho, known)
    safe = [line for line in results.lines if line["method"] == SAFE and line["rho"] == rho]
    pruner = method_settings(method, rho, evaluation.presets, safe)
    results.check_pruner(method, rho, pruner)
    return Entrant(method, rho, pruner)


def calibrate(evaluation: Evaluation, results: Results, submit: Submit, console: Console) -> bool:
    """Find gamma and write the evidence; False when there was no time or no gamma.

    Raises:
        ConfigError: A worker refuses a job, or the rate cannot be reached.
    """
    options, (rho,) = evaluation.options, evaluation.options.rho
    safe = evaluation.presets.safe(rho)

    def measure(gamma: float) -> Trial | None:
        entrant = Entrant(f"{SAFE} gamma {gamma:g}", rho, replace(safe, gamma=gamma))
        jobs = ordered_jobs([entrant], options.tasks, CALIBRATION, _indices(options))
        missing = sum(key_of(job) not in results for job in jobs)
        with EpisodeProgress(console, missing, f"gamma {gamma:g}") as progress:
            if not evaluation.complete(jobs, results, submit, progress):
                return None
        keys = {key_of(job) for job in jobs}
        trial = Trial.of(gamma, [line for line in results.lines if EpisodeKey.of(line) in keys])
        console.print(
            f"gamma {gamma:g}: {100 * trial.rate:.1f} % keyframes in {trial.queries} steps of "
            f"{trial.episodes} episodes, {trial.successes} solved"
        )
        return trial

    found, trials = find_gamma(measure, safe.gamma, options.keyframe_rate)
    if not trials:
        console.print("time is up before the first gamma was measured; the same call goes on")
        return False
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    about = {
        "keyframe_rate": options.keyframe_rate,
        "rho": rho,
        "split": CALIBRATION,
        "episodes_per_task": options.episodes,
        "tasks": list(options.tasks),
        "date": date,
        "checkpoint": evaluation.checkpoint,
        **evaluation.common,
    }
    path = options.out / "gamma.json"
    write_evidence(evidence(found, trials, about), path)
    if found is None:
        console.print(f"no gamma yet that makes {100 * options.keyframe_rate:g} %; tries: {path}")
        return False
    console.print(f"evidence in {path}; for preset `robot` of config/pruners.yaml:")
    console.print(f"    {preset_line(found, evaluation.checkpoint, date)}", highlight=False)
    return True


def film(evaluation: Evaluation, path: Path, console: Console) -> None:
    """Film one episode of every task.

    Raises:
        ConfigError: Checkpoint, robot or pruner do not fit.
    """
    from safe_pruner_node.evaluation.film import film_episodes  # noqa: PLC0415 - av, matplotlib

    options = evaluation.options
    method = SAFE if SAFE in options.methods else options.methods[0]
    pruner = method_settings(method, options.rho[0], evaluation.presets)
    entrant = Entrant(method, table_rho(method, options.rho[0]), pruner)
    jobs = ordered_jobs([entrant], options.tasks, _split(options), [options.first])
    film_episodes(Bench(evaluation.plan), jobs, path, console)


def write_tables(path: Path, out: Path, console: Console) -> None:
    """Draw every table of a results file, Markdown and PNG.

    Raises:
        ConfigError: There is no episode in the file.
    """
    lines = read_lines(path)
    tables = make_tables(lines)
    if not tables:
        raise ConfigError(path, "", "no episode", "results of an evaluation")
    for table in tables:
        stem = out / f"{table.split}_rho{table.rho:g}"
        text = markdown(table)
        stem.with_name(f"{stem.name}.md").write_text(text, encoding="utf-8")
        console.print(text, highlight=False, soft_wrap=True, markup=False)
        try:
            from safe_pruner_node.evaluation.table_figure import (  # noqa: PLC0415 - see below
                draw_table,
            )
        except ImportError:  # a machine that only computes: --table-only draws it elsewhere
            console.print("no matplotlib here: Markdown only")
        else:
            draw_table(table, stem.with_name(f"{stem.name}.png"))
    console.print(f"wrote {', '.join(f'{t.split}_rho{t.rho:g}.md' for t in tables)} in {out}")


def _indices(options: EvaluateOptions) -> range:
    return range(options.first, options.first + options.episodes)


def _split(options: EvaluateOptions) -> Split:
    episode_seed(options.split, 0)  # type: ignore[arg-type]  # checked here
    return options.split  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``evaluate``; returns the exit status."""
    console = Console()
    try:
        return run(tyro.cli(EvaluateOptions, args=arguments), console)
    except ConfigError as error:
        console.print(f"[red]evaluate failed:[/red] {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped by hand; finished episodes are kept, the same call goes on")
        return 130


def run(options: EvaluateOptions, console: Console) -> int:
    """What was asked for; returns the exit status.

    Raises:
        ConfigError: Anything wrong with options, files or results.
    """
    path = options.out / f"{options.split}.jsonl"
    if options.table_only:
        write_tables(path, options.out, console)
        return 0
    evaluation = Evaluation.of(options)
    if options.video is not None:
        film(evaluation, options.video, console)
        return 0
    if options.calibrate_gamma:
        if len(options.rho) != 1:
            raise ConfigError("parameter", "--rho", list(options.rho), "one, to calibrate gamma at")
        with (
            evaluation.results("gamma.jsonl") as results,
            process_pool(evaluation.plan, evaluation.workers) as submit,
        ):
            return 0 if calibrate(evaluation, results, submit, console) else 1
    with (
        evaluation.results(path.name) as results,
        process_pool(evaluation.plan, evaluation.workers) as submit,
    ):
        evaluate(evaluation, results, submit, console)
    write_tables(path, options.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
