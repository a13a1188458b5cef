"""What a person sees of a training run, and the log that remains."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from typing_extensions import Self

from safe_pruner_node.training.objective import Losses
from safe_pruner_node.training.validation import OpenLoopError

_EVERY_S = 5.0
"""Reading a loss waits for the device: once in so many seconds, s."""


class TrainingProgress:
    """A bar with losses, speed and time left; lines instead where there is no terminal.

    Args:
        console: Where to.
        log: JSON lines, appended.
    """

    def __init__(self, console: Console, log: Path) -> None:
        self._console = console
        self._log = log
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %  {task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling the first step", total=1.0)
        self._next_s = 0.0
        self._last: tuple[int, float] | None = None
        self._error = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(
        self,
        step: int,
        done: float,
        elapsed_s: float,
        found: Sequence[Losses],
        norm: Tensor,
        rate: float,
        batch: int,
    ) -> None:
        """Tell of an optimizer step; the numbers are read only now and then."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _EVERY_S
        record = {
            "step": step,
            "elapsed_s": round(elapsed_s, 1),
            "flow": sum(float(losses.flow) for losses in found) / len(found),
            "landmarks": sum(float(losses.landmarks) for losses in found) / len(found),
            "gradient": float(norm),
            "learning_rate": rate,
        }
        if self._last is not None:
            record["samples_per_s"] = (step - self._last[0]) * batch / (now_s - self._last[1])
        self._last = (step, now_s)
        self._write(record)
        left_s = elapsed_s / done - elapsed_s if done > 0 else float("nan")
        line = (
            f"step {step}  flow {record['flow']:.4f}  landmarks {record['landmarks']:.4f}  "
            f"{record.get('samples_per_s', 0):.0f} samples/s  {left_s:.0f} s left  {self._error}"
        )
        self._say(line, done)

    def validated(self, step: int, errors: Sequence[OpenLoopError]) -> None:
        """Tell of open-loop errors."""
        for error in errors:
            self._write({"step": step, **{f"open_loop_{k}": v for k, v in asdict(error).items()}})
        self._error = "open loop " + "; ".join(map(str, errors))
        self._say(f"step {step}  {self._error}", None)

    def _say(self, line: str, done: float | None) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, description=line)
        else:
            share = "" if done is None else f"{100 * done:5.1f} %  "
            self._console.print(share + line, highlight=False, soft_wrap=True)

    def _write(self, record: dict[str, float]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
