"""The twin's three cameras: rendering and true intrinsics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.calibration import CameraCalibration
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.settings import CAMERA_SCALE
from safe_pruner_node.types import FloatArray, RgbImage

Resolution = tuple[int, int]
"""Width and height, pixels."""

FULL_RESOLUTION: Mapping[str, Resolution] = {
    "head": (1280, 720),
    "left_wrist": (640, 360),
    "right_wrist": (640, 360),
}
"""What the robot's cameras deliver."""

MAX_GEOMS = 2000
"""Room for what is drawn; the fullest scene has about a hundred geoms."""


def drawn_resolutions(robot: RobotConfig, scale: float = CAMERA_SCALE) -> dict[str, Resolution]:
    """Camera to width and height of its images, in the policy's order.

    Raises:
        ConfigError: The robot file names a camera that the twin does not have.
    """
    for camera in robot.cameras:
        if camera.name not in FULL_RESOLUTION:
            expected = f"one of {', '.join(FULL_RESOLUTION)}"
            raise ConfigError(robot.path, f"cameras.{camera.name}", "an unknown camera", expected)
    return {
        camera.name: (round(camera.width * scale), round(camera.height * scale))
        for camera in robot.cameras
    }


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
        self._resolutions = dict(resolutions)
        self._width = max(width for width, _ in resolutions.values())
        self._height = max(height for _, height in resolutions.values())
        self._context: mujoco.MjrContext | None = None
        self._gl = mujoco.GLContext(self._width, self._height)
        self.load(model)

    def load(self, model: mujoco.MjModel) -> None:
        """Draws another model from now on.

        The GL context stays: it takes a second to make one, and milliseconds to load a model.
        """
        model.vis.global_.offwidth = self._width
        model.vis.global_.offheight = self._height
        self._model = model
        self._data = mujoco.MjData(model)
        self._gl.make_current()
        if self._context is not None:
            self._context.free()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._option = mujoco.MjvOption()
        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def show(self, snapshot: Snapshot) -> None:
        """Chooses the instant that :meth:`render` draws."""
        self._data.qpos[:] = snapshot.qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def render(self, camera: str) -> RgbImage:
        """The image of one camera, [height, width, 3]."""
        width, height = self._resolutions[camera]
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model, self._data, self._option, None, view, everything, self._scene
        )
        self._gl.make_current()
        corner = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(corner, self._scene, self._context)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, corner, self._context)
        return np.ascontiguousarray(image[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Frees the GL context."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None
            self._gl.free()
