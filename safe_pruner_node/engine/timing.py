"""Milliseconds per stage: steady clock on a CPU, events on a CUDA stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from safe_pruner_node.engine.runner import Runner


class StageTimer:
    """Adds up the time of named stages, in the order in which they first ran.

    On CUDA the events are recorded in the stream and read once at the end, so that timing
    does not synchronise between stages.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, runner: Runner | None = None) -> Iterator[None]:
        """Time the enclosed work and add it to `name`.

        Args:
            name: Of the stage.
            runner: Runs it; what it did for the first time is booked as ``capture``.
        """
        before_ms = 0.0 if runner is None else runner.capture_ms
        with self._timed(name):
            yield
        if runner is not None and (spent_ms := runner.capture_ms - before_ms):
            self.move(spent_ms, name, "capture")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._ms.setdefault(name, 0.0)
        if self._cuda:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._ms[name] += (time.perf_counter() - started) * 1e3

    def move(self, ms: float, source: str, target: str) -> None:
        """Book time that was measured as part of one stage on another."""
        for name, change in ((source, -ms), (target, ms)):
            self._ms[name] = self._ms.get(name, 0.0) + change

    def milliseconds(self) -> dict[str, float]:
        """Stage to milliseconds; on CUDA this waits for the last event.

        Not below 0: what `move` took was measured by the host's clock, not by the stream's.
        """
        if self._events:
            self._events[-1][2].synchronize()
            for name, start, end in self._events:
                self._ms[name] += start.elapsed_time(end)
            self._events.clear()
        return {name: max(0.0, ms) for name, ms in self._ms.items()}
