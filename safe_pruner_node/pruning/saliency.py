"""Attention-based token saliency (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def visual_saliency(query: Tensor, keys: Tensor, n_visual: int, over: str = "visual") -> Tensor:
    """How much the query rows attend to each visual token (Eq. 1 and 2), in fp32.

    Args:
        query: Query rows after RoPE, [h, R, d].
        keys: Keys after RoPE, the first `n_visual` visual, [g, M, d]; g divides h.
        n_visual: Visual tokens among the keys.
        over: ``visual`` takes the softmax over the visual keys alone, so that every map sums
            to 1; ``all`` takes it over all M keys and then slices, as the authors' code does.

    Returns:
        Mean over heads and rows, [n_visual].
    """
    if over == "visual":
        keys = keys[:, :n_visual]
    heads, rows, dim = query.shape
    # Heads that share a key head are rows of one product: no key is ever repeated.
    grouped = query.float().reshape(len(keys), -1, dim)  # [g, h/g * R, d]
    logits = torch.bmm(grouped, keys.float().transpose(1, 2)) * dim**-0.5  # [g, h/g * R, M]
    total: Tensor = logits.softmax(-1)[..., :n_visual].sum((0, 1))
    return total / (heads * rows)
