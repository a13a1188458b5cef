"""Which sections run, in which order, each path in a process of its own.

An illegal access of one kernel spoils the CUDA context of its process: the other paths go on in
theirs. A process that overruns its time is ended; what it had is in its files.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from safe_pruner_node.engine.build import choose_runner
from safe_pruner_node.engine.settings import PATHS
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.ceilings import measure_ceilings
from safe_pruner_node.evaluation.bench_gpu.correctness import correctness, reference
from safe_pruner_node.evaluation.bench_gpu.latency import curves, latency, shapes
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES, random_policy
from safe_pruner_node.evaluation.bench_gpu.section import (
    CUT,
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    Bench,
    Result,
    Section,
    one_line,
    read_results,
    run_section,
)

ALL_PATHS = tuple(path for path in PATHS if path != "auto")
COMPILED = "compiled"
"""The path whose preparation takes minutes: it comes after the others."""
LATER = ("eager", COMPILED)
"""Baselines, in this order. What eager is off by, the reference says."""
COMPILED_SHARE = 0.5
"""Of the time that is left."""
GRACE_S = 10.0
"""A process that noticed its deadline ends within this."""

FILE_COLUMNS = 160

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Task:
    """Sections that one process runs on one path.

    Attributes:
        path: ``eager``, ``graphs`` and so on.
        sections: Names, in order.
        share: Part of the time that is left which it may take.
    """

    path: str
    sections: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Run:
    """What is the same for all tasks of a run.

    Attributes:
        paths: Those asked for.
        size: Key of `SIZES`.
        device: ``cuda`` or ``cpu``.
        out: Folder of the results.
        end_s: `time.time` at which the last section has to stop.
        quick: As in `Bench`.
    """

    paths: tuple[str, ...]
    size: str
    device: str
    out: Path
    end_s: float
    quick: bool


def first_tasks(paths: Sequence[str]) -> list[Task]:
    """What can be said beforehand: the reference, then every path.

    Args:
        paths: Those asked for.
    """

    def when(path: str) -> tuple[int, int]:
        return LATER.index(path) if path in LATER else -1, -PATHS.index(path)

    ordered = sorted(paths, key=when)
    return [
        Task("eager", ("ceilings", "reference")),
        *(Task(path, ("correctness",)) for path in ordered if path not in LATER),
        *(
            Task(path, ("latency",), COMPILED_SHARE if path == COMPILED else 1.0)
            for path in ordered
        ),
    ]


def last_tasks(paths: Sequence[str], results: Sequence[Result]) -> list[Task]:
    """More about the fastest path that is right, and what takes long.

    Args:
        paths: Those asked for.
        results: Of the first tasks.
    """
    tasks = []
    path = best_path(results)
    if path is not None:
        tasks = [Task(path, ("end_to_end",)), Task(path, ("shapes", "curves"))]
    if COMPILED in paths:
        tasks.append(Task(COMPILED, ("correctness",)))
    return tasks


def best_path(results: Sequence[Result]) -> str | None:
    """The path with the fastest full step among eager and those that were found right."""
    right = {
        result.path
        for result in results
        if result.section == "correctness"
        and result.status in {DONE, CUT}
        and result.data.get("cases")
        and not any(case["complaints"] for case in result.data["cases"])
    }
    p50 = {
        result.path: result.data["rows"][0]["wall_ms"]["p50"]
        for result in results
        if result.section == "latency"
        and result.data.get("rows")
        and result.path in {"eager", *right}
    }
    return min(p50, key=lambda path: p50[path], default=None)


def run_tasks(run: Run, console: Console) -> None:
    """Run everything; results are in the files of `run.out` when this returns, or is interrupted.

    Args:
        run: What to run.
        console: Where progress goes.
    """
    for task in first_tasks(run.paths):
        _run_in_process(task, run, console)
    for task in last_tasks(run.paths, read_results(run.out)):
        _run_in_process(task, run, console)


def _run_in_process(task: Task, run: Run, console: Console) -> None:
    left_s = run.end_s - time.time()
    names = ", ".join(task.sections)
    if left_s <= 0:
        console.print(f"{task.path}, {names}: skipped, no time left")
        _write_all(task, run, SKIPPED, "no time left")
        return
    console.print(f"{task.path}, {names}: {left_s:.0f} s left", highlight=False)
    deadline_s = time.time() + task.share * left_s
    process = _SPAWN.Process(target=run_task, args=(task, run, deadline_s))
    process.start()
    try:
        process.join(deadline_s - time.time() + GRACE_S)
        overran = process.is_alive()
    finally:
        process.kill()  # also on Ctrl-C
        process.join()
    why = (CUT, "out of time") if overran else (FAILED, f"process ended with {process.exitcode}")
    for result in _unfinished(task, run, overran or process.exitcode != 0):
        Result(result.section, result.path, *why, result.data).write(run.out)
    for result in read_results(run.out):
        if result.path == task.path and result.section in task.sections and result.note:
            console.print(f"{task.path}, {result.section}: {result.status}: {result.note}")


def _write_all(task: Task, run: Run, status: str, note: str) -> None:
    for name in task.sections:
        Result(name, task.path, status, note, {}).write(run.out)


def _unfinished(task: Task, run: Run, broke: bool) -> Iterator[Result]:
    """Sections of a process that ended before them, with what they had."""
    if not broke:
        return
    known = {r.section: r for r in read_results(run.out) if r.path == task.path}
    for name in task.sections:
        result = known.get(name, Result(name, task.path, RUNNING, "", {}))
        if result.status == RUNNING:
            yield result


def run_task(task: Task, run: Run, deadline_s: float) -> None:
    """Build the policy and run the sections; entry point of the process.

    Args:
        task: What to run.
        run: On what.
        deadline_s: `time.time` at which to stop.
    """
    device = torch.device(run.device)
    try:
        model = random_policy(SIZES[run.size], device)
        runner = choose_runner(task.path, model)
        if task.path == "compiled":
            runner.prompt_bucket = None  # a baseline at its fastest: no padding, nothing masked
    except ConfigError as error:  # a path that this device or build does not have
        _write_all(task, run, SKIPPED, str(error))
        return
    except Exception as error:  # noqa: BLE001 - the other tasks are to go on
        _write_all(task, run, FAILED, one_line(error))
        return
    console = make_console()
    for note in runner.notes:
        console.print(f"{task.path}: {note}", highlight=False)
    bench = Bench(model, runner, run.out, deadline_s, run.quick, console)
    for name in task.sections:
        run_section(name, _sections()[name], bench)


def make_console() -> Console:
    """The terminal; tables need their width where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_COLUMNS)


def _sections() -> dict[str, Section]:
    return {
        "ceilings": _ceilings,
        "reference": reference,
        "correctness": correctness,
        "latency": latency,
        "shapes": shapes,
        "curves": curves,
        "end_to_end": _end_to_end,
    }


def _ceilings(bench: Bench) -> Iterator[dict[str, Any]]:
    ceilings = measure_ceilings(bench.model.device)
    bench.say(
        f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matrix product {ceilings.flop_per_s / 1e12:.0f} TFLOP/s"
    )
    yield asdict(ceilings)


def _end_to_end(bench: Bench) -> Iterator[dict[str, Any]]:
    # Here and not above: the robot's files need pydantic, which nothing else of a run does.
    from safe_pruner_node.evaluation.bench_gpu.end_to_end import end_to_end  # noqa: PLC0415

    yield from end_to_end(bench)
