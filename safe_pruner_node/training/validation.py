"""Open-loop error: what the policy would do in held-out frames, against what was done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.pi05.model import Pi05, flow_schedule
from safe_pruner_node.training.objective import Batch, prefix


@dataclass(frozen=True)
class OpenLoopError:
    """Mean absolute error of normalised chunks.

    Attributes:
        near: Over the first third of the horizon.
        whole: Over all of it.
    """

    near: float
    whole: float


@torch.no_grad()
def predict(model: Pi05, batch: Batch, noise: Tensor) -> Tensor:
    """Normalised chunks, [B, H, A], by the checkpoint's number of flow steps."""
    kv, _, length = prefix(model, batch)
    times, dt = flow_schedule(model.config.flow_steps)
    x_t = noise
    for t in times:
        batch_t = torch.full((len(noise),), t, device=noise.device)
        x_t = x_t + dt * model.denoise(x_t, batch_t, kv, length)
    return x_t


def open_loop_error(predicted: list[Tensor], wanted: list[Tensor]) -> OpenLoopError:
    """Error over batches of chunks, [B, H, A] each."""
    error = torch.cat([(p - w).abs() for p, w in zip(predicted, wanted, strict=True)])
    third = max(1, error.shape[1] // 3)
    return OpenLoopError(near=float(error[:, :third].mean()), whole=float(error.mean()))
