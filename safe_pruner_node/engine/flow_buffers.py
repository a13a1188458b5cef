"""What one call of the fused flow computes in.

Shapes: H horizon, D expert width, h query heads, d head_dim, M MLP channels, R = h * H rows, N
prefix keys of a layer, P blocks of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from safe_pruner_node.engine.kernels.tiles import FlowTiles
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import KeyValue, Pi05

LEAST_ROWS, MOST_ROWS = 16, 64
"""Suffix rows per program of a product: what a tensor core, and a Hopper one, works on at once."""


@dataclass(frozen=True)
class FlowBuffers:
    """Every layer writes over the last one's, but for keys and values.

    Attributes:
        row_block: Rows per program of a product.
        x: Hidden states, [H, D].
        scaled: The same, times 1 + scale of the next norm, [H, D].
        squares_o: Sums of squares of x after attention, one per column block, [H, n] fp32.
        squares_down: Likewise after the MLP.
        queries: [h, H, d].
        cache: Keys and values of every layer, prefix and then suffix, [2, N + H, d].
        parts: Attention over each block of keys, [P, R, d].
        lse: Log of the softmax's sum over each block, [P, R] fp32.
        attended: Attention's output, [H, h * d].
        hidden: The MLP's inside, [H, M].
        scratch: Parts of split products, fp32.
        counts: Arrivals at each output tile, int32, zero between kernels.
        cos: Rotary table, [H, d].
        sin: Rotary table, [H, d].
    """

    row_block: int
    x: Tensor
    scaled: Tensor
    squares_o: Tensor
    squares_down: Tensor
    queries: Tensor
    cache: tuple[Tensor, ...]
    parts: Tensor
    lse: Tensor
    attended: Tensor
    hidden: Tensor
    scratch: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(
        cls,
        model: Pi05,
        tiles: FlowTiles,
        noise: Tensor,
        n_visual: int,
        prompt: Prompt,
        cache: Sequence[KeyValue],
    ) -> FlowBuffers:
        """Allocate them, with the prefix's keys and values in place.

        Args:
            model: The policy.
            tiles: Block sizes.
            noise: Initial noise, [1, H, A].
            n_visual: Visual tokens BEFORE pruning: with the text they are where the suffix begins.
            prompt: The text at the end of each layer's prefix.
            cache: The prefix's keys and values of every layer.
        """
        config, horizon = model.config.expert, noise.shape[1]
        n_text = prompt.slots if prompt.n_valid is None else prompt.n_valid
        positions = torch.arange(horizon, device=noise.device) + n_visual + n_text
        cos, sin = (table[0] for table in model.rope(positions[None]))  # [H, d] each
        x = noise.new_empty(horizon, config.width, dtype=model.dtype)
        single = partial(x.new_empty, dtype=torch.float32)
        own_cache = _with_room(cache, horizon)
        n_parts = max(tiles.attention.parts(own.shape[1]) for own in own_cache)
        n_rows = config.heads * horizon
        row_block = min(MOST_ROWS, max(LEAST_ROWS, 1 << (horizon - 1).bit_length()))
        n_blocks = -(-horizon // row_block)
        columns = min(tiles.o.columns, tiles.down.columns)
        splits = max(tiles.o.splits, tiles.down.splits)
        return cls(
            row_block=row_block,
            x=x,
            scaled=torch.empty_like(x),
            squares_o=single(horizon, config.width // tiles.o.columns),
            squares_down=single(horizon, config.width // tiles.down.columns),
            queries=x.new_empty(config.heads, horizon, config.head_dim),
            cache=own_cache,
            parts=x.new_empty(n_parts, n_rows, config.head_dim),
            lse=single(n_parts, n_rows),
            attended=x.new_empty(horizon, config.heads * config.head_dim),
            hidden=x.new_empty(horizon, config.mlp),
            scratch=single(splits * n_blocks * row_block * config.width),
            counts=torch.zeros(
                n_blocks * config.width // columns, dtype=torch.int32, device=x.device
            ),
            cos=cos,
            sin=sin,
        )


def _with_room(cache: Sequence[KeyValue], horizon: int) -> tuple[Tensor, ...]:
    """Per layer keys and values with room for the suffix behind them, [2, N + H, d]."""
    whole = tuple(k.new_empty(2, k.shape[2] + horizon, k.shape[3]) for k, _ in cache)
    pairs = list(zip(whole, cache, strict=True))
    prefix = [own[i, : k.shape[2]] for own, (k, _) in pairs for i in (0, 1)]
    torch._foreach_copy_(prefix, [t[0, 0] for pair in cache for t in pair])  # few kernels
    return whole
