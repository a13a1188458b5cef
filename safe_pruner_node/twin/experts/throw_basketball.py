"""Expert of Throw Basketball."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.grasping import grasp, side_of
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.throw_basketball import BALL, HOOP, ThrowBasketball

ROUNDS = 3
GRAVITY_M_S2 = 9.81

TOSS_M_S = np.array([0.85, 0.0, 0.85])
"""Velocity of the hand when it lets go: an underhand toss, as fast as the joints allow there."""

RELEASE_ABOVE_RIM_M = 0.12
RELEASE_TILT_RAD = 0.7

SHOULDER_AND_ELBOW = 4
"""The first joints swing. The wrist, near its limits, takes from the lift to the release to turn:
it moves fastest where the swing begins, so that every instant looks different from the next."""

HOLDING = 56.0
"""Gripper units that hold the ball: it is free a few hundredths of a second after opening."""

RAMP_S = 0.5
CRUISE_S = 0.20
SWING_S = 2 * RAMP_S + CRUISE_S

RELEASE_S = RAMP_S + CRUISE_S / 2
"""From the start of the swing to its middle, the point of release. Arm and fingers lag alike: a
tenth of a second sooner or later the ball still goes in."""

WIND_UP_S = 1.2
EARLY_S = 0.3
HOME_S = 1.2

REACH_X_M = 0.66
"""A ball beyond this is lost."""


class ThrowBasketballExpert(Expert):
    """Swings towards the hoop and lets go in the middle of the swing."""

    def script(self) -> Script:
        """Grasp and throw until it goes in or the ball is out of reach."""
        task, sim = self.episode.task, self.episode.sim
        assert isinstance(task, ThrowBasketball)  # noqa: S101 - tells the type checker
        for _ in range(ROUNDS):
            side = side_of(self, BALL)
            yield from grasp(self, side, BALL, closed=HOLDING)
            yield from self._throw(side)
            yield from self.turn(side, self.home[side], seconds=HOME_S)
            ball = position(sim, BALL)
            if task.is_success(sim) or ball[0] > REACH_X_M or ball[2] < TABLE_TOP_M:
                return

    def _throw(self, side: str) -> Script:
        hoop = self.locate(HOOP)
        release = hoop + up(RELEASE_ABOVE_RIM_M)
        release[:2] -= TOSS_M_S[:2] * fall_s(RELEASE_ABOVE_RIM_M, TOSS_M_S[2])
        joints = self.ik.solve(side, HandPose(release, facing_down(RELEASE_TILT_RAD)))
        jacobian = self.ik.jacobian(side, joints)[:, :SHOULDER_AND_ELBOW]
        still, forth = np.zeros((2, 7))
        forth[:SHOULDER_AND_ELBOW] = np.linalg.pinv(jacobian) @ TOSS_M_S * (RAMP_S + CRUISE_S)
        back = joints - forth / 2 - self.goal(side)
        turn = back.copy()
        turn[:SHOULDER_AND_ELBOW] = 0.0
        self.begin(side, np.stack([still, turn]), WIND_UP_S - EARLY_S + RELEASE_S)
        self.begin(side, np.stack([still, back - turn]), WIND_UP_S)
        yield from self.wait(WIND_UP_S - EARLY_S)
        self.begin(side, np.stack([still, forth]), SWING_S, swing)
        yield from self.wait(RELEASE_S)
        yield from self.grip(side, GRIPPER_OPEN, seconds=SWING_S - RELEASE_S)


def fall_s(drop_m: float, upwards_m_s: float) -> float:
    """Time to fall by a height from a vertical velocity, s."""
    root = np.sqrt(max(upwards_m_s**2 + 2 * GRAVITY_M_S2 * drop_m, 0.0))
    return float((upwards_m_s + root) / GRAVITY_M_S2)


def swing(share: float) -> float:
    """A shape that ramps up smoothly to a constant speed, keeps it, and ramps down."""
    time_s = share * SWING_S
    up_s = min(time_s, RAMP_S) / RAMP_S
    down_s = max(time_s - RAMP_S - CRUISE_S, 0.0) / RAMP_S
    cruise_s = min(max(time_s - RAMP_S, 0.0), CRUISE_S + RAMP_S)
    way = RAMP_S * _ramped(up_s) + cruise_s - RAMP_S * _ramped(down_s)
    return way / (RAMP_S + CRUISE_S)


def _ramped(share: float) -> float:
    """Way along a ramp of speed 0 to 1 by the polynomial 3 s^2 - 2 s^3."""
    return share**3 - share**4 / 2
