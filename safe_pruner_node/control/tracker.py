"""The last filter before the robot: whatever is asked, the command obeys the joint limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ruckig
from numpy.typing import NDArray

from safe_pruner_node.control.braking import (
    JointState,
    hard_brake,
    plan_brake,
    stopping_speed,
)
from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.types import FloatArray

_TOLERANCE = 1e-9
_TRACKED_SPEED = 0.98  # share of the velocity limit a target may use; the rest is for catching up


@dataclass(frozen=True)
class Command:
    """What the joints are told at one tick.

    Attributes:
        position: Robot units, [dof].
        velocity: Robot units per second, [dof].
        clamped: True when the request lay outside the position limits, or reaching it in this
            tick would have taken more than the velocity limit.
    """

    position: FloatArray
    velocity: FloatArray
    clamped: bool


class LimitedTracker:
    """Follows a moving target within position, velocity, acceleration and jerk limits.

    Every tick a time-optimal intercept (ruckig, per joint) is solved in the frame of the moving
    target, so that a target within limits is followed without lag. Its next state is used for a
    joint only if that joint could still brake inside its position limits from there; otherwise
    the joint brakes. The current state is thus always one that braking keeps inside the limits,
    by induction from rest.

    Args:
        limits: Limits in layout order.
        dt_s: Control period, seconds.
    """

    def __init__(self, limits: JointLimits, dt_s: float) -> None:
        self._limits = limits
        self._dt_s = dt_s
        self._solver = ruckig.Ruckig(limits.dof, dt_s)
        self._input = ruckig.InputParameter(limits.dof)
        self._input.synchronization = ruckig.Synchronization.No
        zeros = [0.0] * limits.dof
        self._input.target_position = zeros
        self._input.target_velocity = zeros
        self._input.max_acceleration = limits.max_acceleration.tolist()
        self._input.max_jerk = limits.max_jerk.tolist()
        self._trajectory = ruckig.Trajectory(limits.dof)
        self._hard = False
        self._solver_errors = 0
        self.reset(np.clip(np.zeros(limits.dof), limits.min_position, limits.max_position))

    def reset(self, position: FloatArray) -> None:
        """Begin at rest at ``position`` [dof].

        A position outside the limits is kept, never jumped from: the joint may then only move
        inwards.
        """
        zeros = np.zeros(self._limits.dof)
        self._state = JointState(np.array(position, dtype=np.float64), zeros, zeros.copy())
        self._low = np.minimum(self._limits.min_position, self._state.position)
        self._high = np.maximum(self._limits.max_position, self._state.position)
        self._hard = False

    @property
    def position(self) -> FloatArray:
        """Last commanded position, [dof]."""
        return np.array(self._state.position, dtype=np.float64)

    @property
    def at_rest(self) -> bool:
        """True when no joint moves or accelerates."""
        return not bool(np.any(self._state.velocity) or np.any(self._state.acceleration))

    @property
    def solver_errors(self) -> int:
        """Ticks in which ruckig found no solution and the joints braked instead."""
        return self._solver_errors

    def track(self, position: FloatArray, velocity: FloatArray) -> Command:
        """Command for this tick, towards a target that moves.

        Args:
            position: Where the target is at this tick, [dof]; not finite means brake.
            velocity: How fast it moves, [dof].
        """
        limits, dt_s, state = self._limits, self._dt_s, self._state
        if self._hard:
            return self.brake(hard=True)
        if not (np.all(np.isfinite(position)) and np.all(np.isfinite(velocity))):
            return self._advance(self._braked(), clamped=True)
        target = np.clip(position, limits.min_position, limits.max_position)
        reach = limits.max_velocity * dt_s * (1.0 + _TOLERANCE) + _TOLERANCE
        clamped = bool(
            np.any(np.abs(position - target) > _TOLERANCE)
            or np.any(np.abs(target - state.position) > reach)
        )
        moved = self._intercept(target, self._bounded_velocity(target, velocity))
        if moved is None:
            return self._advance(self._braked(), clamped=clamped)
        trapped = ~self._can_still_stop(moved)
        if np.any(trapped):
            moved = _mixed(trapped, self._braked(), moved)
        return self._advance(moved, clamped=clamped)

    def brake(self, *, hard: bool = False) -> Command:
        """Command for this tick, towards rest; constant once at rest.

        Args:
            hard: Use the full acceleration at once, jerk not limited. Once begun, a hard brake
                runs to rest.
        """
        if self.at_rest:
            self._hard = False
            return self._advance(self._state)
        self._hard = self._hard or hard
        if self._hard:
            return self._advance(hard_brake(self._state, self._limits.max_acceleration, self._dt_s))
        return self._advance(self._braked())

    def _braked(self) -> JointState:
        """State after this tick of jerk-limited braking."""
        limits = self._limits
        plan = plan_brake(self._state, limits.max_acceleration, limits.max_jerk)
        return plan.at(self._dt_s)

    def _bounded_velocity(self, target: FloatArray, velocity: FloatArray) -> FloatArray:
        """Target velocity that leaves room to catch up and to stop before a limit, [dof]."""
        limits = self._limits
        fastest = _TRACKED_SPEED * limits.max_velocity
        a, j = limits.max_acceleration, limits.max_jerk
        up = np.minimum(fastest, stopping_speed(limits.max_position - target, a, j))
        down = np.minimum(fastest, stopping_speed(target - limits.min_position, a, j))
        return np.clip(velocity, -down, up)

    def _intercept(self, target: FloatArray, velocity: FloatArray) -> JointState | None:
        """State after this tick on the way to the moving target; None when ruckig fails."""
        state, dt_s, request = self._state, self._dt_s, self._input
        # in the target's frame the target rests at the origin; it is at `target` after this tick
        relative = state.position - target + velocity * dt_s
        request.current_position = relative.tolist()
        request.current_velocity = (state.velocity - velocity).tolist()
        request.current_acceleration = state.acceleration.tolist()
        request.max_velocity = (self._limits.max_velocity - velocity).tolist()
        request.min_velocity = (-self._limits.max_velocity - velocity).tolist()
        try:
            result = self._solver.calculate(request, self._trajectory)
        except ruckig.RuckigError:
            result = ruckig.Result.Error
        if result not in (ruckig.Result.Working, ruckig.Result.Finished):
            self._solver_errors += 1
            return None
        p, v, a = (np.array(values) for values in self._trajectory.at_time(dt_s))
        return JointState(p + target, v + velocity, a)

    def _can_still_stop(self, state: JointState) -> NDArray[np.bool_]:
        """Which joints are within their rates and could brake inside their positions, [dof]."""
        limits = self._limits
        low, high = plan_brake(state, limits.max_acceleration, limits.max_jerk).extremes()
        return np.asarray(
            (low >= self._low - _TOLERANCE)
            & (high <= self._high + _TOLERANCE)
            & (np.abs(state.velocity) <= limits.max_velocity + _TOLERANCE)
            & (np.abs(state.acceleration) <= limits.max_acceleration + _TOLERANCE),
            dtype=np.bool_,
        )

    def _advance(self, state: JointState, *, clamped: bool = False) -> Command:
        position = np.clip(state.position, self._low, self._high)  # rounding only
        self._state = JointState(position, state.velocity, state.acceleration)
        # a joint that began outside its limits may come in but not go back out
        self._low = np.minimum(self._limits.min_position, np.maximum(self._low, position))
        self._high = np.maximum(self._limits.max_position, np.minimum(self._high, position))
        return Command(position.copy(), state.velocity.copy(), clamped)


def _mixed(mask: NDArray[np.bool_], where: JointState, otherwise: JointState) -> JointState:
    """One state for the joints of a mask, another for the rest."""
    return JointState(
        np.where(mask, where.position, otherwise.position),
        np.where(mask, where.velocity, otherwise.velocity),
        np.where(mask, where.acceleration, otherwise.acceleration),
    )
