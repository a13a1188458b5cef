"""The language model's prefill in few kernels.

Same functions as `stages.read`, `prefix.prefill_early` and `prefix.prefill_late`, rounded to the
model's type in fewer places. Per layer: norm, QKV, rotation (which also writes the cache),
attention, output projection, norm, gate and up with GELU, down. Residuals are added by the norms.
Where gate, up and down are FP8 (`fp8.quantise`), the kernel before each writes what it reads.

Shapes: N prefix tokens (N_vis visual, then T text slots), K visual tokens kept, D width, F hidden
channels, h query heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.engine.kernels.attention import attention
from safe_pruner_node.engine.kernels.gather import embed_rows, kept_rows
from safe_pruner_node.engine.kernels.norms import Residual, rms_norm
from safe_pruner_node.engine.kernels.prefill_attention import fits, prefill_attention
from safe_pruner_node.engine.kernels.rotary import rotate_queries, rotate_split
from safe_pruner_node.engine.packed_weights import interleave, stack
from safe_pruner_node.engine.prefix import EarlyPrefix
from safe_pruner_node.engine.products import products_for
from safe_pruner_node.engine.projection import Projection
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import GemmaLayer, KeyValue, Pi05

MAX_TOKENS = 8192
"""Rotary tables reach this far: Gemma's context length."""


@dataclass(frozen=True)
class _Padding:
    """Which of the last keys are padding.

    Attributes:
        n_text: T.
        valid: How many of these are text, [] int64, on the device; None: all.
    """

    n_text: int
    valid: Tensor | None


