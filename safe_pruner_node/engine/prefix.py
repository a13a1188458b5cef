"""The language model's prefill, split at the pruning layer.

Early: layers 0..ls-2 in full, and of layer ls-1 the keys and values of every token. Late: queries,
attention and MLP of layer ls-1 for the rows that go on, then the layers from ls. So a pruned row
costs nothing after its keys and values, and nothing is computed twice.

Shapes: B = 1, N prefix tokens (N_vis visual, then text), K visual tokens kept, D width, h query
heads, g key heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.pi05.model import KeyValue, Pi05, Rope


@dataclass(frozen=True)
class EarlyPrefix:
    """The prefill, halted inside layer ls-1.

    Attributes:
        layer: ls.
        n_visual: N_vis.
        x: Input of layer ls-1, [1, N, D].
        normed: The same after that layer's input norm, [1, N, D].
        rope: Rotary tables of all N positions.
        text_query: Queries of the text rows at layer ls-1, [1, h, N - N_vis, d].
        cache: Keys and values of layers 0..ls-1, every token.
        prompt_valid: How many of the text slots are text, [] int64; None: all.
    """

    layer: int
    n_visual: int
    x: Tensor
    normed: Tensor
    rope: Rope
    text_query: Tensor
    cache: tuple[KeyValue, ...]
    prompt_valid: Tensor | None


def prefill_early(model: Pi05, x: Tensor, n_visual: int, layer: int) -> EarlyPrefix:
    """Run the prefill up to the decision.

    Args:
        model: The policy.
        x: Prefix embeddings, visual tokens first, [1, N, D].
        n_visual: N_vis.
        layer: ls, in 1..depth-1.
    """
    rope = model.rope(torch.arange(x.shape[1], device=x.device)[None])
    *full, boundary = model.vlm.blocks()[:layer]
    cache: list[KeyValue] = []
    for block in full:
        x, kv = block(x, rope)
        cache.append(kv)
    normed, _ = boundary.input_layernorm(x)
    cache.append(boundary.keys_values(normed, rope))
    text_query = boundary.query(normed[:, n_visual:], _rows(rope, slice(n_visual, None)))
    return EarlyPrefix(layer, n_visual, x, normed, rope, text_query, tuple(cache), None)


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
    x = boundary.finish(x, boundary.attend(query, k, v), None)
    cache = list(early.cache)
    *middle, last = blocks[early.layer :]
    for block in middle:
        x, kv = block(x, rope)
        cache.append(kv)
    # Nobody reads the last layer's output: keys and values are all that is needed of it.
    normed, _ = last.input_layernorm(x)
    cache.append(last.keys_values(normed, rope))
    return cache


def _rows(rope: Rope, rows: Tensor | slice) -> Rope:
    cos, sin = rope
    return cos[:, rows], sin[:, rows]
