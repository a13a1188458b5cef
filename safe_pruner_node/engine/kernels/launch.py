"""Programmatic dependent launch: a kernel may begin while the one before it is still ending.

A kernel that was launched so first does what needs no input, then waits until the kernel before it
has written everything, and tells the next one to begin. Needs an SM 9.0 GPU; with ``PDL`` false all of it
is nothing.
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

