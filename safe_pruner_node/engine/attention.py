"""Attention of a Gemma layer over keys of which some may be padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from safe_pruner_node.pi05.model import GemmaLayer

BIAS_ALIGNMENT = 8
"""Elements: torch's attention kernels copy a bias at every call whose rows do not start at a
multiple of this."""


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of keys so that padding is not seen.

    Args:
        valid: True where a key is no padding, [M] bool.
        dtype: Of the queries.

    Returns:
        0 or -inf, [1, 1, 1, M].
    """
    m = len(valid)
    aligned = -(-m // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias = torch.zeros(1, 1, 1, aligned, dtype=dtype, device=valid.device)[..., :m]
    return bias.masked_fill_(~valid, float("-inf"))


def attend(block: GemmaLayer, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of q [1, h, N_q, d] over k, v [1, g, M, d] to [1, N_q, h*d].

    Args:
        block: The layer.
        q: Queries after RoPE.
        k: Keys after RoPE.
        v: Values.
        bias: As `key_bias` gives it; None: no key is padding.
    """
    if bias is None:
        return block.attend(q, k, v)
    # Heads that share a key head become rows of one: the fast kernels of torch take a bias or
    # grouped heads, not both.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[3])  # [1, g, h/g * N_q, d]
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
    return out.reshape(q.shape).transpose(1, 2).flatten(2)  # [1, N_q, h*d]
