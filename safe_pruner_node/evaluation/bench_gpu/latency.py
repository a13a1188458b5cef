"""Sections ``latency``, ``shapes`` and ``curves``: milliseconds of a step on one path."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from safe_pruner_node.engine.report import step_flops
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.evaluation.bench_gpu import methods
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import synchronize, time_steps
from safe_pruner_node.evaluation.bench_gpu.queries import BASE, Shape, random_query
from safe_pruner_node.evaluation.bench_gpu.section import Bench
from safe_pruner_node.pruning.settings import PrunerSettings

QUERIES = 8
"""Random ones that take turns."""
STEPS, STEPS_S = 200, 5.0
"""Timed steps of each row, and the seconds after which a slow path may stop before."""
CURVE_STEPS, CURVE_STEPS_S = 60, 2.0
RHO = 0.75
RHOS = (RHO, 0.5, 0.9)
CURVE_RHOS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
CURVE_LAYERS = (3, 1, 6, 9)


def latency(bench: Bench) -> Iterator[dict[str, Any]]:
    """Full, keyframe and pruned steps of the shape that the bars are about; compiled, two of them.

    Yields:
        A row for each, and the most device memory that there was in use so far.
    """
    config = bench.model.config
    kinds: dict[str, PrunerSettings] = {methods.FULL: methods.full()}
    kinds[methods.pruned_name(RHO)] = methods.pruned(RHO, config, BASE.cameras)
    kinds[methods.KEYFRAME] = methods.keyframe(config, BASE.cameras)
    kinds |= {methods.pruned_name(rho): methods.pruned(rho, config, BASE.cameras) for rho in RHOS}
    if bench.runner.path == "compiled":  # each is compiled for tens of seconds: what the bars need
        kinds = {name: kinds[name] for name in (methods.FULL, methods.pruned_name(RHO))}
    rows = []
    for mode, settings in kinds.items():
        rows.append(_row(bench, mode, settings, BASE, STEPS, STEPS_S))
        yield {"rows": rows, "memory": _memory(bench.model.device)}


def shapes(bench: Bench) -> Iterator[dict[str, Any]]:
    """Full and pruned steps with fewer cameras, and with a short chunk.

    Yields:
        The rows so far.
    """
    rows = []
    for shape in (replace(BASE, cameras=2), replace(BASE, cameras=1), replace(BASE, horizon=10)):
        pruned = methods.pruned(RHO, bench.model.config, shape.cameras)
        kinds = {methods.FULL: methods.full(), methods.pruned_name(RHO): pruned}
        for mode, settings in kinds.items():
            rows.append(_row(bench, mode, settings, shape, STEPS, STEPS_S))
            yield {"rows": rows}


def curves(bench: Bench) -> Iterator[dict[str, Any]]:
    """A pruned step over rho and over the pruning layer.

    Yields:
        The rows so far, each with its rho and its layer.
    """
    config = bench.model.config
    rows = []
    for layer in (layer for layer in CURVE_LAYERS if layer < config.vlm.depth):
        for rho in CURVE_RHOS if layer == CURVE_LAYERS[0] else RHOS:
            settings = methods.pruned(rho, config, BASE.cameras, layer)
            mode = methods.pruned_name(rho)
            row = _row(bench, mode, settings, BASE, CURVE_STEPS, CURVE_STEPS_S)
            rows.append({**row, "rho": rho, "layer": layer})
            yield {"rows": rows}


def _row(
    bench: Bench,
    mode: str,
    settings: PrunerSettings,
    shape: Shape,
    steps: int,
    at_most_s: float,
) -> dict[str, Any]:
    """Time one kind of step, in a session of its own."""
    bench.check_time()
    config, device = bench.model.config, bench.model.device
    session = PolicySession(bench.model, settings, runner=bench.runner)
    queries = [random_query(config, shape, seed, device) for seed in range(QUERIES)]
    started_s = time.perf_counter()
    queries[0].run(session)  # a keyframe where the method has them
    decision = queries[1].run(session).decision
    synchronize(device)
    first_s = time.perf_counter() - started_s
    times = time_steps(session, queries, bench.steps(steps), at_most_s)
    n_kept = None if decision.keep is None else len(decision.keep)
    flops = step_flops(config, settings, queries[0].context, shape.prompt, n_kept)
    wall = times.to_json()["wall_ms"]
    bench.say(f"{shape}, {mode}: p50 {wall['p50']:.2f}, p99 {wall['p99']:.2f} ms")
    return {
        "mode": mode,
        "shape": asdict(shape),
        "visual_tokens": shape.cameras * config.vision.tokens,
        "kept_tokens": n_kept,
        "layer": None if n_kept is None else settings.layer,
        "prefill_flops": asdict(flops),
        "first_steps_s": first_s,
        **times.to_json(),
    }


def _memory(device: torch.device) -> dict[str, float]:
    """Most bytes in use by tensors and held by the allocator, graphs' pools included."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_bytes": float(torch.cuda.max_memory_allocated(device)),
        "reserved_bytes": float(torch.cuda.max_memory_reserved(device)),
    }
