"""Coming to rest within limits: closed forms, so that braking needs no solver and cannot fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class JointState:
    """Commanded motion of every joint at one moment, each [dof], SI (gripper in its own units)."""

    position: FloatArray
    velocity: FloatArray
    acceleration: FloatArray


@dataclass(frozen=True)
class BrakePlan:
    """Three phases of constant jerk -s j, 0, +s j that end at zero velocity and acceleration.

    Attributes:
        start: State the plan begins in.
        sign: Direction of travel that is braked, s, [dof].
        jerk: Jerk magnitude j, [dof].
        duration: Seconds of each phase, [3, dof].
    """

    start: JointState
    sign: FloatArray
    jerk: FloatArray
    duration: FloatArray

    def at(self, time_s: float | FloatArray) -> JointState:
        """State after ``time_s`` seconds (scalar or [dof]) of braking; rest after its end."""
        p, v, a = self.start.position, self.start.velocity, self.start.acceleration
        left = np.broadcast_to(np.asarray(time_s, dtype=np.float64), p.shape)
        for jerk, duration in zip((-1.0, 0.0, 1.0), self.duration, strict=True):
            t = np.minimum(left, duration)
            j = jerk * self.sign * self.jerk
            p = p + t * (v + t * (a / 2.0 + t * j / 6.0))
            v = v + t * (a + t * j / 2.0)
            a = a + t * j
            left = left - t
        done = left > 0.0  # rounding must not leave a joint creeping
        return JointState(p, np.where(done, 0.0, v), np.where(done, 0.0, a))

    def extremes(self) -> tuple[FloatArray, FloatArray]:
        """Lowest and highest position passed while braking, each [dof].

        In the braked direction the speed rises at most once and then falls to zero, so the
        position turns at most once: where the joint was still moving the other way.
        """
        start = self.start
        end = self.at(self.duration[0] + self.duration[1] + self.duration[2]).position
        low, high = np.minimum(start.position, end), np.maximum(start.position, end)
        v, a = self.sign * start.velocity, self.sign * start.acceleration
        if np.all(v >= 0.0):
            return low, high
        # first root of v + a t - j t^2 / 2 = 0, inside the first phase when v < 0
        root = np.sqrt(np.maximum(a * a + 2.0 * self.jerk * v, 0.0))
        turn_s = np.where(v < 0.0, np.clip((a - root) / self.jerk, 0.0, self.duration[0]), 0.0)
        turn = self.at(turn_s).position
        return np.minimum(low, turn), np.maximum(high, turn)


def plan_brake(start: JointState, max_acceleration: FloatArray, max_jerk: FloatArray) -> BrakePlan:
    """Time-optimal jerk-limited plan from any state to rest, each joint on its own.

    With s the sign of the velocity left after ramping the acceleration to zero, and v, a
    mirrored by s: the peak deceleration A without a plateau solves v + a^2/(2j) = A^2/j.

    Args:
        start: State to brake from; |acceleration| at most ``max_acceleration``.
        max_acceleration: [dof].
        max_jerk: [dof].
    """
    j = max_jerk
    coasting = start.velocity + start.acceleration * np.abs(start.acceleration) / (2.0 * j)
    sign = np.where(coasting < 0.0, -1.0, 1.0)
    v, a = sign * start.velocity, sign * start.acceleration
    peak = np.minimum(np.sqrt(np.maximum(j * v + a * a / 2.0, 0.0)), max_acceleration)
    ramp_down = np.maximum((a + peak) / j, 0.0)
    plateau = np.maximum(v + (a * a / 2.0 - peak * peak) / j, 0.0)
    plateau = np.divide(plateau, peak, out=np.zeros_like(peak), where=peak > 0.0)
    return BrakePlan(start, sign, j, np.stack([ramp_down, plateau, peak / j]))


def hard_brake(start: JointState, max_acceleration: FloatArray, dt_s: float) -> JointState:
    """One period of braking with the full acceleration at once, jerk not limited.

    Args:
        start: State to brake from.
        max_acceleration: [dof].
        dt_s: Control period, seconds.
    """
    change = np.clip(-start.velocity, -max_acceleration * dt_s, max_acceleration * dt_s)
    velocity = start.velocity + change
    position = start.position + dt_s * (start.velocity + velocity) / 2.0
    return JointState(position, velocity, np.where(velocity == 0.0, 0.0, change / dt_s))


def stopping_speed(
    distance: FloatArray, max_acceleration: FloatArray, max_jerk: FloatArray
) -> FloatArray:
    """Highest speed from which a joint at zero acceleration stops within a distance.

    Inverse of d = v sqrt(v/j) (peak deceleration not reached) and of
    d = v^2/(2a) + v a/(2j) (reached, v >= a^2/j).

    Args:
        distance: Room left, at least 0, may be inf, [dof].
        max_acceleration: [dof].
        max_jerk: [dof].
    """
    a, j = max_acceleration, max_jerk
    short = np.cbrt(distance * distance * j)
    ramp = a * a / (2.0 * j)
    long = -ramp + np.sqrt(ramp * ramp + 2.0 * a * distance)
    return np.where(distance < a**3 / j**2, short, long)
