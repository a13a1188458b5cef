"""A random policy of full size, made on the device in seconds: no file of 7 GB is needed.

Time does not depend on the values of the weights, but errors do: the weights are scaled so that
activations stay near 1, attention picks tokens instead of averaging them, and every part of the
model has a say in the actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pi05.config import PI05, TINY, Pi05Config
from safe_pruner_node.pi05.model import Pi05

SIZES: Mapping[str, Pi05Config] = {
    "full": PI05,
    "small": replace(
        TINY,
        vision=replace(TINY.vision, image=56),  # 16 tokens per camera
        vlm=replace(TINY.vlm, depth=10),
        expert=replace(TINY.expert, depth=10),
        flow_steps=2,
        max_prompt_tokens=200,
        vocab_size=1024,
        name="small",
    ),
}
"""``full`` is the published model, ``small`` runs the benchmark's own tests on a CPU."""

SEED = 0
"""Of the weights: every process of one run builds the same ones."""

SHARPNESS = 2.0
"""Scale of the queries: logits of deviation 2, so that a few keys take most of the attention."""
GATE = 0.5
"""Residual gate of the expert: as loud as a layer of the language model."""


@torch.no_grad()
def random_policy(config: Pi05Config, device: torch.device) -> Pi05:
    """A policy with random weights in openpi's mixed precision.

    Args:
        config: Its sizes.
        device: Where the weights are drawn; another device draws others from the same seed.
    """
    with torch.device("meta"):
        model = Pi05(config)
    random = torch.Generator(device).manual_seed(SEED)
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=mixed_dtype(name), device=device)
        mean, deviation = _distribution(name, parameter.shape)
        weights[name] = tensor.normal_(mean, deviation, generator=random)
        if name.endswith("norm.dense.bias"):  # scale, shift and gate, [3 D]
            tensor[2 * len(tensor) // 3 :] += GATE
    return _with(weights, config)


@torch.no_grad()
def in_fp32(model: Pi05) -> Pi05:
    """The same policy with every weight as fp32: what the others are compared with."""
    return _with({name: p.float() for name, p in model.named_parameters()}, model.config)


def _with(weights: dict[str, Tensor], config: Pi05Config) -> Pi05:
    with torch.device("meta"):
        model = Pi05(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(requires_grad=False).eval()


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    if "norm" in name and not name.endswith("dense.weight"):
        layer_norm = ("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")
        return (1.0 if name.endswith(layer_norm) else 0.0), 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if "position_embedding" in name:
        return 0.0, 0.5
    fan_in = shape[1:].numel()
    if name.endswith("q_proj.weight"):
        return 0.0, SHARPNESS * fan_in**-0.5
    return 0.0, fan_in**-0.5
