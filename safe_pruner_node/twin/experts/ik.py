"""Hands to joints: where an arm's joints must be for its hand to be somewhere."""

from __future__ import annotations

from collections.abc import Mapping

import mink
import mujoco
import numpy as np

from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.experts.hand import HandPose
from safe_pruner_node.twin.joint_table import SIDES, joint_names
from safe_pruner_node.twin.scene import build_scene
from safe_pruner_node.types import FloatArray

ORIENTATION_COST = 0.3
"""Against 1 for position: a rad of turn is worth 0.3 m."""

POSTURE_COST = 5e-3
"""Draws the elbow towards its place at home: one hand pose, one posture, whatever came before."""

ITERATIONS = 60
CONVERGED_RAD = 1e-4


class ArmIk:
    """Solves hand poses one by one, from home: the answer depends on the pose alone.

    Args:
        robot: Position limits of the arms.
        posture: Positions of the parts that are not solved for, by part, robot units.
        home: Home of both arms by side, rad, each [7].
    """

    def __init__(
        self, robot: RobotConfig, posture: Mapping[str, FloatArray], home: Mapping[str, FloatArray]
    ) -> None:
        model = build_scene("empty", 0).spec.compile()
        self._qpos: dict[str, list[int]] = {}
        self._dofs: dict[str, list[int]] = {}
        for side in SIDES:
            part = f"astribot_arm_{side}"
            place, limits = robot.layout.slices[part], robot.limits
            joints = [model.joint(name) for name in joint_names(part)]
            spans = np.stack([limits.min_position[place], limits.max_position[place]], axis=1)
            for joint, span in zip(joints, spans, strict=True):
                joint.range[:] = span
            self._qpos[side] = [int(joint.qposadr[0]) for joint in joints]
            self._dofs[side] = [int(joint.dofadr[0]) for joint in joints]
        self._start = np.zeros(model.nq)
        for part, values in posture.items():
            for name, value in zip(joint_names(part), values, strict=True):
                self._start[model.joint(name).qposadr[0]] = value
        for side in SIDES:
            self._start[self._qpos[side]] = home[side]
        self._configuration = mink.Configuration(model, self._start)
        self._hands = {
            side: mink.FrameTask(
                f"astribot_gripper_{side}_pinch",
                "site",
                position_cost=1.0,
                orientation_cost=ORIENTATION_COST,
                lm_damping=1e-3,
            )
            for side in SIDES
        }
        self._rest = mink.PostureTask(model, cost=POSTURE_COST)
        self._rest.set_target(self._start)
        self._limits = [mink.ConfigurationLimit(model)]
        self._frozen = {
            side: [mink.DofFreezingTask(model, [d for d in range(model.nv) if d not in dofs])]
            for side, dofs in self._dofs.items()
        }

    def solve(self, side: str, pose: HandPose, near: FloatArray | None = None) -> FloatArray:
        """Joint positions that bring a hand to a pose, or as near as the limits let it, [7].

        Args:
            side: Which hand.
            pose: Where to.
            near: Joints to search from, rad, [7]; home by default. Where there are two answers
                this is the way to stay with one.
        """
        hand, configuration = self._hands[side], self._configuration
        rotation = mink.SO3.from_matrix(pose.rotation)
        hand.set_target(mink.SE3.from_rotation_and_translation(rotation, pose.position))
        self._place(side, self._start[self._qpos[side]] if near is None else near)
        for _ in range(ITERATIONS):
            step = mink.solve_ik(
                configuration,
                [hand, self._rest],
                1.0,
                "daqp",
                damping=1e-6,
                limits=self._limits,
                constraints=self._frozen[side],
            )
            configuration.integrate_inplace(step, 1.0)
            if np.abs(step).max() < CONVERGED_RAD:
                break
        return np.array(configuration.q[self._qpos[side]])

    def pose(self, side: str, joints: FloatArray) -> HandPose:
        """Where a hand is with its arm's joints somewhere, rad, [7]."""
        self._place(side, joints)
        site = self._configuration.data.site(f"astribot_gripper_{side}_pinch")
        return HandPose(np.array(site.xpos), np.array(site.xmat).reshape(3, 3))

    def jacobian(self, side: str, joints: FloatArray) -> FloatArray:
        """Velocity of the pinch point in the world per joint velocity, m, [3, 7]."""
        self._place(side, joints)
        model, data = self._configuration.model, self._configuration.data
        linear = np.zeros((3, model.nv))
        site = model.site(f"astribot_gripper_{side}_pinch").id
        mujoco.mj_jacSite(model, data, linear, None, site)
        return linear[:, self._dofs[side]]

    def _place(self, side: str, joints: FloatArray) -> None:
        q = self._start.copy()
        q[self._qpos[side]] = joints
        self._configuration.update(q)
