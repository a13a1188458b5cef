"""From one Euler step of the flow to the next: final norm, velocity, step, next embedding.

Shapes: H rows, D width, A action channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs


@triton.jit
def flow_step_kernel(
    x_ptr,  # in and out, [H, D]: the last layer's output, then the next step's input
    scaled_ptr,  # out, [H, D]: x * (1 + s) of the next step's first norm
    squares_ptr,  # out fp32, [H, SQUARES]: sums of x * x, all of it in the first
    actions_ptr,  # in and out fp32, [H, A]
    next_scale_ptr,  # [D] fp32, 1 + s of the next step's first norm
    scale_ptr,  # [D] fp32, 1 + s of the final norm
    shift_ptr,  # [D] fp32
    out_w_ptr,  # [A, D]
    out_b_ptr,  # [A]
    in_w_ptr,  # [D, A]
    in_b_ptr,  # [D]
    dt,
    WIDTH: tl.constexpr,
    ACTION_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program t: one action row. FIRST: there is no velocity yet, only the embedding is made."""
    row = tl.program_id(0)
    a = tl.arange(0, BLOCK_A)
    real = a < ACTION_DIM
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    actions_at = actions_ptr + row * ACTION_DIM + a
    actions = tl.load(actions_at, mask=real, other=0.0)
    if not FIRST:
        square = tl.zeros([BLOCK_D], tl.float32)
        for k in tl.static_range(0, WIDTH, BLOCK_D):
            x = tl.load(x_ptr + row * WIDTH + k + tl.arange(0, BLOCK_D)).to(tl.float32)
            square += x * x
        r = tl.rsqrt(tl.sum(square, 0) / WIDTH + 1e-6)
        velocity = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
        for k in tl.static_range(0, WIDTH, BLOCK_D):
            ks = k + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + row * WIDTH + ks).to(tl.float32) * r
            y = x * tl.load(scale_ptr + ks) + tl.load(shift_ptr + ks)
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
            w_at = out_w_ptr + a[:, None] * WIDTH + ks[None, :]
            w = tl.load(w_at, mask=real[:, None], other=0.0).to(tl.float32)
            velocity += w * y[None, :]
        bias = tl.load(out_b_ptr + a, mask=real, other=0.0).to(tl.float32)
        actions += dt * (tl.sum(velocity, 1) + bias)
        tl.store(actions_at, actions, mask=real)
    square = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(0, WIDTH, BLOCK_D):
        ks = k + tl.arange(0, BLOCK_D)
        w_at = in_w_ptr + ks[:, None] * ACTION_DIM + a[None, :]
        w = tl.load(w_at, mask=real[None, :], other=0.0).to(tl.float32)
        x = tl.sum(w * actions[None, :], 1) + tl.load(in_b_ptr + ks).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * WIDTH + ks, x)
        x = x.to(tl.float32)
        scaled = x * tl.load(next_scale_ptr + ks)
        tl.store(scaled_ptr + row * WIDTH + ks, scaled.to(scaled_ptr.dtype.element_ty))
        square += x * x
    parts = tl.arange(0, BLOCK_S)
    squares = tl.where(parts == 0, tl.sum(square, 0), 0.0)
    tl.store(squares_ptr + row * SQUARES + parts, squares, mask=parts < SQUARES)
