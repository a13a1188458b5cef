"""The gated MLP's first half: gelu(gate) * up, alone or in the epilogue of its GEMM.

The rows of the packed weight alternate: gate 0, up 0, gate 1, up 1 and so on (see
`packed_weights.interleave`), so both halves of one hidden channel meet in one thread.

Shapes: N rows, D width, F hidden channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 2048
"""Hidden channels per program of the element-wise kernel."""

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""Of the GEMM: rows and weight rows (gate and up together) per tile, input channels per step."""

GROUP = 8
"""Tiles of rows that share a run of weight tiles, so that these stay in the L2."""


def gelu_mul(projected: Tensor) -> Tensor:
    """gelu(gate) * up of projected rows [N, 2F], channels alternating, to [N, F]."""
    rows, columns = projected.shape
    hidden = projected.new_empty(rows, columns // 2)  # [N, F]
    n = hidden.numel()
    _gelu_mul[(triton.cdiv(n, BLOCK),)](projected, hidden, n, BLOCK=BLOCK, num_warps=8)
    return hidden


def glu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """gelu(gate) * up of x in one GEMM.

    One program per multiprocessor: it loads its next tile's first operands while it finishes one.

    Args:
        x: Rows, contiguous, [N, D].
        weight: Gate and up alternating, contiguous, [2F, D]; D and F are multiples of 8.

    Returns:
        [N, F].
    """
    rows, columns = len(x), len(weight)
    hidden = x.new_empty(rows, columns // 2)  # [N, F]
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    programs = min(tiles, _multiprocessors(x.device))
    _glu_linear[(programs,)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(hidden, [ROWS, COLUMNS // 2]),
        rows,
        columns,
        programs,
        WIDTH=x.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        GROUP=GROUP,
        num_stages=3,
        num_warps=8,
    )
    return hidden


def _multiprocessors(device: torch.device) -> int:
    """How many programs run at once; in the interpreter, any number that has to take turns."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form, of fp32 x."""
    # 0.5 (1 + tanh(u)) is sigmoid(2u): one exponential, no tanh needed
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_mul(projected, hidden, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.arange(0, 2 * BLOCK)
    inside = pair < 2 * (n - start)
    both = tl.load(projected + 2 * start + pair, inside, 0.0, eviction_policy="evict_first")
    gate, up = tl.split(both.to(tl.float32).reshape(BLOCK, 2))  # [BLOCK] each
    channel = tl.arange(0, BLOCK)
    tl.store(hidden + start + channel, gelu_tanh(gate) * up, channel < n - start)


@triton.jit
def _glu_linear(
    x,
    weight,
    hidden,
    rows,
    columns,
    programs,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    # Flattened, so that loads for the next tile are under way while this one is stored
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        group = min(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % group) * ROWS
        column = tile % (GROUP * column_tiles) // group * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, WIDTH, DEPTH):
            a = x.load([row, depth])  # [ROWS, DEPTH]
            b = weight.load([column, depth])  # [COLUMNS, DEPTH]
            total = tl.dot(a, b.T, total, input_precision="ieee")
        gate, up = tl.split(total.reshape(ROWS, COLUMNS // 2, 2))  # [ROWS, COLUMNS / 2] each
        hidden.store([row, column // 2], (gelu_tanh(gate) * up).to(hidden.dtype))
