"""Attention-based token saliency (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def visual_saliency(
    query: Tensor,
    keys: Tensor,
    n_visual: int,
    over: str = "visual",
    *,
    n_rows: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """How much the query rows attend to each visual token (Eq. 1 and 2), in fp32.

    Args:
        query: Query rows after RoPE, [h, R, d].
        keys: Keys after RoPE, the first `n_visual` visual, [g, M, d]; g divides h.
        n_visual: Visual tokens among the keys.
        over: ``visual`` takes the softmax over the visual keys alone, so that every map sums
            to 1; ``all`` takes it over all M keys and then slices, as the authors' code does.
        n_rows: How many of the R rows vote, from the first, [] int64; None: all do.
        valid: Keys that ``all`` means, the others are padding, [M] bool; None: all are.

    Returns:
        Mean over heads and rows, [n_visual].
    """
    if over == "visual":
        keys, valid = keys[:, :n_visual], None
    heads, rows, dim = query.shape
    # Heads that share a key head are rows of one product: no key is ever repeated.
    grouped = query.float().reshape(len(keys), -1, dim)  # [g, h/g * R, d]
    logits = torch.bmm(grouped, keys.float().transpose(1, 2)) * dim**-0.5  # [g, h/g * R, M]
    if valid is not None:
        logits = logits.masked_fill(~valid, float("-inf"))
    weights = logits.softmax(-1)[..., :n_visual]  # [g, h/g * R, n_visual]
    if n_rows is None:
        total: Tensor = weights.sum((0, 1))
        return total / (heads * rows)
    silent = (torch.arange(rows, device=keys.device) >= n_rows)[:, None]  # [R, 1]
    by_row = weights.reshape(heads, rows, n_visual)
    # No product with 0: what a row of padding holds may be anything.
    total = by_row.masked_fill(silent, 0.0).sum((0, 1))
    return total / (heads * n_rows)
