"""A small policy for the benchmark's tests, and runners that are wrong in one known way."""

import functools
import os

import torch
from rich.console import Console

from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES, random_policy
from safe_pruner_node.evaluation.bench_gpu.section import RUNNING, Bench, Result

CPU = torch.device("cpu")
SMALL = SIZES["small"]


@functools.cache
def small_policy():
    return random_policy(SMALL, CPU)


def make_bench(out, runner, deadline_s=float("inf")):
    console = Console(quiet=True)
    return Bench(small_policy(), runner, out, deadline_s, quick=True, console=console)


def die_in_the_middle(task, run, _deadline_s):
    """In place of `run_task`: what an illegal access or the kernel's out-of-memory killer does."""
    Result(task.sections[0], task.path, RUNNING, "", {"rows": [1]}).write(run.out)
    os.abort()


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


def write_peer(folder):
    """A peer that times something real, as docs/performance.md says."""
    program = folder / "tiny_peer.py"
    program.write_text(TINY_PEER)
    return program


TINY_PEER = """
import argparse, json, pathlib, time
import torch

parser = argparse.ArgumentParser()
for name in ("cameras", "prompt-tokens", "horizon", "flow-steps", "steps"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--seconds", type=float)
parser.add_argument("--device")
parser.add_argument("--out", type=pathlib.Path)
asked = parser.parse_args()

left = torch.rand(asked.cameras, asked.prompt_tokens)
right = torch.rand(asked.prompt_tokens, asked.horizon)
wall_ms = []
for _ in range(asked.steps):
    started_s = time.perf_counter()
    for _ in range(asked.flow_steps):
        left @ right
    wall_ms.append((time.perf_counter() - started_s) * 1e3)
covers = (
    f"a product of {asked.cameras} x {asked.prompt_tokens} by {asked.horizon}, "
    f"{asked.flow_steps} times on {asked.device}, {asked.seconds:g} s at most"
)
asked.out.write_text(json.dumps({"version": "tiny 1.0", "covers": covers, "wall_ms": wall_ms}))
"""
