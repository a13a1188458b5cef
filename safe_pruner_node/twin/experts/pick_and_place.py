"""Expert of Pick and Place."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.grasping import BLEND_S, TILT_RAD, grasp, side_of
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.pick_and_place import PLATE, PickAndPlace

ROUNDS = 3
OVER_M = 0.09
CARRY_S = 1.1
LOWER_S = 0.6
RELEASE_S = 0.25
BACK_S = 0.6
HOME_S = 1.2

DROP_M = 0.022
"""Above the table with the thing's height taken off: the plate and a finger's breadth."""


class PickAndPlaceExpert(Expert):
    """Takes the named thing with the hand on its side; picks up again what it drops."""

    def script(self) -> Script:
        """Grasp, carry, put down, go home, again if need be."""
        task, sim = self.episode.task, self.episode.sim
        assert isinstance(task, PickAndPlace)  # noqa: S101 - tells the type checker
        body = task.target.body
        level = facing_down(TILT_RAD)
        for _ in range(ROUNDS):
            side = side_of(self, body)
            yield from grasp(self, side, body)
            plate = self.locate(PLATE)
            down = np.array([*plate[:2], TABLE_TOP_M + DROP_M + task.target.lift_m])
            over = HandPose(down + up(OVER_M), level)
            yield from self.move(side, over, seconds=CARRY_S, early_s=BLEND_S)
            if position(sim, body)[2] < down[2]:
                continue  # lost on the way
            yield from self.move(side, HandPose(down, level), seconds=LOWER_S)
            yield from self.grip(side, GRIPPER_OPEN, seconds=RELEASE_S)
            back = HandPose(down - OVER_M * level[:, 2] + up(0.02), level)
            yield from self.move(side, back, seconds=BACK_S, early_s=BLEND_S)
            yield from self.turn(side, self.home[side], seconds=HOME_S)
            if task.is_success(sim):
                return
