"""Section ``fp8``: the fused path in FP8 against fp32 eager, on many inputs.

FP8 is far coarser than bf16, so it is not judged in bf16's errors but by the direction of the
actions, and on more inputs than the other paths. Its scales come from other random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from safe_pruner_node.engine.fp8 import quantise, watch_inputs
from safe_pruner_node.engine.fp8_calibration import LEAST_COSINE
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.evaluation.bench_gpu import methods
from safe_pruner_node.evaluation.bench_gpu.cases import FIXED, Case, no_tf32, play
from safe_pruner_node.evaluation.bench_gpu.comparison import closeness
from safe_pruner_node.evaluation.bench_gpu.policy import in_fp32, random_policy
from safe_pruner_node.evaluation.bench_gpu.queries import BASE, random_query
from safe_pruner_node.evaluation.bench_gpu.section import Bench
from safe_pruner_node.pi05.model import Pi05

FP8 = "fp8"
"""Name of the section, and of the fused path in FP8."""

MOST_OFF = 1 - LEAST_COSINE
"""1 - cosine of the actions with fp32's; above it FP8 is experimental."""

INPUTS = 50
CALIBRATION_SEEDS = range(500, 508)
"""Queries that the scales come from; those of the comparison are others."""


def to_fp8(model: Pi05) -> None:
    """Calibrate a policy on random queries and quantise it; its memory is counted from then on."""
    session = PolicySession(model, methods.full())
    with watch_inputs(model) as largest:
        for seed in CALIBRATION_SEEDS:
            random_query(model.config, BASE, seed, model.device).run(session)
    quantise(model, largest)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)


def fp8(bench: Bench) -> Iterator[dict[str, Any]]:
    """Play full and pruned steps in FP8 and in fp32.

    Yields:
        For each of the two, how close the actions are.
    """
    config, device = bench.model.config, bench.model.device
    truth_model = in_fp32(random_policy(config, device))
    inputs = INPUTS // 10 if bench.quick else INPUTS
    rows = []
    for mode in (methods.FULL, FIXED):
        bench.check_time()
        case = Case(BASE, mode)
        with no_tf32():
            truth = play(case, truth_model, EagerRunner(), inputs)
        ours = play(case, bench.model, bench.runner, inputs)
        rows.append({"mode": mode, "inputs": inputs, **closeness(ours, truth)})
        bench.say(f"{mode}: least cosine of {inputs} inputs {rows[-1]['cosine']:.6f}")
        yield {"rows": rows}
