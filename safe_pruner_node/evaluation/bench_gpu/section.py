"""What a section of the benchmark works with, and the file that its results go to at once."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from safe_pruner_node.engine.runner import Runner
from safe_pruner_node.pi05.model import Pi05

DONE, CUT, SKIPPED, FAILED, RUNNING = "done", "cut", "skipped", "failed", "running"
"""A section that was ``cut`` ran out of time: what it has is right, but not all."""

LINE_MAX = 500

Section = Callable[["Bench"], Iterator[dict[str, Any]]]
"""Yields its results so far, again and again."""


class OutOfTime(Exception):  # noqa: N818 - an outcome, not an error
    """The run's minutes are over."""


@dataclass(frozen=True)
class Bench:
    """One path on one model.

    Attributes:
        model: The policy, in mixed bf16.
        runner: The path; its captures are shared by the sections.
        out: Folder of the results.
        deadline_s: `time.time` at which to stop.
        quick: Fewer steps and seeds: to see that everything runs.
        console: Where progress goes.
    """

    model: Pi05
    runner: Runner
    out: Path
    deadline_s: float
    quick: bool
    console: Console

    @property
    def seeds(self) -> int:
        """Queries of each compared case."""
        return 2 if self.quick else 3

    def steps(self, usual: int) -> int:
        """Timed steps."""
        return fewer_steps(usual) if self.quick else usual

    def check_time(self) -> None:
        """Stop here if the time is over.

        Raises:
            OutOfTime: It is.
        """
        if time.time() > self.deadline_s:
            raise OutOfTime

    def say(self, line: str) -> None:
        """Print a line of progress."""
        self.console.print(f"  {self.runner.path}: {line}", highlight=False)


@dataclass(frozen=True)
class Result:
    """What a section left behind.

    Attributes:
        section: Its name.
        path: The path that it ran on.
        status: `DONE`, `CUT`, `SKIPPED`, `FAILED`, or `RUNNING` until one of these.
        note: Why it is not done; empty otherwise.
        data: Its results, as far as it got.
    """

    section: str
    path: str
    status: str
    note: str
    data: dict[str, Any]

    def write(self, out: Path) -> None:
        """Write ``<section>-<path>.json``, whole or not at all."""
        file = out / f"{self.section}-{self.path}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(file)


def read_results(out: Path) -> list[Result]:
    """Every section's results in a folder."""
    return [
        Result(**json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(out.glob("*-*.json"))
    ]


def fewer_steps(usual: int) -> int:
    """Timed steps of a quick run."""
    return max(2, usual // 20)


def one_line(error: Exception) -> str:
    """What went wrong; torch may say it in pages."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= LINE_MAX else line[:LINE_MAX] + " ..."


def run_section(name: str, section: Section, bench: Bench) -> Result:
    """Run a section; whatever happens in it is its result.

    Args:
        name: Of the section.
        section: What to run.
        bench: What it works with.
    """
    data: dict[str, Any] = {}
    path = bench.runner.path
    try:
        for data in section(bench):
            Result(name, path, RUNNING, "", data).write(bench.out)
        result = Result(name, path, DONE, "", data)
    except OutOfTime:
        result = Result(name, path, CUT, "out of time", data)
    except Exception as error:  # noqa: BLE001 - the other sections are to go on
        traceback.print_exc()
        result = Result(name, path, FAILED, one_line(error), data)
    result.write(bench.out)
    return result
