"""How far a run is, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A run ends with its steps or its minutes, whichever comes first.

    Attributes:
        steps: Optimizer steps; 0 for no bound.
        minutes: Training time over all resumed runs; 0 for no bound.
        warmup_share: Part of the run in which the learning rate rises.
    """

    steps: int
    minutes: float
    warmup_share: float = 0.04

    def progress(self, step: int, elapsed_s: float) -> float:
        """Part of the run that is done, 0 to 1."""
        shares = [0.0]
        if self.steps:
            shares.append(step / self.steps)
        if self.minutes:
            shares.append(elapsed_s / (60.0 * self.minutes))
        return min(1.0, max(shares))

    def learning_rate(self, progress: float, peak: float) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        if progress < self.warmup_share:
            return peak * (progress + 1e-3) / (self.warmup_share + 1e-3)
        done = (progress - self.warmup_share) / (1.0 - self.warmup_share)
        return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))
