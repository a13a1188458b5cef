"""A layer norm between two projections, folded into both: no kernel of its own.

With mu and r = 1 / std of a row x, the norm's weight g and its bias b,

    norm(x) @ W.T = r * ((x * g) @ W.T - mu * (W @ g)) + W @ b

where W @ g and W @ b do not depend on x and are computed beforehand. Who writes x
(`residual_linear`) also writes x * g and the sums that mu and r are made of; `normed_linear` reads
these.

Shapes: N rows, K width of what is added, D width, F output channels, T tiles of columns of D.
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
from safe_pruner_node.engine.kernels.linear import Tiles, prefetch_rows
from safe_pruner_node.engine.kernels.norms import EPSILON


@dataclass(frozen=True)
class Rows:
    """A residual stream that is ready for a norm.

    Attributes:
        x: [N, D].
        scaled: x * g, [N, D].
        sums: Of x, by tile of columns, [N, T] fp32.
        squares: Sums of x * x, [N, T] fp32.
    """

    x: Tensor
    scaled: Tensor
    sums: Tensor
    squares: Tensor


@dataclass(frozen=True)
class NormedWeight:
    """A projection after a norm.

    Attributes:
        weight: W, [F, D].
        toward_mean: W @ g, [F] fp32.
        bias: W @ b + the projection's own bias, [F] fp32.
    """

    weight: Tensor
    toward_mean: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> NormedWeight:
        """Of W, its bias [F], g and b [D]."""
        exact = weight.float()
        return cls(weight, exact @ scale.float(), exact @ shift.float() + bias.float())


def residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    scale: Tensor,
    tiles: Tiles,
    *,
    dependent: bool = False,
) -> Rows:
    """x + a @ weight.T + bias, ready for a norm with weight `scale`.

    Args:
        a: [N, K].
        weight: [D, K].
        bias: [D].
        x: [N, D].
        scale: g, [D].
        tiles: Block sizes; neither splits nor a rest.
        dependent: Programmatic dependent launch.
    """
    n_rows, width = x.shape
    per_row = triton.cdiv(width, tiles.columns)
    complete, scaled = torch.empty_like(x), torch.empty_like(x)  # [N, D] each
    sums, squares = x.new_empty(2, n_rows, per_row, dtype=torch.float32)  # [N, T] each
    _residual_linear[(per_row * triton.cdiv(n_rows, tiles.rows),)](
        TensorDescriptor.from_tensor(a, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
        weight,
        bias,
        x,
        scale,
        complete,
        scaled,
        sums,
        squares,
        n_rows,
        WIDTH=width,
        DEPTH_TOTAL=a.shape[1],
        TILES=per_row,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_launch(tiles, dependent),
    )
    return Rows(complete, scaled, sums, squares)


def normed_linear(
    rows: Rows, weight: NormedWeight, tiles: Tiles, *, gelu: bool = False, dependent: bool = False
) -> Tensor:
    """The norm of rows, projected, and tanh-GELU of it on request.

    Args:
        rows: From `residual_linear`, with the g that `weight` was made of.
        weight: The projection.
        tiles: Block sizes; neither splits nor a rest.
        gelu: Whether.
        dependent: Programmatic dependent launch.

    Returns:
        [N, F].
    """
    n_rows, width = rows.x.shape
    columns = len(weight.weight)
    out = rows.x.new_empty(n_rows, columns)  # [N, F]
    n_tiles = triton.cdiv(columns, tiles.columns) * triton.cdiv(n_rows, tiles.rows)
    parts = rows.sums.shape[1]
    _normed_linear[(n_tiles,)](
        TensorDescriptor.from_tensor(rows.scaled, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight.weight, [tiles.columns, tiles.depth]),
        weight.weight,
        weight.toward_mean,
        weight.bias,
        rows.sums,
        rows.squares,
        TensorDescriptor.from_tensor(out, [tiles.rows, tiles.columns]),
        n_rows,
        columns,
        WIDTH=width,
        EPSILON=EPSILON,
        PARTS=parts,
        BLOCK_PARTS=triton.next_power_of_2(parts),
        GELU=gelu,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_launch(tiles, dependent),
    )
    return out


def _launch(tiles: Tiles, dependent: bool) -> dict[str, int]:
    options = {"PDL": dependent, "PREFETCH": tiles.prefetch if dependent else 0}
    if dependent:  # the interpreter of kernels does not know this option
        options["launch_pdl"] = True
    return options


@triton.jit
def _residual_linear(
    a,  # descriptor of [N, K]
    weight,  # descriptor of [D, K]
    w_ptr,  # the same
    bias,  # [D]
    x,  # [N, D]
    scale,  # [D]
    complete,  # out, [N, D]
    scaled,  # out, [N, D]
    sums,  # out fp32, [N, T]
    squares,  # out fp32, [N, T]
    n_rows,
    WIDTH: tl.constexpr,
    DEPTH_TOTAL: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (tile)."""
    per_column = tl.cdiv(n_rows, ROWS)
    first_row = tl.program_id(0) % per_column * ROWS
    tile = tl.program_id(0) // per_column
    first = tile * COLUMNS
    if PREFETCH > 0 and first_row == 0:
        prefetch_rows(w_ptr, first, 0, min(DEPTH_TOTAL, PREFETCH), WIDTH, COLUMNS, DEPTH_TOTAL)
    row = first_row + tl.arange(0, ROWS)
    channel = first + tl.arange(0, COLUMNS)
    known = channel < WIDTH
    added = tl.load(bias + channel, known, 0.0).to(tl.float32)
    g = tl.load(scale + channel, known, 0.0).to(tl.float32)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    at = row[:, None] * WIDTH + channel[None]
    inside = (row < n_rows)[:, None] & known[None]
    before = tl.load(x + at, inside, 0.0)  # [ROWS, COLUMNS]; early, it is needed at the end
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, DEPTH_TOTAL, DEPTH):
        total = tl.dot(
            a.load([first_row, depth]), weight.load([first, depth]).T, total, input_precision="ieee"
        )
    dtype = complete.dtype.element_ty
    rounded = (before.to(tl.float32) + total + added[None]).to(dtype)
    tl.store(complete + at, rounded, inside)
    value = tl.where(known[None], rounded.to(tl.float32), 0.0)
    tl.store(scaled + at, (value * g[None]).to(dtype), inside)
    part = row * TILES + tile
    tl.store(sums + part, tl.sum(value, 1), row < n_rows)
    tl.store(squares + part, tl.sum(value * value, 1), row < n_rows)


