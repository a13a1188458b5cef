"""``ros2 run safe_pruner_node forecast_study``: where a policy looks, and whether SAFE foresees it.

    python -m safe_pruner_node.evaluation.forecast_study [--episodes 3] [--figures-only] ...

Full-token episodes in the twin are recorded, one NPZ each, into `<out>/records`; figures and the
summary are made from these files alone. The same call again records only what is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import tyro
from rich.console import Console

from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.episode_figure import episode_figure
from safe_pruner_node.evaluation.forecast_figures import accuracy_figure, core_loss_figure
from safe_pruner_node.evaluation.forecast_summary import (
    Study,
    headline,
    make_study,
    markdown,
    to_json,
)
from safe_pruner_node.evaluation.layer_figure import layer_figure
from safe_pruner_node.evaluation.progress import EpisodeProgress
from safe_pruner_node.evaluation.rollout import RolloutSettings
from safe_pruner_node.evaluation.run_record import git_revision
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.evaluation.saliency_replay import Replay
from safe_pruner_node.evaluation.saliency_rollout import SaliencyBench
from safe_pruner_node.pi05.checkpoint import WEIGHTS, checkpoint_id
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import Split, episode_seed

ROBOT_FILE = "config/astribot_s1.yaml"


@dataclass(frozen=True)
class ForecastStudyOptions:
    """Records where a full-token policy looks, and measures what each pruner makes of it."""

    checkpoint: Path = Path("checkpoints/nano")
    """Policy to look into."""
    out: Path = Path("runs/forecast_study")
    """Where records, figures and summary go; one checkpoint and one set of settings per folder."""
    episodes: int = 3
    """Episodes per task."""
    first: int = 0
    """Number of the first episode within the split."""
    split: str = "calibration"
    """Whose seeds: evaluation, calibration, validation, demonstration."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks to run."""
    preset: str = "robot"
    """Preset of SAFE that is replayed."""
    gamma: float | None = None
    """Keyframe threshold; None: the preset's."""
    rho: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Shares of the visual tokens that are dropped."""
    horizon: int = 10
    """Largest distance of a forecast, policy queries."""
    seed: int = 0
    """Of what is drawn here: control frames, random keyframes."""
    pruners_config: Path | None = None
    """Pruner presets; None: config/pruners.yaml."""
    robot_config: Path | None = None
    """Robot description; None: config/astribot_s1.yaml."""
    query_period_s: float = 0.5
    """Simulated time between policy queries at least; each waits until it shows the last chunk."""
    latency_s: float = 0.1
    """Simulated time from a query to its chunk."""
    noise_seed: int = 0
    """Seed of the flow noise."""
    time_limit_s: float = 0.0
    """End episodes early; 0: the task's own limit."""
    threads: int = 1
    """CPU threads."""
    device: str = "auto"
    """auto, cpu or cuda."""
    figures_only: bool = False
    """Only draw from the records that are there."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            build_task(task, 0)
        for key, low, high in (("episodes", 1, 1000), ("horizon", 1, 100), ("threads", 1, 256)):
            if not low <= getattr(self, key) <= high:
                raise ConfigError("parameter", f"--{key}", getattr(self, key), f"{low} to {high}")
        for name, values in (("tasks", self.tasks), ("rho", self.rho)):
            if not values or len(set(values)) != len(values):
                raise ConfigError("parameter", f"--{name}", list(values), "each one once")
        episode_seed(self.split, self.first + self.episodes - 1)  # type: ignore[arg-type]
        if self.pruner.method != "safe":
            raise ConfigError("parameter", "--preset", self.preset, "a preset of method safe")
        for rho in self.rho:
            replace(self.pruner, rho=rho)
        self.rollout  # noqa: B018 - validates

    @property
    def rollout(self) -> RolloutSettings:
        """How an episode is run."""
        return RolloutSettings(
            query_period_s=self.query_period_s,
            latency_s=self.latency_s,
            noise_seed=self.noise_seed,
            time_limit_s=self.time_limit_s,
        )

    @property
    def pruner(self) -> PrunerSettings:
        """SAFE as it is replayed.

        Raises:
            ConfigError: The presets are wrong.
        """
        settings = load_preset(self.pruners_config, self.preset)
        return settings if self.gamma is None else replace(settings, gamma=self.gamma)


def record_episodes(options: ForecastStudyOptions, console: Console) -> None:
    """Record what is missing.

    Raises:
        ConfigError: Checkpoint, robot, presets or files of other settings.
    """
    if not (options.checkpoint / WEIGHTS).is_file():
        found = f"no {WEIGHTS} in {options.checkpoint}"
        raise ConfigError("parameter", "--checkpoint", found, "a checkpoint directory")
    wanted = {
        _path(options, task, index): (task, index)
        for index in range(options.first, options.first + options.episodes)
        for task in options.tasks
    }
    identity = {
        "checkpoint": checkpoint_id(options.checkpoint),
        "layer": options.pruner.layer,
        "rollout": asdict(options.rollout),
    }
    missing = {path: key for path, key in wanted.items() if not path.exists()}
    for path in wanted.keys() - missing.keys():
        _check(path, SaliencyRecord.load(path), identity)
    console.print(f"{len(wanted)} episodes, {len(wanted) - len(missing)} recorded already")
    if not missing:
        return
    robot = load_robot_config(options.robot_config or resource(ROBOT_FILE))
    engine = EngineSettings(
        options.checkpoint,
        device=options.device,
        threads=options.threads,
        pruner=options.pruner,
        state_in_prompt=robot.policy.state_in_prompt,
        state_dim=robot.layout.dof,
        action_dim=robot.layout.dof,
    )
    cv2.setNumThreads(options.threads)
    bench = SaliencyBench(engine, robot, options.rollout)
    about = {
        "checkpoint": identity["checkpoint"],
        "policy": _title(options.checkpoint),
        "git": git_revision(Path(__file__).parent),
    }
    split: Split = options.split  # type: ignore[assignment]  # the options checked it
    with EpisodeProgress(console, len(missing), "recording") as progress:
        for path, (task, index) in missing.items():
            record = bench.record(task, split, index, about, sorted(options.rho)[-2:])
            record.save(path)
            progress.take({"method": task, "success": record.about["success"]})
        console.print(f"recorded {len(missing)} episodes: {progress.success()}")


def load_records(folder: Path) -> list[SaliencyRecord]:
    """Every record of a folder, by task and number.

    Raises:
        ConfigError: There is none, or they are of different policies or settings.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ConfigError(folder, "", "no record", "a run without --figures-only first")
    records = [SaliencyRecord.load(path) for path in paths]
    identity = {key: records[0].about[key] for key in ("checkpoint", "layer", "rollout", "cameras")}
    for path, record in zip(paths, records, strict=True):
        _check(path, record, identity)
    order = {name: number for number, name in enumerate(TASKS)}
    return sorted(records, key=lambda r: (order[r.about["task"]], r.about["index"]))


