"""Uniformly random pruning at the same layer and K: the least a method has to beat."""

from __future__ import annotations

import torch

from safe_pruner_node.pruning.base import Decision, EarlyView, Pruner, Run, call
from safe_pruner_node.pruning.selection import select
from safe_pruner_node.pruning.settings import PrunerSettings


class RandomPruner(Pruner):
    """Keeps K tokens drawn without replacement, afresh every step, from the settings' seed."""

    def __init__(self, settings: PrunerSettings, depth: int, run: Run = call) -> None:
        super().__init__(settings, depth, run)
        self._generator = torch.Generator().manual_seed(settings.seed)

    def decide(self, early: EarlyView) -> Decision:
        """Draw the tokens, on the CPU: it needs nothing of what the GPU knows."""
        scores = torch.rand(len(early.scene.z), generator=self._generator)
        keep = select(self._selection(early.scene), scores)
        return Decision(keep=keep.to(early.scene.z.device, non_blocking=True))
