"""From one packed projection to rotated queries, and keys and values as the cache holds them.

A projection that was left as terms is added up on the way.

Shapes: S terms, N rows, h query heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs
from safe_pruner_node.pi05.model import KeyValue, Rope

ROWS = 16
"""Rows per program."""


def rotate_queries(projected: Tensor, rope: Rope, positions: Tensor, out: Tensor) -> None:
    """Rotate projected queries.

    Args:
        projected: Terms of rows whose channels are the heads', one after the other, contiguous,
            [S, N, h*d].
        rope: Tables of every position, [P, d] each.
        positions: Position of each row, [N] int64.
        out: Is given the queries, contiguous, [N, h, d].
    """
    _, heads, dim = out.shape
    _launch(projected, rope, positions, out, None, heads, 0, dim)


def rotate_split(
    projected: Tensor, rope: Rope, positions: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, KeyValue]:
    """Rotate queries and keys of a packed projection, and take it apart.

    Args:
        projected: Terms of queries, keys, values, contiguous: [S, N, (h + 2g) * d].
        rope: Tables of every position, [P, d] each.
        positions: Position of each row, [N] int64.
        heads: h; 0 where there are only keys and values.
        kv_heads: g.

    Returns:
        Queries [N, h, d]; keys and values, [1, g, N, d] each. All contiguous.
    """
    _, rows, columns = projected.shape
    dim = columns // (heads + 2 * kv_heads)
    query = projected.new_empty(rows, heads, dim)  # [N, h, d]
    keys, values = projected.new_empty(2, 1, kv_heads, rows, dim).unbind(0)  # [1, g, N, d]
    _launch(projected, rope, positions, query, (keys, values), heads, kv_heads, dim)
    return query, (keys, values)


def _launch(
    projected: Tensor,
    rope: Rope,
    positions: Tensor,
    query: Tensor,
    cache: KeyValue | None,
    heads: int,
    kv_heads: int,
    dim: int,
) -> None:
    terms, rows, columns = projected.shape
    keys, values = (query, query) if cache is None else cache
    _rotate_split[(triton.cdiv(rows, ROWS), heads + 2 * kv_heads)](
        projected,
        *rope,
        positions,
        query,
        keys,
        values,
        rows,
        columns,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF=triton.next_power_of_2(dim // 2),
        ROWS=ROWS,
        TERMS=terms,
        **dependent(projected.device),
    )


@triton.jit
def _rotate_split(
    projected,
    cos,
    sin,
    positions,
    query,
    keys,
    values,
    rows,
    stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (channel < DIM // 2)[None]
    source = projected + row[:, None] * stride + head * DIM + channel[None]
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    first = tl.load(source, inside, 0.0).to(tl.float32)  # [ROWS, d/2]
    second = tl.load(source + DIM // 2, inside, 0.0).to(tl.float32)  # [ROWS, d/2]
    for _ in tl.static_range(1, TERMS):
        source += rows * stride
        first += tl.load(source, inside, 0.0).to(tl.float32)
        second += tl.load(source + DIM // 2, inside, 0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:  # values are not rotated
        position = tl.load(positions + row, row < rows, 0)  # [ROWS]
        entry = position[:, None] * DIM + channel[None]  # both halves of a table are the same
        c = tl.load(cos + entry, inside, 0.0).to(tl.float32)  # [ROWS, d/2]
        s = tl.load(sin + entry, inside, 0.0).to(tl.float32)  # [ROWS, d/2]
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    if head < HEADS:
        target = query + (row * HEADS + head)[:, None] * DIM + channel[None]
    elif head < HEADS + KV_HEADS:
        target = keys + ((head - HEADS) * rows + row)[:, None] * DIM + channel[None]
    else:
        target = values + ((head - HEADS - KV_HEADS) * rows + row)[:, None] * DIM + channel[None]
    tl.store(target, first.to(query.dtype.element_ty), inside)
    tl.store(target + DIM // 2, second.to(query.dtype.element_ty), inside)
