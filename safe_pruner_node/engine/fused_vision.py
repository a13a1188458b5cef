"""The vision tower in few kernels.

Same function as `Pi05.embed_images`, rounded to the model's type in fewer places. Per layer: norm,
QKV, attention, output projection, norm, first and second half of the MLP. Residuals are added by
the norms.

Shapes: C images, P patches of one image, N = C * P tokens, D width, F hidden channels, h heads,
d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from safe_pruner_node.engine.cuda.image_attention import ImageAttention, fits
from safe_pruner_node.engine.kernels.attention import attention
from safe_pruner_node.engine.kernels.norms import Residual, layer_norm
from safe_pruner_node.engine.kernels.patches import patch_tokens, patch_weights
from safe_pruner_node.engine.packed_weights import stack
from safe_pruner_node.engine.products import products_for
from safe_pruner_node.engine.projection import Projection
from safe_pruner_node.pi05.config import VisionConfig
from safe_pruner_node.pi05.model import Pi05, SiglipLayer, SiglipVision


class FusedVision:
    """Images to visual tokens.

    The model's query, key and value weights become views of one matrix per layer. Those of the
    patches are copied, 1.4 MB.

    Args:
        model: The policy, with its weights where they stay.
    """

    def __init__(self, model: Pi05) -> None:
        root = model.get_submodule("paligemma_with_expert.paligemma.model")
        tower = cast("SiglipVision", root.get_submodule("vision_tower.vision_model"))
        self._config = model.config.vision
        self._dtype = model.dtype
        patches = _affine(tower.embeddings.patch_embedding)
        weight = patch_weights(patches.weight, tower.post_layernorm.weight.dtype)
        self._patches = replace(patches, weight=weight)
        self._position = tower.embeddings.position_embedding.weight.data
        layers = cast("nn.ModuleList", tower.encoder["layers"])
        self._layers = [_Layer.of(cast("SiglipLayer", layer)) for layer in layers]
        self._products = products_for(self._layers[0].qkv.weight)
        self._attention = _attention(self._config, self._layers[0].qkv.weight)
        self._norm = _affine(tower.post_layernorm)
        self._projector = _affine(root.get_submodule("multi_modal_projector.linear"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Projector outputs [N, D_vlm] of images [C, 3, S, S] in [-1, 1], image by image."""
        dtype = self._norm.weight.dtype
        weight, bias = self._patches.weight, self._patches.bias
        residual = Residual(patch_tokens(images, weight, bias, self._position, dtype))  # [N, D]
        for layer in self._layers:
            residual = self._layer(residual, layer)
        _, y = layer_norm(residual, self._norm.weight, self._norm.bias)  # [N, D]
        projector = self._projector
        z = self._products.linear(y, projector.weight, projector.bias)  # [N, D_vlm]
        return z.to(self._dtype)

    def _layer(self, residual: Residual, layer: _Layer) -> Residual:
        x, y = layer_norm(residual, layer.norm1.weight, layer.norm1.bias)  # [N, D] each
        qkv = self._products.linear(y, layer.qkv.weight, layer.qkv.bias)  # [N, 3D]
        attended = self._attention(qkv)  # [N, D]
        residual = Residual(x, self._products.terms(attended, layer.out), layer.out_bias)
        x, y = layer_norm(residual, layer.norm2.weight, layer.norm2.bias)  # [N, D] each
        hidden = self._products.linear_gelu(y, layer.fc1.weight, layer.fc1.bias)  # [N, F]
        return Residual(x, self._products.terms(hidden, layer.fc2), layer.fc2_bias)


@dataclass(frozen=True)
class _Affine:
    """Weight and bias of a norm, a projection or a convolution."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Layer:
    norm1: _Affine
    qkv: _Affine
    out: Projection
    out_bias: Tensor  # the norm behind the projection adds it
    norm2: _Affine
    fc1: _Affine
    fc2: Projection
    fc2_bias: Tensor

    @classmethod
    def of(cls, layer: SiglipLayer) -> _Layer:
        attn = layer.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        qkv = _Affine(
            stack(*(p.weight for p in projections)),
            stack(*(p.bias for p in projections)),
        )
        return cls(
            _affine(layer.layer_norm1),
            qkv,
            Projection(attn.out_proj.weight.data),
            attn.out_proj.bias.data,
            _affine(layer.layer_norm2),
            _affine(layer.mlp.fc1),
            Projection(layer.mlp.fc2.weight.data),
            layer.mlp.fc2.bias.data,
        )


def _affine(module: nn.Module) -> _Affine:
    return _Affine(module.get_parameter("weight").data, module.get_parameter("bias").data)


def _attention(config: VisionConfig, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes attended rows [N, D] of queries, keys and values [N, 3D]."""
    if fits(config, weight):
        return ImageAttention(config.heads)
    return partial(_attention_in_triton, config)


def _attention_in_triton(config: VisionConfig, qkv: Tensor) -> Tensor:
    heads = qkv.view(-1, config.tokens, 3, config.heads, 1, config.width // config.heads)
    q, k, v = heads.unbind(2)  # [C, P, h, 1, d] each
    k, v = (t.squeeze(3).transpose(1, 2) for t in (k, v))  # [C, h, P, d] each
    return attention(q, k, v).view(len(qkv), config.width)  # [N, D]
