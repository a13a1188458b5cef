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

from safe_pruner_node.engine.e4m3 import E4M3, LARGEST, Scales
from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs
from safe_pruner_node.engine.kernels.quantise import cut_off

BLOCK = 2048
"""Hidden channels per program of the element-wise kernel."""

ROWS, COLUMNS, DEPTH_BYTES = 128, 256, 128
"""Of the GEMM: rows and weight rows (gate and up together) per tile, bytes of a row per step."""

GROUP = 8
"""Tiles of rows that share a run of weight tiles, so that these stay in the L2."""


def gelu_mul(projected: Tensor, scale: float | None = None) -> Tensor:
    """gelu(gate) * up.

    Args:
        projected: Rows, channels alternating, [N, 2F].
        scale: Of the result as E4M3; None: it is of the type of `projected`.

    Returns:
        [N, F].
    """
    rows, columns = projected.shape
    hidden = _new(projected, rows, columns // 2, scale)  # [N, F]
    n = hidden.numel()
    _gelu_mul[(triton.cdiv(n, BLOCK),)](
        projected,
        hidden,
        n,
        _per(scale),
        BLOCK=BLOCK,
        LARGEST=_largest(scale),
        num_warps=8,
        **dependent(projected.device),
    )
    return hidden


def glu_linear(
    x: Tensor, weight: Tensor, scales: Scales | None = None, scale: float | None = None
) -> Tensor:
    """gelu(gate) * up of x in one GEMM.

    One program per multiprocessor: it loads its next tile's first operands while it finishes one.

    Args:
        x: Rows, contiguous, [N, D].
        weight: Gate and up alternating, contiguous, [2F, D]; a row of D and one of F are multiples
            of 16 bytes.
        scales: What x and weight stand for where they are E4M3; None: for themselves.
        scale: Of the result as E4M3; None: it is of the type of x.

    Returns:
        [N, F].
    """
    rows, columns = len(x), len(weight)
    hidden = _new(x, rows, columns // 2, scale)  # [N, F]
    depth = DEPTH_BYTES // x.element_size()
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    programs = min(tiles, _multiprocessors(x.device))
    _glu_linear[(programs,)](
        TensorDescriptor.from_tensor(x, [ROWS, depth]),
        TensorDescriptor.from_tensor(weight, [COLUMNS, depth]),
        TensorDescriptor.from_tensor(hidden, [ROWS, COLUMNS // 2]),
        rows,
        columns,
        programs,
        1.0 if scales is None else scales.input * scales.weight,
        _per(scale),
        WIDTH=x.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=depth,
        GROUP=GROUP,
        LARGEST=_largest(scale),
        num_stages=3,
        num_warps=8,
        **dependent(x.device),
    )
    return hidden


def _new(like: Tensor, rows: int, columns: int, scale: float | None) -> Tensor:
    return like.new_empty(rows, columns, dtype=like.dtype if scale is None else E4M3)


def _per(scale: float | None) -> float:
    return 1.0 if scale is None else 1.0 / scale


def _largest(scale: float | None) -> float | None:
    """What a kernel cuts its result off at; None: it does not."""
    return None if scale is None else LARGEST


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
def _gelu_mul(
    projected,
    hidden,
    n,
    per_scale,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.arange(0, 2 * BLOCK)
    inside = pair < 2 * (n - start)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    both = tl.load(projected + 2 * start + pair, inside, 0.0, eviction_policy="evict_first")
    gate, up = tl.split(both.to(tl.float32).reshape(BLOCK, 2))  # [BLOCK] each
    channel = tl.arange(0, BLOCK)
    value = gelu_tanh(gate) * up  # [BLOCK]
    if LARGEST is not None:
        value = cut_off(value * per_scale, LARGEST)
    tl.store(hidden + start + channel, value.to(hidden.dtype.element_ty), channel < n - start)


@triton.jit
def _glu_linear(
    x,
    weight,
    hidden,
    rows,
    columns,
    programs,
    scale,
    per_scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_begin(PDL)
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
        if LARGEST is not None:
            total *= scale
        gate, up = tl.split(total.reshape(ROWS, COLUMNS // 2, 2))  # [ROWS, COLUMNS / 2] each
        value = gelu_tanh(gate) * up
        if LARGEST is not None:
            value = cut_off(value * per_scale, LARGEST)
        hidden.store([row, column // 2], value.to(hidden.dtype))