@triton.jit
def _normed_linear(
    scaled,  # descriptor of [N, D]
    weight,  # descriptor of [F, D]
    w_ptr,  # the same
    toward_mean,  # [F] fp32
    bias,  # [F] fp32
    sums,  # [N, PARTS] fp32
    squares,  # [N, PARTS] fp32
    out,  # descriptor of [N, F]
    n_rows,
    columns,
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (tile)."""
    per_column = tl.cdiv(n_rows, ROWS)
    first_row = tl.program_id(0) % per_column * ROWS
    first = tl.program_id(0) // per_column * COLUMNS
    if PREFETCH > 0 and first_row == 0:
        prefetch_rows(w_ptr, first, 0, min(WIDTH, PREFETCH), columns, COLUMNS, WIDTH)
    row = first_row + tl.arange(0, ROWS)
    channel = first + tl.arange(0, COLUMNS)
    added = tl.load(bias + channel, channel < columns, 0.0)
    mean_weight = tl.load(toward_mean + channel, channel < columns, 0.0)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    part = tl.arange(0, BLOCK_PARTS)[None]
    at = row[:, None] * PARTS + part
    inside = (row < n_rows)[:, None] & (part < PARTS)
    mean = tl.sum(tl.load(sums + at, inside, 0.0), 1) / WIDTH  # [ROWS]
    square = tl.sum(tl.load(squares + at, inside, 0.0), 1) / WIDTH  # [ROWS]
    r = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + EPSILON)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, WIDTH, DEPTH):
        total = tl.dot(
            scaled.load([first_row, depth]),
            weight.load([first, depth]).T,
            total,
            input_precision="ieee",
        )
    total = r[:, None] * (total - mean[:, None] * mean_weight[None]) + added[None]
    if GELU:
        total = gelu_tanh(total)
    out.store([first_row, first], total.to(out.dtype))
