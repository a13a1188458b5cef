"""What a checkpoint needs before it may run in FP8.

    python -m safe_pruner_node.evaluation.calibrate_fp8 --checkpoint <checkpoint> --dataset <set>

Measures, on recorded observations, how large the inputs of the layers become that FP8 is for; then
compares the actions in FP8 with those in bf16 on observations of other episodes, with the same
noise, every token kept. Both go into ``fp8.safetensors`` beside the checkpoint, which the engine
reads with dtype ``fp8``. Exit status 1: FP8 is too far from bf16 here, and the engine will say so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from safe_pruner_node.demonstrations.dataset import Dataset, open_dataset
from safe_pruner_node.demonstrations.features import camera_feature
from safe_pruner_node.engine.build import check_fp8, choose_device, load_policy, policy_engine
from safe_pruner_node.engine.fp8 import quantise, watch_inputs
from safe_pruner_node.engine.fp8_calibration import LEAST_COSINE, Calibration
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import Checkpoint
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import RobotConfig, load_robot_config
from safe_pruner_node.types import FloatArray, PolicyInput


@dataclass(frozen=True)
class CalibrateFp8Options:
    """Calibrates a checkpoint for FP8 on demonstrations, and says whether it may run so."""

    checkpoint: Path
    """Policy to calibrate; the file is written into its folder."""
    dataset: Path
    """LeRobot v3 data set of what the policy will see: at least two episodes."""
    robot_config: Path | None = None
    """Robot description; None: config/astribot_s1.yaml."""
    tokenizer: Path | None = None
    """SentencePiece model; None: the checkpoint's, else openpi's."""
    asset_id: str | None = None
    """Which of an openpi checkpoint's assets holds the statistics; None: the only one."""
    inputs: int = 32
    """Observations to measure on."""
    tested: int = 50
    """Observations, of other episodes, to compare FP8 and bf16 on."""

    def __post_init__(self) -> None:
        for key in ("inputs", "tested"):
            if (value := getattr(self, key)) < 1:
                raise ConfigError("parameter", key, value, "at least 1")


def main() -> int:
    """Entry point; returns the exit status."""
    console = Console()
    try:
        calibration, path = run(tyro.cli(CalibrateFp8Options))
    except ConfigError as error:
        console.print(f"[red]calibration failed:[/red] {error}", highlight=False)
        return 1
    fits = calibration.cosine >= LEAST_COSINE
    console.print(
        f"{path}: least cosine of FP8's and bf16's actions {calibration.cosine:.6f} on "
        f"{calibration.tested} observations: "
        + ("dtype fp8 may be used" if fits else f"below {LEAST_COSINE}, stay with bf16"),
        highlight=False,
    )
    return 0 if fits else 1


def run(options: CalibrateFp8Options) -> tuple[Calibration, Path]:
    """Calibrate and write the file.

    Raises:
        ConfigError: Checkpoint, data set and robot do not fit each other, or there is no GPU that
            multiplies FP8.
    """
    check_fp8(choose_device("auto"))  # before anything that takes long
    robot = load_robot_config(options.robot_config or resource("config/astribot_s1.yaml"))
    dataset = open_dataset(options.dataset)
    dataset.check_robot(robot)
    settings = EngineSettings(
        options.checkpoint,
        asset_id=options.asset_id,
        tokenizer=options.tokenizer,
        dtype="bf16",
        pruner=load_preset(None, "vanilla"),
        state_in_prompt=robot.policy.state_in_prompt,
        state_dim=robot.layout.dof,
        action_dim=robot.layout.dof,
    )
    measured, tested = halves(dataset, robot, options.inputs, options.tested)
    checkpoint, tokenizer = load_policy(settings)
    calibration = calibrate(checkpoint, tokenizer, settings, measured, tested)
    return calibration, calibration.write(options.checkpoint)


def halves(
    dataset: Dataset, robot: RobotConfig, inputs: int, tested: int
) -> tuple[list[PolicyInput], list[PolicyInput]]:
    """Observations of every other episode to measure on, and of the others to compare on.

    Args:
        dataset: The demonstrations.
        robot: Layout and cameras.
        inputs: How many to measure on, if there are as many.
        tested: How many to compare on, likewise.

    Raises:
        ConfigError: There is only one episode.
    """
    n = len(dataset.episodes)
    if n < 2:
        raise ConfigError(dataset.path, "episodes", n, "at least 2: one half is compared on")
    return (
        list(_observations(dataset, robot, range(0, n, 2), inputs)),
        list(_observations(dataset, robot, range(1, n, 2), tested)),
    )


def _observations(
    dataset: Dataset, robot: RobotConfig, episodes: Sequence[int], count: int
) -> Iterator[PolicyInput]:
    """So many of these episodes' frames, evenly spaced."""
    frames = [(e, k) for e in episodes for k in range(dataset.episodes[e].length)]
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)
    for i in track(chosen, "reading", console=Console(stderr=True)):
        episode, k = frames[i]
        info = dataset.episodes[episode]
        images = {
            camera.name: dataset.read_frames(episode, camera_feature(camera.name), info.length, k)[
                0
            ]
            for camera in robot.cameras
        }
        state = dataset.state[info.first + k].astype(np.float64)
        yield PolicyInput(images, robot.layout.to_policy_state(state), info.task)


def calibrate(
    checkpoint: Checkpoint,
    tokenizer: PromptTokenizer,
    settings: EngineSettings,
    measured: Iterable[PolicyInput],
    tested: Sequence[PolicyInput],
) -> Calibration:
    """Measure, quantise, compare; the checkpoint's model is FP8 afterwards.

    Args:
        checkpoint: In bf16, where it will run.
        tokenizer: Its tokenizer.
        settings: Of the engines; the path is that of the comparison.
        measured: What to measure on.
        tested: What to compare on.
    """
    model = checkpoint.model
    measured = list(measured)
    with watch_inputs(model) as largest:
        _actions("measuring", checkpoint, tokenizer, replace(settings, path="eager"), measured)
    bf16 = _actions("bf16", checkpoint, tokenizer, settings, tested)
    quantise(model, largest)
    fp8 = _actions("FP8", checkpoint, tokenizer, settings, tested)
    cosines = [
        float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in zip(fp8, bf16, strict=True)
    ]
    return Calibration(
        checkpoint=checkpoint.identity,
        largest={name: float(value) for name, value in largest.items()},
        inputs=len(measured),
        tested=len(tested),
        cosine=float(np.min(cosines)),  # NumPy's: NaN is less than anything
    )


def _actions(
    title: str,
    checkpoint: Checkpoint,
    tokenizer: PromptTokenizer,
    settings: EngineSettings,
    inputs: Sequence[PolicyInput],
) -> list[FloatArray]:
    """Normalised actions [H, A] of an engine that sees these one after the other, with a bar."""
    stats = checkpoint.norm_stats
    assert stats is not None  # noqa: S101 - load_policy has checked
    as_they_are = replace(checkpoint, norm_stats=replace(stats, action_mode="identity"))
    engine = policy_engine(as_they_are, tokenizer, settings)
    bar = track(inputs, title, console=Console(stderr=True))
    return [engine.step(observation)[0] for observation in bar]


if __name__ == "__main__":
    sys.exit(main())
