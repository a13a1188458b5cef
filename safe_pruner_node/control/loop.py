"""What calls the tick: a thread on the steady clock, or the simulator's ``/clock``."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from safe_pruner_node.control.clock import Clock, SteadyClock
from safe_pruner_node.realtime import CONTROL_PRIORITY, request_realtime
from safe_pruner_node.types import FloatArray

_RING = 65536  # periods remembered for the percentiles: 262 s at 250 Hz


@dataclass(frozen=True)
class LoopStatistics:
    """How regular the loop was since its start.

    Attributes:
        ticks: Ticks done.
        expected_ticks: Ticks a perfect loop would have done.
        overruns: Deadlines that were missed and skipped.
        errors: Ticks that raised.
        period_p50_ms: Median of the actual periods; NaN before the second tick.
        period_p99_ms: 99th percentile.
        period_max_ms: Longest period.
        jitter_p99_ms: 99th percentile of |period - nominal period|.
        realtime: True when the thread runs under SCHED_FIFO.
    """

    ticks: int
    expected_ticks: int
    overruns: int
    errors: int
    period_p50_ms: float
    period_p99_ms: float
    period_max_ms: float
    jitter_p99_ms: float
    realtime: bool


class ControlLoop(ABC):
    """Calls ``tick(now_s)`` at a fixed rate and measures how well it does.

    Args:
        rate_hz: Control rate.
        tick: Called with the control-clock time, seconds.
        on_error: Called with whatever ``tick`` raised; the loop goes on.
    """

    def __init__(
        self,
        rate_hz: float,
        tick: Callable[[float], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.period_s = 1.0 / rate_hz
        self._tick = tick
        self._on_error = on_error
        self._periods: FloatArray = np.zeros(_RING)
        self._forget()

    def _forget(self) -> None:
        """Statistics begin anew."""
        self._ticks = 0
        self._overruns = 0
        self._errors = 0
        self._max_period_s = 0.0
        self._first_s: float | None = None
        self._last_s: float | None = None

    @property
    def realtime(self) -> bool:
        """True when the loop runs under a real-time scheduler."""
        return False

    @abstractmethod
    def start(self) -> None:
        """Begin to tick."""

    @abstractmethod
    def stop(self) -> None:
        """End; no tick runs after this has returned."""

    def statistics(self) -> LoopStatistics:
        """Statistics so far; the percentiles are computed here, on the caller's thread."""
        periods_ms = 1e3 * self.periods()
        if not periods_ms.size:
            periods_ms = np.array([np.nan])
        p50, p99 = np.percentile(periods_ms, [50, 99])
        jitter_ms = np.abs(periods_ms - 1e3 * self.period_s)
        first, last = self._first_s, self._last_s
        expected = 0 if first is None or last is None else 1 + round((last - first) / self.period_s)
        return LoopStatistics(
            ticks=self._ticks,
            expected_ticks=expected,
            overruns=self._overruns,
            errors=self._errors,
            period_p50_ms=float(p50),
            period_p99_ms=float(p99),
            period_max_ms=1e3 * self._max_period_s if self._ticks > 1 else float("nan"),
            jitter_p99_ms=float(np.percentile(jitter_ms, 99)),
            realtime=self.realtime,
        )

    def periods(self, after: int = 0) -> FloatArray:
        """Actual periods, oldest first, seconds, [n].

        Args:
            after: Leave out what a caller has: the periods up to this tick number. Pass the
                ``ticks`` of the last statistics to get those since.
        """
        count = max(0, self._ticks - 1)
        first = max(0, after - 1, count - _RING)
        return np.array(self._periods[np.arange(first, count) % _RING], dtype=np.float64)

    def _run_tick(self, now_s: float) -> None:
        if self._last_s is None:
            self._first_s = now_s
        else:
            period_s = now_s - self._last_s
            self._periods[(self._ticks - 1) % _RING] = period_s
            self._max_period_s = max(self._max_period_s, period_s)
        self._last_s = now_s
        self._ticks += 1
        try:
            self._tick(now_s)
        except Exception as error:  # noqa: BLE001  # the command stream outlives any bug
            self._errors += 1
            if self._on_error is not None:
                with contextlib.suppress(Exception):
                    self._on_error(error)


class RealTimeLoop(ControlLoop):
    """A dedicated thread with absolute deadlines.

    A missed deadline is skipped and counted, never made up for in a burst. The thread asks for
    SCHED_FIFO and goes on without it where that is not permitted.

    Args:
        rate_hz: Control rate.
        tick: Called with the control-clock time, seconds.
        clock: Steady clock; a manual one in tests.
        on_error: Called with whatever ``tick`` raised; the loop goes on.
    """

    def __init__(
        self,
        rate_hz: float,
        tick: Callable[[float], None],
        clock: Clock | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(rate_hz, tick, on_error)
        self._clock: Clock = SteadyClock() if clock is None else clock
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._realtime = False

    @property
    def realtime(self) -> bool:
        """True when the thread runs under SCHED_FIFO."""
        return self._realtime

    def start(self) -> None:
        """Begin to tick on a thread of its own."""
        if self._thread is not None:
            return
        self._forget()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._stopping,), name="control", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Join the thread; no tick runs after this has returned."""
        thread, self._thread = self._thread, None
        self._stopping.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self, stopping: threading.Event) -> None:
        self._realtime = request_realtime(CONTROL_PRIORITY)
        deadline_s = self._clock.now_s()
        while not stopping.is_set():
            self._run_tick(self._clock.now_s())
            deadline_s += self.period_s
            late_s = self._clock.now_s() - deadline_s
            if late_s > 0.0:
                missed = int(late_s / self.period_s) + 1
                self._overruns += missed
                deadline_s += missed * self.period_s
            self._clock.sleep_until(deadline_s)


class ClockDrivenLoop(ControlLoop):
    """Ticks when the simulator's clock says so: call ``step_to`` for every ``/clock`` message."""

    def start(self) -> None:
        """Statistics begin; the clock drives."""
        self._forget()

    def stop(self) -> None:
        """Nothing to end: no clock, no tick."""

    def step_to(self, now_s: float) -> bool:
        """Tick once when a period has passed since the last tick, or the clock went back.

        Args:
            now_s: Simulation time, seconds.

        Returns:
            True when it ticked.
        """
        if self._last_s is not None:
            gap_s = now_s - self._last_s
            if 0.0 <= gap_s < self.period_s - 1e-9:
                return False
            self._overruns += max(0, round(gap_s / self.period_s) - 1)
        self._run_tick(now_s)
        return True
