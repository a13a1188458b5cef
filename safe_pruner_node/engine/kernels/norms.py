"""Row norms: Gemma's RMSNorm and SigLIP's LayerNorm, one row per program, in fp32 whatever x is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6
"""Both norms', in Gemma and in SigLIP."""


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm times (1 + weight).

    Args:
        x: Rows, contiguous, [N, D].
        weight: [D]; fp32 in openpi's mixed precision.

    Returns:
        [N, D], in the type of x.
    """
    rows, width = x.shape
    y = torch.empty_like(x)  # [N, D]
    _rms_norm[(rows,)](
        x, weight, y, WIDTH=width, BLOCK=triton.next_power_of_2(width), EPSILON=EPSILON
    )
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None) -> Tensor:
    """Layer norm; on the way it adds a bias to x itself.

    The next projection's result is then accumulated in x by the GEMM, which needs no bias.

    Args:
        x: Rows, contiguous, [N, D]; `added` is added to each of them in place.
        weight: [D].
        bias: [D].
        added: [D], added to x after x was normalised; None leaves x as it is.

    Returns:
        [N, D], in the type of x.
    """
    rows, width = x.shape
    y = torch.empty_like(x)  # [N, D]
    _layer_norm[(rows,)](
        x,
        weight,
        bias,
        y,
        x if added is None else added,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        EPSILON=EPSILON,
        ADD=added is not None,
    )
    return y


@triton.jit
def _rms_norm(x, weight, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, inside, 0.0).to(tl.float32)  # [D]
    scale = 1.0 + tl.load(weight + column, inside, 0.0).to(tl.float32)  # [D]
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + EPSILON)
    tl.store(y + row * WIDTH + column, value * scale, inside)


@triton.jit
def _layer_norm(
    x,
    weight,
    bias,
    y,
    added,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, inside, 0.0).to(tl.float32)  # [D]
    if ADD:
        addend = tl.load(added + column, inside, 0.0).to(tl.float32)  # [D]
        tl.store(x + row * WIDTH + column, value + addend, inside)
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(inside, value - mean, 0.0)  # [D]
    value = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPSILON)
    value = value * tl.load(weight + column, inside, 0.0).to(tl.float32)
    value = value + tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, value, inside)
