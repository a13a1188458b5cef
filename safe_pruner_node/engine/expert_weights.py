"""The action expert's weights as its kernels read them, and what the fixed flow times make of them.

Shapes: L layers, D width, h query heads, d head_dim, M MLP channels, S Euler steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from safe_pruner_node.engine.packed_weights import stack
from safe_pruner_node.pi05.model import GemmaLayer, Pi05, RMSNorm


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's matrices, [out, in] as in nn.Linear.

    Attributes:
        qkv: Queries, keys and values, [(h + 2) * d, D].
        o: [D, h * d].
        gate_up: [2 * M, D].
        down: [D, M].
    """

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Modulation:
    """What an adaRMS norm does at one flow time, and what its shift becomes after the product.

    Attributes:
        scale: 1 + scale, [D] fp32.
        shift: [D] fp32.
        gate: Of the residual, [D] fp32.
        bias: The shift after the following product, [columns] fp32; empty where none follows.
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor
    bias: Tensor


@dataclass(frozen=True)
class StepModulation:
    """Every norm of one Euler step: per layer before attention and before the MLP, and the last."""

    attention: tuple[Modulation, ...]
    mlp: tuple[Modulation, ...]
    final: Modulation


def pack_expert(model: Pi05) -> tuple[ExpertLayer, ...]:
    """Lay the projections that are computed together side by side; the model's become views."""
    return tuple(_pack(layer) for layer in model.expert.blocks())


def _pack(layer: GemmaLayer) -> ExpertLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return ExpertLayer(
        qkv=stack(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        o=attention.o_proj.weight.data,
        gate_up=stack(mlp.gate_proj.weight, mlp.up_proj.weight),
        down=mlp.down_proj.weight.data,
    )


def step_modulation(
    model: Pi05, layers: Sequence[ExpertLayer], condition: Tensor
) -> StepModulation:
    """Evaluate every adaptive norm for one adaRMS condition [1, D]."""
    blocks = model.expert.blocks()
    return StepModulation(
        attention=tuple(
            _modulation(block.input_layernorm, condition, layer.qkv)
            for block, layer in zip(blocks, layers, strict=True)
        ),
        mlp=tuple(
            _modulation(block.post_attention_layernorm, condition, layer.gate_up)
            for block, layer in zip(blocks, layers, strict=True)
        ),
        final=_modulation(model.expert.norm, condition, None),
    )


def _modulation(norm: RMSNorm, condition: Tensor, following: Tensor | None) -> Modulation:
    scale, shift, gate = norm.dense(condition)[0].float().chunk(3)  # [D] each
    bias = shift.new_empty(0) if following is None else following.float() @ shift
    return Modulation((1.0 + scale).contiguous(), shift.contiguous(), gate.contiguous(), bias)
