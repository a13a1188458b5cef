"""The reference token nearest to each token by cosine similarity: a product that keeps its argmax.

What a row is compared with decides the argmax, its own length does not. So the rows go into the
product as they are, which is exact in bf16 with fp32 sums, and only the references' lengths count;
these are summed from the same tiles on the way.

Shapes: N tokens in cameras of CAMERA tokens each, D width, P blocks of references per camera.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs
from safe_pruner_node.engine.kernels.token_rank import nan_as_infinite

ROWS, REFERENCES = 32, 64
"""Of a tile: 96 programs for three cameras of 256 tokens, so that most of a GPU reads; the
references are the 64 rows that a warp group multiplies at once."""

DEPTH_BYTES = 256
"""Of a row per turn of the loop: 24 KiB of both sides, four of them under way at once."""

STAGES, WARPS = 4, 4

JOINED = 64
"""Rows per program of the joining kernel."""

SHORTEST = tl.constexpr(1e-12)
"""Length that a row has at least, as in `torch.nn.functional.normalize`."""


@triton.jit
def token_match_kernel(
    current,  # [N, D]
    reference,  # [N, D]
    value,  # out fp32, [P, N]: the greatest similarity in a block, times the row's length
    nearest,  # out int32, [P, N]: its reference token
    n_tokens,  # N
    CAMERA: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    REFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, p, camera): a block of rows over a block of references of their camera."""
    part = tl.program_id(1)
    first = tl.program_id(2) * CAMERA
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    other = part * REFERENCES + tl.arange(0, REFERENCES)
    channel = tl.arange(0, DEPTH)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    product = tl.zeros((REFERENCES, ROWS), tl.float32)
    squares = tl.zeros((REFERENCES, DEPTH), tl.float32)
    row_at = current + (first + row)[:, None] * DIM + channel[None]
    other_at = reference + (first + other)[:, None] * DIM + channel[None]
    for start in range(0, DIM, DEPTH):
        left = (channel < DIM - start)[None]
        z = tl.load(row_at + start, (row < CAMERA)[:, None] & left, 0.0)  # [ROWS, DEPTH]
        r = tl.load(other_at + start, (other < CAMERA)[:, None] & left, 0.0)  # [REFERENCES, DEPTH]
        product = tl.dot(r, z.T, product, input_precision="ieee")
        wide = r.to(tl.float32)
        squares += wide * wide
    length = tl.maximum(tl.sqrt(tl.sum(squares, 1)), SHORTEST)  # [REFERENCES]
    similarity = product / length[:, None]  # [REFERENCES, ROWS]
    similarity = nan_as_infinite(similarity)  # torch's argmax is a NaN's index too
    similarity = tl.where((other < CAMERA)[:, None], similarity, float("-inf"))
    greatest, index = tl.max(similarity, 0, return_indices=True)  # [ROWS]; the lowest of equal ones
    at = part * n_tokens + first + row
    tl.store(value + at, greatest, row < CAMERA)
    tl.store(nearest + at, first + part * REFERENCES + index, row < CAMERA)


@triton.jit
def join_match_kernel(
    value,  # fp32, [P, N]
    nearest,  # int32, [P, N]
    pi,  # out int64, [N]
    n_tokens,  # N
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program m: the nearest of all blocks, the lowest of equal ones, for ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n_tokens
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    greatest = tl.load(value + row, inside, 0.0)
    index = tl.load(nearest + row, inside, 0)
    for part in tl.static_range(1, PARTS):
        at = part * n_tokens + row
        found = tl.load(value + at, inside, 0.0)
        index = tl.where(found > greatest, tl.load(nearest + at, inside, 0), index)
        greatest = tl.maximum(greatest, found)
    tl.store(pi + row, index.to(tl.int64), inside)
