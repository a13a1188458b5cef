"""Uniformly random pruning at the same layer and K: the least a method has to beat."""

from __future__ import annotations

import torch

from safe_pruner_node.pruning.base import Decision, EarlyView, Pruner
from safe_pruner_node.pruning.selection import top_k_with_floors
from safe_pruner_node.pruning.settings import PrunerSettings


class RandomPruner(Pruner):
    """Keeps K tokens drawn without replacement, afresh every step, from the settings' seed."""

    def __init__(self, settings: PrunerSettings, depth: int) -> None:
        super().__init__(settings, depth)
        self._generator = torch.Generator().manual_seed(settings.seed)

    def decide(self, early: EarlyView) -> Decision:
        """Draw the tokens."""
        settings, scene = self.settings, early.scene
        n_visual = len(scene.z)
        scores = torch.rand(n_visual, generator=self._generator).to(scene.z.device)
        keep = top_k_with_floors(
            scores, settings.kept(n_visual), scene.context.camera_slices, settings.camera_floor
        )
        return Decision(keep=keep)
