"""The weights while they learn: fp32 masters, a working copy in mixed precision, an average."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pi05.model import GemmaLayer, Pi05, SiglipLayer
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.training.objective import (
    Batch,
    LandmarkHead,
    Losses,
    best_tokens,
    draw_times,
    losses,
)

ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 1e-4
CLIP_NORM = 1.0


class Learner:
    """Model, optimizer and moving average on one device.

    The optimizer's weights are fp32. On CUDA a working copy with openpi's mixed precision (the
    very types of the exported checkpoint) computes losses and gradients.

    Args:
        model: fp32, trainable.
        landmark_coordinates: Size of the auxiliary target; 0 for none.
        device: Where to train.
        ema: Part of the average that stays at each step.
    """

    def __init__(
        self, model: Pi05, landmark_coordinates: int, device: torch.device, ema: float
    ) -> None:
        self.device = device
        self.ema = ema
        self.step = 0
        self.pruner = PrunerSettings()  # the layers of the shipped preset
        self._master = model.to(device)
        width = model.config.vlm.width
        coordinates = landmark_coordinates
        self.head = LandmarkHead(width, coordinates).to(device) if coordinates else None
        self._working = copy.deepcopy(self._master)
        if device.type == "cuda":
            for name, parameter in self._working.named_parameters():
                parameter.data = parameter.data.to(mixed_dtype(name))
            _compile_layers(self._working)
        self.average = copy.deepcopy(self._master).requires_grad_(requires_grad=False).eval()
        self._weights: list[Tensor] = list(self._master.parameters())
        self._copies: list[Tensor] = list(self._working.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        head = list(self.head.parameters()) if self.head else []
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [w for w in self._weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [w for w in self._weights if w.ndim <= 1] + head, "weight_decay": 0.0},
            ],
            betas=ADAM_BETAS,
            fused=device.type == "cuda",
        )

    def accumulate(
        self,
        batch: Batch,
        repeats: int,
        share: float,
        landmark_weight: float,
        keep_share: float,
        random: torch.Generator,
    ) -> Losses:
        """Add the gradients of one micro-batch.

        Args:
            batch: Samples of one prompt length.
            repeats: Draws of noise and flow time per sample.
            share: Weight of this micro-batch in the step.
            landmark_weight: Weight of the auxiliary loss.
            keep_share: Of the visual tokens, from the pruning layer on.
            random: On the device.
        """
        count = repeats * len(batch.actions)
        shape = (count, *batch.actions.shape[1:])
        noise = torch.randn(shape, generator=random, device=self.device)
        t = draw_times(count, random)
        kept = best_tokens(self._working, batch, self.pruner, keep_share, random)
        found = losses(self._working, self.head, batch, noise, t, kept)
        total = share * (found.flow + landmark_weight * found.landmarks)
        total.backward()
        return Losses(found.flow.detach(), found.landmarks.detach())

    def update(self, learning_rate: float) -> Tensor:
        """Take one optimizer step with what was accumulated; returns the gradient's norm."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for weight, working in zip(self._weights, self._copies, strict=True):
            # The language model's last layer gives keys and values only: the rest has none.
            weight.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)
            keep = min(self.ema, (1.0 + self.step) / (10.0 + self.step))  # short at first
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - keep)
        self.step += 1
        return norm

    def save(self, path: Path, **more: object) -> None:
        """Write everything that a resumed run needs, beside and renamed."""
        state = {
            "step": self.step,
            "master": self._master.state_dict(),
            "average": self.average.state_dict(),
            "head": self.head.state_dict() if self.head else None,
            "optimizer": self._optimizer.state_dict(),
            **more,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `save` has written."""
        self.step = int(state["step"])
        self._master.load_state_dict(state["master"])
        self.average.load_state_dict(state["average"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)


def _compile_layers(model: nn.Module) -> None:
    """Compile layer by layer: seconds instead of minutes, and most of the gain."""
    # One variant per kind of layer, kept share and grad mode; the default gives up after 8.
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - the documented way
    for module in model.modules():
        if isinstance(module, GemmaLayer | SiglipLayer):
            module.compile(dynamic=False)
