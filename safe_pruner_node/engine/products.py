"""Products of the fused stages by the libraries: cuBLAS, and Triton where something follows.

`TensorCoreProducts` does the same in a kernel of our own.

Shapes: N rows, D width of the input, F features of the result, S terms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from safe_pruner_node.engine.kernels.activation import gelu_mul, glu_linear
from safe_pruner_node.engine.projection import Projection

MANY_ROWS = 512
"""From here on gate and up with the GELU inside are faster than cuBLAS and a kernel after it. On an
H100: 188 us against 218 for 888 rows, 84 against 78 for 312. FP8 on an H200: 92 against 118, 44.5
against 43.7."""

LONG = 4
"""A product whose depth is so many times its features has too few tiles for all multiprocessors,
and is done in two halves. On an H100 (Gemma's down projection, 16384 to 2048): 37 us instead of 43
for 312 rows, as fast for 888; quarters are no faster in a whole prefill. In FP8, which has no
batched product, two halves are slower than one: 24.6 us instead of 22.7 for 312 rows, 49.3 instead
of 42.9 for 888 on an H200."""


class Products:
    """What a fused stage does with its weights. Rows are contiguous.

    Args:
        reason: Why these and not the faster ones.

    Attributes:
        note: Whose products these are.
    """

    def __init__(self, reason: str = "") -> None:
        self.note = "products: cuBLAS and Triton"
        if reason:
            self.note += f"; no kernel of our own: {reason}"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A projection of x [N, D] with a bias [F], [N, F]."""
        return torch.addmm(bias, x, weight.T)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """tanh-GELU of a projection of x [N, D] with a bias [F], [N, F]."""
        if x.is_cuda:
            return torch._addmm_activation(  # noqa: SLF001 - the only door to cuBLASLt's epilogue
                bias, x, weight.T, use_gelu=True
            )
        # On a CPU the same call has the erf form.
        return gelu(torch.addmm(bias, x, weight.T), approximate="tanh")

    def terms(self, x: Tensor, projection: Projection) -> Tensor:
        """Terms [S, N, F] whose sum is the projection of x [N, D]; who reads them adds them up."""
        weight = projection.weight
        if projection.scales is not None or len(weight) * LONG > x.shape[1]:
            return projection(x)[None]
        halves = x.unflatten(1, (2, -1)).transpose(0, 1)  # [2, N, D/2]
        return torch.bmm(halves, weight.unflatten(1, (2, -1)).permute(1, 2, 0))

    def gated(self, x: Tensor, gate_up: Projection, scale: float | None) -> Tensor:
        """gelu(gate) * up of x [N, D], [N, F].

        Args:
            x: Rows.
            gate_up: Gate and up alternating, [2F, D].
            scale: Of the result as E4M3; None: it is of the type of the model.
        """
        if len(x) < MANY_ROWS:
            return gelu_mul(gate_up(x), scale)
        return glu_linear(x, gate_up.weight, gate_up.scales, scale)


def products_for(weight: Tensor) -> Products:
    """The fastest products there are where a model's weights are.

    Args:
        weight: One of them.
    """
    # Here, because the other is a subclass.
    from safe_pruner_node.engine.tensor_core_products import (  # noqa: PLC0415
        TensorCoreProducts,
        unsupported,
    )

    reason = unsupported(weight)
    return TensorCoreProducts(weight.device) if reason is None else Products(reason)