def draw(study: Study, replays: Sequence[Replay], out: Path) -> list[Path]:
    """Every figure; returns the files."""
    by_task: dict[str, list[int]] = {}
    for number, record in enumerate(study.records):
        by_task.setdefault(record.about["task"], []).append(number)
    # Of every task an episode that worked, if there is one: that is what a policy looks at.
    shown = {
        task: next((n for n in numbers if study.records[n].about["success"]), numbers[0])
        for task, numbers in by_task.items()
    }
    written = []
    for task, number in shown.items():
        written.append(out / f"episode_{task}.png")
        episode_figure(replays[number], study.traces[number], written[-1])
    about = study.records[0].about
    title = (
        f"{about['policy']} ({about['checkpoint']}): {len(study.records)} full-token episodes, "
        f"{study.queries} queries, {about['split']} seeds; bands: 95 % over episodes"
    )
    accuracy, loss, layers = (out / f"{name}.png" for name in ("forecast", "core_loss", "layers"))
    accuracy_figure(study.accuracy, accuracy, title)
    core_loss_figure(study.loss, study.actions, loss, title)
    layer_figure([study.records[number] for number in shown.values()], layers)
    return [*written, accuracy, loss, layers]


def _path(options: ForecastStudyOptions, task: str, index: int) -> Path:
    return options.out / "records" / f"{task}_{options.split}_{index:03d}.npz"


def _check(path: Path, record: SaliencyRecord, identity: dict[str, Any]) -> None:
    for key, expected in identity.items():
        if record.about[key] != expected:
            found = f"{record.about[key]} of another run"
            raise ConfigError(path, key, found, f"{expected}; or another --out")


def _title(checkpoint: Path) -> str:
    """First heading of the model card; the folder's name where there is none."""
    card = checkpoint / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line[2:] for line in lines if line.startswith("# ")), checkpoint.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``forecast_study``; returns the exit status."""
    console = Console()
    try:
        run(tyro.cli(ForecastStudyOptions, args=arguments), console)
    except ConfigError as error:
        console.print(f"[red]forecast_study failed:[/red] {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped by hand; recorded episodes are kept, the same call goes on")
        return 130
    return 0


def run(options: ForecastStudyOptions, console: Console) -> None:
    """Record, measure, draw, tell.

    Raises:
        ConfigError: Anything wrong with options, files or records.
    """
    if not options.figures_only:
        record_episodes(options, console)
    records = load_records(options.out / "records")
    with console.status("measuring"):
        replays = [Replay(record, options.pruner) for record in records]
        study = make_study(
            replays,
            options.rho,
            horizon=options.horizon,
            seed=options.seed,
            revision=git_revision(Path(__file__).parent),
        )
    with console.status("drawing"):
        written = draw(study, replays, options.out)
    text = json.dumps(to_json(study), indent=2) + "\n"
    (options.out / "summary.json").write_text(text, encoding="utf-8")
    (options.out / "summary.md").write_text(markdown(study), encoding="utf-8")
    names = ", ".join(path.name for path in written)
    console.print(f"wrote {names}, summary.md and summary.json in {options.out}", soft_wrap=True)
    console.print(headline(study), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
