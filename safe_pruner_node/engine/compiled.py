"""Layers through torch.compile before their stage is captured: fused, with no kernel of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch._dynamo import config as dynamo

from safe_pruner_node.engine import flow, prefix
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.runner import Result
from safe_pruner_node.pi05.model import SiglipLayer

LAYERS = ((SiglipLayer, "forward"), (prefix, "vlm_layer"), (flow, "expert_layer"))
"""Where the model's time is. A whole stage would be hundreds of them in a row, which torch would
unroll and compile for minutes; one of them serves all of its kind."""

KINDS_MAX = 1000
"""Shapes that torch may compile a layer for. Its own limit of 8 is against functions that never
settle; here every shape is wanted, and each is compiled once."""


class CompiledRunner(GraphRunner):
    """As `GraphRunner`, with compiled layers; on a CPU they are compiled and not captured.

    Each kind of call costs a compilation at its first, less where torch finds it in its cache on
    disk. While a stage runs, the compiled layers stand in for the plain ones in the whole process.
    """

    path = "compiled"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._layers = [
            (owner, name, torch.compile(getattr(owner, name), fullgraph=True, dynamic=False))
            for owner, name in LAYERS
        ]

    def _prepared(self, stage: Callable[..., Result]) -> Callable[..., Result]:
        """The stage on layers to be compiled at their first call for the shapes they get."""

        @wraps(stage)
        def call(*arguments: object) -> Result:
            with (
                dynamo.patch(recompile_limit=KINDS_MAX, accumulated_recompile_limit=KINDS_MAX),
                self._stand_in(),
            ):
                return stage(*arguments)

        return call

    @contextmanager
    def _stand_in(self) -> Iterator[None]:
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in self._layers]
        try:
            for owner, name, compiled in self._layers:
                setattr(owner, name, compiled)
            yield
        finally:
            for owner, name, original in plain:
                setattr(owner, name, original)
