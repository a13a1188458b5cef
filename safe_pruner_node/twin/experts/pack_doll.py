"""Expert of Pack Doll."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.grasping import BLEND_S, TILT_RAD, grasp
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_CLOSED, GRIPPER_OPEN
from safe_pruner_node.twin.tasks.pack_doll import (
    CARTON,
    CARTON_HEIGHT_M,
    CLOSED_WITHIN_RAD,
    DOLL,
    LID_HINGE_M,
    LID_OPEN_RAD,
    PackDoll,
)
from safe_pruner_node.types import FloatArray

ROUNDS = 3
CARRY_S = 1.1
LOWER_S = 0.6
RELEASE_S = 0.25
BACK_S = 0.6
HOME_S = 1.3

OVER_M = 0.09
DROP_M = 0.012
"""The doll's origin above the rim when it is let go: the fingertips are level with the rim."""

PINCH_ABOVE_M = 0.004

PUSH_RADIUS_M = 0.12
"""Where the hand pushes the lid, from the hinge."""

PUSH_GAP_M = 0.030
"""From the lid to the pinch point of a closed hand that pushes it."""

CLEAR_M = 0.09
"""From the lid to a hand that is about to push it."""

PUSHED_RAD = 0.75
"""How far over the lid is pushed; from upright on it falls shut by itself."""

LID_TILT_RAD = 0.9
BESIDE_S = 1.2
PUSH_S = 1.3
FALL_S = 0.5


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
        yield from self.turn(packing, self.home[packing], seconds=HOME_S, early_s=HOME_S / 2)
        for _ in range(ROUNDS):
            yield from self._close(closing, -task.doll_side)
            if task.lid_angle(sim) < CLOSED_WITHIN_RAD:
                break
        yield from self.turn(closing, self.home[closing], seconds=HOME_S)

    def _pack(self, side: str) -> Script:
        yield from grasp(self, side, DOLL, above_m=PINCH_ABOVE_M)
        level = facing_down(TILT_RAD)
        inside = self.locate(CARTON) + up(CARTON_HEIGHT_M + DROP_M + PINCH_ABOVE_M)
        over = HandPose(inside + up(OVER_M), level)
        yield from self.move(side, over, seconds=CARRY_S, early_s=BLEND_S)
        yield from self.move(side, HandPose(inside, level), seconds=LOWER_S)
        yield from self.grip(side, GRIPPER_OPEN, seconds=RELEASE_S)
        back = HandPose(inside - OVER_M * level[:, 2] + up(0.02), level)
        yield from self.move(side, back, seconds=BACK_S, early_s=BLEND_S)

    def _close(self, side: str, hinge_side: int) -> Script:
        """Pushes the lid over with a closed hand until it falls shut, and goes home."""
        rotation = facing_down(LID_TILT_RAD)
        hinge_y, hinge_z = LID_HINGE_M
        hinge = self.locate(CARTON) + np.array([0, hinge_side * hinge_y, hinge_z])

        def beside_lid(angle_rad: float, gap_m: float) -> HandPose:
            along: FloatArray = np.array([0.0, -hinge_side * np.cos(angle_rad), np.sin(angle_rad)])
            outwards = np.array([0.0, hinge_side * np.sin(angle_rad), np.cos(angle_rad)])
            return HandPose(hinge + PUSH_RADIUS_M * along + gap_m * outwards, rotation)

        self._fingers[side] = GRIPPER_CLOSED
        yield from self.move(
            side, beside_lid(LID_OPEN_RAD, CLEAR_M), seconds=BESIDE_S, early_s=BLEND_S
        )
        yield from self.move(side, beside_lid(PUSHED_RAD, PUSH_GAP_M), seconds=PUSH_S)
        yield from self.move(side, beside_lid(LID_OPEN_RAD, CLEAR_M), seconds=PUSH_S)
        self._fingers[side] = GRIPPER_OPEN
