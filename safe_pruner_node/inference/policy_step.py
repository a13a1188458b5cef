"""One policy query inside the worker: frames and joints in, absolute joint targets out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.overlay import draw_overlay, encode_jpeg
from safe_pruner_node.robot.calibration import Undistorter
from safe_pruner_node.robot.codecs import image_to_rgb
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.types import (
    ActionChunk,
    CameraFrame,
    FloatArray,
    Observation,
    PolicyInput,
    RgbImage,
    StepReport,
)

if TYPE_CHECKING:
    from safe_pruner_node.engine.base import Engine

_REHEARSAL_PROMPT = "rehearsal"


_MARGIN = 2
"""A camera image keeps this many pixels for each one that the model sees, on the longer side."""


class InputError(Exception):
    """The observation is to blame: the next one may well do. One line."""


@dataclass(frozen=True)
class StepOutput:
    """What one query gives; ``overlays`` is empty unless asked for."""

    chunk: ActionChunk
    report: StepReport
    overlays: Mapping[str, bytes]


class PolicyStep:
    """The way of an observation through decoding, the engine and the robot's units.

    Args:
        engine: Built and warm.
        robot: Layout, units and cameras.
        threads: Images decoded at the same time.

    Raises:
        ConfigError: A camera calibration is missing or wrong.
    """

    def __init__(self, engine: Engine, robot: RobotConfig, *, threads: int = 1) -> None:
        self.engine = engine
        self.robot = robot
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image")
        calibrations = {camera.name: camera.load_calibration() for camera in robot.cameras}
        self._undistorters = {
            name: Undistorter(calibration)
            for name, calibration in calibrations.items()
            if calibration is not None and np.any(calibration.D)
        }
        # A calibration is for the whole resolution.
        self._enough = {
            camera.name: None if camera.name in self._undistorters else _MARGIN * engine.image_side
            for camera in robot.cameras
        }

    def run(
        self,
        observation: Observation,
        epoch: int,
        *,
        want_overlay: bool,
        noise: FloatArray | None = None,
    ) -> StepOutput:
        """Run one query.

        ``actions[0]`` of the chunk is meant for the observation's time: what the policy wanted
        while it was computing has passed when the chunk arrives, and the buffer skips it.

        Args:
            observation: Frames still encoded, state in robot units.
            epoch: Goes into the chunk.
            want_overlay: Draw the kept patches of every camera.
            noise: Initial noise of the flow, as `Engine.step` takes it; None draws it there.

        Raises:
            InputError: A frame is missing or does not decode, or the engine refuses the input.
        """
        before = _StageTimes()
        after = _StageTimes()
        with before.stage("decode"):
            images = self._decode(observation)
        try:
            with before.stage("undistort"):
                images = self._undistort(images)
            state = self.robot.layout.to_policy_state(observation.state)
            inputs = PolicyInput(images, state, observation.prompt)
            actions, report = self.engine.step(inputs, noise)
        except ConfigError as error:
            raise InputError(str(error)) from error
        with after.stage("to_robot"):
            chunk = ActionChunk(
                actions=self.robot.layout.to_robot_actions(actions, observation.state),
                time_s=observation.time_s,
                dt_s=1.0 / self.robot.policy.action_rate_hz,
                epoch=epoch,
            )
        overlays: dict[str, bytes] = {}
        if want_overlay:
            with after.stage("overlay"):
                overlays = _draw_overlays(images, report)
        stage_ms = {**before.ms, **report.stage_ms, **after.ms}
        return StepOutput(chunk, replace(report, stage_ms=stage_ms), overlays)

    def rehearse(self, prompt: str = "") -> tuple[int, int]:
        """Run one query on grey images at the home pose, then begin a fresh session.

        So a checkpoint that does not fit the robot is found now and not by the first real
        observation, and the first real step is no slower than the others.

        Args:
            prompt: The task in words; empty: not known yet.

        Returns:
            Actions per chunk and size of one action.

        Raises:
            ConfigError: Checkpoint and robot do not fit.
        """
        images: dict[str, RgbImage] = {
            camera.name: np.full((camera.height, camera.width, 3), 127, np.uint8)
            for camera in self.robot.cameras
        }
        state = self.robot.layout.to_policy_state(self.robot.home)
        inputs = PolicyInput(self._undistort(images), state, prompt or _REHEARSAL_PROMPT)
        actions, _ = self.engine.step(inputs)
        horizon, action_dim = actions.shape
        if action_dim != self.robot.layout.dof:
            raise ConfigError(
                self.robot.path,
                "layout",
                f"{self.robot.layout.name} of {self.robot.layout.dof} joints",
                f"{action_dim}, the action size of the checkpoint",
            )
        self.robot.layout.to_robot_actions(actions, self.robot.home)
        self.engine.reset()
        return horizon, action_dim

    def _decode(self, observation: Observation) -> dict[str, RgbImage]:
        """RGB images in the policy's camera order, as large as they have to be."""
        names = [camera.name for camera in self.robot.cameras]
        frames = [observation.frames.get(name) for name in names]
        enough = [self._enough[name] for name in names]
        return dict(zip(names, self._pool.map(_decode, names, frames, enough), strict=True))

    def _undistort(self, images: Mapping[str, RgbImage]) -> dict[str, RgbImage]:
        return {
            name: self._undistorters[name].apply(image) if name in self._undistorters else image
            for name, image in images.items()
        }


class _StageTimes:
    """Milliseconds per stage, in the order they ran."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.ms[name] = (time.perf_counter() - start_s) * 1e3


def _decode(camera: str, frame: CameraFrame | None, enough: int | None) -> RgbImage:
    if frame is None:
        raise InputError(f"camera {camera}: no frame in the observation")
    try:
        return image_to_rgb(frame, enough=enough)
    except ConfigError as error:
        raise InputError(f"camera {camera}: {error}") from error


def _draw_overlays(images: Mapping[str, RgbImage], report: StepReport) -> dict[str, bytes]:
    return {
        camera: encode_jpeg(draw_overlay(images[camera], kept, report.visual_tokens[camera]))
        for camera, kept in report.kept_indices.items()
    }
