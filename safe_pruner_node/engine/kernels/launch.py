"""Programmatic dependent launch: a kernel may begin while the one before it is still ending.

A kernel that was launched so first prefetches what nobody writes (weights) into the L2 cache, then
waits until the kernel before it has written everything, and early tells the next one to begin.
Needs an SM 9.0 GPU; with ``PDL`` false all of it is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def prefetch_rows(pointers, ROW_BYTES: tl.constexpr, PDL: tl.constexpr):
    """Ask for ROW_BYTES (a multiple of 16) from every pointer to come into the L2 cache."""
    if PDL:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [pointers, tl.full(pointers.shape, ROW_BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
