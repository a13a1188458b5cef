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
from safe_pruner_node.robot.codecs import image_to_rgb, is_plain_jpeg
from safe_pruner_node.robot.config import CameraConfig, RobotConfig
from safe_pruner_node.types import (
    ActionChunk,
    CameraFrame,
    DeviceImage,
    FloatArray,
    Observation,
    PolicyInput,
    RgbImage,
    StepReport,
    host_image,
)

if TYPE_CHECKING:
    from safe_pruner_node.engine.base import Engine

_REHEARSAL_PROMPT = "rehearsal"


MARGIN = 2
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
        # The thread that asks decodes too.
        self._pool = ThreadPoolExecutor(threads - 1, "image") if threads > 1 else None
        calibrations = {camera.name: camera.load_calibration() for camera in robot.cameras}
        self._undistorters = {
            name: Undistorter(calibration)
            for name, calibration in calibrations.items()
            if calibration is not None and np.any(calibration.D)
        }
        self._places = {camera.name: i for i, camera in enumerate(robot.cameras)}
        # A calibration is for the whole resolution. The GPU decodes all of an image: where it does,
        # the CPU does so too, and an image has one size whoever decodes it.
        whole = {name for name in self._places if engine.decodes_jpeg or name in self._undistorters}
        self._enough = {
            name: None if name in whole else MARGIN * engine.image_side for name in self._places
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
        try:
            with before.stage("decode"):
                images = self._images(observation.frames)
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
        """Run one query on grey frames at the home pose, then begin a fresh session.

        The frames are what the cameras send: the engine sees images as large as they will be.

        So a checkpoint that does not fit the robot is found now and not by the first real
        observation, and the first real step is no slower than the others.

        Args:
            prompt: The task in words; empty: not known yet.

        Returns:
            Actions per chunk and size of one action.

        Raises:
            ConfigError: Checkpoint and robot do not fit.
        """
        images = self._images({camera.name: _grey(camera) for camera in self.robot.cameras})
        state = self.robot.layout.to_policy_state(self.robot.home)
        inputs = PolicyInput(images, state, prompt or _REHEARSAL_PROMPT)
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

    def _images(self, frames: Mapping[str, CameraFrame]) -> dict[str, RgbImage | DeviceImage]:
        """What `PolicyInput` takes, in the policy's camera order, decoded side by side.

        What the GPU decodes is decoded in one batch, from right here; where it has nothing to do,
        the first image, the head camera's and the largest, is decoded right here: no other thread
        has to wake up for it, nor to wake this one.
        """
        by_gpu = self._jpegs_for_the_gpu(frames)
        by_cpu = [name for name in self._places if name not in by_gpu]
        here, begun = by_cpu, {}
        if self._pool is not None:
            n_here = 0 if by_gpu else 1
            here, elsewhere = by_cpu[:n_here], by_cpu[n_here:]
            begun = {name: self._pool.submit(self._image, name, frames) for name in elsewhere}
        try:
            images = self._decode_on_gpu(by_gpu, frames)
            images |= {name: self._image(name, frames) for name in here}
        finally:
            for other in begun.values():
                other.exception()  # done, whatever came of it: the next query finds nobody here
        images |= {name: other.result() for name, other in begun.items()}
        return {name: images[name] for name in self._places}

    def _jpegs_for_the_gpu(self, frames: Mapping[str, CameraFrame]) -> dict[str, bytes]:
        """Camera to JPEG of those that the engine may decode; undistortion is the CPU's."""
        if not self.engine.decodes_jpeg:
            return {}
        return {
            name: frames[name].data
            for name in self._places
            if name in frames and name not in self._undistorters and is_plain_jpeg(frames[name])
        }

    def _decode_on_gpu(
        self, jpegs: Mapping[str, bytes], frames: Mapping[str, CameraFrame]
    ) -> dict[str, RgbImage | DeviceImage]:
        """Images that the engine decodes; the CPU does if it cannot, or says what is wrong."""
        images = self.engine.decode(list(jpegs.values())) if jpegs else []
        if images is None:
            return {name: self._image(name, frames) for name in jpegs}
        return dict(zip(jpegs, images, strict=True))

    def _image(self, name: str, frames: Mapping[str, CameraFrame]) -> RgbImage:
        """One camera's image as large as it has to be, undistorted, on its way to the device."""
        image = _decode(name, frames.get(name), self._enough[name])
        if name in self._undistorters:
            image = self._undistorters[name].apply(image)
        return self.engine.place(self._places[name], image)


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


def _grey(camera: CameraConfig) -> CameraFrame:
    """A frame as the camera's driver sends it."""
    image: RgbImage = np.full((camera.height, camera.width, 3), 127, np.uint8)
    if camera.type == "CompressedImage":
        return CameraFrame(encode_jpeg(image), "jpeg", 0, 0, 0, 0, 0)
    height, width = image.shape[:2]
    return CameraFrame(image.tobytes(), "rgb8", height, width, 3 * width, 0, 0)


def _draw_overlays(
    images: Mapping[str, RgbImage | DeviceImage], report: StepReport
) -> dict[str, bytes]:
    return {
        camera: encode_jpeg(
            draw_overlay(host_image(images[camera]), kept, report.visual_tokens[camera])
        )
        for camera, kept in report.kept_indices.items()
    }
