"""Row norms: Gemma's RMSNorm and SigLIP's LayerNorm, one row per program, in fp32 whatever x is.

They also complete the residual stream: what the projection before has left is added on the way.
RMSNorm also quantises what an FP8 product reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_pruner_node.engine.e4m3 import E4M3, LARGEST
from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs
from safe_pruner_node.engine.kernels.quantise import cut_off

EPSILON = 1e-6
"""Both norms', in Gemma and in SigLIP."""

CHANNELS_PER_WARP = 512
"""A lane has 16 of them: one warp is too slow for wide rows, and several wait for each other."""


@dataclass(frozen=True)
class Residual:
    """A residual stream whose last addition has not been made yet.

    Attributes:
        x: Rows, contiguous, [N, D].
        terms: What is to be added to them, contiguous, [S, N, D]; None: nothing.
        bias: Added to every row as well, [D]; only with `terms`; None: nothing.
    """

    x: Tensor
    terms: Tensor | None = None
    bias: Tensor | None = None


def rms_norm(
    residual: Residual, weight: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm times (1 + weight).

    Args:
        residual: What to norm.
        weight: [D]; fp32 in openpi's mixed precision.
        scale: Of the normed rows as E4M3; None: they are of the type of x.

    Returns:
        The complete rows, in the type of x, and the normed ones: [N, D] each.
    """
    return _norm(residual, weight, None, scale)


def layer_norm(residual: Residual, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm.

    Args:
        residual: What to norm.
        weight: [D].
        bias: [D].

    Returns:
        The complete rows, and the normed ones: [N, D] each, in the type of x.
    """
    return _norm(residual, weight, bias, None)


def _norm(
    residual: Residual, weight: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Layer norm, or without a bias RMSNorm."""
    x, terms = residual.x, residual.terms
    rows, width = x.shape
    complete = x if terms is None else torch.empty_like(x)  # [N, D]
    y = torch.empty_like(x, dtype=x.dtype if scale is None else E4M3)  # [N, D]
    _norm_rows[(rows,)](
        x,
        x if terms is None else terms,
        x if residual.bias is None else residual.bias,
        complete,
        weight,
        weight if bias is None else bias,
        y,
        rows,
        1.0 if scale is None else 1.0 / scale,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        EPSILON=EPSILON,
        TERMS=0 if terms is None else len(terms),
        ADDS_BIAS=residual.bias is not None,
        CENTRED=bias is not None,
        LARGEST=None if scale is None else LARGEST,
        num_warps=_warps(width),
        **dependent(x.device),
    )
    return complete, y


def _warps(width: int) -> int:
    """Of a program: a power of two."""
    return 1 << (max(1, width // CHANNELS_PER_WARP).bit_length() - 1)


@triton.jit
def _norm_rows(
    x,
    terms,
    added,
    complete,
    weight,
    bias,
    y,
    rows,
    per_scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    TERMS: tl.constexpr,
    ADDS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    # Nobody writes weights: they are here before the rows are.
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)  # [D]
    if CENTRED:
        shift = tl.load(bias + column, inside, 0.0).to(tl.float32)  # [D]
    if ADDS_BIAS:
        always = tl.load(added + column, inside, 0.0).to(tl.float32)  # [D]
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    value = tl.load(x + at, inside, 0.0).to(tl.float32)  # [D]
    if TERMS > 0:
        for i in tl.static_range(TERMS):
            value += tl.load(terms + i * rows * WIDTH + at, inside, 0.0).to(tl.float32)
        if ADDS_BIAS:
            value += always
        rounded = value.to(x.dtype.element_ty)
        tl.store(complete + at, rounded, inside)
        value = rounded.to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / WIDTH, 0.0)
    else:
        scale += 1.0
    value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + EPSILON) * scale
    if CENTRED:
        value += shift
    if LARGEST is not None:
        value = cut_off(value * per_scale, LARGEST)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)
