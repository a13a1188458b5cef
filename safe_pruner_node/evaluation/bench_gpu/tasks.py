"""Which sections run, in which order, each path in a process of its own.

An illegal access of one kernel spoils the CUDA context of its process: the other paths go on in
theirs. A process that overruns its time is ended; what it had is in its files.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from safe_pruner_node.engine.build import check_fp8, choose_runner
from safe_pruner_node.engine.settings import PATHS
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.ceilings import measure_ceilings
from safe_pruner_node.evaluation.bench_gpu.correctness import correctness, reference
from safe_pruner_node.evaluation.bench_gpu.fp8 import FP8, fp8, to_fp8
from safe_pruner_node.evaluation.bench_gpu.latency import curves, latency, shapes
from safe_pruner_node.evaluation.bench_gpu.peers import PEER_S, SECTION, Peer, run_peer
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES, random_policy
from safe_pruner_node.evaluation.bench_gpu.queries import BASE
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

ALL_PATHS = (*(path for path in PATHS if path != "auto"), FP8)
ALL_SECTIONS = (
    "ceilings",
    "reference",
    "correctness",
    FP8,
    "latency",
    "end_to_end",
    "shapes",
    "curves",
    "cold_start",
)
COMPILED = "compiled"
"""The path whose preparation takes minutes: it comes after the others."""
LATER = ("eager", COMPILED)
"""Baselines, in this order. What eager is off by, the reference says."""
COMPILED_SHARE = 0.5
"""Of the time that is left."""
COLD_START_S = 90.0
"""Not begun with less than this left of the run: every kernel is compiled in it."""
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
        least_s: It is skipped where no more than this is left.
    """

    path: str
    sections: tuple[str, ...]
    share: float = 1.0
    least_s: float = 0.0


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
        sections: Those asked for.
        peers: Programs to time beside ours.
    """

    paths: tuple[str, ...]
    size: str
    device: str
    out: Path
    end_s: float
    quick: bool
    sections: tuple[str, ...]
    peers: tuple[Peer, ...]


def first_tasks(paths: Sequence[str]) -> list[Task]:
    """What can be said beforehand: the reference, then every path.

    Args:
        paths: Those asked for.
    """
    ordered = fastest_first(paths)
    compared = [path for path in ordered if path not in LATER]
    return [
        Task("eager", ("ceilings", "reference")),
        *(Task(path, ("correctness",)) for path in compared),
        *(Task(path, ("latency",)) for path in compared),
        *(Task(FP8, (section,)) for section in (FP8, "latency") if FP8 in paths),
        *(
            Task(path, ("latency",), COMPILED_SHARE if path == COMPILED else 1.0)
            for path in ordered
            if path in LATER
        ),
    ]


def fastest_first(paths: Sequence[str]) -> list[str]:
    """The bf16 paths as they are expected to be, the baselines after the others."""

    def when(path: str) -> tuple[int, int]:
        return LATER.index(path) if path in LATER else -1, -PATHS.index(path)

    return sorted((path for path in paths if path != FP8), key=when)


def last_tasks(paths: Sequence[str], best: str | None) -> list[Task]:
    """More about the path that matters, and what takes long.

    Args:
        paths: Those asked for.
        best: The fastest of them that is right; None where none is.
    """
    tasks = []
    if best is not None:
        tasks = [
            Task(best, ("end_to_end",)),
            Task(best, ("cold_start",), least_s=COLD_START_S),
            Task(best, ("shapes", "curves")),
        ]
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
    for task in _asked_for(first_tasks(run.paths), run):
        _run_in_process(task, run, console)
    for peer in run.peers:
        _run_peer(peer, run, console)
    for task in _asked_for(last_tasks(run.paths, _path_that_matters(run)), run):
        _run_in_process(task, run, console)


def _asked_for(tasks: Sequence[Task], run: Run) -> Iterator[Task]:
    for task in tasks:
        sections = tuple(name for name in task.sections if name in run.sections)
        if sections:
            yield replace(task, sections=sections)


def _path_that_matters(run: Run) -> str | None:
    """The best one, or, where a run was not asked to find that out, the first."""
    if {"correctness", "latency"} <= set(run.sections):
        return best_path(read_results(run.out))
    return next(iter(fastest_first(run.paths)), None)


def _run_peer(peer: Peer, run: Run, console: Console) -> None:
    left_s = run.end_s - time.time()
    if left_s <= 0:
        result = Result(SECTION, peer.name, SKIPPED, "no time left", {})
    else:
        console.print(f"{peer.name} (peer): {left_s:.0f} s left", highlight=False)
        flow_steps, limit_s = SIZES[run.size].flow_steps, min(PEER_S, left_s)
        result = run_peer(peer, BASE, flow_steps, run.device, run.out, limit_s, quick=run.quick)
    result.write(run.out)
    if result.data:
        wall = result.data["wall_ms"]
        line = f"p50 {wall['p50']:.2f}, p99 {wall['p99']:.2f} ms"
    else:
        line = f"{result.status}: {result.note}"
    console.print(f"  {peer.name} (peer): {line}", highlight=False)


def _run_in_process(task: Task, run: Run, console: Console) -> None:
    left_s = run.end_s - time.time()
    names = ", ".join(task.sections)
    if left_s <= task.least_s:
        note = f"{left_s:.0f} s left of {task.least_s:.0f}" if left_s > 0 else "no time left"
        console.print(f"{task.path}, {names}: skipped, {note}", highlight=False)
        _write_all(task, run, SKIPPED, note)
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
        path = task.path
        if path == FP8:  # the fused path on another model
            check_fp8(device)
            to_fp8(model)
            path = "fused"
        runner = choose_runner(path, model)
        runner.path = task.path
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
        FP8: fp8,
        "latency": latency,
        "shapes": shapes,
        "curves": curves,
        "end_to_end": _end_to_end,
        "cold_start": _cold_start,
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


def _cold_start(bench: Bench) -> Iterator[dict[str, Any]]:
    from safe_pruner_node.evaluation.bench_gpu.cold_start import cold_start  # noqa: PLC0415

    yield from cold_start(bench)
