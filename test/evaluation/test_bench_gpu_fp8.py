"""The benchmark's FP8: quantised on inputs of its own, judged by the worst of many."""

import math
import time
from dataclasses import replace

import pytest
from bench_gpu_side import CPU, SMALL, Faulty, make_bench

from safe_pruner_node.engine.fp8 import is_fp8
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.evaluation.bench_gpu.bars import all_bars
from safe_pruner_node.evaluation.bench_gpu.cases import FIXED
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.fp8 import fp8, to_fp8
from safe_pruner_node.evaluation.bench_gpu.methods import FULL
from safe_pruner_node.evaluation.bench_gpu.policy import random_policy
from safe_pruner_node.evaluation.bench_gpu.report import tables
from safe_pruner_node.evaluation.bench_gpu.section import DONE, SKIPPED, Result, read_results
from safe_pruner_node.evaluation.bench_gpu.tasks import (
    Run,
    Task,
    best_path,
    first_tasks,
    run_task,
)


@pytest.fixture(scope="module")
def model():
    quantised = random_policy(SMALL, CPU)
    to_fp8(quantised)
    return quantised


def rows(out, model, runner):
    (*_, data) = fp8(replace(make_bench(out, runner), model=model))
    return data["rows"]


def test_full_and_pruned_steps_are_compared_with_fp32(tmp_path, model):
    assert is_fp8(model)
    found = rows(tmp_path, model, EagerRunner())
    assert [(row["mode"], row["inputs"]) for row in found] == [(FULL, 5), (FIXED, 5)]
    for row in found:
        assert 0.99 < row["cosine"] < 1 - 1e-6
        assert 1e-3 < row["error"] < 0.1


def test_one_bad_input_of_many_decides(tmp_path, model):
    def once(result, calls):
        actions, saliency = result
        return (-actions if calls == 3 else actions), saliency

    (full, pruned) = rows(tmp_path, model, Faulty("denoise", once))
    assert full["cosine"] < -0.9
    assert pruned["cosine"] > 0.99

    def nothing(result, calls):
        actions, saliency = result
        return (actions * math.nan if calls == 2 else actions), saliency

    (full, _) = rows(tmp_path, model, Faulty("denoise", nothing))
    assert math.isnan(full["cosine"])


def timed(path, p50):
    row = {"mode": "full", "wall_ms": {"p50": p50, "p99": p50}}
    return Result("latency", path, DONE, "", {"rows": [row], "memory": {"reserved_bytes": 7e9}})


def compared(cosine):
    row = {"mode": "full", "inputs": 50, "cosine": cosine, "error": 0.03}
    row |= {"worst": 0.2, "worst_arm_mrad": 30.0}
    return Result("fp8", "fp8", DONE, "", {"rows": [row]})


@pytest.mark.parametrize(
    ("cosine", "verdict"), [(0.9995, "met"), (0.9985, "NOT met"), (math.nan, "NOT met")]
)
def test_the_bar_is_on_the_cosine(cosine, verdict):
    findings = Findings({}, SMALL, [timed("fp8", 9.0), compared(cosine)])
    bars = {bar.name: bar for bar in all_bars(findings)}
    (bar,) = (bar for name, bar in bars.items() if "worst of 50 inputs" in name)
    assert bar.verdict == verdict
    assert bars["fp8: device memory: weights, buffers, graphs"].found == 7.0


def test_fp8_is_timed_beside_the_others_and_never_taken_for_the_best():
    order = [(task.path, task.sections[-1]) for task in first_tasks(("eager", "fused", "fp8"))]
    assert order == [
        ("eager", "reference"),
        ("fused", "correctness"),
        ("fused", "latency"),
        ("fp8", "fp8"),
        ("fp8", "latency"),
        ("eager", "latency"),
    ]
    assert best_path([timed("eager", 20.0), timed("fp8", 5.0), compared(0.9999)]) == "eager"


def test_the_report_has_a_table():
    (grid,) = (g for g in tables(Findings({}, SMALL, [compared(0.9995)])) if g.title == "FP8")
    assert grid.rows[0][1:3] == ("50", "0.999500")


def test_a_cpu_skips_it_with_a_line(tmp_path):
    run = Run(
        ("fp8",), "small", "cpu", tmp_path, time.time() + 60, quick=True, sections=(), peers=()
    )
    run_task(Task("fp8", ("fp8",)), run, run.end_s)
    (result,) = read_results(tmp_path)
    assert result.status == SKIPPED
    assert "dtype: found fp8, on device cpu" in result.note
