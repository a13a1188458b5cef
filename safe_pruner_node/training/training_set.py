"""LeRobot data sets as samples and decoded frames, ready to draw batches from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from safe_pruner_node.demonstrations.dataset import Dataset, open_dataset
from safe_pruner_node.demonstrations.features import camera_feature
from safe_pruner_node.demonstrations.images import fitted
from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import NormStats
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.training.frame_store import FrameStore, Job
from safe_pruner_node.training.samples import (
    EpisodeRows,
    Samples,
    chunk_targets,
    kept_rows,
    norm_stats,
    normalised_actions,
    policy_units,
    prompts,
)

MIN_DEVIATION = 1e-3


@dataclass(frozen=True)
class TrainingSet:
    """What batches are made of.

    Attributes:
        paths: The data sets.
        samples: Numbers of every sample.
        frames: Images of every sample.
        held_out: True for samples of episodes that only the open-loop error sees, [S].
        stats: Normalisation of the checkpoint.
        image_size: Side of the model's square input.
        tasks: Task in words to episodes.
        fps: Frames per second of the data set.
    """

    paths: tuple[Path, ...]
    samples: Samples
    frames: FrameStore
    held_out: NDArray[np.bool_]
    stats: NormStats
    image_size: int
    tasks: dict[str, int]
    fps: float

    @property
    def landmark_coordinates(self) -> int:
        """Size of the auxiliary target; 0 when the data set has none."""
        landmarks = self.samples.landmarks
        return 0 if landmarks is None else landmarks.shape[1]


def load_training_set(
    paths: Sequence[Path],
    robot: RobotConfig,
    config: Pi05Config,
    tokenizer: PromptTokenizer,
    *,
    stats: NormStats | None,
    stride: int,
    validation_share: float,
    workers: int,
    console: Console,
) -> TrainingSet:
    """Read data sets for a robot and a model.

    Args:
        paths: LeRobot v3 data sets, at least one.
        robot: Layout, cameras and what the policy's numbers mean.
        config: Sizes of the model.
        tokenizer: Of the prompts.
        stats: Normalisation to keep; None computes it from the data.
        stride: Every how many frames one becomes a sample.
        validation_share: Episodes held out.
        workers: Threads that decode.
        console: Tells how far it is.

    Raises:
        ConfigError: A data set does not fit the robot.
    """
    begun_s = time.monotonic()
    datasets = [open_dataset(path) for path in paths]
    for dataset in datasets:
        dataset.check_robot(robot)
    cameras = [camera_feature(camera.name) for camera in robot.cameras]
    firsts = np.cumsum([0, *(dataset.frames for dataset in datasets)])
    episodes = [
        EpisodeRows(int(first) + e.first, e.length, e.task)
        for dataset, first in zip(datasets, firsts, strict=False)
        for e in dataset.episodes
    ]
    kept = [kept_rows(e, stride, i % stride) for i, e in enumerate(episodes)]
    states = np.concatenate([d.state for d in datasets])[np.concatenate(kept)].astype(np.float64)
    actions = np.concatenate([d.action for d in datasets])
    targets = chunk_targets(actions, kept, episodes, config.horizon)
    policy_states, policy_actions = policy_units(robot.layout, states, targets)
    stats = stats or norm_stats(policy_states, policy_actions)
    shapes = [fitted(*datasets[0].cameras[camera], config.vision.image) for camera in cameras]
    frames = FrameStore(cameras, shapes, len(states))
    _decode(datasets, kept, frames, stride, workers, console)
    samples = Samples(
        rows=np.arange(len(states)),
        tokens=prompts(
            tokenizer,
            np.repeat([e.task for e in episodes], [len(rows) for rows in kept]).tolist(),
            policy_states,
            stats,
            state_in_prompt=robot.policy.state_in_prompt,
        ),
        actions=normalised_actions(policy_actions, stats, config.action_dim),
        landmarks=_landmarks(datasets, kept),
    )
    tasks: dict[str, int] = {}
    for episode in episodes:
        tasks[episode.task] = tasks.get(episode.task, 0) + 1
    console.print(
        f"{', '.join(map(str, paths))}: {len(episodes)} episodes, {len(tasks)} prompts, "
        f"{len(states)} samples, {frames.gigabytes:.1f} GB of images "
        f"in {time.monotonic() - begun_s:.0f} s",
        highlight=False,
    )
    return TrainingSet(
        tuple(paths),
        samples,
        frames,
        _held_out(kept, validation_share),
        stats,
        config.vision.image,
        tasks,
        datasets[0].fps,
    )


def _decode(
    datasets: Sequence[Dataset],
    kept: Sequence[NDArray[np.int64]],
    frames: FrameStore,
    stride: int,
    workers: int,
    console: Console,
) -> None:
    begins = np.cumsum([0, *(len(rows) for rows in kept)])
    jobs = [Job(i, int(begins[i]), len(rows)) for i, rows in enumerate(kept)]

    owners = [(d, e.index) for d in datasets for e in d.episodes]

    def read(episode: int, camera: str) -> NDArray[np.uint8]:
        dataset, index = owners[episode]
        return dataset.read_frames(index, camera, stride=stride, offset=episode % stride)

    done = frames.fill(jobs, read, workers)
    for _ in track(done, "decoding", len(jobs), console=console, transient=True):
        pass


def _landmarks(
    datasets: Sequence[Dataset], kept: Sequence[NDArray[np.int64]]
) -> NDArray[np.float32] | None:
    """Normalised privileged positions; None unless all the data sets have the same ones."""
    known = [d.environment for d in datasets if d.environment is not None]
    if len(known) < len(datasets) or len({values.shape[1] for values in known}) > 1:
        return None
    chosen = np.concatenate(known)[np.concatenate(kept)].astype(np.float64)
    spread = np.maximum(chosen.std(0), MIN_DEVIATION)
    normalised: NDArray[np.float32] = ((chosen - chosen.mean(0)) / spread).astype(np.float32)
    return normalised


def _held_out(kept: Sequence[NDArray[np.int64]], share: float) -> NDArray[np.bool_]:
    """Every so many-th episode, so that all tasks are among them."""
    every = round(1.0 / share) if share > 0 else len(kept) + 1
    flags = [i % every == every - 1 for i in range(len(kept))]
    return np.repeat(flags, [len(rows) for rows in kept])
