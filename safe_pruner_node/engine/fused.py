"""The model's stages in kernels of our own, captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any

import torch

from safe_pruner_node.engine import stages
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.kernels.tiles import unfit
from safe_pruner_node.engine.runner import Result
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pruning.judgement import judge
from safe_pruner_node.pruning.matching import correspond

LEAST_SHARED_MEMORY = 227 * 1024
"""Bytes per block of an H100, whose tiles the kernels have; later data-centre GPUs have as many."""


def unsupported(model: Pi05) -> str | None:
    """Why a model cannot run in these kernels where it is; None when it can."""
    if model.device.type != "cuda":
        return f"device {model.device.type}, the kernels are for CUDA"
    gpu = torch.cuda.get_device_properties(model.device)
    found = int(getattr(gpu, "shared_memory_per_block_optin", 0))  # AMD's have no such figure
    if found < LEAST_SHARED_MEMORY:
        needed = LEAST_SHARED_MEMORY // 1024
        return f"{gpu.name}, {found // 1024} KiB of shared memory, the kernels need {needed}"
    if model.dtype != torch.bfloat16:
        return f"{str(model.dtype).removeprefix('torch.')}, the kernels are for bf16"
    if find_spec("triton") is None:
        return "no Triton, which the kernels are written in"
    return unfit(model.config)


class FusedRunner(GraphRunner):
    """Runs a stage in fused kernels where there are some, and captures it like any other.

    Args:
        model: The policy, `unsupported` by nothing. Projections that are computed together are
            laid side by side in memory; the model itself stays usable. Only the flow's resident
            kernel, where it runs, has copies of weights of its own, the expert's, 0.6 GB, and the
            vision tower a copy of the patch embedding's, 1.4 MB.
    """

    path = "fused"

    def __init__(self, model: Pi05) -> None:
        # Triton is no requirement: only who runs its kernels imports it.
        from safe_pruner_node.engine import fused_pruner  # noqa: PLC0415
        from safe_pruner_node.engine.fused_denoise import FusedDenoise  # noqa: PLC0415
        from safe_pruner_node.engine.fused_prefix import FusedPrefix  # noqa: PLC0415
        from safe_pruner_node.engine.fused_vision import FusedVision  # noqa: PLC0415

        super().__init__(model.device)
        self._model = model
        prefix, denoise = FusedPrefix(model), FusedDenoise(model)
        self.notes = (prefix.note, denoise.note)
        self._fused: dict[Callable[..., Any], Callable[..., Any]] = {
            stages.see: FusedVision(model),
            stages.read: prefix.read,
            stages.read_early: prefix.read_early,
            stages.prefill_late: prefix.late,
            stages.denoise: denoise,
        }
        # Of the pruner, which knows no model.
        self._without_model: dict[Callable[..., Any], Callable[..., Any]] = {
            correspond: fused_pruner.correspond,
            judge: fused_pruner.judge,
        }

    def run(
        self, stage: Callable[..., Result], fixed: tuple[Hashable, ...], *inputs: object
    ) -> Result:
        """Replay the stage, or capture it first; see `Runner.run`."""
        fused: Callable[..., Result] | None = self._fused.get(stage)
        if fused is None:
            own: Callable[..., Result] = self._without_model.get(stage, stage)
            return super().run(own, fixed, *inputs)
        if fixed[0] is not self._model:
            raise ValueError("a fused runner runs the model it was made for")
        return super().run(fused, fixed[1:], *inputs)
