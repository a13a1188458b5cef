"""Hands to joints: differential inverse kinematics of both arms within the robot's limits."""

from __future__ import annotations

from collections.abc import Mapping

import mink
import numpy as np

from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.experts.hand import HandPose
from safe_pruner_node.twin.joint_table import SIDES, joint_names
from safe_pruner_node.twin.scene import build_scene
from safe_pruner_node.types import FloatArray

VELOCITY_SHARE = 0.9
"""Share of the robot's velocity limits that the solution uses: noise comes on top."""


ORIENTATION_COST = 0.3
"""Against 1 for position: a rad of turn is worth 0.3 m."""


class ArmIk:
    """Solves one tick at a time; the torso stays where it is.

    Args:
        robot: Position and velocity limits of the arms.
        posture: Positions of the parts that are not solved for, by part, robot units.
        arms: Start of both arms by side, rad, each [7].
        dt_s: Time between two solutions, s.
    """

    def __init__(
        self,
        robot: RobotConfig,
        posture: Mapping[str, FloatArray],
        arms: Mapping[str, FloatArray],
        dt_s: float,
    ) -> None:
        self._model = build_scene("empty", 0).spec.compile()
        self._dt_s = dt_s
        self._address = {
            side: np.array(
                [self._model.joint(name).qposadr[0] for name in joint_names(f"astribot_arm_{side}")]
            )
            for side in SIDES
        }
        velocity = {}
        for side in SIDES:
            part = f"astribot_arm_{side}"
            place = robot.layout.slices[part]
            limits = robot.limits
            ranges = np.stack([limits.min_position[place], limits.max_position[place]], axis=1)
            for name, span, rate in zip(
                joint_names(part), ranges, limits.max_velocity[place], strict=True
            ):
                self._model.joint(name).range[:] = span
                velocity[name] = VELOCITY_SHARE * float(rate)
        q = np.zeros(self._model.nq)
        for part, values in posture.items():
            for name, value in zip(joint_names(part), values, strict=True):
                q[self._model.joint(name).qposadr[0]] = value
        for side in SIDES:
            q[self._address[side]] = arms[side]
        self._configuration = mink.Configuration(self._model, q)
        self._hands = {
            side: mink.FrameTask(
                f"astribot_gripper_{side}_pinch",
                "site",
                position_cost=1.0,
                orientation_cost=ORIENTATION_COST,
                lm_damping=1e-4,
            )
            for side in SIDES
        }
        rest = mink.PostureTask(self._model, cost=5e-3)
        rest.set_target(q)
        self._tasks = [*self._hands.values(), rest]
        self._limits = [
            mink.ConfigurationLimit(self._model),
            mink.VelocityLimit(self._model, velocity),
        ]
        arm_dofs = {
            int(self._model.joint(name).dofadr[0])
            for side in SIDES
            for name in joint_names(f"astribot_arm_{side}")
        }
        others = [dof for dof in range(self._model.nv) if dof not in arm_dofs]
        self._frozen = [mink.DofFreezingTask(self._model, dof_indices=others)]

    def pose(self, side: str) -> HandPose:
        """Where the solution has a hand at present."""
        site = self._configuration.data.site(f"astribot_gripper_{side}_pinch")
        return HandPose(np.array(site.xpos), np.array(site.xmat).reshape(3, 3))

    def set_orientation_cost(self, side: str, cost: float) -> None:
        """How much a hand's orientation counts, against 1 for its position."""
        self._hands[side].set_orientation_cost(cost)

    def solve(self, targets: Mapping[str, HandPose]) -> dict[str, FloatArray]:
        """Joint targets one tick closer to the hands' targets, by side, rad, each [7]."""
        for side, pose in targets.items():
            rotation = mink.SO3.from_matrix(pose.rotation)
            self._hands[side].set_target(
                mink.SE3.from_rotation_and_translation(rotation, pose.position)
            )
        velocity = mink.solve_ik(
            self._configuration,
            self._tasks,
            self._dt_s,
            "daqp",
            damping=1e-6,
            limits=self._limits,
            constraints=self._frozen,
        )
        self._configuration.integrate_inplace(velocity, self._dt_s)
        q = self._configuration.q
        return {side: np.array(q[self._address[side]]) for side in SIDES}
