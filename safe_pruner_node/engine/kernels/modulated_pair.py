"""adaRMS norm and two products at once: query/key/value with rotary embedding, gate/up with GELU.

The norm is folded into the product. With r = 1/rms(x), s the scale and b the shift,

    norm(x) @ W = r * ((x * (1 + s)) @ W) + b @ W

where b @ W does not depend on x and is computed beforehand. Who writes x (`gated_residual.py`,
`flow_step.py`) also writes x * (1 + s) and the sums of squares that r is made of.

"Pair": each program has two column blocks of W that its epilogue combines, element by element: the
two halves of a head (rotary embedding turns one against the other), or gate and up.

Shapes: H rows of the suffix, D width, d head_dim, M MLP channels.
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
def _pair_product(
    scaled_ptr,
    squares_ptr,
    w_ptr,
    rows,
    first,
    second,
    n_rows,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """r * (scaled @ W[first].T) and the same for W[second], each [BLOCK_M, BLOCK_N] fp32."""
    inside = rows[:, None] < n_rows
    parts = tl.arange(0, BLOCK_S)[None, :]
    squares = tl.load(
        squares_ptr + rows[:, None] * SQUARES + parts, mask=inside & (parts < SQUARES), other=0.0
    )
    acc_first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(scaled_ptr + rows[:, None] * WIDTH + ks[None, :], mask=inside, other=0.0)
        w_first = tl.load(w_ptr + first[:, None] * WIDTH + ks[None, :])
        w_second = tl.load(w_ptr + second[:, None] * WIDTH + ks[None, :])
        acc_first = tl.dot(x, tl.trans(w_first), acc_first, input_precision="ieee")
        acc_second = tl.dot(x, tl.trans(w_second), acc_second, input_precision="ieee")
    r = tl.rsqrt(tl.sum(squares, 1) / WIDTH + 1e-6)[:, None]
    return acc_first * r, acc_second * r


@triton.jit
def query_key_value_kernel(
    scaled_ptr,  # [H, D], x * (1 + s)
    squares_ptr,  # [H, SQUARES] fp32, sums of x * x
    w_ptr,  # [(heads + 2) * d, D]: queries, keys, values
    bias_ptr,  # [(heads + 2) * d] fp32, b @ W
    cos_ptr,  # [H, d]
    sin_ptr,  # [H, d]
    out_ptr,  # out, [heads + 2, H, d]: queries, keys, values
    n_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (n, m): BLOCK_N pairs of channels of one head, for one block of rows."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (tl.program_id(0) * BLOCK_N) // HALF
    channel = pair - head * HALF  # in 0..d/2-1
    first = head * HEAD_DIM + channel
    second = first + HALF
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows[:, None] < n_rows
    at = rows[:, None] * HEAD_DIM + channel[None, :]
    bias_first = tl.load(bias_ptr + first)[None, :]
    bias_second = tl.load(bias_ptr + second)[None, :]
    begin = tl.program_id(0) * BLOCK_N + head * HALF
    prefetch_weights(w_ptr, begin, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    prefetch_weights(w_ptr, begin + HALF, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a, b = _pair_product(
        scaled_ptr,
        squares_ptr,
        w_ptr,
        rows,
        first,
        second,
        n_rows,
        WIDTH,
        SQUARES,
        BLOCK_S,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    a += bias_first
    b += bias_second
    if head <= HEADS:  # queries and keys
        a, b = a * cos - b * sin, b * cos + a * sin
    dtype = w_ptr.dtype.element_ty
    at += head * n_rows * HEAD_DIM
    tl.store(out_ptr + at, a.to(dtype), mask=inside)
    tl.store(out_ptr + at + HALF, b.to(dtype), mask=inside)


@triton.jit
def gate_up_kernel(
    scaled_ptr,  # [H, D], x * (1 + s)
    squares_ptr,  # [H, SQUARES] fp32, sums of x * x
    w_ptr,  # [2 * M, D]: gate, up
    bias_ptr,  # [2 * M] fp32, b @ W
    out_ptr,  # out, [H, M]
    n_rows,
    MLP: tl.constexpr,
    WIDTH: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (n, m): gelu(gate) * up of BLOCK_N channels, for one block of rows."""
    gate = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    up = gate + MLP
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    bias_gate = tl.load(bias_ptr + gate)[None, :]
    bias_up = tl.load(bias_ptr + up)[None, :]
    begin = tl.program_id(0) * BLOCK_N
    prefetch_weights(w_ptr, begin, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    prefetch_weights(w_ptr, begin + MLP, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    g, u = _pair_product(
        scaled_ptr,
        squares_ptr,
        w_ptr,
        rows,
        gate,
        up,
        n_rows,
        WIDTH,
        SQUARES,
        BLOCK_S,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    g += bias_gate
    u += bias_up
    # gelu(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)): the tanh form, without a tanh
    y = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    at = rows[:, None] * MLP + gate[None, :]
    tl.store(out_ptr + at, y.to(w_ptr.dtype.element_ty), mask=rows[:, None] < n_rows)
