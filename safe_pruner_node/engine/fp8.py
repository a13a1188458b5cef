"""Which layers of a policy run in FP8, and how they get there.

A weight is quantised once, with one scale for the layers that read the same input. An input's scale
is fixed beforehand too (`fp8_calibration`): nothing is measured while the robot runs, and in the
fused path the kernel that makes an input also quantises it.

`quantise` puts the layers into the model, so that every path, the plain one too, multiplies the
same numbers; the weights that they replace are let go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safe_pruner_node.engine.e4m3 import LARGEST, Scales, scaled_linear, to_e4m3
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.model import Pi05

HEADROOM = 2.0
"""So many times the largest input seen is the largest that is not cut off. E4M3 is a floating-point
type: the factor costs one of its 15 powers of two, no digit."""

MULTIPLE = 16
"""Of which both sides of a weight are: what cuBLAS asks for."""

_LAYERS = "paligemma_with_expert.paligemma.model.language_model.layers"


class Fp8Linear(nn.Linear):
    """Stands in for a linear layer without a bias.

    Args:
        linear: The layer.
        scales: What the numbers stand for.

    Attributes:
        weight: [D_out, D], E4M3.
    """

    def __init__(self, linear: nn.Linear, scales: Scales) -> None:
        rows, columns = linear.weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        numbers = to_e4m3(linear.weight, scales.weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scales = scales

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Project x [..., D] to [..., D_out]."""
        rows = to_e4m3(input.flatten(0, -2), self.scales.input)  # [N, D]
        out = scaled_linear(rows, self.weight, self.scales)
        return out.view(*input.shape[:-1], -1)


def layer_groups(model: Pi05) -> dict[str, tuple[str, ...]]:
    """Names of the layers that FP8 is for; those that read the same input together.

    The MLPs of the language model, where most of the prefill's time is. The last one is not among
    them, nobody reads it. Nor are those of the vision tower: they cost more exactness than these
    and gain a fortieth of its time.

    Returns:
        Name of a group to the paths of its layers in the model.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for i in range(model.config.vlm.depth - 1):
        mlp = f"{_LAYERS}.{i}.mlp"
        groups[f"vlm.{i}.gate_up"] = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        groups[f"vlm.{i}.down"] = (f"{mlp}.down_proj",)
    return groups


def is_fp8(model: nn.Module) -> bool:
    """True when `quantise` has been there."""
    return any(isinstance(module, Fp8Linear) for module in model.modules())


@torch.no_grad()
def quantise(model: Pi05, largest: Mapping[str, float | Tensor]) -> None:
    """Replace the layers of `layer_groups` by FP8 ones, for good.

    Args:
        model: The policy, with its weights where they stay; not yet in any fused runner.
        largest: Group to the largest magnitude that its input has been seen to have.

    Raises:
        ConfigError: A layer's size is none that FP8 products have.
    """
    groups = layer_groups(model)
    for paths in groups.values():
        for path in paths:
            shape = list(_linear(model, path).weight.shape)
            if any(size % MULTIPLE for size in shape):
                found = f"fp8, and a layer {path} of {shape}"
                expected = f"bf16: FP8 is for multiples of {MULTIPLE}"
                raise ConfigError("parameter", "dtype", found, expected)
    for name, paths in groups.items():
        layers = [_linear(model, path) for path in paths]
        weight = max(float(layer.weight.abs().max()) for layer in layers)
        first = layers[0].weight
        scales = Scales(
            HEADROOM * float(largest[name]) / LARGEST, weight / LARGEST, first.dtype, first.device
        )
        for path, layer in zip(paths, layers, strict=True):
            model.set_submodule(path, Fp8Linear(layer, scales))


@contextmanager
def watch_inputs(model: Pi05) -> Iterator[dict[str, Tensor]]:
    """While it is open, the largest magnitude of each group's inputs is kept.

    Args:
        model: The policy, run by a path that calls its modules (``eager``).

    Yields:
        Group to its largest magnitude so far, [] on the model's device; groups that ran.
    """
    largest: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, (first, *_) in layer_groups(model).items():

        def watch(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            found = arguments[0].abs().max().float()
            largest[name] = torch.maximum(found, largest.get(name, found))

        handles.append(_linear(model, first).register_forward_pre_hook(watch))
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: Pi05, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{path} is {type(layer).__name__}")
    return layer
