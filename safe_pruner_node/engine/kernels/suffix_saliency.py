"""How much the action rows of one layer attend to each visual token, summed over the rows.

`suffix_attention.py` leaves the log of the softmax's sum of every block of keys. Those
of the blocks that count give the whole sum, so a share needs nothing but its own logit.

Shapes: R = heads * H rows, N prefix keys of which N_vis are visual, d head_dim, P blocks of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


@triton.jit
def suffix_saliency_kernel(
    queries,  # descriptor of [R, d]
    keys,  # descriptor of [N + H, d], the visual ones first
    lse_ptr,  # fp32, [P, R], base 2
    out_ptr,  # out fp32, [row blocks, N_vis]: sum over the block's rows
    n_queries,  # R
    n_visual,  # N_vis, a multiple of BLOCK_N
    n_counted,  # blocks of keys that the softmax runs over: the visual ones, or all
    log2_scale,  # d**-0.5 / ln 2
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, n): a block of rows and a block of visual keys."""
    first_row = tl.program_id(0) * BLOCK_M
    first_key = tl.program_id(1) * BLOCK_N
    k = keys.load([first_key, 0])  # of the prefix: complete before the flow began
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    rows = first_row + tl.arange(0, BLOCK_M)
    parts = tl.arange(0, BLOCK_P)
    counted = (rows[:, None] < n_queries) & (parts[None, :] < n_counted)
    at = lse_ptr + parts[None, :] * n_queries + rows[:, None]
    lse = tl.load(at, mask=counted, other=float("-inf"))  # [BLOCK_M, BLOCK_P]
    top = tl.max(lse, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # rows behind the last
    total = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
    q = queries.load([first_row, 0])
    logits = tl.dot(q, k.T, input_precision="ieee") * log2_scale
    share = tl.where(rows[:, None] < n_queries, tl.exp2(logits - total[:, None]), 0.0)
    columns = first_key + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + tl.program_id(0) * n_visual + columns, tl.sum(share, 0))
