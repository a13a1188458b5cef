"""Open-loop error: what the policy would do in held-out frames, against what was done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.pi05.model import Pi05, flow_schedule
from safe_pruner_node.training.objective import Batch, prefix
from safe_pruner_node.training.token_dropping import Kept


@dataclass(frozen=True)
class OpenLoopError:
    """Mean absolute error of normalised chunks.

    Attributes:
        share: Of the visual tokens that the policy was given.
        near: Over the first third of the horizon.
        whole: Over all of it.
    """

    share: float
    near: float
    whole: float

    def __str__(self) -> str:
        return f"{self.near:.4f} near, {self.whole:.4f} whole ({self.share:.3g} of the tokens)"


@torch.no_grad()
def predict(model: Pi05, batch: Batch, noise: Tensor, kept: Kept | None = None) -> Tensor:
    """Normalised chunks, [B, H, A], by the checkpoint's number of flow steps."""
    seen = prefix(model, batch, kept)
    times, dt = flow_schedule(model.config.flow_steps)
    x_t = noise
    for t in times:
        batch_t = torch.full((len(noise),), t, device=noise.device)
        x_t = x_t + dt * model.denoise(x_t, batch_t, seen.kv, seen.length)
    return x_t


def open_loop_error(
    predicted: list[Tensor], wanted: list[Tensor], share: float = 1.0
) -> OpenLoopError:
    """Error over batches of chunks [B, H, A] predicted from a share of the tokens; NaN of none."""
    if not predicted:
        return OpenLoopError(share, float("nan"), float("nan"))
    error = torch.cat([(p - w).abs() for p, w in zip(predicted, wanted, strict=True)])
    third = max(1, error.shape[1] // 3)
    return OpenLoopError(share, near=float(error[:, :third].mean()), whole=float(error.mean()))
