"""Section ``correctness``: every path against fp32 eager, before anything is timed.

The reference (fp32 eager, and plain bf16 eager beside it) is played once and kept in a file, so
that no other process of the run needs the 13 GB of the fp32 weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.cases import (
    NOTHING_DROPPED,
    Case,
    Played,
    all_cases,
    no_tf32,
    play,
    poison_free_memory,
)
from safe_pruner_node.evaluation.bench_gpu.comparison import compare
from safe_pruner_node.evaluation.bench_gpu.methods import FULL
from safe_pruner_node.evaluation.bench_gpu.policy import in_fp32
from safe_pruner_node.evaluation.bench_gpu.section import Bench

REFERENCE = "reference.npz"
_FIELDS = ("actions", "keep", "again")


def reference(bench: Bench) -> Iterator[dict[str, Any]]:
    """Play every case in fp32 and in plain bf16, and keep what they gave.

    Yields:
        The error of plain bf16 against fp32: the unit that paths are judged in.
    """
    truth_model = in_fp32(bench.model)
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for case in all_cases():
        bench.check_time()
        with no_tf32():
            truth = play(case, truth_model, EagerRunner(), bench.seeds)
        bf16 = play(case, bench.model, EagerRunner(), bench.seeds)
        for name, played in (("fp32", truth), ("bf16", bf16)):
            for field in _FIELDS:
                arrays[_key(name, case, field)] = getattr(played, field)
        np.savez(bench.out / REFERENCE, **arrays)  # type: ignore[arg-type]  # numpy's stub
        rows.append(_row(case, compare(bf16, bf16, truth, chooses=case.chooses).to_json()))
        yield {"cases": rows}


def correctness(bench: Bench) -> Iterator[dict[str, Any]]:
    """Play every case on the path and compare it with the reference.

    Yields:
        The comparisons so far, and the seconds that the first case took: kernels are compiled
        in it if that has never been done on this machine.

    Raises:
        ConfigError: There is no reference to compare with.
    """
    known = _read_reference(bench.out / REFERENCE)
    poison_free_memory(bench.model.device)
    rows: list[dict[str, Any]] = []
    full: Played | None = None
    first_s, started_s = 0.0, time.perf_counter()
    for case in all_cases():
        pair = known.get(case)
        if pair is None:  # the reference ran out of time
            break
        bench.check_time()
        played = play(case, bench.model, bench.runner, bench.seeds)
        if case.mode == FULL:  # the first of its shape
            full = played
        result = compare(
            played,
            pair["bf16"],
            pair["fp32"],
            chooses=case.chooses,
            full=full if case.mode == NOTHING_DROPPED else None,
        )
        rows.append(_row(case, result.to_json()))
        verdict = "; ".join(result.complaints) or "right"
        bench.say(f"{case.shape}, {case.mode}: error {result.error:.2e}, {verdict}")
        first_s = first_s or time.perf_counter() - started_s
        yield {"cases": rows, "first_case_s": first_s}


def _row(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    return {"shape": asdict(case.shape), "mode": case.mode, **values}


def _key(name: str, case: Case, field: str) -> str:
    shape = case.shape
    return f"{name}/{shape.cameras}/{shape.prompt}/{shape.horizon}/{case.mode}/{field}"


def _read_reference(path: Path) -> dict[Case, dict[str, Played]]:
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except OSError as error:
        raise ConfigError(path, "", error, "what the section `reference` writes") from None
    return {
        case: {
            name: Played(**{field: arrays[_key(name, case, field)] for field in _FIELDS})
            for name in ("fp32", "bf16")
        }
        for case in all_cases()
        if _key("bf16", case, "again") in arrays
    }
