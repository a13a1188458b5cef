"""FastV: prune by shallow attention alone (Chen et al., ECCV 2024), as a baseline.

Written from the method's description: head-mean attention at layer ls-1, top-k, original
positions. Every step is pruned; there are no keyframes.
"""

from __future__ import annotations

from torch import Tensor

from safe_pruner_node.pruning.base import Decision, EarlyView, Pruner
from safe_pruner_node.pruning.early import Vote, early_saliency
from safe_pruner_node.pruning.selection import Selection, select


class FastVPruner(Pruner):
    """Keeps the tokens that the query rows attend to in layer ls-1."""

    def decide(self, early: EarlyView) -> Decision:
        """Rank by the early saliency."""
        fixed = (self._vote(early), self._selection(early.scene))
        return Decision(keep=self._run(_rank, fixed, early.query, early.keys, early.n_text))


def _rank(
    vote: Vote, selection: Selection, query: Tensor, keys: Tensor, n_text: Tensor | None
) -> Tensor:
    return select(selection, early_saliency(vote, query, keys, n_text))  # [K]
