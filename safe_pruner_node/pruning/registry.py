"""From settings to a pruner."""

from __future__ import annotations

from safe_pruner_node.pruning.base import Pruner, Run, call
from safe_pruner_node.pruning.fastv import FastVPruner
from safe_pruner_node.pruning.random import RandomPruner
from safe_pruner_node.pruning.safe import SafePruner
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.pruning.vanilla import VanillaPruner

PRUNERS: dict[str, type[Pruner]] = {
    "vanilla": VanillaPruner,
    "safe": SafePruner,
    "fastv": FastVPruner,
    "random": RandomPruner,
}


def build_pruner(settings: PrunerSettings, depth: int, run: Run = call) -> Pruner:
    """A new session of the method that the settings name.

    Args:
        settings: Validated settings.
        depth: Layers of the model.
        run: Runs the method's tensor arithmetic.

    Raises:
        ConfigError: The settings do not fit a model of that depth.
    """
    return PRUNERS[settings.method](settings, depth, run)
