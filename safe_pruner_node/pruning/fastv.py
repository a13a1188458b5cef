"""FastV: prune by shallow attention alone (Chen et al., ECCV 2024), as a baseline.

Written from the method's description: head-mean attention at layer ls-1, top-k, original
positions. Every step is pruned; there are no keyframes.
"""

from __future__ import annotations

from safe_pruner_node.pruning.base import Decision, EarlyView, Pruner
from safe_pruner_node.pruning.saliency import visual_saliency
from safe_pruner_node.pruning.selection import top_k_with_floors


class FastVPruner(Pruner):
    """Keeps the tokens that the query rows attend to in layer ls-1."""

    def decide(self, early: EarlyView) -> Decision:
        """Rank by the early saliency."""
        settings, scene = self.settings, early.scene
        n_visual = len(scene.z)
        scores = visual_saliency(early.query, early.keys, n_visual, settings.softmax_over)
        keep = top_k_with_floors(
            scores, settings.kept(n_visual), scene.context.camera_slices, settings.camera_floor
        )
        return Decision(keep=keep)
