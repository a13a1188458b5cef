"""One product of a fused stage, in the model's own type or in FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.functional import linear

from safe_pruner_node.engine.e4m3 import Scales, scaled_linear
from safe_pruner_node.engine.fp8 import Fp8Linear


@dataclass(frozen=True)
class Projection:
    """Weights of one layer, or of several that read the same input.

    Attributes:
        weight: [D_out, D].
        bias: [D_out]; None: none.
        scales: What weight and input stand for where both are E4M3; None: for themselves.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Scales | None

    @classmethod
    def of(cls, layer: nn.Linear) -> Projection:
        """A layer by itself."""
        bias = None if layer.bias is None else layer.bias.data
        return cls(layer.weight.data, bias, _scales(layer))

    @classmethod
    def packed(cls, pack: Callable[..., Tensor], *layers: nn.Linear) -> Projection:
        """Layers without bias as one; `pack` is of `packed_weights`."""
        return cls(pack(*(layer.weight for layer in layers)), None, _scales(layers[0]))

    @property
    def input_scale(self) -> float | None:
        """What its input is to be quantised with; None: it is not."""
        return None if self.scales is None else self.scales.input

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [N, D] projected, [N, D_out]."""
        if self.scales is not None:
            return scaled_linear(x, self.weight, self.scales, self.bias)
        return linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias."""
        return replace(self, bias=None)(x)


def _scales(layer: nn.Linear) -> Scales | None:
    return layer.scales if isinstance(layer, Fp8Linear) else None
