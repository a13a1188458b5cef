"""The steps that are compared with fp32, and how they are played."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.engine.runner import Runner
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.evaluation.bench_gpu import methods
from safe_pruner_node.evaluation.bench_gpu.queries import BASE, Query, Shape, random_query
from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pruning.settings import PrunerSettings

RHO = 0.75
FIXED, SAFE, NOTHING_DROPPED = "pruned, fixed tokens", "pruned, SAFE", "pruned, rho 0"
MODES = (methods.FULL, methods.KEYFRAME, FIXED, SAFE, NOTHING_DROPPED)

SHAPES = (
    BASE,
    replace(BASE, prompt=20),
    replace(BASE, prompt=200),
    replace(BASE, cameras=1),
    replace(BASE, cameras=2),
    replace(BASE, horizon=10),
)
"""One thing changes at a time; the base comes first."""

POISON_MB = (1, 1, 16, 16, 256, 256, 1024)

FIRST_SEED = 1000
"""Queries of the comparison; a session that needs a keyframe first takes the one before."""


@dataclass(frozen=True)
class Case:
    """One method on one shape."""

    shape: Shape
    mode: str

    def settings(self, config: Pi05Config) -> PrunerSettings:
        """The pruner that plays it."""
        if self.mode == methods.FULL:
            return methods.full()
        if self.mode == methods.KEYFRAME:
            return methods.keyframe(config, self.shape.cameras)
        if self.mode == FIXED:
            return methods.fixed_tokens(RHO)
        rho = RHO if self.mode == SAFE else 0.0
        return methods.pruned(rho, config, self.shape.cameras)

    @property
    def chooses(self) -> bool:
        """True when the path's own saliency decides which tokens go on."""
        return self.mode == SAFE

    @property
    def needs_keyframe(self) -> bool:
        """True when the first step of a session would not be of this kind."""
        return self.mode in {SAFE, NOTHING_DROPPED}


@dataclass(frozen=True)
class Played:
    """What a case gave.

    Attributes:
        actions: Normalised actions of every seed, [seeds, H, A] float32.
        keep: Visual tokens kept, [seeds, K]; K is 0 where every token was.
        again: The first query's actions when asked once more at the end, [H, A] float32.
    """

    actions: NDArray[np.float32]
    keep: NDArray[np.int64]
    again: NDArray[np.float32]


def all_cases() -> list[Case]:
    """Shape by shape, the most important first."""
    return [Case(shape, mode) for shape in SHAPES for mode in MODES]


def play(case: Case, model: Pi05, runner: Runner, seeds: int) -> Played:
    """Run a case, in a session of its own, on as many queries as there are seeds.

    No query has anything in common with the one before it, so a part of a buffer that a step
    left as it was would be wrong in the next one's actions.

    Args:
        case: What to run.
        model: The policy.
        runner: The path.
        seeds: How many queries.

    Raises:
        RuntimeError: A step was not of the kind that the case is about.
    """
    config = model.config
    session = PolicySession(model, case.settings(config), runner=runner)
    if case.needs_keyframe:
        random_query(config, case.shape, FIRST_SEED - 1, model.device).run(session)
    queries = [random_query(config, case.shape, FIRST_SEED + i, model.device) for i in range(seeds)]
    steps = [_step(case, session, query) for query in queries]
    again = steps[0][0]
    if case.mode != FIXED:  # there the tokens would be others
        again, _ = _step(case, session, queries[0])
    actions, keep = zip(*steps, strict=True)
    return Played(np.stack(actions), np.stack(keep), again)


def _step(
    case: Case, session: PolicySession, query: Query
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    step = query.run(session)
    if step.decision.keyframe != (case.mode == methods.KEYFRAME):
        raise RuntimeError(f"{case}: keyframe is {step.decision.keyframe}, {step.decision.reason}")
    keep = step.decision.keep
    kept = np.zeros(0, np.int64) if keep is None else keep.cpu().numpy()
    return _to_numpy(step.actions[0]), kept


def _to_numpy(actions: Tensor) -> NDArray[np.float32]:
    return np.asarray(actions.float().cpu().numpy(), dtype=np.float32)


@contextmanager
def no_tf32() -> Iterator[None]:
    """Convolutions of fp32 are rounded to TF32 unless told otherwise; products are not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def poison_free_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next.

    What reads a buffer before it has been written then gives NaN, and not by luck what it should.
    """
    if device.type != "cuda":
        return
    # Held together until all are filled, else they would be one block.
    held = [torch.full((mb << 18,), float("nan"), device=device) for mb in POISON_MB]
    torch.cuda.synchronize(device)
    del held
