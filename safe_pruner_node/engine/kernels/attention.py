"""Bidirectional attention without the score matrix, of packed or separate q, k and v.

The queries that share a key/value head are rows of one problem: row n*r + i is query head i of
token n (r query heads per key/value head). So multi-query attention reads its keys once per tile
of rows, whatever head they belong to.

Source: Dao et al., "FlashAttention-2" (2023).

Shapes: B images or prompts, N query tokens, M key tokens, g key/value heads, r query heads per
key/value head, d head_dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


class Tiles(NamedTuple):
    """Of a program: query rows, keys per step, warps, and steps whose keys are on their way."""

    rows: int
    keys: int
    warps: int
    stages: int


TILES = Tiles(64, 64, 4, 2)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid_text: Tensor | None = None,
    n_text: int = 0,
) -> Tensor:
    """Softmax attention; the channels of one head are adjacent, other strides are free.

    Args:
        query: [B, N, g, r, d].
        keys: [B, g, M, d].
        values: [B, g, M, d].
        valid_text: How many of the last `n_text` keys are attended, [] int64, on the device;
            None: all.
        n_text: Keys that may be padding at their end; only with `valid_text`.

    Returns:
        [B, N, g, r, d], contiguous.
    """
    batch, tokens, kv_heads, shared, dim = query.shape
    n_keys = keys.shape[2]
    out = query.new_empty(query.shape)  # [B, N, g, r, d]
    # A head_dim that is no power of two is cut in two: 72 as 64 + 16 is cheaper than as 128.
    major = max(16, 1 << (dim.bit_length() - 1))
    minor = max(16, triton.next_power_of_2(dim - major)) if dim > major else 0
    _attention[(triton.cdiv(tokens * shared, TILES.rows), batch * kv_heads)](
        query,
        keys,
        values,
        out,
        query if valid_text is None else valid_text,
        tokens * shared,
        n_keys,
        n_text,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(2),
        values.stride(0),
        values.stride(2),
        KV_HEADS=kv_heads,
        SHARED=shared,
        Q_HEAD=query.stride(2),
        Q_SHARED=query.stride(3),
        K_HEAD=_head_stride(keys),
        V_HEAD=_head_stride(values),
        DIM=dim,
        MAJOR=major,
        MINOR=minor,
        SCALE=math.log2(math.e) / math.sqrt(dim),  # exp2 is the hardware's exponential
        MASKED=valid_text is not None,
        ROWS=TILES.rows,
        KEYS=TILES.keys,
        num_stages=TILES.stages,
        num_warps=TILES.warps,
        **dependent(query.device),
    )
    return out


def _head_stride(tensor: Tensor) -> int:
    """Elements from head to head; it is compiled in, so one head must not make it a variable."""
    return tensor.stride(1) if tensor.shape[1] > 1 else 0


@triton.jit
def _attention(
    query,
    keys,
    values,
    out,
    valid_text,
    n_rows,
    n_keys,
    n_text,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    Q_HEAD: tl.constexpr,
    Q_SHARED: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    MAJOR: tl.constexpr,
    MINOR: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    batch = tl.program_id(1) // KV_HEADS
    head = tl.program_id(1) % KV_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // SHARED
    inside = (row < n_rows)[:, None]
    channel = tl.arange(0, MAJOR)[None]
    rest = MAJOR + tl.arange(0, MINOR if MINOR > 0 else 16)[None]
    key = tl.arange(0, KEYS)

    offset = token[:, None] * q_token + (row % SHARED)[:, None] * Q_SHARED
    source = query + batch * q_batch + head * Q_HEAD + offset
    k_source = keys + batch * k_batch + head * K_HEAD
    v_source = values + batch * v_batch + head * V_HEAD
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    q = tl.load(source + channel, inside & (channel < DIM), 0.0)  # [ROWS, MAJOR]
    if MINOR:
        q_rest = tl.load(source + rest, inside & (rest < DIM), 0.0)  # [ROWS, MINOR]
        total_rest = tl.zeros((ROWS, MINOR), tl.float32)

    limit = n_keys
    if MASKED:
        limit = n_keys - n_text + tl.load(valid_text).to(tl.int32)
    total = tl.zeros((ROWS, MAJOR), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, limit, KEYS):
        attended = start + key < limit  # [KEYS]
        k_row = k_source + (start + key)[:, None] * k_token
        v_row = v_source + (start + key)[:, None] * v_token
        k = tl.load(k_row + channel, attended[:, None] & (channel < DIM), 0.0)  # [KEYS, MAJOR]
        score = tl.dot(q, k.T, input_precision="ieee")  # [ROWS, KEYS]
        if MINOR:
            k_rest = tl.load(k_row + rest, attended[:, None] & (rest < DIM), 0.0)
            score = tl.dot(q_rest, k_rest.T, score, input_precision="ieee")
        score = tl.where(attended[None], score * SCALE, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))  # finite: every step has an attended key
        probability = tl.exp2(score - above[:, None])
        shrink = tl.exp2(largest - above)
        largest = above
        weight = weight * shrink + tl.sum(probability, 1)
        v = tl.load(v_row + channel, attended[:, None] & (channel < DIM), 0.0)  # [KEYS, MAJOR]
        part = probability.to(v.dtype)  # [ROWS, KEYS]
        total = tl.dot(part, v, total * shrink[:, None], input_precision="ieee")
        if MINOR:
            v_rest = tl.load(v_row + rest, attended[:, None] & (rest < DIM), 0.0)
            total_rest = tl.dot(part, v_rest, total_rest * shrink[:, None], input_precision="ieee")

    offset = (token * KV_HEADS + head)[:, None] * SHARED + (row % SHARED)[:, None]  # of heads
    target = out + batch.to(tl.int64) * n_rows * KV_HEADS * DIM + offset * DIM
    share = 1.0 / weight[:, None]
    tl.store(target + channel, (total * share).to(out.dtype.element_ty), inside & (channel < DIM))
    if MINOR:
        tl.store(
            target + rest, (total_rest * share).to(out.dtype.element_ty), inside & (rest < DIM)
        )
