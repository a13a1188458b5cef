"""A projection added to the residual stream: x + gate * (a @ W.T), split along its long side.

A product of few rows has too few output tiles to fill a GPU, so K is split over programs. The last
program of a tile to arrive adds up all parts, always in the same order: the same result every time.
It also prepares the norm that comes next, see `modulated_pair.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import (
    let_next_begin,
    prefetch_weights,
    wait_for_inputs,
)


@triton.jit
def _add_and_prepare(
    acc, x, x_ptr, scaled_ptr, squares_ptr, gate, scale, rows, columns, n_rows, N: tl.constexpr
):
    inside = rows[:, None] < n_rows
    dtype = x_ptr.dtype.element_ty
    at = rows[:, None] * N + columns[None, :]
    x = (x.to(tl.float32) + gate[None, :] * acc).to(dtype)
    tl.store(x_ptr + at, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(scaled_ptr + at, (x * scale[None, :]).to(dtype), mask=inside)
    part = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares_ptr + part, tl.sum(x * x, 1), mask=rows < n_rows)


@triton.jit
def gated_residual_kernel(
    a,  # descriptor of [H, K]
    weight,  # descriptor of [N, K]
    w_ptr,  # the same
    x_ptr,  # in and out, [H, N]
    gate_ptr,  # [N] fp32
    scale_ptr,  # [N] fp32, 1 + s of the next norm
    scaled_ptr,  # out, [H, N]: x * (1 + s)
    squares_ptr,  # out fp32, [H, N / BLOCK_N]: sums of x * x
    part_ptr,  # scratch fp32, [tiles, SPLITS, BLOCK_M, BLOCK_N]
    count_ptr,  # [tiles] int32, zero before and after
    n_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (n, split, m)."""
    SPAN: tl.constexpr = K // SPLITS
    first = tl.program_id(0) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    prefetch_weights(w_ptr, first, split * SPAN, BLOCK_N, SPAN, K, PREFETCH)
    gate = tl.load(gate_ptr + columns)
    scale = tl.load(scale_ptr + columns)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    x_at = x_ptr + rows[:, None] * N + columns[None, :]
    # Early: whoever arrives last needs it at once.
    x = tl.load(x_at, mask=rows[:, None] < n_rows, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(split * SPAN, (split + 1) * SPAN, BLOCK_K):
        acc = tl.dot(a.load([first_row, k]), weight.load([first, k]).T, acc, input_precision="ieee")
    if SPLITS == 1:
        _add_and_prepare(
            acc, x, x_ptr, scaled_ptr, squares_ptr, gate, scale, rows, columns, n_rows, N
        )
    else:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = part_ptr + tile * SPLITS * BLOCK_M * BLOCK_N + within
        tl.store(parts + split * BLOCK_M * BLOCK_N, acc)
        tl.debug_barrier()  # every thread has stored before one of them counts
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(parts + s * BLOCK_M * BLOCK_N, cache_modifier=".cg")
            _add_and_prepare(
                total, x, x_ptr, scaled_ptr, squares_ptr, gate, scale, rows, columns, n_rows, N
            )
            tl.store(count_ptr + tile, 0)
