"""Expert of Pack Doll."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.grasping import LIFT_M, TILT_RAD, grasp
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_CLOSED, GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.pack_doll import (
    CARTON,
    CLOSED_WITHIN_RAD,
    DOLL,
    LID_HINGE_M,
    LID_OPEN_RAD,
    PackDoll,
)
from safe_pruner_node.types import FloatArray

ROUNDS = 3
AJAR = 45.0
"""Gripper units that let go of the doll and stay clear of the walls."""

PUSH_RADIUS_M = 0.11
"""Where the hand pushes the lid, from the hinge."""

PUSH_GAP_M = 0.030
"""From the lid to the pinch point of a closed hand that pushes it."""

LID_TILT_RAD = 0.9


class PackDollExpert(Expert):
    """Packs with the hand on the doll's side, closes with the other."""

    def script(self) -> Script:
        """Pack until it is inside, then close until it is closed."""
        task, sim = self.episode.task, self.episode.sim
        assert isinstance(task, PackDoll)  # noqa: S101 - tells the type checker
        packing, closing = ("left", "right") if task.doll_side > 0 else ("right", "left")
        for _ in range(ROUNDS):
            if task.doll_inside(sim):
                break
            yield from self._pack(packing)
        aside = np.array([0.44, task.doll_side * 0.34, TABLE_TOP_M + 0.20])
        yield from self.sweep(packing, HandPose(aside, facing_down(TILT_RAD)))
        for _ in range(ROUNDS):
            yield from self._close(closing, -task.doll_side)
            if task.lid_angle(sim) < CLOSED_WITHIN_RAD:
                return

    def _pack(self, side: str) -> Script:
        sim = self.episode.sim
        # The doll is round: any turn of the hand will do.
        yield from grasp(self, side, DOLL, above_m=0.004, symmetry_rad=1e-3)
        held_at = self.pinch(side) - position(sim, DOLL)
        level = facing_down(TILT_RAD)
        inside = position(sim, CARTON) + up(0.008 + 0.022 + 0.03)
        inside = inside + held_at
        yield from self.move(side, HandPose(inside + up(LIFT_M), level))
        yield from self.move(side, HandPose(inside, level), speed_m_s=0.2)
        yield from self.grip(side, AJAR, ticks=10)
        yield from self.move(side, HandPose(inside - 0.10 * level[:, 2] + up(0.08), level))
        yield from self.grip(side, GRIPPER_OPEN, ticks=1)

    def _close(self, side: str, hinge_side: int) -> Script:
        """Swings the lid over with a closed hand, then presses it down and lets go."""
        rotation = facing_down(LID_TILT_RAD)
        hinge_y, hinge_z = LID_HINGE_M
        hinge = position(self.episode.sim, CARTON) + np.array([0, hinge_side * hinge_y, hinge_z])

        def beside_lid(angle_rad: float, gap_m: float) -> HandPose:
            along: FloatArray = np.array([0.0, -hinge_side * np.cos(angle_rad), np.sin(angle_rad)])
            outwards = np.array([0.0, hinge_side * np.sin(angle_rad), np.cos(angle_rad)])
            return HandPose(hinge + PUSH_RADIUS_M * along + gap_m * outwards, rotation)

        yield from self.grip(side, GRIPPER_CLOSED, ticks=1)
        yield from self.move(side, beside_lid(LID_OPEN_RAD, 0.08))
        for angle in np.linspace(LID_OPEN_RAD, 0.2, 12):
            yield from self.sweep(side, beside_lid(float(angle), PUSH_GAP_M), speed_m_s=0.25)
        yield from self.move(side, beside_lid(0.0, PUSH_GAP_M - 0.008), speed_m_s=0.15)
        yield from self.move(side, beside_lid(0.0, 0.12))
