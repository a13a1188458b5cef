"""SigLIP's patch embedding: images to tokens in two kernels, with the learned positions added.

Patches do not overlap, so the convolution is a matrix product: one kernel lays every patch in a
row, the other multiplies. Where tokens are bf16, the product's operands are fp16. They have the ten
bits of mantissa of TF32, which torch's convolutions use on a GPU by default, in half the bytes, and
bytes are what the product waits for; pixels in [-1, 1] and weights are in fp16's range. That makes
an error of 3e-4, the tokens' own rounding one of 1.7e-3 (bf16 operands would add 2.2e-3). Other
tokens have fp32 operands, multiplied as TF32 on a GPU.

Shapes: C images, P pixels along a patch's side, N patches of all images, K pixels of a patch, of
all colours, and zeros up to a whole number of 16 bytes; D channels of a token.
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

ROWS, COLUMNS, DEPTH, STAGES = 64, 64, 128, 3
"""Of the product: patches and channels per program, pixels per step, steps on their way."""

PIXELS = 1024
"""Per program of the other kernel."""

ALIGNED = 8
"""K is a multiple: rows begin at multiples of 16 bytes, as the copy engine wants."""


def patch_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weights as `patch_tokens` reads them: a copy.

    Args:
        weight: [D, 3, P, P].
        dtype: Of the tokens.

    Returns:
        [D, K].
    """
    rows = weight.flatten(1)  # [D, 3 * P * P]
    operand = torch.float32 if dtype == torch.float32 else torch.float16
    return pad(rows, (0, -rows.shape[1] % ALIGNED)).to(operand)


def patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor, position: Tensor, dtype: torch.dtype
) -> Tensor:
    """Embed images.

    Args:
        images: [C, 3, S, S].
        weight: Of `patch_weights`, [D, K].
        bias: [D].
        position: Learned position of each patch of an image, contiguous, [(S/P)^2, D].
        dtype: Of the tokens.

    Returns:
        [N, D], image by image, row by row.
    """
    width, depth = weight.shape
    rows = _patch_rows(images.contiguous(), isqrt(len(position)), weight)  # [N, K]
    x = images.new_empty(len(rows), width, dtype=dtype)  # [N, D]
    _patch_product[(triton.cdiv(len(rows), ROWS), triton.cdiv(width, COLUMNS))](
        TensorDescriptor.from_tensor(rows, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
        bias,
        position,
        x,
        len(rows),
        PATCHES=len(position),
        PIXELS=depth,
        WIDTH=width,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_stages=STAGES,
        num_warps=max(4, ROWS // 16),
        **dependent(images.device),
    )
    return x


def _patch_rows(images: Tensor, along: int, weight: Tensor) -> Tensor:
    """Patches [N, K] of images [C, 3, S, S], `along` each side, in the type of the weights."""
    count, colours, side, _ = images.shape
    rows = weight.new_empty(count * along * along, weight.shape[1])  # [N, K]
    _unfold[(triton.cdiv(rows.numel(), PIXELS),)](
        images,
        rows,
        rows.numel(),
        SIDE=side,
        COLOURS=colours,
        PATCH=side // along,
        PITCH=rows.shape[1],
        BLOCK=PIXELS,
        **dependent(images.device),
    )
    return rows


@triton.jit
def _unfold(
    images,  # [C, 3, S, S]
    rows,  # out, [N, K]
    size,  # N * K
    SIDE: tl.constexpr,
    COLOURS: tl.constexpr,
    PATCH: tl.constexpr,
    PITCH: tl.constexpr,  # K
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    along: tl.constexpr = SIDE // PATCH
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, pixel = at // PITCH, at % PITCH
    image, patch = row // (along * along), row % (along * along)
    colour, inside = pixel // (PATCH * PATCH), pixel % (PATCH * PATCH)
    y = patch // along * PATCH + inside // PATCH
    x = patch % along * PATCH + inside % PATCH
    source = images + ((image * COLOURS + colour) * SIDE + y) * SIDE + x
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    value = tl.load(source, (at < size) & (colour < COLOURS), 0.0)
    tl.store(rows + at, value.to(rows.dtype.element_ty), at < size)


@triton.jit
def _patch_product(
    rows,  # descriptor of [N, K]
    weight,  # descriptor of [D, K]
    bias,  # [D]
    position,  # [PATCHES, D]
    x,  # out, [N, D]
    n_rows,  # N
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None]
    drawn = (row < n_rows) & (column < WIDTH)
    # Nobody writes these: they are here before the patches are.
    total = tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)  # [1, COLUMNS]
    total += tl.load(position + row % PATCHES * WIDTH + column, drawn, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    for start in range(0, PIXELS, DEPTH):
        a = rows.load([first_row, start])  # [ROWS, DEPTH]
        b = weight.load([first_column, start])  # [COLUMNS, DEPTH]
        total = tl.dot(a, b.T, total, input_precision="tf32")
    tl.store(x + row * WIDTH + column, total.to(x.dtype.element_ty), drawn)
