"""Expert of Pick and Place."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.grasping import LIFT_M, TILT_RAD, grasp
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.pick_and_place import PLATE, PickAndPlace

ROUNDS = 3


class PickAndPlaceExpert(Expert):
    """Takes the named thing with the arm on its side; picks up again what it drops."""

    def script(self) -> Script:
        """Grasp, carry, put down, look, again if need be."""
        task, sim = self.episode.task, self.episode.sim
        assert isinstance(task, PickAndPlace)  # noqa: S101 - tells the type checker
        body = task.target.body
        for _ in range(ROUNDS):
            side = "left" if position(sim, body)[1] > 0 else "right"
            yield from grasp(self, side, body)
            plate = position(sim, PLATE)
            held_at = self.pinch(side) - position(sim, body)
            level = facing_down(TILT_RAD)
            down = np.array([*plate[:2], TABLE_TOP_M + 0.018 + task.target.lift_m])
            down[:2] += held_at[:2]
            down[2] += max(held_at[2], 0.0)
            yield from self.move(side, HandPose(down + up(LIFT_M), level))
            yield from self.move(side, HandPose(down, level), speed_m_s=0.2)
            yield from self.grip(side, GRIPPER_OPEN, ticks=12)
            away = HandPose(down - 0.10 * level[:, 2] + up(0.03), level)
            yield from self.move(side, away)
            yield from self.wait(8)
            if task.is_success(sim):
                return
