"""Attention of the action rows over the prefix cache of their layer and over themselves.

All query heads share one key/value head, so heads x H rows read the same keys: they are rows of one
product. Every program has one block of keys (few rows, many keys); a second kernel joins the parts.

Shapes: R = heads * H rows, N prefix keys, d head_dim, P = ceil((N + H) / BLOCK_N) parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


@triton.jit
def suffix_attention_kernel(
    queries,  # descriptor of [R, d]
    keys,  # descriptor of [N + H, d]: the prefix, then the suffix
    values,  # descriptor of [N + H, d]
    n_valid_ptr,  # [] int64, valid text tokens; read if MASKED
    out_ptr,  # out, [P, R, d]
    lse_ptr,  # out fp32, [P, R], base 2; -inf where nothing was read
    n_queries,  # R
    n_prefix,  # N
    n_suffix,  # H
    n_slots,  # text tokens and padding, at the end of the prefix
    log2_scale,  # d**-0.5 / ln 2
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, part): a block of rows over a block of keys."""
    first_row = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    first_key = part * BLOCK_N
    n_read = n_prefix
    if MASKED:
        n_read = n_prefix - n_slots + tl.load(n_valid_ptr).to(tl.int32)
    if first_key + BLOCK_N > n_prefix:
        wait_for_inputs(PDL)
    k = keys.load([first_key, 0])  # of the prefix: complete before the flow began
    v = values.load([first_key, 0])
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    q = queries.load([first_row, 0])
    key = first_key + tl.arange(0, BLOCK_N)
    ok = (key < n_read) | ((key >= n_prefix) & (key < n_prefix + n_suffix))
    logits = tl.dot(q, k.T, input_precision="ieee") * log2_scale
    logits = tl.where(ok[None, :], logits, float("-inf"))
    rows = first_row + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    inside = rows[:, None] < n_queries
    top = tl.max(logits, 1)
    p = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    lse = tl.where(seen, top + tl.log2(safe), float("-inf"))
    out_at = (part * n_queries + rows[:, None]) * HEAD_DIM + channels[None, :]
    acc = acc / safe[:, None]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + part * n_queries + rows, lse, mask=rows < n_queries)


@triton.jit
def join_attention_kernel(
    part_ptr,  # [P, R, d]
    lse_ptr,  # fp32, [P, R]
    out_ptr,  # out, [H, heads * d]
    n_queries,  # R
    n_suffix,  # H
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program m: BLOCK_M rows of the whole softmax from those of its parts."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    inside = rows < n_queries
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for s in tl.static_range(PARTS):
        lse = tl.load(lse_ptr + s * n_queries + rows, mask=inside, other=0.0)
        top = tl.maximum(top, lse)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for s in tl.static_range(PARTS):
        lse = tl.load(lse_ptr + s * n_queries + rows, mask=inside, other=0.0)
        weight = tl.exp2(lse - top)
        part_at = part_ptr + (s * n_queries + rows[:, None]) * HEAD_DIM + channels[None, :]
        acc += weight[:, None] * tl.load(part_at, mask=inside[:, None], other=0.0).to(tl.float32)
        total += weight
    head = rows // n_suffix
    row = rows - head * n_suffix
    at = (row[:, None] * HEADS + head[:, None]) * HEAD_DIM + channels[None, :]
    acc = acc / total[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
