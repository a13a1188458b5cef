"""The end of a kernel whose result is read by an FP8 product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cut_off(x, LARGEST: tl.constexpr):
    """Fp32 x within what E4M3 can hold, ready to be converted; NaN stays NaN."""
    return tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
