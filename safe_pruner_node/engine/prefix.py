"""The language model's prefill, split at the pruning layer.

Early: layers 0..ls-2 in full, and of layer ls-1 the keys and values of every token. Late: queries,
attention and MLP of layer ls-1 for the rows that go on, then the layers from ls. So a pruned row
costs nothing after its keys and values, and nothing is computed twice.

Padding at the end of the text has keys like any other row, but nobody attends to them.

Shapes: B = 1, N prefix tokens (N_vis visual, then T of text and its padding), K visual tokens kept,
D width, h query heads, g key heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.engine.attention import attend, key_bias
from safe_pruner_node.pi05.model import GemmaLayer, KeyValue, Pi05, Rope
from safe_pruner_node.pruning.padding import valid_keys


@dataclass(frozen=True)
class EarlyPrefix:
    """The prefill, halted inside layer ls-1.

    Attributes:
        layer: ls.
        n_visual: N_vis.
        x: Input of layer ls-1, [1, N, D].
        normed: The same after that layer's input norm, [1, N, D].
        rope: Rotary tables of all N positions.
        text_query: Queries of the text rows at layer ls-1, [1, h, T, d].
        cache: Keys and values of layers 0..ls-1, every token.
        prompt_valid: How many of the T text rows are text, [] int64; None: all are.
    """

    layer: int
    n_visual: int
    x: Tensor
    normed: Tensor
    rope: Rope
    text_query: Tensor
    cache: tuple[KeyValue, ...]
    prompt_valid: Tensor | None = None


def prefill(
    model: Pi05, x: Tensor, n_visual: int, prompt_valid: Tensor | None = None
) -> list[KeyValue]:
    """Keys and values of every layer, nothing pruned.

    Args:
        model: The policy.
        x: Prefix embeddings, visual tokens first, [1, N, D].
        n_visual: N_vis.
        prompt_valid: How many of the text rows are text, [] int64; None: all are.
    """
    n = x.shape[1]
    rope = model.rope(torch.arange(n, device=x.device)[None])
    return _finish([], model.vlm.blocks(), x, rope, _bias(x, n - n_visual, prompt_valid))


def prefill_early(
    model: Pi05, x: Tensor, n_visual: int, layer: int, prompt_valid: Tensor | None = None
) -> EarlyPrefix:
    """Run the prefill up to the decision.

    Args:
        model: The policy.
        x: Prefix embeddings, visual tokens first, [1, N, D].
        n_visual: N_vis.
        layer: ls, in 1..depth-1.
        prompt_valid: How many of the text rows are text, [] int64; None: all are.
    """
    n = x.shape[1]
    rope = model.rope(torch.arange(n, device=x.device)[None])
    bias = _bias(x, n - n_visual, prompt_valid)
    *full, boundary = model.vlm.blocks()[:layer]
    cache: list[KeyValue] = []
    for block in full:
        x, kv = vlm_layer(block, x, rope, bias)
        cache.append(kv)
    normed, _ = boundary.input_layernorm(x)
    cache.append(boundary.keys_values(normed, rope))
    text_query = boundary.query(normed[:, n_visual:], _rows(rope, slice(n_visual, None)))
    return EarlyPrefix(layer, n_visual, x, normed, rope, text_query, tuple(cache), prompt_valid)


def prefill_late(model: Pi05, early: EarlyPrefix, keep: Tensor | None) -> list[KeyValue]:
    """Finish the prefill with the visual tokens that go on.

    Rows keep their original positions: hidden states and rotary tables are gathered alike.

    Args:
        model: The policy.
        early: Where `prefill_early` halted.
        keep: Ascending visual indices [K]; None keeps all.

    Returns:
        Keys and values of every layer: N tokens below ls, K plus the text from there on.
    """
    blocks = model.vlm.blocks()
    boundary = blocks[early.layer - 1]
    n, n_visual = early.x.shape[1], early.n_visual
    if keep is None:
        x, rope = early.x, early.rope
        visual_normed, visual_rope = early.normed[:, :n_visual], _rows(rope, slice(n_visual))
    else:
        rows = torch.cat([keep, torch.arange(n_visual, n, device=keep.device)])  # [K + T]
        x, rope = early.x[:, rows], _rows(early.rope, rows)
        visual_normed, visual_rope = early.normed[:, keep], _rows(early.rope, keep)
    query = torch.cat([boundary.query(visual_normed, visual_rope), early.text_query], 2)
    k, v = early.cache[-1]
    text = n - n_visual
    out = attend(boundary, query, k, v, _bias(early.x, text, early.prompt_valid))
    x = boundary.finish(x, out, None)
    bias = _bias(x, text, early.prompt_valid)
    return _finish(early.cache, blocks[early.layer :], x, rope, bias)


def _finish(
    cache: Sequence[KeyValue],
    blocks: Sequence[GemmaLayer],
    x: Tensor,
    rope: Rope,
    bias: Tensor | None,
) -> list[KeyValue]:
    """The cache with the keys and values of the layers that are left."""
    whole = list(cache)
    *middle, last = blocks
    for block in middle:
        x, kv = vlm_layer(block, x, rope, bias)
        whole.append(kv)
    # Nobody reads the last layer's output: keys and values are all that is needed of it.
    normed, _ = last.input_layernorm(x)
    whole.append(last.keys_values(normed, rope))
    return whole


def vlm_layer(
    block: GemmaLayer, x: Tensor, rope: Rope, bias: Tensor | None
) -> tuple[Tensor, KeyValue]:
    """One layer on x [1, N, D] among themselves: x and its keys and values."""
    q, k, v, _ = block.qkv(x, rope)
    return block.finish(x, attend(block, q, k, v, bias), None), (k, v)


def _bias(x: Tensor, slots: int, prompt_valid: Tensor | None) -> Tensor | None:
    """What hides the padding at the end of a prefix x [1, N, D]; see `key_bias`."""
    if prompt_valid is None:
        return None
    n = x.shape[1]
    return key_bias(valid_keys(n, n - slots, slots, prompt_valid), x.dtype)


def _rows(rope: Rope, rows: Tensor | slice) -> Rope:
    cos, sin = rope
    return cos[:, rows], sin[:, rows]
