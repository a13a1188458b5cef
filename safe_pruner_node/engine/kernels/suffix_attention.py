"""Attention of the action rows over the prefix cache of their layer and over themselves.

All query heads share one key/value head, so heads x H rows read the same keys: they are rows of one
product. Every program has one block of keys (few rows, many keys), the suffix is one more block; a
second kernel joins the parts.

Shapes: R = heads * H rows, N prefix keys, d head_dim, P = ceil(N / BLOCK_N) + 1 parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


@triton.jit
def suffix_attention_kernel(
    q_ptr,  # [R, d]
    prefix_k_ptr,  # [N, d]
    prefix_v_ptr,  # [N, d]
    k_ptr,  # [H, d]
    v_ptr,  # [H, d]
    n_valid_ptr,  # [] int64, valid text tokens; read if MASKED
    out_ptr,  # out fp32, [P, R, d]
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
    """Program (m, part): rows of block m over one block of keys; prefix blocks, then suffix ones."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    channels = tl.arange(0, HEAD_DIM)
    inside = rows[:, None] < n_queries
    prefix_parts = tl.cdiv(n_prefix, BLOCK_N)
    n_read = n_prefix
    if MASKED:
        n_read = n_prefix - n_slots + tl.load(n_valid_ptr).to(tl.int32)
    # A block is of the prefix or of the suffix: of two loads one is empty, and costs nothing.
    key = part * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (part - prefix_parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_prefix = key < n_read
    in_suffix = (own >= 0) & (own < n_suffix)
    at = key[:, None] * HEAD_DIM + channels[None, :]
    k = tl.load(prefix_k_ptr + at, mask=in_prefix[:, None], other=0.0)
    v = tl.load(prefix_v_ptr + at, mask=in_prefix[:, None], other=0.0)
    wait_for_inputs(PDL)  # the prefix was complete before the flow began
    let_next_begin(PDL)
    q = tl.load(q_ptr + rows[:, None] * HEAD_DIM + channels[None, :], mask=inside, other=0.0)
    own_at = own[:, None] * HEAD_DIM + channels[None, :]
    k += tl.load(k_ptr + own_at, mask=in_suffix[:, None], other=0.0)
    v += tl.load(v_ptr + own_at, mask=in_suffix[:, None], other=0.0)
    ok = in_prefix | in_suffix
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
    logits = tl.where(ok[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    p = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    lse = tl.where(seen, top + tl.log2(safe), float("-inf"))
    out_at = (part * n_queries + rows[:, None]) * HEAD_DIM + channels[None, :]
    tl.store(out_ptr + out_at, acc / safe[:, None], mask=inside)
    tl.store(lse_ptr + part * n_queries + rows, lse, mask=rows < n_queries)


@triton.jit
def join_attention_kernel(
    part_ptr,  # fp32, [P, R, d]
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
        acc += weight[:, None] * tl.load(part_at, mask=inside[:, None], other=0.0)
        total += weight
    head = rows // n_suffix
    row = rows - head * n_suffix
    at = (row[:, None] * HEADS + head[:, None]) * HEAD_DIM + channels[None, :]
    acc = acc / total[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
