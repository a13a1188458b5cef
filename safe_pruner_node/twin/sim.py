"""The simulated robot as the wire sees it: parts, robot units, commands and joint states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.calibration import CameraCalibration
from safe_pruner_node.twin.cameras import FULL_RESOLUTION, Resolution, Snapshot, pinhole
from safe_pruner_node.twin.joint_table import GRIPPER_CLOSED, HOME, PART_DOF, joint_names
from safe_pruner_node.twin.model import FINGER_STROKE
from safe_pruner_node.twin.scene import Furnish, build_scene
from safe_pruner_node.types import FloatArray

PARTS = tuple(PART_DOF)

SETTLE_S = 0.5
"""Simulated time for the objects to come to rest before time zero, s."""


@dataclass(frozen=True)
class JointState:
    """What one part reports, each [dof]: rad (chassis m, m, rad; gripper 0..100) and per second.

    ``torque`` is what the joint's motor bears, gravity included, N m (gripper and slides: N).
    """

    position: FloatArray
    velocity: FloatArray
    acceleration: FloatArray
    torque: FloatArray


class TwinSim:
    """Physics of the twin; cameras draw its :meth:`snapshot` elsewhere.

    Args:
        scene: Key in :data:`safe_pruner_node.twin.scene.SCENES`, or a task's ``furnish``.
        seed: Places the objects.
        timestep: Physics step, s.
        home: Robot units by part; parts left out take the scene's posture, else the S1's home.
        resolutions: Resolution of each camera's images; the real robot's by default.

    Raises:
        ConfigError: Unknown scene, or a home pose that is not one of this robot.
    """

    def __init__(
        self,
        scene: str | Furnish = "table",
        seed: int = 0,
        timestep: float = 0.002,
        *,
        home: Mapping[str, FloatArray] | None = None,
        resolutions: Mapping[str, Resolution] = FULL_RESOLUTION,
    ) -> None:
        built = build_scene(scene, seed, timestep_s=timestep)
        self.model: mujoco.MjModel = built.spec.compile()
        self.data = mujoco.MjData(self.model)
        self.objects = built.objects
        self.resolutions = dict(resolutions)
        self._ports = {part: _Port.of(self.model, part) for part in PARTS}
        poses = {**HOME, **built.posture, **(home or {})}
        self.home = {part: _checked("home", part, poses[part]) for part in PARTS}
        self.reset()

    @property
    def time_s(self) -> float:
        """Simulated time, s."""
        return float(self.data.time)

    def reset(self) -> None:
        """Back to home at time zero, with the objects at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self._steps_owed = 0.0
        for part, values in self.home.items():
            port = self._ports[part]
            self.data.qpos[port.qpos] = np.repeat(port.to_model(values), port.fingers)
            self.set_command(part, values)
        mujoco.mj_forward(self.model, self.data)
        self.step(SETTLE_S)
        self.data.time = 0.0

    def step(self, dt: float) -> None:
        """Advances the physics by ``dt`` s; what is left of a physics step is carried over."""
        self._steps_owed += dt / self.model.opt.timestep
        steps = int(self._steps_owed + 1e-9)
        self._steps_owed -= steps
        if steps:
            mujoco.mj_step(self.model, self.data, nstep=steps)

    def set_command(self, part: str, values: FloatArray) -> None:
        """Sets the position targets of a part; they are tracked until the next command.

        Args:
            part: ``astribot_arm_left``...
            values: Robot units, [dof]. Beyond a joint's limit is clamped to it.

        Raises:
            ConfigError: Unknown part, wrong number of values, or a value that is not finite.
        """
        port = self._ports.get(part)
        if port is None:
            raise ConfigError("command", "part", part, f"one of {', '.join(PARTS)}")
        self.data.ctrl[port.actuators] = port.to_model(_checked("command", part, values))

    def joint_state(self, part: str) -> JointState:
        """Measured state of a part in robot units."""
        port = self._ports[part]
        data = self.data
        # An arm's motors bear gravity; gravity compensation is the twin's way of doing it.
        torque = data.qfrc_actuator[port.dofs] + data.qfrc_gravcomp[port.dofs]
        first = slice(None, None, port.fingers)
        return JointState(
            position=port.to_robot(data.qpos[port.qpos][first]),
            velocity=data.qvel[port.dofs][first] * port.units_per_model,
            acceleration=data.qacc[port.dofs][first] * port.units_per_model,
            torque=np.asarray(torque[first], dtype=np.float64),
        )

    def snapshot(self) -> Snapshot:
        """A copy of the present instant for a renderer."""
        return Snapshot(self.time_s, self.data.qpos.copy())

    def calibration(self, camera: str) -> CameraCalibration:
        """Intrinsics of a camera (``head``, ``left_wrist``, ``right_wrist``) as it renders."""
        if camera not in self.resolutions:
            expected = f"one of {', '.join(self.resolutions)}"
            raise ConfigError("parameter", "camera", camera, expected)
        return pinhole(self.model, camera, self.resolutions[camera])


@dataclass(frozen=True)
class _Port:
    """Where a part lives in the model and how its units translate: robot = offset + k * model."""

    qpos: np.ndarray
    dofs: np.ndarray
    actuators: np.ndarray
    fingers: int
    units_per_model: float
    offset: float

    @classmethod
    def of(cls, model: mujoco.MjModel, part: str) -> _Port:
        names = joint_names(part)
        actuators = np.array([model.actuator(name).id for name in names])
        gripper = part.startswith("astribot_gripper")
        if gripper:
            names = tuple(f"{part}_finger_{label}" for label in "ab")
        joints = [model.joint(name) for name in names]
        return cls(
            qpos=np.array([joint.qposadr[0] for joint in joints]),
            dofs=np.array([joint.dofadr[0] for joint in joints]),
            actuators=actuators,
            fingers=2 if gripper else 1,
            units_per_model=-GRIPPER_CLOSED / FINGER_STROKE if gripper else 1.0,
            offset=GRIPPER_CLOSED if gripper else 0.0,
        )

    def to_model(self, values: FloatArray) -> FloatArray:
        return (values - self.offset) / self.units_per_model

    def to_robot(self, values: FloatArray) -> FloatArray:
        return np.asarray(self.offset + self.units_per_model * values, dtype=np.float64)


def _checked(source: str, part: str, values: object) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (PART_DOF[part],):
        raise ConfigError(source, part, f"{array.size} values", f"{PART_DOF[part]} values")
    if not np.isfinite(array).all():
        raise ConfigError(source, part, array.tolist(), "finite values")
    return array
