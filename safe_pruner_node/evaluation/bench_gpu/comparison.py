"""How far a path's actions are from fp32, and whether that is near enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.evaluation.bench_gpu.cases import Played
from safe_pruner_node.pi05.nano import ARM_SPAN

BAR = 1.5
"""A path's error against fp32, in units of the error of plain bf16 PyTorch."""

SPARE_TOKENS = 0.01
"""Share of the kept tokens that may differ from fp32's beyond `BAR` times what bf16's do, where
the path itself chooses: near the threshold the order of two tokens is a matter of rounding."""
FULL_BAR = 2.0
"""Two results that are each as far from fp32 as bf16 is are so far from each other at most."""

ARM_JOINTS = 14
"""The S1's first channels, of both arms."""


@dataclass(frozen=True)
class Comparison:
    """A path, and plain bf16 eager beside it, against fp32 eager on the same queries.

    Attributes:
        chooses: The path chooses the tokens: the errors are then also those of other tokens, and
            the tokens are judged instead.
        error: |a - ref| / |ref| over all seeds.
        bf16_error: The same of plain bf16 eager.
        full_error: |a - full| / |full| against the path's own full step where the two have to be
            the same; else None.
        cosine: The least cosine of a seed's actions and the reference.
        worst: Greatest difference of one normalised action.
        worst_arm_mrad: The same of an arm joint, where the normalised range is ± 0.15 rad.
        seeds: Queries compared.
        lost_tokens: Share of fp32's tokens that were not kept, all seeds.
        bf16_lost_tokens: The same of plain bf16 eager.
        unchanged: Elements of the actions that were left from one query to the next.
        repeat_error: First query asked again after the others, relative.
        finite: No NaN and no infinity.
    """

    chooses: bool
    error: float
    bf16_error: float
    full_error: float | None
    cosine: float
    worst: float
    worst_arm_mrad: float
    seeds: int
    lost_tokens: float
    bf16_lost_tokens: float
    unchanged: int
    repeat_error: float
    finite: bool

    @property
    def complaints(self) -> list[str]:
        """What is not as it should be; empty when the path is right."""
        found = []
        if not self.finite:
            found.append("not finite")
        if not self.chooses and self.error > BAR * self.bf16_error:
            found.append(f"error {self.error / self.bf16_error:.2f} of bf16 eager's")
        if self.full_error is not None and self.full_error > FULL_BAR * self.bf16_error:
            found.append(f"{self.full_error:.1e} off its own full step")
        spare = BAR * self.bf16_lost_tokens + SPARE_TOKENS if self.chooses else 0.0
        if self.lost_tokens > spare:
            found.append(f"{100 * self.lost_tokens:.1f} % other tokens")
        if self.unchanged:
            found.append(f"{self.unchanged} actions left from the query before")
        if self.repeat_error > self.bf16_error:
            found.append(f"{self.repeat_error:.1e} off when asked again")
        return found

    def to_json(self) -> dict[str, Any]:
        """Every figure and the verdict."""
        return {**asdict(self), "complaints": self.complaints}


def compare(
    path: Played,
    bf16: Played,
    reference: Played,
    *,
    chooses: bool = False,
    full: Played | None = None,
) -> Comparison:
    """Judge a path.

    Args:
        path: What it gave.
        bf16: What plain bf16 eager gave on the same queries.
        reference: What fp32 eager gave.
        chooses: True where the path chooses the tokens.
        full: What the path gave in the mode that this one has to be equal to; None: there is none.
    """
    ours, truth = path.actions, reference.actions  # [seeds, H, A] each
    return Comparison(
        chooses=chooses,
        bf16_error=_relative(bf16.actions, truth),
        full_error=None if full is None else _relative(ours, full.actions),
        **closeness(path, reference),
        seeds=len(ours),
        lost_tokens=_lost(path, reference),
        bf16_lost_tokens=_lost(bf16, reference),
        unchanged=int((path.actions[1:] == path.actions[:-1]).sum()),
        repeat_error=_relative(path.again[None], path.actions[:1]),
        finite=bool(np.isfinite(path.actions).all()),
    )


def closeness(path: Played, reference: Played) -> dict[str, float]:
    """The fields of `Comparison` that need no other path: error, cosine, worst and of the arms."""
    ours, truth = path.actions, reference.actions  # [seeds, H, A] each
    off = np.abs(ours - truth)
    return {
        "error": _relative(ours, truth),
        # NumPy's minimum: NaN is less than anything
        "cosine": float(np.min([_cosine(a, b) for a, b in zip(ours, truth, strict=True)])),
        "worst": float(off.max()),
        "worst_arm_mrad": 1e3 * ARM_SPAN * float(off[..., :ARM_JOINTS].max()),
    }


def _lost(path: Played, reference: Played) -> float:
    """Share of the reference's tokens that the path did not keep."""
    if not reference.keep.size:
        return 0.0
    if path.keep.shape != reference.keep.shape:
        raise ValueError(f"{path.keep.shape[1]} tokens kept instead of {reference.keep.shape[1]}")
    pairs = zip(path.keep, reference.keep, strict=True)
    return sum(len(np.setdiff1d(theirs, ours)) for ours, theirs in pairs) / reference.keep.size


def _relative(ours: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
