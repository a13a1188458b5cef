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
    scaled,
    squares_ptr,
    weight,
    first_row,
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
    """r * (scaled @ W[first:].T) and the same for W[second:], each [BLOCK_M, BLOCK_N] fp32."""
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    parts = tl.arange(0, BLOCK_S)[None, :]
    squares = tl.load(
        squares_ptr + rows * SQUARES + parts, mask=(rows < n_rows) & (parts < SQUARES), other=0.0
    )
    acc_first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        x = scaled.load([first_row, k])
        w_first = weight.load([first, k])
        w_second = weight.load([second, k])
        acc_first = tl.dot(x, w_first.T, acc_first, input_precision="ieee")
        acc_second = tl.dot(x, w_second.T, acc_second, input_precision="ieee")
    r = tl.rsqrt(tl.sum(squares, 1) / WIDTH + 1e-6)[:, None]
    return acc_first * r, acc_second * r


@triton.jit
def query_key_value_kernel(
    scaled,  # descriptor of [H, D], x * (1 + s)
    squares_ptr,  # [H, SQUARES] fp32, sums of x * x
    weight,  # descriptor of [(heads + 2) * d, D]: queries, keys, values
    w_ptr,  # the same
    bias_ptr,  # [(heads + 2) * d] fp32, b @ W
    cos_ptr,  # [H, d]
    sin_ptr,  # [H, d]
    q_ptr,  # out, [heads, H, d]
    k_ptr,  # out, [H, d]
    v_ptr,  # out, [H, d]
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
    head = (tl.program_id(0) * BLOCK_N) // HALF
    begin = tl.program_id(0) * BLOCK_N - head * HALF  # channel, in 0..d/2-1
    first = head * HEAD_DIM + begin
    first_row = tl.program_id(1) * BLOCK_M
    prefetch_weights(w_ptr, first, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    prefetch_weights(w_ptr, first + HALF, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    columns = tl.arange(0, BLOCK_N)
    bias_first = tl.load(bias_ptr + first + columns)[None, :]
    bias_second = tl.load(bias_ptr + first + HALF + columns)[None, :]
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    at = rows * HEAD_DIM + begin + columns[None, :]
    inside = rows < n_rows
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    a, b = _pair_product(
        scaled,
        squares_ptr,
        weight,
        first_row,
        first,
        first + HALF,
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
    dtype = q_ptr.dtype.element_ty
    a = a.to(dtype)
    b = b.to(dtype)
    if head < HEADS:
        at += head * n_rows * HEAD_DIM
        tl.store(q_ptr + at, a, mask=inside)
        tl.store(q_ptr + at + HALF, b, mask=inside)
    elif head == HEADS:
        tl.store(k_ptr + at, a, mask=inside)
        tl.store(k_ptr + at + HALF, b, mask=inside)
    else:
        tl.store(v_ptr + at, a, mask=inside)
        tl.store(v_ptr + at + HALF, b, mask=inside)


@triton.jit
def gate_up_kernel(
    scaled,  # descriptor of [H, D], x * (1 + s)
    squares_ptr,  # [H, SQUARES] fp32, sums of x * x
    weight,  # descriptor of [2 * M, D]: gate, up
    w_ptr,  # the same
    bias_ptr,  # [2 * M] fp32, b @ W
    out,  # descriptor of the output, [H, M]
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
    gate = tl.program_id(0) * BLOCK_N
    first_row = tl.program_id(1) * BLOCK_M
    prefetch_weights(w_ptr, gate, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    prefetch_weights(w_ptr, gate + MLP, 0, BLOCK_N, WIDTH, WIDTH, PREFETCH)
    columns = tl.arange(0, BLOCK_N)
    bias_gate = tl.load(bias_ptr + gate + columns)[None, :]
    bias_up = tl.load(bias_ptr + gate + MLP + columns)[None, :]
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    g, u = _pair_product(
        scaled,
        squares_ptr,
        weight,
        first_row,
        gate,
        gate + MLP,
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
    out.store([first_row, gate], y.to(out.dtype))
