"""The full-token path: nothing is pruned."""

from __future__ import annotations

from safe_pruner_node.pruning.base import Decision, EarlyView, Pruner


class VanillaPruner(Pruner):
    """Keeps every valid token; the baseline of every table."""

    @property
    def layer(self) -> None:
        """No layer prunes."""
        return

    def decide(self, early: EarlyView) -> Decision:  # noqa: ARG002 - the interface
        """Keep all."""
        return Decision()
