"""What a person sees while episodes run: how many, how fast, how long yet, and who succeeds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

_PLAIN_EVERY_S = 20.0


class EpisodeProgress:
    """A progress bar; lines every now and then where there is no terminal.

    Args:
        console: Where it is shown.
        total: Episodes to run.
        title: What is being run.
    """

    def __init__(self, console: Console, total: int, title: str) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._counts: dict[str, tuple[int, int]] = {}
        self._begun_s = time.monotonic()
        self._told_s = self._begun_s
        self._bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[success]}"),
            console=console,
            transient=True,
            speed_estimate_period=600.0,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, rate="", success="")

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

    @property
    def per_minute(self) -> float:
        """Episodes per minute so far."""
        return 60.0 * self._done / max(time.monotonic() - self._begun_s, 1e-9)

    def take(self, line: Mapping[str, Any]) -> None:
        """Count a finished episode."""
        self._done += 1
        solved, episodes = self._counts.get(line["method"], (0, 0))
        self._counts[line["method"]] = (solved + bool(line["success"]), episodes + 1)
        self._bar.update(
            self._task, advance=1, rate=f"{self.per_minute:.1f}/min", success=self.success()
        )
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._told_s > _PLAIN_EVERY_S:
            self._told_s = now_s
            left_s = (self._total - self._done) / max(self.per_minute, 1e-9) * 60.0
            self._console.print(
                f"{self._done}/{self._total}  {self.per_minute:.1f}/min  {left_s:.0f} s left  "
                f"{self.success()}",
                soft_wrap=True,
            )

    def success(self) -> str:
        """Method to successes of this call, in a line."""
        return "  ".join(f"{name} {a}/{b}" for name, (a, b) in self._counts.items())
