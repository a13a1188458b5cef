"""Expert of Throw Basketball."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import TICK_HZ, TICK_S, Expert, Script
from safe_pruner_node.twin.experts.grasping import TILT_RAD, grasp
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.experts.ik import ORIENTATION_COST
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.throw_basketball import BALL, HOOP, ThrowBasketball
from safe_pruner_node.types import FloatArray

ROUNDS = 3
GRAVITY_M_S2 = 9.81

SWING_M_S = np.array([0.90, 0.0, 0.20])
"""Velocity of the hand when it lets go: forwards and a little up."""

SWING_ORIENTATION_COST = 0.05

RAMP_S = 0.30
CRUISE_S = 0.24
BRAKE_S = 0.20

RELEASE_ABOVE_RIM_M = 0.30
HOLDING = 48.0
"""Gripper units that hold the ball and let it go within a few hundredths of a second."""

RELEASE_DELAY_S = 0.05
"""From the action that opens the fingers to the ball flying free, measured."""

REACH_X_M = 0.72
"""A ball beyond this is lost."""


class ThrowBasketballExpert(Expert):
    """Swings towards the hoop and lets go when the ball would fall through it."""

    def script(self) -> Script:
        """Grasp and throw until it goes in or the ball is out of reach."""
        task, sim = self.episode.task, self.episode.sim
        assert isinstance(task, ThrowBasketball)  # noqa: S101 - tells the type checker
        for _ in range(ROUNDS):
            side = "left" if position(sim, BALL)[1] > 0 else "right"
            yield from grasp(self, side, BALL, symmetry_rad=1e-3)
            yield from self._throw(side)
            yield from self.wait(40)
            ball = position(sim, BALL)
            if task.is_success(sim) or ball[0] > REACH_X_M or ball[2] < TABLE_TOP_M:
                return

    def _throw(self, side: str) -> Script:
        sim = self.episode.sim
        hoop = position(sim, HOOP)
        level = facing_down(TILT_RAD)
        height = hoop[2] + RELEASE_ABOVE_RIM_M
        release = np.array([hoop[0], hoop[1], height])
        release[0] -= SWING_M_S[0] * _fall_s(RELEASE_ABOVE_RIM_M, SWING_M_S[2])
        start = HandPose(release - SWING_M_S * (RAMP_S / 2 + CRUISE_S / 2), level)
        yield from self.move(side, HandPose(start.position + up(0.02), level))
        yield from self.grip(side, HOLDING, ticks=4)
        yield from self.move(side, start, speed_m_s=0.2)
        # In a swing the way counts: an arm that need not keep its hand level is faster.
        self._ik.set_orientation_cost(side, SWING_ORIENTATION_COST)
        opened = False
        ticks = int(np.ceil((RAMP_S + CRUISE_S + BRAKE_S) * TICK_HZ))
        for k in range(1, ticks + 1):
            way = SWING_M_S * _swung_s(k * TICK_S)
            self._targets[side] = start.moved(way)
            if not opened and self._would_land() >= hoop[0]:
                self._fingers[side] = GRIPPER_OPEN
                opened = True
            yield
        self._fingers[side] = GRIPPER_OPEN
        self._ik.set_orientation_cost(side, ORIENTATION_COST)
        yield from self.sweep(side, start.moved(up(0.05)))

    def _would_land(self) -> float:
        """Where along x the ball would cross the rim's plane, let go by the next action, m."""
        sim = self.episode.sim
        velocity: FloatArray = np.array(sim.data.joint(BALL).qvel[:3])
        at = position(sim, BALL) + RELEASE_DELAY_S * velocity
        drop = at[2] - position(sim, HOOP)[2]
        return float(at[0] + velocity[0] * _fall_s(drop, velocity[2]))


def _fall_s(drop_m: float, upwards_m_s: float) -> float:
    """Time to fall by a height from a vertical velocity, s."""
    root = np.sqrt(max(upwards_m_s**2 + 2 * GRAVITY_M_S2 * drop_m, 0.0))
    return float((upwards_m_s + root) / GRAVITY_M_S2)


def _swung_s(time_s: float) -> float:
    """Way of a swing at unit speed that ramps up, cruises and brakes, s."""
    ramp = min(time_s, RAMP_S)
    cruise = np.clip(time_s - RAMP_S, 0.0, CRUISE_S)
    brake = np.clip(time_s - RAMP_S - CRUISE_S, 0.0, BRAKE_S)
    return float(ramp**2 / (2 * RAMP_S) + cruise + brake - brake**2 / (2 * BRAKE_S))
