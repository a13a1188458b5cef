"""The few frozen dataclasses that cross rooms. numpy only: no torch, no ROS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
RgbImage = NDArray[np.uint8]
"""One image, [height, width, 3], RGB, uint8."""


@dataclass(frozen=True, eq=False)
class DeviceImage:
    """One image that is in the GPU's memory, for the engine that decoded it.

    Attributes:
        pixels: The engine's own tensor, [height, width, 3], RGB, uint8.
    """

    pixels: Any

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, 3."""
        height, width, channels = self.pixels.shape
        return height, width, channels


def host_image(image: RgbImage | DeviceImage) -> RgbImage:
    """The image itself, or a copy of one that is on a device."""
    if isinstance(image, DeviceImage):
        return np.asarray(image.pixels.contiguous().cpu(), dtype=np.uint8)
    return image


@dataclass(frozen=True)
class CameraFrame:
    """One camera message as received: bytes and stamps, not yet decoded.

    Attributes:
        data: The message payload; JPEG/PNG bytes, or raw pixel rows.
        encoding: ``jpeg`` or ``png`` for compressed payloads, else a ``sensor_msgs/Image``
            encoding (``rgb8``, ``bgr8``, ``rgba8``, ``bgra8``, ``mono8``).
        height: Rows; 0 when only the compressed payload knows.
        width: Columns; 0 when only the compressed payload knows.
        row_bytes: Bytes per row of a raw payload (``Image.step``); 0 when compressed.
        stamp_ns: Header stamp, ROS time, nanoseconds.
        received_ns: Steady clock at reception, nanoseconds.
    """

    data: bytes
    encoding: str
    height: int
    width: int
    row_bytes: int
    stamp_ns: int
    received_ns: int


@dataclass(frozen=True)
class Observation:
    """What one policy query sees, in robot units, before anything is decoded.

    Attributes:
        frames: Camera name (``head``, ``left_wrist``, ``right_wrist``) to its frame.
        state: Joint state in layout order, robot units (rad, gripper 0..100), [dof].
        prompt: The task in words.
        time_s: Control-clock time at which the oldest camera frame was taken, seconds.
        camera_stamp_ns: Header stamp of that oldest frame, ROS time, nanoseconds.
    """

    frames: Mapping[str, CameraFrame]
    state: FloatArray
    prompt: str
    time_s: float
    camera_stamp_ns: int


@dataclass(frozen=True)
class PolicyInput:
    """What the engine sees: decoded images and a state in the policy's units.

    Attributes:
        images: Camera name to RGB image at any resolution, here or already on the engine's device;
            order is the prefix order.
        state: Proprioception in the policy's units and order, [state_dim].
        prompt: The task in words.
    """

    images: Mapping[str, RgbImage | DeviceImage]
    state: FloatArray
    prompt: str


@dataclass(frozen=True)
class ActionChunk:
    """A chunk of future joint targets, indexed by time.

    Attributes:
        actions: Absolute targets in layout order, robot units, [horizon, dof].
        time_s: Control-clock time for which ``actions[0]`` is meant, seconds.
        dt_s: Time between consecutive actions, seconds.
        epoch: Buffer epoch the query was made in; a chunk of an older epoch is dropped.
    """

    actions: FloatArray
    time_s: float
    dt_s: float
    epoch: int

    @property
    def end_s(self) -> float:
        """Control-clock time of the last action, seconds."""
        return self.time_s + (len(self.actions) - 1) * self.dt_s


@dataclass(frozen=True)
class Flops:
    """Cost of the VLM prefill of one step, in floating point operations.

    ``paper_*`` is C(N) = 4Nd^2 + 2N^2 d + 3Ndm per layer (paper, appendix C), which counts
    a multiply-add once; ``exact`` counts the multi-query projections as they are, twice the
    multiply-adds.
    """

    paper_padded: float
    paper_trimmed: float
    exact: float


@dataclass(frozen=True)
class StepReport:
    """What happened inside one policy step.

    Attributes:
        pruner: Name of the method that ran (``vanilla``, ``safe``...).
        query: Policy query number since the last reset; the t of the paper.
        keyframe: True when every token was kept and the reference was refreshed.
        keyframe_reason: Why (``first``, ``prompt``, ``cameras``, ``kappa``, ``age``), or empty.
        kappa: Eq. 6; NaN where there is no reference to compare with.
        gamma: Threshold in force; NaN for methods without one.
        rho: Pruning ratio in force over valid visual tokens.
        visual_tokens: Camera to valid visual tokens.
        kept_tokens: Camera to visual tokens kept after the pruning layer.
        kept_indices: Camera to kept token indices within that camera (0..255), ascending.
        text_tokens: Valid text tokens.
        stage_ms: Stage name to milliseconds, in the order they ran.
        flops: Prefill cost of this step.
        engine: Which path ran (``eager cpu fp32``, ...).
    """

    pruner: str
    query: int
    keyframe: bool
    keyframe_reason: str
    kappa: float
    gamma: float
    rho: float
    visual_tokens: Mapping[str, int]
    kept_tokens: Mapping[str, int]
    kept_indices: Mapping[str, NDArray[np.int64]]
    text_tokens: int
    flops: Flops
    engine: str
    stage_ms: Mapping[str, float] = field(default_factory=dict)
