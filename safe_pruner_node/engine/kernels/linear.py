"""Projections in tiles that fit few rows: one wave of programs, and split where that is too few.

What a program reads comes from the L2 cache, and at these sizes that is what a product waits for
as much as for the tensor cores: a tile is as square as registers allow. Rows that no power of two
fits get two accumulators: 312 rows are 256 + 64, so that few rows of a tile are nobody's and each
weight is read by one program.

Shapes: N rows, D width, F output channels, S parts that D is split into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_pruner_node.engine.kernels.activation import gelu_tanh
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

LINEAR, GELU, GLU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is done with a product: nothing, tanh-GELU, or gelu(gate) * up of alternating channels."""


@dataclass(frozen=True)
class Tiles:
    """Of a projection.

    Attributes:
        rows: Rows per program; a power of two.
        rest: More rows, in an accumulator of their own; a power of two, 0: none.
        columns: Output channels per program, of both gate and up together; a power of two.
        depth: Input channels per step.
        splits: Parts of the width.
        warps: Warps per program.
        stages: Steps whose loads are under way at once.
        persistent: One program per multiprocessor, which does several tiles.
        prefetch: With dependent launch, so many input channels of a program's weights are asked
            for before the inputs are there.
    """

    rows: int
    columns: int
    rest: int = 0
    depth: int = 64
    splits: int = 1
    warps: int = 8
    stages: int = 3
    persistent: bool = False
    prefetch: int = 512


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    *,
    then: str = "",
    dependent: bool = False,
) -> Tensor:
    """Project rows.

    Args:
        x: Contiguous, [N, D].
        weight: Contiguous, [F, D]; D and F are multiples of 8.
        bias: [F]; None: none. Only without splits.
        tiles: Block sizes.
        then: "gelu", "glu" (gate and up alternate in F, see `packed_weights.interleave`) or "".
            Only without splits.
        dependent: Programmatic dependent launch.

    Returns:
        Terms whose sum is the projection, [S, N, F]; F / 2 after "glu".
    """
    n_rows, width = x.shape
    columns = len(weight)
    halves = 2 if then == "glu" else 1
    out = x.new_empty(tiles.splits, n_rows, columns // halves)  # [S, N, F]
    block = tiles.columns // halves
    per_row = triton.cdiv(columns, tiles.columns)
    n_tiles = per_row * triton.cdiv(n_rows, tiles.rows + tiles.rest)
    programs = n_tiles
    if tiles.persistent:
        programs = min(n_tiles, _multiprocessors(x.device))
        programs = triton.cdiv(n_tiles, triton.cdiv(n_tiles, programs))  # all the same number
    rest = max(tiles.rest, 16)  # without a rest nobody reads the descriptors
    options = {"PDL": dependent, "PREFETCH": tiles.prefetch if dependent else 0}
    if dependent:  # the interpreter of kernels does not know this option
        options["launch_pdl"] = True
    kernel = _linear_persistent if tiles.persistent else _linear
    kernel[(programs, tiles.splits)](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(x, [rest, tiles.depth]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
        weight,
        weight if bias is None else bias,
        TensorDescriptor.from_tensor(out, [1, tiles.rows, block]),
        TensorDescriptor.from_tensor(out, [1, rest, block]),
        n_rows,
        columns,
        n_tiles,
        WIDTH=width,
        SPAN=triton.cdiv(triton.cdiv(width, tiles.depth), tiles.splits) * tiles.depth,
        BIAS=bias is not None,
        THEN={"": LINEAR, "gelu": GELU, "glu": GLU}[then],
        ROWS=tiles.rows,
        REST=tiles.rest,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **options,
    )
    return out


def _multiprocessors(device: torch.device) -> int:
    """How many programs run at once; in the interpreter, any number that has to take turns."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def prefetch_rows(w_ptr, first, column, span, columns, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Ask for w[first:first + COLUMNS, column:column + span] to come into the L2, a row each."""
    row = tl.minimum(first + tl.arange(0, COLUMNS), columns - 1)
    n_bytes = tl.zeros_like(row) + span * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [w_ptr + row.to(tl.int64) * WIDTH + column, n_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _finish(total, added, out, split, row, column, BIAS: tl.constexpr, THEN: tl.constexpr):
    """Bias [COLUMNS], activation and store of a tile [R, COLUMNS]."""
    if BIAS:
        total += added[None]
    if THEN == 1:
        total = gelu_tanh(total)
    if THEN == 2:
        gate, up = tl.split(total.reshape(total.shape[0], total.shape[1] // 2, 2))
        total = gelu_tanh(gate) * up
        column = column // 2
    block: tl.constexpr = [1, total.shape[0], total.shape[1]]
    out.store([split, row, column], total.to(out.dtype).reshape(block))


@triton.jit
def _linear(
    x,  # descriptor of [N, D]
    x_rest,  # the same
    weight,  # descriptor of [F, D]
    w_ptr,  # the same
    bias,  # [F]
    out,  # descriptor of [S, N, F]
    out_rest,  # the same
    n_rows,
    columns,
    n_tiles,  # noqa: ARG001 - the arguments are those of the other kernel
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    THEN: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (tile, split)."""
    per_column = tl.cdiv(n_rows, ROWS + REST)
    row = tl.program_id(0) % per_column * (ROWS + REST)
    column = tl.program_id(0) // per_column * COLUMNS
    split = tl.program_id(1)
    first, end = split * SPAN, min((split + 1) * SPAN, WIDTH)
    if PREFETCH > 0 and row == 0:
        prefetch_rows(w_ptr, column, first, min(end - first, PREFETCH), columns, COLUMNS, WIDTH)
    channel = column + tl.arange(0, COLUMNS)
    added = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        added = tl.load(bias + channel, channel < columns, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    rest = tl.zeros((REST if REST > 0 else 16, COLUMNS), tl.float32)
    for depth in range(first, end, DEPTH):
        w = weight.load([column, depth]).T  # [DEPTH, COLUMNS]
        total = tl.dot(x.load([row, depth]), w, total, input_precision="ieee")
        if REST:
            rest = tl.dot(x_rest.load([row + ROWS, depth]), w, rest, input_precision="ieee")
    _finish(total, added, out, split, row, column, BIAS, THEN)
    if REST:
        _finish(rest, added, out_rest, split, row + ROWS, column, BIAS, THEN)


@triton.jit
def _linear_persistent(
    x,  # descriptor of [N, D]
    x_rest,  # the same
    weight,  # descriptor of [F, D]
    w_ptr,  # the same
    bias,  # [F]
    out,  # descriptor of [S, N, F]
    out_rest,  # the same
    n_rows,
    columns,
    n_tiles,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    THEN: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (worker, split): every so manieth tile, with its loads under way a tile before."""
    per_column = tl.cdiv(n_rows, ROWS + REST)
    split = tl.program_id(1)
    first, end = split * SPAN, min((split + 1) * SPAN, WIDTH)
    if PREFETCH > 0 and tl.program_id(0) % per_column == 0:
        begin = tl.program_id(0) // per_column * COLUMNS
        prefetch_rows(w_ptr, begin, first, min(end - first, PREFETCH), columns, COLUMNS, WIDTH)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        row = tile % per_column * (ROWS + REST)
        column = tile // per_column * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        rest = tl.zeros((REST if REST > 0 else 16, COLUMNS), tl.float32)
        for depth in range(first, end, DEPTH):
            w = weight.load([column, depth]).T  # [DEPTH, COLUMNS]
            total = tl.dot(x.load([row, depth]), w, total, input_precision="ieee")
            if REST:
                rest = tl.dot(x_rest.load([row + ROWS, depth]), w, rest, input_precision="ieee")
        channel = column + tl.arange(0, COLUMNS)
        added = tl.zeros((COLUMNS,), tl.float32)
        if BIAS:
            added = tl.load(bias + channel, channel < columns, 0.0).to(tl.float32)
        _finish(total, added, out, split, row, column, BIAS, THEN)
        if REST:
            _finish(rest, added, out_rest, split, row + ROWS, column, BIAS, THEN)
