"""Stages through torch.compile before they are captured: fused kernels without any of our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch._dynamo import config as dynamo

from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.runner import Result

KINDS_MAX = 1000
"""Kinds of calls per stage that torch may compile. Its own limit of 8 is against functions that
never settle; here every kind is wanted, and each is compiled once."""


class CompiledRunner(GraphRunner):
    """As `GraphRunner`, of compiled stages; on a CPU they are compiled and not captured.

    Each kind of call costs a compilation at its first: seconds to minutes for a large model, less
    where torch finds it in its cache on disk.
    """

    path = "compiled"

    def _prepared(self, stage: Callable[..., Result]) -> Callable[..., Result]:
        """The stage, to be compiled at its first call for the shapes it is called with."""
        compiled = torch.compile(stage, fullgraph=True, dynamic=False)

        @wraps(stage)
        def call(*arguments: object) -> Result:
            with dynamo.patch(recompile_limit=KINDS_MAX, accumulated_recompile_limit=KINDS_MAX):
                return compiled(*arguments)

        return call
