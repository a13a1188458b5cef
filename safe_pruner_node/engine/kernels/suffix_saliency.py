"""How much the action rows of one layer attend to each visual token, summed over the rows.

Shapes: R = heads * H rows, N prefix keys of which N_vis are visual, d head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


@triton.jit
def _logits(
    q,
    key,
    k_ptr,
    n_read,
    n_prefix,
    n_suffix,
    log2_scale,
    HEAD_DIM: tl.constexpr,
    OWN: tl.constexpr,
):
    channels = tl.arange(0, HEAD_DIM)
    ok = key < n_read
    if OWN:
        ok = ok | ((key >= n_prefix) & (key < n_prefix + n_suffix))
    k = tl.load(k_ptr + key[:, None] * HEAD_DIM + channels[None, :], mask=ok[:, None], other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
    return tl.where(ok[None, :], logits, float("-inf"))


@triton.jit
def suffix_saliency_kernel(
    q_ptr,  # [R, d]
    k_ptr,  # [N + H, d]: the prefix, then the suffix
    n_valid_ptr,  # [] int64, valid text tokens; read if MASKED
    out_ptr,  # out fp32, [row blocks, N_vis]: sum over the block's rows
    n_queries,  # R
    n_visual,  # N_vis
    n_prefix,  # N
    n_suffix,  # H
    n_slots,  # text tokens and padding, at the end of the prefix
    log2_scale,  # d**-0.5 / ln 2
    OVER_ALL: tl.constexpr,  # softmax over every key, else over the visual ones
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program m: BLOCK_M rows. One pass for the softmax's sums, one for the shares."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    inside = rows < n_queries
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    at = rows[:, None] * HEAD_DIM + channels[None, :]
    q = tl.load(q_ptr + at, mask=inside[:, None], other=0.0)
    n_read = n_visual
    n_keys = n_visual
    if OVER_ALL:
        n_read = n_prefix
        n_keys = n_prefix + n_suffix
        if MASKED:
            n_read = n_prefix - n_slots + tl.load(n_valid_ptr).to(tl.int32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, n_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        logits = _logits(q, key, k_ptr, n_read, n_prefix, n_suffix, log2_scale, HEAD_DIM, OVER_ALL)
        new_top = tl.maximum(top, tl.max(logits, 1))  # the first tile holds a visual key
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    for start in range(0, n_visual, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        logits = _logits(q, key, k_ptr, n_visual, n_prefix, n_suffix, log2_scale, HEAD_DIM, False)
        share = tl.exp2(logits - top[:, None]) / total[:, None]
        share = tl.where(inside[:, None], share, 0.0)
        tl.store(out_ptr + tl.program_id(0) * n_visual + key, tl.sum(share, 0), mask=key < n_visual)
