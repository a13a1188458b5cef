"""Clocks that drive control code: the steady clock of the machine, or one moved by a test."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock that never runs on wall time and can be slept on."""

    def now_s(self) -> float:
        """Current time, seconds from an arbitrary origin."""
        ...

    def sleep_until(self, deadline_s: float) -> None:
        """Return at or after ``deadline_s``; at once when that is in the past."""
        ...


class SteadyClock:
    """``time.monotonic``: not affected by NTP, by the user or by ``/clock``."""

    def now_s(self) -> float:
        """Current steady time, seconds."""
        return time.monotonic()

    def sleep_until(self, deadline_s: float) -> None:
        """Sleep to an absolute deadline; a signal does not shorten the sleep (PEP 475)."""
        delay_s = deadline_s - time.monotonic()
        if delay_s > 0.0:
            time.sleep(delay_s)


class ManualClock:
    """A clock that moves only when told to, or exactly to the deadline when slept on."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Time set so far, seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move by ``seconds``; a negative value is a clock that jumps back."""
        self._now_s += seconds

    def sleep_until(self, deadline_s: float) -> None:
        """Jump to the deadline unless it has passed."""
        self._now_s = max(self._now_s, deadline_s)
