"""The barrier of the lock-step mode: a tick waits for its complete set of commands."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class CommandBarrier:
    """Counts in the parts that have answered a tick. Thread-safe.

    Args:
        parts: Parts that must all have been commanded before the physics may advance.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = frozenset(parts)
        self._missing = set(self._parts)
        self._tick_ns = 0
        self._changed = threading.Condition()
        self._closed = False
        self.commanded = False

    def restart(self) -> None:
        """As at the beginning: nobody has commanded yet. Lets a waiting thread go on."""
        with self._changed:
            self.commanded = False
            self._missing = set()
            self._changed.notify_all()

    def open_tick(self, stamp_ns: int) -> None:
        """Starts waiting for commands that answer the tick of this time stamp."""
        with self._changed:
            self._tick_ns = stamp_ns
            self._missing = set(self._parts)

    def offer(self, part: str, stamp_ns: int) -> None:
        """Counts a command. An older stamp answers an older tick; zero counts as unstamped."""
        with self._changed:
            self.commanded = True
            if stamp_ns == 0 or stamp_ns >= self._tick_ns:
                self._missing.discard(part)
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the set; False when the (wall) time is over first, or after :meth:`close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._missing, timeout_s)
            return not self._missing

    def close(self) -> None:
        """Lets a waiting thread go, and never holds one again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