class FusedPrefix:
    """Visual tokens and a prompt to keys and values of every layer.

    The model's query, key and value weights become views of one matrix per layer, and so do
    those of gate and up.

    Args:
        model: The policy, with its weights where they stay.

    Attributes:
        note: Whose products it runs.
    """

    def __init__(self, model: Pi05) -> None:
        self._model = model
        self._config = model.config.vlm
        self._layers = [_Layer.of(layer) for layer in model.vlm.blocks()]
        self._products = products_for(self._layers[0].qkv.weight)
        self.note = self._products.note
        self._positions = torch.arange(MAX_TOKENS, device=model.device)  # [P]
        cos, sin = model.rope(self._positions[None])
        self._rope = cos[0], sin[0]  # [P, d] each

    @torch.no_grad()
    def read(self, z: Tensor, prompt: Prompt) -> list[KeyValue]:
        """Keys and values of every layer, nothing pruned.

        Args:
            z: Visual tokens, [N_vis, D].
            prompt: The text; its padding is attended by nobody.

        Returns:
            Per layer, keys and values, [1, g, N, d] each.
        """
        x = self._embed(z, prompt)  # [N, D]
        padding = _Padding(prompt.slots, prompt.n_valid)
        return self._to_the_end(Residual(x), self._layers, self._positions[: len(x)], padding)

    @torch.no_grad()
    def read_early(self, layer: int, z: Tensor, prompt: Prompt) -> EarlyPrefix:
        """The prefill up to the decision; see `prefix.prefill_early`.

        Args:
            layer: ls, in 1..depth-1.
            z: Visual tokens, [N_vis, D].
            prompt: The text; its padding is attended by nobody.
        """
        residual = Residual(self._embed(z, prompt))
        n, n_visual = len(residual.x), len(z)
        positions = self._positions[:n]
        padding = _Padding(prompt.slots, prompt.n_valid)
        *full, boundary = self._layers[:layer]
        cache: list[KeyValue] = []
        for block in full:
            residual, kv = self._layer(residual, block, positions, padding)
            cache.append(kv)
        x, normed = rms_norm(residual, boundary.input_norm)  # [N, D] each
        cache.append(self._keys_values(normed, boundary, positions))
        text = normed.new_empty(self._query_shape(prompt.slots))  # [T, h, d]
        projected = self._products.terms(normed[n_visual:], boundary.query)  # [S, T, h*d]
        rotate_queries(projected, self._rope, positions[n_visual:], text)
        cos, sin = self._rope
        return EarlyPrefix(
            layer,
            n_visual,
            x[None],
            normed[None],
            (cos[None, :n], sin[None, :n]),
            text.transpose(0, 1)[None],
            tuple(cache),
            prompt.n_valid,
        )

    @torch.no_grad()
    def late(self, early: EarlyPrefix, keep: Tensor | None) -> list[KeyValue]:
        """Finish the prefill with the visual tokens that go on; see `prefix.prefill_late`.

        Args:
            early: Where `read_early` halted.
            keep: Ascending visual indices [K]; None keeps all.

        Returns:
            Per layer, keys and values: of N tokens below ls, of K plus the text from there on.
        """
        n, n_visual = early.x.shape[1], early.n_visual
        padding = _Padding(n - n_visual, early.prompt_valid)
        boundary = self._layers[early.layer - 1]
        n_kept = n_visual if keep is None else len(keep)
        query = early.x.new_empty(self._query_shape(n_kept + n - n_visual))  # [K + T, h, d]
        text = early.text_query[0].transpose(0, 1)  # [T, h, d]
        if keep is None:
            rows = self._positions[:n]
            x, normed = early.x[0], early.normed[0, :n_visual]
            query[n_kept:] = text
        else:
            x, normed, rows = kept_rows(
                early.x[0], early.normed[0], text.flatten(1), keep, query.flatten(1)
            )  # [K + T, D], [K, D], [K + T]
        projected = self._products.terms(normed, boundary.query)  # [S, K, h*d]
        rotate_queries(projected, self._rope, rows[:n_kept], query[:n_kept])
        residual = self._finish(x, boundary, self._attend(query, early.cache[-1], padding))
        rest = self._layers[early.layer :]
        return [*early.cache, *self._to_the_end(residual, rest, rows, padding)]

    def _embed(self, z: Tensor, prompt: Prompt) -> Tensor:
        n = len(z) + prompt.slots
        if n > MAX_TOKENS:
            raise ValueError(f"a prefix of {n} tokens; the language model reads {MAX_TOKENS}")
        table = self._model.vlm.embed_tokens.weight  # [V, D]
        # Scaled as `Pi05.embed_text` does it.
        return embed_rows(z, prompt.tokens[0], table, math.sqrt(self._config.width))  # [N, D]

    def _to_the_end(
        self,
        residual: Residual,
        layers: Sequence[_Layer],
        positions: Tensor,
        padding: _Padding,
    ) -> list[KeyValue]:
        """Keys and values of these layers, the model's last ones."""
        *middle, last = layers
        cache: list[KeyValue] = []
        for layer in middle:
            residual, kv = self._layer(residual, layer, positions, padding)
            cache.append(kv)
        # Nobody reads the last layer's output: keys and values are all that is needed of it.
        _, normed = rms_norm(residual, last.input_norm)  # [N, D]
        return [*cache, self._keys_values(normed, last, positions)]

    def _layer(
        self, residual: Residual, layer: _Layer, positions: Tensor, padding: _Padding
    ) -> tuple[Residual, KeyValue]:
        x, normed = rms_norm(residual, layer.input_norm)  # [N, D] each
        projected = self._products.terms(normed, layer.qkv)  # [S, N, (h + 2g) * d]
        heads, kv_heads = self._config.heads, self._config.kv_heads
        query, cache = rotate_split(projected, self._rope, positions, heads, kv_heads)
        return self._finish(x, layer, self._attend(query, cache, padding)), cache

    def _keys_values(self, normed: Tensor, layer: _Layer, positions: Tensor) -> KeyValue:
        projected = self._products.terms(normed, layer.keys_values)  # [S, N, 2g * d]
        _, cache = rotate_split(projected, self._rope, positions, 0, self._config.kv_heads)
        return cache

    def _query_shape(self, rows: int) -> tuple[int, int, int]:
        return rows, self._config.heads, self._config.head_dim

    def _attend(self, query: Tensor, cache: KeyValue, padding: _Padding) -> Tensor:
        """Attention of queries [N, h, d] to [N, h*d]."""
        keys, values = cache
        if fits(keys):
            return prefill_attention(query, keys, values, padding.valid, padding.n_text)
        grouped = query.unflatten(1, (keys.shape[1], -1))[None]  # [1, N, g, h/g, d]
        out = attention(grouped, keys, values, padding.valid, padding.n_text)
        return out.view(len(query), -1)

    def _finish(self, x: Tensor, layer: _Layer, attended: Tensor) -> Residual:
        """Output projection and MLP of x [N, D], attended [N, h*d]."""
        out = self._products.terms(attended, layer.out)  # [S, N, D]
        gate_up, down = layer.gate_up, layer.down
        x, y = rms_norm(Residual(x, out), layer.output_norm, gate_up.input_scale)  # [N, D] each
        hidden = self._products.gated(y, gate_up, down.input_scale)  # [N, F]
        return Residual(x, self._products.terms(hidden, down))


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, packed; `query` and `keys_values` are views of `qkv`."""

    input_norm: Tensor
    qkv: Projection
    query: Projection
    keys_values: Projection
    out: Projection
    output_norm: Tensor
    gate_up: Projection
    down: Projection

    @classmethod
    def of(cls, layer: GemmaLayer) -> _Layer:
        attn, mlp = layer.self_attn, layer.mlp
        qkv = stack(attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
        n_query = len(attn.q_proj.weight)
        return cls(
            layer.input_layernorm.weight.data,
            Projection(qkv),
            Projection(qkv[:n_query]),
            Projection(qkv[n_query:]),
            Projection(attn.o_proj.weight.data),
            layer.post_attention_layernorm.weight.data,
            Projection.packed(interleave, mlp.gate_proj, mlp.up_proj),
            Projection.of(mlp.down_proj),
        )
