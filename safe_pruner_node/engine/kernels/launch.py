"""Programmatic dependent launch: a kernel may begin while the one before it is still ending.

A kernel that was launched so first does what needs no input (it asks for its weights to come into
the L2 cache), then waits until the kernel before it has written everything, and tells the next one
to begin. Needs an SM 9.0 GPU; with ``PDL`` false all of it is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

PIECE = tl.constexpr(256)
"""Weights that one request of `prefetch_weights` asks for."""


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernels before this one have finished and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Lets the next kernel begin once every program of this one has come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_weights(
    w_ptr,
    first_row,
    column,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    PITCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ask for w[first_row:, column:], ROWS by SPAN, of bf16 rows of PITCH elements.

    One request per thread and 512 bytes: more threads than requests would only repeat them.
    """
    if PDL:
        PIECES: tl.constexpr = SPAN // PIECE
        piece = tl.arange(0, ROWS * PIECES)
        at = (first_row + piece // PIECES) * PITCH + column + (piece % PIECES) * PIECE
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;",
            "=r,l",
            [w_ptr + at],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
