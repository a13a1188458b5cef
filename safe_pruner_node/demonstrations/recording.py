"""Records one demonstration: the expert does it, then the cameras draw it frame by frame."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safe_pruner_node.demonstrations.features import LANDMARK_NAMES, camera_feature
from safe_pruner_node.demonstrations.images import fit, fitted
from safe_pruner_node.demonstrations.parts import PartWriter
from safe_pruner_node.demonstrations.rollout import Demonstration, demonstrate
from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.cameras import CameraRig, drawn_resolutions
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import build_task

ROBOT_TYPE = "astribot_s1"


@dataclass(frozen=True)
class Recording:
    """What came of one episode.

    Attributes:
        task: Name of the task.
        seed: Its seed.
        success: Whether the expert did it; only then is there a part.
        tries: Grasps it took.
        frames: How many were recorded.
        seconds: Stage (``expert``, ``render``, ``resize``, ``encode``) to wall time, s.
    """

    task: str
    seed: int
    success: bool
    tries: int
    frames: int
    seconds: Mapping[str, float]


def twin_spec(robot: RobotConfig, image_size: int) -> DatasetSpec:
    """What the frames of a dataset from the twin hold.

    Args:
        robot: Layout, rate and cameras.
        image_size: Longer side of the images, pixels.
    """
    cameras = {
        camera_feature(name): fitted(height, width, image_size)
        for name, (width, height) in drawn_resolutions(robot).items()
    }
    return DatasetSpec(
        fps=robot.policy.action_rate_hz,
        robot_type=ROBOT_TYPE,
        joint_names=robot.layout.joint_names,
        cameras=cameras,
        environment_names=LANDMARK_NAMES,
    )


class Recorder:
    """Records demonstrations one after the other. One thread: a GL context lives here.

    Args:
        robot: Layout, limits, rate and cameras.
        image_size: Longer side of the recorded images, pixels.
    """

    def __init__(self, robot: RobotConfig, image_size: int) -> None:
        self._robot = robot
        self._image_size = image_size
        self._spec = twin_spec(robot, image_size)
        self._rig: CameraRig | None = None

    def record(self, task_name: str, seed: int, folder: Path) -> Recording:
        """Records an episode; where the expert fails nothing is written.

        Args:
            task_name: Key in the registry of tasks.
            seed: The episode's seed.
            folder: The part's folder.
        """
        started = time.perf_counter()
        episode = Episode(build_task(task_name, seed), self._robot)
        demonstration = demonstrate(episode)
        seconds = {"expert": time.perf_counter() - started}
        if demonstration.success:
            self._write(demonstration, episode, folder, seconds)
        return Recording(
            task=task_name,
            seed=seed,
            success=demonstration.success,
            tries=demonstration.tries,
            frames=len(demonstration.frames),
            seconds=seconds,
        )

    def close(self) -> None:
        """Frees the GL context."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None

    def _write(
        self,
        demonstration: Demonstration,
        episode: Episode,
        folder: Path,
        seconds: dict[str, float],
    ) -> None:
        clock = _Clock(seconds)
        rig = self._loaded(episode)
        clock.lap("render")
        frames = demonstration.frames
        with PartWriter(folder, self._spec) as part:
            for frame in frames:
                rig.show(frame.snapshot)
                images = {}
                for camera in self._robot.policy.camera_order:
                    image = rig.render(camera)
                    clock.lap("render")
                    images[camera_feature(camera)] = fit(image, self._image_size)
                    clock.lap("resize")
                part.add(images)
                clock.lap("encode")
            part.finish(
                state=np.stack([frame.state for frame in frames]),
                action=np.stack([frame.action for frame in frames]),
                environment=np.stack([frame.landmarks.ravel() for frame in frames]),
                prompt=demonstration.prompt,
                details={
                    "task_name": demonstration.task,
                    "seed": demonstration.seed,
                    "tries": demonstration.tries,
                },
            )
        clock.lap("encode")

    def _loaded(self, episode: Episode) -> CameraRig:
        if self._rig is not None:
            self._rig.load(episode.sim.model)
            return self._rig
        try:
            self._rig = CameraRig(episode.sim.model, drawn_resolutions(self._robot))
        except Exception as error:
            raise ConfigError(
                "MuJoCo rendering",
                f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}",
                error,
                "a renderer that works: MUJOCO_GL=egl (libegl1) or osmesa (libosmesa6)",
            ) from error
        return self._rig


class _Clock:
    """Adds the time since the last lap to a stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now
