"""Forecast of late saliency and the test for a subtask boundary (paper, Eq. 4 to 6)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def transfer(saliency: Tensor, pi: Tensor) -> Tensor:
    """Carry a keyframe's saliency [..., N] over to the current tokens pi [N] (algorithm 2)."""
    return saliency[..., pi]


def deep_forecast(deep: Tensor, pi: Tensor) -> Tensor:
    """Mean over the deep layers of the transferred maps (Eq. 4): [n_deep, N] to [N]."""
    return transfer(deep, pi).mean(0)


def fuse(early: Tensor, forecast: Tensor, lambda_: float) -> Tensor:
    """Token scores (1 - lambda) S_early + lambda S_forecast (Eq. 5), [N] each."""
    return (1.0 - lambda_) * early + lambda_ * forecast


def kappa(early: Tensor, forecast_early: Tensor) -> Tensor:
    """Cosine of the early map and its own forecast (Eq. 6): [N], [N] to a scalar in [-1, 1]."""
    return cosine_similarity(early, forecast_early, dim=0).clamp(-1.0, 1.0)
