"""The twin's three cameras: rendering and true intrinsics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.robot.calibration import CameraCalibration
from safe_pruner_node.types import FloatArray, RgbImage

Resolution = tuple[int, int]
"""Width and height, pixels."""

FULL_RESOLUTION: Mapping[str, Resolution] = {
    "head": (1280, 720),
    "left_wrist": (640, 360),
    "right_wrist": (640, 360),
}
"""What the robot's cameras deliver."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a renderer needs to draw one instant.

    Attributes:
        time_s: Simulated time, s.
        qpos: Generalised positions, [nq].
    """

    time_s: float
    qpos: FloatArray


def pinhole(model: mujoco.MjModel, camera: str, resolution: Resolution) -> CameraCalibration:
    """The ideal pinhole camera that MuJoCo renders: no distortion, centred, square pixels.

    Args:
        model: A compiled twin.
        camera: Camera name in the model.
        resolution: Width and height of the image, pixels.
    """
    width, height = resolution
    fovy = np.radians(model.camera(camera).fovy[0])
    focal = height / 2 / np.tan(fovy / 2)
    # Pixel centres lie at integers (OpenCV), so that the axis passes between the middle pixels.
    matrix = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    return CameraCalibration(
        width=width,
        height=height,
        name=camera,
        K=matrix,
        model="plumb_bob",
        D=np.zeros(5),
        R=np.eye(3),
        P=np.hstack([matrix, np.zeros((3, 1))]),
    )


class CameraRig:
    """Renders snapshots. Create, use and close it in one thread: the GL context lives there.

    Args:
        model: The compiled twin; only read.
        resolutions: Camera name to the resolution of its images.
    """

    def __init__(self, model: mujoco.MjModel, resolutions: Mapping[str, Resolution]) -> None:
        model.vis.global_.offwidth = max(width for width, _ in resolutions.values())
        model.vis.global_.offheight = max(height for _, height in resolutions.values())
        self._model = model
        self._data = mujoco.MjData(model)
        self._resolutions = dict(resolutions)
        self._renderers: dict[Resolution, mujoco.Renderer] = {}
        for width, height in set(resolutions.values()):
            renderer = mujoco.Renderer(model, height, width)
            flags = renderer.scene.flags
            flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._renderers[width, height] = renderer

    def show(self, snapshot: Snapshot) -> None:
        """Chooses the instant that :meth:`render` draws."""
        self._data.qpos[:] = snapshot.qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def render(self, camera: str) -> RgbImage:
        """The image of one camera, [height, width, 3]."""
        renderer = self._renderers[self._resolutions[camera]]
        renderer.update_scene(self._data, camera)
        return np.asarray(renderer.render(), dtype=np.uint8)

    def close(self) -> None:
        """Frees the GL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
