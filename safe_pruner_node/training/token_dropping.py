"""Leaving visual tokens out while training, so that the policy bears a pruner later.

A small policy trained on every token spreads its attention over most of them, and no pruner can
then find a quarter that suffices. So some steps are trained on the tokens that the policy itself
attends to late, which is what SAFE-Pruner forecasts; the others on all of them.

Shapes: B batch, N_vis visual tokens, K of them kept, N prefix tokens, H horizon, A action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.pi05.model import KeyValue, Pi05


@dataclass(frozen=True)
class Kept:
    """Which visual tokens go on from the pruning layer.

    Attributes:
        layer: ``ls``: so many VLM layers see every token.
        tokens: Ascending visual indices of every sample, [B, K].
    """

    layer: int
    tokens: Tensor


@torch.no_grad()
def late_saliency(
    model: Pi05,
    kv: Sequence[KeyValue],
    prefix_len: int,
    n_visual: int,
    x_t: Tensor,
    t: Tensor,
    layers: Sequence[int],
) -> Tensor:
    """What the action rows attend to in late expert layers, in one pass (paper, Eq. 1 and 2).

    Args:
        model: The policy.
        kv: Prefix keys and values of every layer, every token.
        prefix_len: N.
        n_visual: N_vis.
        x_t: Noisy actions, [B, H, A].
        t: Flow times, [B].
        layers: Expert layers to average over.

    Returns:
        Saliency, [B, N_vis]; every row sums to 1.
    """
    cond = model.time_condition(t)
    x = model.embed_actions(x_t)
    rope = model.rope((prefix_len + torch.arange(x.shape[1], device=x.device))[None])
    maps = []
    for number, (layer, past) in enumerate(zip(model.expert.blocks(), kv, strict=True)):
        if number in layers:
            query = layer.qkv(x, rope, cond)[0].float()  # [B, h, H, d]
            keys = past[0][:, :, :n_visual].float()  # [B, g, N_vis, d]
            keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
            logits = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
            maps.append(logits.softmax(-1).mean((1, 2)))  # [B, N_vis]
        x, _ = layer(x, rope, past, cond)
    return torch.stack(maps).mean(0)


def choose(saliency: Tensor, count: int, random: torch.Generator) -> Tensor:
    """The best tokens of every sample, blurred: no forecast is perfect.

    The order is that of log saliency plus Gumbel noise, which draws tokens without replacement;
    its strength is drawn per sample, from none (the very best) to 1 (in proportion).

    Args:
        saliency: [B, N_vis].
        count: K.
        random: On the same device.

    Returns:
        Ascending indices, [B, K].
    """
    shape, device = saliency.shape, saliency.device
    uniform = torch.rand(shape, generator=random, device=device).clamp(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    strength = torch.rand(shape[0], 1, generator=random, device=device)
    scores = saliency.clamp_min(1e-12).log() + strength * gumbel
    return scores.topk(count, -1).indices.sort(-1).values


def gather_rows(x: Tensor, tokens: Tensor, n_visual: int) -> Tensor:
    """Kept visual rows, then all text rows: [B or 1, N, D] by tokens [B, K] to [B, K + T, D]."""
    x = x.expand(len(tokens), -1, -1)
    visual = x[:, :n_visual].gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([visual, x[:, n_visual:]], 1)
