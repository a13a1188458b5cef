"""One product of a fused stage, in the model's own type or in FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear

from safe_pruner_node.engine.e4m3 import Scales, scaled_linear
from safe_pruner_node.engine.fp8 import Fp8Linear


@dataclass(frozen=True)
class Projection:
    """Weights of one layer without a bias, or of several that read the same input.

    Attributes:
        weight: [D_out, D].
        scales: What weight and input stand for where both are E4M3; None: for themselves.
    """

    weight: Tensor
    scales: Scales | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> Projection:
        """A layer by itself."""
        return cls(layer.weight.data, _scales(layer))

    @classmethod
    def packed(cls, pack: Callable[..., Tensor], *layers: nn.Linear) -> Projection:
        """Layers as one; `pack` is of `packed_weights`."""
        return cls(pack(*(layer.weight for layer in layers)), _scales(layers[0]))

    @property
    def input_scale(self) -> float | None:
        """What its input is to be quantised with; None: it is not."""
        return None if self.scales is None else self.scales.input

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [N, D] projected, [N, D_out]."""
        if self.scales is not None:
            return scaled_linear(x, self.weight, self.scales)
        return linear(x, self.weight)


def _scales(layer: nn.Linear) -> Scales | None:
    return layer.scales if isinstance(layer, Fp8Linear) else None
