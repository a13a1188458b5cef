"""Who decides what the joints are told: HOLD, POLICY or ESTOP."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from safe_pruner_node.control.chunk_buffer import ChunkBuffer, malformation
from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.control.settings import ControlSettings
from safe_pruner_node.control.statistics import ControlCounters
from safe_pruner_node.control.tracker import Command, LimitedTracker
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import ActionChunk, FloatArray

__all__ = ["ControlOutput", "ControlSettings", "ControlSupervisor", "Mode", "Outcome"]

_NOT_STARTED = "not started"
_WAITING = "waiting for the first chunk"
_WORKER_LOST = "worker lost"
_MAX_HALF_WINDOW_S = 0.1
_EPSILON_S = 1e-9


class Mode(Enum):
    """What drives the joints."""

    HOLD = "HOLD"
    POLICY = "POLICY"
    ESTOP = "ESTOP"


@dataclass(frozen=True)
class Outcome:
    """Answer to a request.

    Attributes:
        ok: True when it was granted.
        message: Why not; or, in a few words, what happened.
    """

    ok: bool
    message: str


@dataclass(frozen=True)
class ControlOutput:
    """Result of one tick.

    Attributes:
        position: Command in layout order, robot units, [dof]; None before the first measured
            state: nothing is to be published then.
        velocity: Its velocity, [dof]; None with ``position``.
        mode: Mode in force.
        armed: True when started and waiting for the first chunk (mode is HOLD then).
        hold_reason: Why the joints are held; empty while the policy moves them.
        starved: True when the newest chunk has ended and the joints rest for want of the next.
        clamped: True when the policy's target was altered to obey the limits.
        remaining_actions: Actions of the newest chunk not yet played.
        max_step: Largest change of a command since the last tick as a share of what the
            velocity limit allows; at most 1.
        epoch: Epoch that policy queries must carry.
        chunk_time_s: ``time_s`` of the newest chunk that this command follows; None in HOLD.
        counters: Totals, a copy.
    """

    position: FloatArray | None
    velocity: FloatArray | None
    mode: Mode
    armed: bool
    hold_reason: str
    starved: bool
    clamped: bool
    remaining_actions: int
    max_step: float
    epoch: int
    chunk_time_s: float | None
    counters: ControlCounters


class ControlSupervisor:
    """State machine between measured joints, policy chunks, people, and the command stream.

    It has no thread and no clock of its own; every method may be called from any thread. The
    command starts at the measured position, obeys the limits in every mode and never jumps.

    Args:
        settings: Times and tolerances.
        limits: Joint limits in layout order.

    Raises:
        ConfigError: The tolerance has another size than the limits.
    """

    def __init__(self, settings: ControlSettings, limits: JointLimits) -> None:
        tolerances = len(settings.first_action_tolerance)
        if tolerances != limits.dof:
            expected = f"one value per joint ({limits.dof})"
            raise ConfigError("control", "first_action_tolerance", tolerances, expected)
        self._settings = settings
        self._limits = limits
        self._lock = threading.Lock()
        self._buffer = ChunkBuffer(limits.dof, settings.blend_s)
        self._tracker = LimitedTracker(limits, settings.dt_s)
        # Noise between two actions moves the plan's velocity faster than a joint can follow.
        # Chasing it time-optimally amplifies it, so the plan's velocity is averaged over the
        # time a joint takes to build up its acceleration. The position is not averaged.
        build_up_s = float(np.max(limits.max_acceleration / limits.max_jerk))
        self._half_window_s = min(max(build_up_s, settings.dt_s), _MAX_HALF_WINDOW_S)
        self._counters = ControlCounters.zero(limits.dof)
        self._mode = Mode.HOLD
        self._reason = _NOT_STARTED
        self._armed = False
        self._resume = False  # take up POLICY again once the fault is gone
        self._worker_ready = False
        self._worker_lost_s: float | None = None
        self._measured: FloatArray | None = None
        self._measured_s = 0.0
        self._has_command = False
        self._armed_s = 0.0
        self._remaining = 0
        self._bad_chunks = 0
        self._query_due_s = 0.0
        self._last_tick_s: float | None = None

    @property
    def mode(self) -> Mode:
        """Mode in force."""
        return self._mode

    @property
    def epoch(self) -> int:
        """Epoch that policy queries must carry."""
        return self._buffer.epoch

    def wants_query(self, now_s: float) -> bool:
        """True while a policy query makes sense: armed, or in POLICY with the newest chunk shown.

        A chunk continues the motion that its observation shows. A query made before the chunk
        in play has moved the joints for as long as an answer takes would continue the motion
        before that one, and the two would be played in turn, each going back on the other.

        Args:
            now_s: Control-clock time of the observation, seconds.
        """
        if self._armed:
            return True
        return self._mode is Mode.POLICY and now_s >= self._query_due_s - _EPSILON_S

    @property
    def remaining_actions(self) -> int:
        """Actions of the newest chunk not yet played at the last tick."""
        return self._remaining

    @property
    def counters(self) -> ControlCounters:
        """Counters so far, a copy."""
        with self._lock:
            return self._counters.copy()

    def reset(self) -> None:
        """Forget the command, the measured state and the counters, for a stream that begins.

        The next measured state is where the command begins, so never call this while commands
        reach the robot: they would jump by the tracking error. A latched emergency stop stays.
        """
        with self._lock:
            if self._mode is not Mode.ESTOP:
                self._hold(_NOT_STARTED)
            self._tracker = LimitedTracker(self._limits, self._settings.dt_s)
            self._counters = ControlCounters.zero(self._limits.dof)
            self._last_tick_s = None
            self._measured = None
            self._has_command = False

    def on_state(self, position: FloatArray, now_s: float) -> None:
        """Take measured joints; the first fresh ones become the command at the next tick.

        Args:
            position: Layout order, robot units, [dof].
            now_s: Control-clock time of reception, seconds.
        """
        measured = np.array(position, dtype=np.float64)
        with self._lock:
            if measured.shape != (self._limits.dof,) or not np.all(np.isfinite(measured)):
                self._counters.dropped_states += 1
                return
            self._measured, self._measured_s = measured, now_s

    def start(self, now_s: float) -> Outcome:
        """Hand the joints to the policy, from its first accepted chunk on.

        Args:
            now_s: Control-clock time, seconds.
        """
        with self._lock:
            if self._mode is Mode.ESTOP:
                return Outcome(False, f"emergency stop is latched: {self._reason}")
            if self._armed or self._mode is Mode.POLICY:
                return Outcome(True, "already started")
            obstacle = self._obstacle(now_s)
            if obstacle:
                return Outcome(False, obstacle)
            self._arm(now_s)
            return Outcome(True, _WAITING)

    def stop(self, reason: str) -> None:
        """Take the joints back from the policy: brake, then hold."""
        with self._lock:
            if self._mode is not Mode.ESTOP:
                self._hold(reason)

    def emergency_stop(self, reason: str) -> None:
        """Brake as hard as the acceleration limits allow and stay there until cleared."""
        with self._lock:
            if self._mode is Mode.ESTOP:
                return
            self._hold(reason)
            self._mode = Mode.ESTOP

    def clear_emergency_stop(self) -> Outcome:
        """Leave ESTOP for HOLD; nothing moves until ``start``."""
        with self._lock:
            if self._mode is not Mode.ESTOP:
                return Outcome(False, "no emergency stop is latched")
            self._mode = Mode.HOLD
            self._hold("emergency stop cleared")
            return Outcome(True, "cleared")

    def on_chunk(self, chunk: ActionChunk, now_s: float) -> Outcome:
        """Accept a policy chunk, or drop it whole.

        The first one of a run begins with its first action, now: the joints stood still while
        it was computed, so nothing of it has passed. It is compared with the measured joints; if
        it begins too far from them the run ends before it began.

        Args:
            chunk: Actions [horizon, dof], robot units.
            now_s: Control-clock time, seconds.
        """
        with self._lock:
            delay_s = max(0.0, now_s - chunk.time_s)
            if self._armed and chunk.end_s > now_s:  # one that took longer than it lasts is dropped
                chunk = replace(chunk, time_s=max(chunk.time_s, now_s))
            refusal = self._refusal(chunk, now_s)
            if refusal:
                self._counters.dropped_chunks += 1
                return Outcome(False, refusal)
            self._bad_chunks = 0
            self._counters.accepted_chunks += 1
            self._buffer.add(chunk, now_s)
            shown_s = now_s + self._settings.blend_s + delay_s
            # Never so late that the joints would run out of actions before the answer.
            self._query_due_s = min(shown_s, chunk.end_s - delay_s)
            if self._armed:
                self._armed, self._mode = False, Mode.POLICY
            self._reason = ""
            return Outcome(True, "accepted")

    def on_worker_lost(self, now_s: float) -> None:
        """The policy worker died or hangs: brake and hold.

        Args:
            now_s: Control-clock time, seconds.
        """
        with self._lock:
            if self._worker_ready:
                self._worker_lost_s = now_s
            self._worker_ready = False
            if self._mode is not Mode.ESTOP:
                self._fault(_WORKER_LOST)

    def on_worker_ready(self, now_s: float) -> None:
        """A policy worker, the first one or a new one, can be asked for chunks.

        Args:
            now_s: Control-clock time, seconds.
        """
        with self._lock:
            self._worker_ready = True
            if self._worker_lost_s is not None:
                self._counters.worker_downtime_s += max(0.0, now_s - self._worker_lost_s)
                self._worker_lost_s = None
            if self._mode is Mode.HOLD and self._reason == _WORKER_LOST:
                self._reason = "worker was lost, is ready again"
            self._resume_if_possible(now_s)

    def tick(self, now_s: float) -> ControlOutput:
        """Advance by one control period.

        Args:
            now_s: Control-clock time of this tick, seconds.
        """
        with self._lock:
            self._counters.ticks += 1
            self._check_clock(now_s)
            self._remaining = 0
            if not self._anchor(now_s):
                return self._output(None, starved=False, max_step=0.0)
            self._check_waiting(now_s)
            before = self._tracker.position
            command, starved = self._command(now_s)
            step = np.abs(command.position - before)
            counters = self._counters
            counters.max_joint_step = np.maximum(counters.max_joint_step, step)
            counters.starved_ticks += starved
            counters.clamped_ticks += command.clamped
            counters.solver_errors = self._tracker.solver_errors
            max_step = float(np.max(step / (self._limits.max_velocity * self._settings.dt_s)))
            return self._output(command, starved=starved, max_step=max_step)

    # everything below is called with the lock held

    def _anchor(self, now_s: float) -> bool:
        """Begin the command at the measured joints; False while there are no fresh ones."""
        if not self._has_command and self._measured is not None:
            obstacle = self._state_obstacle(now_s) or self._outside_limits(self._measured)
            if obstacle and self._mode is not Mode.ESTOP:
                self._reason = obstacle
            elif not obstacle:
                if self._mode is Mode.HOLD and not self._armed:
                    self._reason = _NOT_STARTED
                self._tracker.reset(self._measured)
                self._has_command = True
        return self._has_command

    def _command(self, now_s: float) -> tuple[Command, bool]:
        """Command of this tick, and whether it starves."""
        newest = self._buffer.newest
        sample = self._buffer.sample(now_s)
        if self._mode is not Mode.POLICY or newest is None or sample is None:
            return self._tracker.brake(hard=self._mode is Mode.ESTOP), False
        if not sample.starved:
            self._reason, self._remaining = "", sample.remaining
            velocity = self._buffer.mean_velocity(now_s, self._half_window_s)
            return self._tracker.track(sample.position, velocity), False
        self._reason = "starved"
        if now_s - newest.end_s > self._settings.starvation_timeout_s:
            self._fault("starved")
        return self._tracker.brake(), True

    def _output(self, command: Command | None, *, starved: bool, max_step: float) -> ControlOutput:
        newest = self._buffer.newest if self._mode is Mode.POLICY else None
        return ControlOutput(
            position=None if command is None else command.position,
            velocity=None if command is None else command.velocity,
            mode=self._mode,
            armed=self._armed,
            hold_reason=self._reason,
            starved=starved,
            clamped=False if command is None else command.clamped,
            remaining_actions=self._remaining,
            max_step=max_step,
            epoch=self._buffer.epoch,
            chunk_time_s=None if newest is None else newest.time_s,
            counters=self._counters.copy(),
        )

    def _refusal(self, chunk: ActionChunk, now_s: float) -> str:
        """Why a chunk is dropped, with the consequences; empty for a good one."""
        if not (self._armed or self._mode is Mode.POLICY):
            return f"{self._mode.value}: {self._reason}"
        reason = self._buffer.reason_to_drop(chunk, now_s)
        if chunk.epoch == self._buffer.epoch and malformation(chunk, self._limits.dof):
            self._bad_chunks += 1
            if self._bad_chunks >= self._settings.max_bad_chunks:
                self._hold(f"{self._bad_chunks} bad chunks in a row: {reason}")
        if not reason and self._armed:
            reason = self._state_obstacle(now_s) or self._first_action_refusal(chunk, now_s)
            if reason:
                self._hold(reason)
        return reason

    def _first_action_refusal(self, chunk: ActionChunk, now_s: float) -> str:
        probe = ChunkBuffer(self._limits.dof, 0.0)
        probe.add(replace(chunk, epoch=probe.epoch), now_s)
        sample = probe.sample(now_s)
        if sample is None or self._measured is None:
            return "no measured joint state"
        return self._too_far("first action", sample.position, self._measured)

    def _too_far(self, what: str, position: FloatArray, measured: FloatArray) -> str:
        """One line naming the joint furthest beyond its tolerance; empty when none is."""
        tolerance = self._settings.first_action_tolerance
        excess = np.abs(position - measured) / tolerance
        joint = int(np.argmax(excess))
        if excess[joint] <= 1.0:
            return ""
        return (
            f"{what} of joint {joint} is {position[joint]:.4g}, measured {measured[joint]:.4g}, "
            f"tolerance {tolerance[joint]:.4g}"
        )

    def _state_obstacle(self, now_s: float) -> str:
        if self._measured is None:
            return "no measured joint state"
        age_s = now_s - self._measured_s
        if abs(age_s) > self._settings.max_state_age_s:  # below 0: from before a clock jump
            return f"joint states stale ({age_s:.3f} s)"
        return ""

    def _obstacle(self, now_s: float) -> str:
        """What stands against arming; empty for nothing."""
        if not self._worker_ready:
            return "policy worker not ready"
        stale = self._state_obstacle(now_s)
        if stale or self._measured is None:
            return stale
        held = self._tracker.position if self._has_command else self._measured
        return self._outside_limits(self._measured) or self._too_far(
            "command held", held, self._measured
        )

    def _outside_limits(self, measured: FloatArray) -> str:
        """What a wrong unit, a wrong polarity or a broken sensor looks like; empty if inside."""
        inside = np.clip(measured, self._limits.min_position, self._limits.max_position)
        return self._too_far("limit", inside, measured)

    def _arm(self, now_s: float) -> None:
        self._buffer.bump_epoch()
        self._armed_s = now_s
        self._armed, self._resume, self._bad_chunks = True, False, 0
        self._reason = _WAITING

    def _hold(self, reason: str) -> None:
        """End POLICY or the wait for it; chunks in flight become worthless."""
        if self._mode is Mode.POLICY:
            self._counters.holds += 1
        self._mode, self._armed, self._resume = Mode.HOLD, False, False
        self._reason = reason
        self._buffer.bump_epoch()

    def _fault(self, reason: str) -> None:
        """End POLICY for a reason that may pass by itself."""
        resume = self._resume or self._armed or self._mode is Mode.POLICY
        self._hold(reason)
        self._resume = resume and self._settings.auto_resume

    def _resume_if_possible(self, now_s: float) -> None:
        if self._resume and self._mode is Mode.HOLD and not self._obstacle(now_s):
            self._arm(now_s)

    def _check_clock(self, now_s: float) -> None:
        last_s, self._last_tick_s = self._last_tick_s, now_s
        if last_s is None:
            return
        gap_s = now_s - last_s
        if 0.0 <= gap_s <= self._settings.max_clock_jump_s:
            return
        if self._mode is not Mode.ESTOP:
            self._hold(f"clock jumped by {gap_s:.3f} s")

    def _check_waiting(self, now_s: float) -> None:
        """End what has waited too long, for joint states or for a chunk; resume what may."""
        if self._armed or self._mode is Mode.POLICY:
            stale = self._state_obstacle(now_s)
            if stale:
                self._fault(stale)
        if self._armed and now_s - self._armed_s > self._settings.first_chunk_timeout_s:
            self._hold(f"no chunk within {self._settings.first_chunk_timeout_s:g} s of the start")
        self._resume_if_possible(now_s)
