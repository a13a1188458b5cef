"""Rows that a part of the prefill begins with, brought together in one launch.

One output row per program; nothing is computed but the scale of embeddings.

Shapes: N rows (N_vis visual, then T of text), K visual rows kept, D width, W query channels of all
heads, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

WARPS = 4
"""Of a program."""


def embed_rows(z: Tensor, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
    """Visual tokens, then embeddings of text.

    Args:
        z: Visual tokens, contiguous, [N_vis, D].
        tokens: Text, [T] int64, each in 0..V-1.
        table: Embeddings, contiguous, in the type of z, [V, D].
        scale: Multiplies the embeddings.

    Returns:
        [N, D].
    """
    n_visual, width = z.shape
    out = z.new_empty(n_visual + len(tokens), width)  # [N, D]
    _embed_rows[(len(out),)](
        z,
        tokens,
        table,
        out,
        n_visual,
        scale,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=WARPS,
        **dependent(z.device),
    )
    return out


def kept_rows(
    x: Tensor, normed: Tensor, text: Tensor, keep: Tensor, query: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes on where visual tokens are dropped.

    Args:
        x: All rows, contiguous, [N, D].
        normed: The same normed, contiguous, [N, D].
        text: Queries of the text rows, contiguous, [T, W].
        keep: Visual rows that go on, [K] int64.
        query: Its last T rows are given the text's queries, contiguous, [K + T, W].

    Returns:
        Rows of x, of visual tokens kept and of text, [K + T, D]; normed visual ones, [K, D]; where
        all of them were, [K + T] int64.
    """
    n_kept, rows = len(keep), len(query)
    width, channels = x.shape[1], text.shape[1]
    x_out, normed_out = x.new_empty(rows, width), normed.new_empty(n_kept, width)
    positions = keep.new_empty(rows)
    _kept_rows[(rows,)](
        x,
        normed,
        text,
        keep,
        x_out,
        normed_out,
        query,
        positions,
        n_kept,
        len(x) - len(text),
        WIDTH=width,
        CHANNELS=channels,
        BLOCK=triton.next_power_of_2(width),
        CHANNEL_BLOCK=triton.next_power_of_2(channels),
        num_warps=WARPS,
        **dependent(x.device),
    )
    return x_out, normed_out, positions


@triton.jit
def _embed_rows(
    z,
    tokens,
    table,
    out,
    n_visual,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    target = out + row * WIDTH + column
    if row < n_visual:
        tl.store(target, tl.load(z + row * WIDTH + column, inside), inside)
    else:
        token = tl.load(tokens + row - n_visual)
        entry = tl.load(table + token * WIDTH + column, inside).to(tl.float32) * scale  # [D]
        tl.store(target, entry.to(out.dtype.element_ty), inside)


@triton.jit
def _kept_rows(
    x,
    normed,
    text,
    keep,
    x_out,
    normed_out,
    query,
    positions,
    n_kept,
    n_visual,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    of_text = row - n_kept
    position = (n_visual + of_text).to(tl.int64)
    if of_text < 0:
        position = tl.load(keep + row)
    tl.store(positions + row, position)
    # Two rows are on their way at once.
    value = tl.load(x + position * WIDTH + column, inside)  # [D]
    if of_text < 0:
        other = tl.load(normed + position * WIDTH + column, inside)  # [D]
        tl.store(normed_out + row * WIDTH + column, other, inside)
    else:
        channel = tl.arange(0, CHANNEL_BLOCK)
        heads = channel < CHANNELS
        query_of_text = tl.load(text + of_text * CHANNELS + channel, heads)  # [W]
        tl.store(query + row * CHANNELS + channel, query_of_text, heads)
    tl.store(x_out + row * WIDTH + column, value, inside)
