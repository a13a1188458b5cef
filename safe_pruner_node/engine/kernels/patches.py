"""SigLIP's patch embedding: images to tokens in one kernel, with the learned positions added.

Patches do not overlap, so the convolution is a matrix product; its left side is read straight from
the images. Products are TF32, as torch's convolutions are on a GPU by default.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

ROWS, COLUMNS, DEPTH = 64, 64, 64
"""Patches and channels per program, and pixels per step."""


def patch_tokens(
    images: Tensor, weight: Tensor, bias: Tensor, position: Tensor, dtype: torch.dtype
) -> Tensor:
    """Embed images.

    Args:
        images: [C, 3, S, S].
        weight: The convolution's, contiguous, [D, 3, P, P].
        bias: [D].
        position: Learned position of each patch of an image, contiguous, [(S/P)^2, D].
        dtype: Of the tokens.

    Returns:
        [C * (S/P)^2, D], image by image, row by row.
    """
    images = images.contiguous()
    width, colours, patch, _ = weight.shape
    side = images.shape[-1]
    rows = len(images) * len(position)
    x = images.new_empty(rows, width, dtype=dtype)  # [C * (S/P)^2, D]
    _patch_tokens[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
        images,
        weight,
        bias,
        position,
        x,
        rows,
        SIDE=side,
        PATCH=patch,
        PIXELS=colours * patch * patch,
        WIDTH=width,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_stages=3,
        **dependent(images.device),
    )
    return x


@triton.jit
def _patch_tokens(
    images,
    weight,
    bias,
    position,
    x,
    rows,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    along: tl.constexpr = SIDE // PATCH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    patch = row % (along * along)
    corner = row // (along * along) * (PIXELS // (PATCH * PATCH) * SIDE * SIDE)
    corner += patch // along * (PATCH * SIDE) + patch % along * PATCH  # [ROWS]

    wait_for_inputs(PDL)
    let_next_begin(PDL)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, PIXELS, DEPTH):
        pixel = start + tl.arange(0, DEPTH)
        colour, inside = pixel // (PATCH * PATCH), pixel % (PATCH * PATCH)
        offset = colour * (SIDE * SIDE) + inside // PATCH * SIDE + inside % PATCH  # [DEPTH]
        known = pixel < PIXELS
        a = tl.load(
            images + corner[:, None] + offset[None], (row < rows)[:, None] & known[None], 0.0
        )
        b = tl.load(
            weight + column[:, None] * PIXELS + pixel[None],
            (column < WIDTH)[:, None] & known[None],
            0.0,
        )
        total = tl.dot(a.to(tl.float32), b.to(tl.float32).T, total, input_precision="tf32")
    drawn = (row < rows)[:, None] & (column < WIDTH)[None]
    total += tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)[None]
    total += tl.load(position + patch[:, None] * WIDTH + column[None], drawn, 0.0).to(tl.float32)
    tl.store(x + row[:, None] * WIDTH + column[None], total.to(x.dtype.element_ty), drawn)
