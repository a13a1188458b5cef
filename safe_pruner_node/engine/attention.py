"""Attention of a Gemma layer over keys of which some may be padding."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from safe_pruner_node.pi05.model import GemmaLayer


def attend(block: GemmaLayer, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Attention of q [1, h, N_q, d] over k, v [1, g, M, d] to [1, N_q, h*d].

    Args:
        block: The layer.
        q: Queries after RoPE.
        k: Keys after RoPE.
        v: Values.
        valid: True where a key is no padding, [M] bool; None: all are.
    """
    if valid is None:
        return block.attend(q, k, v)
    # Heads that share a key head become rows of one: the fast kernels of torch take a mask or
    # grouped heads, not both.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[3])  # [1, g, h/g * N_q, d]
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=valid[None, None, None])
    return out.reshape(q.shape).transpose(1, 2).flatten(2)  # [1, N_q, h*d]
