"""A small policy for the benchmark's tests, and runners that are wrong in one known way."""

import functools

import torch
from rich.console import Console

from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES, random_policy
from safe_pruner_node.evaluation.bench_gpu.section import Bench

CPU = torch.device("cpu")
SMALL = SIZES["small"]


@functools.cache
def small_policy():
    return random_policy(SMALL, CPU)


def make_bench(out, runner, deadline_s=float("inf")):
    console = Console(quiet=True)
    return Bench(small_policy(), runner, out, deadline_s, quick=True, console=console)


class Faulty(EagerRunner):
    """Eager, but `spoil(result, calls)` stands in for the result of one stage."""

    path = "graphs"

    def __init__(self, stage, spoil):
        self._stage, self._spoil, self._calls = stage, spoil, 0

    def run(self, stage, fixed, *inputs):
        result = stage(*fixed, *inputs)
        if stage.__name__ != self._stage:
            return result
        self._calls += 1
        return self._spoil(result, self._calls)
