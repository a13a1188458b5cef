"""What this GPU can do at best: bytes per second and bf16 operations per second, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from safe_pruner_node.evaluation.bench_gpu.gpu_timing import synchronize

REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device.

    Attributes:
        bytes_per_s: Device to device copy, bytes read and written.
        flop_per_s: Square bf16 matrix product on random data.
    """

    bytes_per_s: float
    flop_per_s: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Both ceilings; medians after a warm-up.

    On a GPU the copy is of 4 GiB, many times any cache, and the matrices are 8192 wide.
    """
    on_gpu = device.type == "cuda"
    n_bytes, side = (4 << 30, 8192) if on_gpu else (64 << 20, 256)
    return Ceilings(
        bytes_per_s=2 * n_bytes / _copy_s(n_bytes, device),
        flop_per_s=2 * side**3 / _product_s(side, device),
    )


def _copy_s(n_bytes: int, device: torch.device) -> float:
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source), device)


def _product_s(side: int, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _median_s(lambda: a @ b, device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; several are queued so that the launch is not in it."""
    for _ in range(3):
        work()
    samples = []
    for _ in range(3):
        synchronize(device)
        started_s = time.perf_counter()
        for _ in range(REPEATS):
            work()
        synchronize(device)
        samples.append((time.perf_counter() - started_s) / REPEATS)
    return float(np.median(samples))
