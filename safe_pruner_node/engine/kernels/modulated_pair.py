"""adaRMS norm and two products at once: query/key/value with rotary embedding, gate/up with GELU.

The norm is folded into the product. With r = 1/rms(x), s the scale and b the shift,

    norm(x) @ W = r * ((x * (1 + s)) @ W) + b @ W

where b @ W does not depend on x and is computed beforehand, and r comes from the very tiles of x
that the product reads. So x is read once and no normed copy of it exists.

"Pair": each program has two column blocks of W that its epilogue combines, element by element: the
two halves of a head (rotary embedding turns one against the other), or gate and up.

Shapes: H rows of the suffix, D width, d head_dim, M MLP channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, prefetch_rows, wait_for_inputs


@triton.jit
def _pair_product(
    x_ptr,
    scale_ptr,
    w_ptr,
    rows,
    first,
    second,
    n_rows,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """r * ((x * scale) @ W[first].T) and the same for W[second], each [BLOCK_M, BLOCK_N] fp32."""
    dtype = w_ptr.dtype.element_ty
    inside = rows[:, None] < n_rows
    acc_first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * WIDTH + ks[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
        x = (x * tl.load(scale_ptr + ks)[None, :]).to(dtype)
        w_first = tl.load(w_ptr + first[:, None] * WIDTH + ks[None, :])
        w_second = tl.load(w_ptr + second[:, None] * WIDTH + ks[None, :])
        acc_first = tl.dot(x, tl.trans(w_first), acc_first, input_precision="ieee")
        acc_second = tl.dot(x, tl.trans(w_second), acc_second, input_precision="ieee")
    r = tl.rsqrt(square / WIDTH + 1e-6)[:, None]
    return acc_first * r, acc_second * r


@triton.jit
def query_key_value_kernel(
    x_ptr,  # [H, D]
    scale_ptr,  # [D] fp32, 1 + s
    w_ptr,  # [(heads + 2) * d, D]: queries, keys, values
    bias_ptr,  # [(heads + 2) * d] fp32, b @ W
    cos_ptr,  # [H, d]
    sin_ptr,  # [H, d]
    out_ptr,  # out, [heads + 2, H, d]: queries, keys, values
    n_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    prefetch_rows(w_ptr + first * WIDTH, WIDTH * 2, PDL)
    prefetch_rows(w_ptr + second * WIDTH, WIDTH * 2, PDL)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    a, b = _pair_product(
        x_ptr, scale_ptr, w_ptr, rows, first, second, n_rows, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    a += tl.load(bias_ptr + first)[None, :]
    b += tl.load(bias_ptr + second)[None, :]
    inside = rows[:, None] < n_rows
    at = rows[:, None] * HEAD_DIM + channel[None, :]
    if head <= HEADS:  # queries and keys
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    dtype = w_ptr.dtype.element_ty
    at += head * n_rows * HEAD_DIM
    tl.store(out_ptr + at, a.to(dtype), mask=inside)
    tl.store(out_ptr + at + HALF, b.to(dtype), mask=inside)


@triton.jit
def gate_up_kernel(
    x_ptr,  # [H, D]
    scale_ptr,  # [D] fp32, 1 + s
    w_ptr,  # [2 * M, D]: gate, up
    bias_ptr,  # [2 * M] fp32, b @ W
    out_ptr,  # out, [H, M]
    n_rows,
    MLP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (n, m): gelu(gate) * up of BLOCK_N channels, for one block of rows."""
    gate = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    up = gate + MLP
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    prefetch_rows(w_ptr + gate * WIDTH, WIDTH * 2, PDL)
    prefetch_rows(w_ptr + up * WIDTH, WIDTH * 2, PDL)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    g, u = _pair_product(
        x_ptr, scale_ptr, w_ptr, rows, gate, up, n_rows, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    g += tl.load(bias_ptr + gate)[None, :]
    u += tl.load(bias_ptr + up)[None, :]
    # gelu(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)): the tanh form, without a tanh
    y = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    at = rows[:, None] * MLP + gate[None, :]
    tl.store(out_ptr + at, y.to(w_ptr.dtype.element_ty), mask=rows[:, None] < n_rows)
