"""What the project asks of the engine, and whether this run shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safe_pruner_node.evaluation.bench_gpu.comparison import BAR as ERROR_BAR
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.fp8 import FP8, MOST_OFF
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import PRUNER
from safe_pruner_node.evaluation.bench_gpu.methods import FULL, KEYFRAME, pruned_name
from safe_pruner_node.evaluation.bench_gpu.section import DONE, FAILED
from safe_pruner_node.evaluation.bench_gpu.tasks import COMPILED

PRUNED = pruned_name(0.75)


@dataclass(frozen=True)
class Bar:
    """One requirement.

    Attributes:
        name: What is measured, on which path.
        found: The figure; None where this run did not measure it.
        at_most: The bar.
        unit: Of both.
    """

    name: str
    found: float | None
    at_most: float
    unit: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.found is None:
            return "not measured"
        return "met" if self.found <= self.at_most else "NOT met"


def all_bars(run: Findings) -> list[Bar]:
    """Every bar, on the fastest right path."""
    return [
        *_latency_bars(run),
        *_correctness_bars(run),
        *_fp8_bars(run),
        *_memory_bars(run),
        *_worker_bars(run),
    ]


def _latency_bars(run: Findings) -> Iterator[Bar]:
    full, pruned = (_wall(run, run.best, mode) for mode in (FULL, PRUNED))
    keyframe = _wall(run, run.best, KEYFRAME)
    yield Bar("full step, p50", full, 12.0, "ms")
    yield Bar("pruned step, rho 0.75, p50", pruned, 9.0, "ms")
    for mode, ours in ((FULL, full), (PRUNED, pruned)):
        theirs = _wall(run, COMPILED, mode)
        yield Bar(f"{mode}, against torch.compile + CUDA graph", _ratio(ours, theirs), 0.5, "")
    for mode, p50 in ((FULL, full), (PRUNED, pruned)):
        yield Bar(f"{mode}, p99 / p50", _ratio(_wall(run, run.best, mode, "p99"), p50), 1.05, "")
    yield Bar("keyframe / full step", _ratio(keyframe, full), 1.05, "")
    row = run.row(run.best, PRUNED)
    pruner = None if row is None else float(row["group_ms"][PRUNER]["p50"])
    yield Bar("matching + saliency + selection of a pruned step", pruner, 0.4, "ms")


def _correctness_bars(run: Findings) -> Iterator[Bar]:
    for result in run.of("correctness"):
        cases = result.data["cases"]
        ratios = [case["error"] / case["bf16_error"] for case in cases if not case["chooses"]]
        yield Bar(
            f"{result.path}: error against fp32, in errors of bf16 eager, worst of "
            f"{len(ratios)} cases",
            max(ratios, default=None),
            ERROR_BAR,
            "",
        )
        yield Bar(
            f"{result.path}: cases with any complaint",
            float(sum(bool(case["complaints"]) for case in cases)),
            0.0,
            "",
        )


def _fp8_bars(run: Findings) -> Iterator[Bar]:
    for result in run.of(FP8):
        for row in result.data["rows"]:
            name = f"fp8, {row['mode']}: 1 - cosine with fp32, worst of {row['inputs']} inputs"
            yield Bar(name, 1 - row["cosine"], MOST_OFF, "")
    memory = [r.data["memory"].get("reserved_bytes") for r in run.of("latency") if r.path == FP8]
    if memory:
        yield Bar("fp8: device memory: weights, buffers, graphs", _gigabytes(memory[0]), 10.0, "GB")


def _memory_bars(run: Findings) -> Iterator[Bar]:
    found = [r.data["memory"] for r in run.of("latency") if r.path == run.best]
    peak = found[0].get("reserved_bytes") if found else None
    yield Bar("device memory: weights, buffers, graphs", _gigabytes(peak), 10.0, "GB")
    workers = [r.data.get("device_bytes") for r in run.of("end_to_end")]
    used = workers[0] if workers else None
    yield Bar("device memory of the worker, CUDA's context included", _gigabytes(used), 10.0, "GB")


def _worker_bars(run: Findings) -> Iterator[Bar]:
    results = list(run.of("end_to_end"))
    start = results[0].data["start"]["ready_s"] if results else None
    yield Bar("worker from spawn to ready", start, 60.0, "s")
    rows = {row["mode"]: row for row in results[0].data["rows"]} if results else {}
    for mode in (FULL, PRUNED):
        step = _wall(run, results[0].path if results else None, mode)
        row = rows.get(mode)
        above = None if row is None or step is None else row["round_trip_ms"]["p50"] - step
        yield Bar(f"worker, camera bytes to chunk, above the {mode} step", above, 4.0, "ms")


def _wall(run: Findings, path: str | None, mode: str, percentile: str = "p50") -> float | None:
    row = run.row(path, mode)
    return None if row is None else float(row["wall_ms"][percentile])


def _gigabytes(n_bytes: float | None) -> float | None:
    return n_bytes / 1e9 if n_bytes else None


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def is_right(run: Findings) -> bool:
    """True when nothing failed and no comparison has a complaint."""
    failed = any(result.status == FAILED for result in run.results)
    cases = [case for result in run.of("correctness") for case in result.data["cases"]]
    return not failed and not any(case["complaints"] for case in cases)


def incomplete(run: Findings) -> list[str]:
    """A line for every section that did not run to its end."""
    return [
        f"{result.section} on {result.path}: {result.status}, {result.note}"
        for result in run.results
        if result.status != DONE
    ]
