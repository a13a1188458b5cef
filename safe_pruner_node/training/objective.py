"""The flow-matching loss of π0.5, and an auxiliary one that teaches where things are.

Shapes: B batch, C cameras, T text tokens, R flow repeats, H horizon, A action_dim, M landmark
coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss

from safe_pruner_node.pi05.model import KeyValue, Pi05

TIME_ALPHA = 1.5
"""Flow times are Beta(1.5, 1) * 0.999 + 0.001, as in openpi: mostly noisy."""


@dataclass(frozen=True)
class Batch:
    """Samples of one prompt length.

    Attributes:
        images: In [-1, 1], one tensor per camera, [B, 3, S, S] each.
        tokens: Prompts without padding, [B, T].
        actions: Normalised chunks, [B, H, A].
        landmarks: Normalised, [B, M]; None when the data set has none.
    """

    images: tuple[Tensor, ...]
    tokens: Tensor
    actions: Tensor
    landmarks: Tensor | None


class LandmarkHead(nn.Module):
    """Reads privileged positions off the prompt's tokens before the last VLM layer.

    Only in training: it makes the tokens that the action expert attends to know where the named
    thing is, long before the flow loss alone would.

    Args:
        width: Channels of a token.
        coordinates: M.
    """

    def __init__(self, width: int, coordinates: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, coordinates)

    def forward(self, text: Tensor) -> Tensor:
        """Map hidden text rows [B, T, D] to [B, M]."""
        pooled = self.norm(text.float()).mean(1)  # [B, D]
        y: Tensor = self.out(gelu(self.hidden(pooled)))
        return y


@dataclass(frozen=True)
class Losses:
    """Scalars; ``landmarks`` is zero when the data set has none."""

    flow: Tensor
    landmarks: Tensor


def prefix(model: Pi05, batch: Batch) -> tuple[list[KeyValue], Tensor, int]:
    """Prefix pass that keeps the gradient.

    Returns:
        Keys and values of every layer, the text rows before the last layer [B, T, D], and the
        number of prefix tokens.
    """
    count = len(batch.tokens)
    visual = model.embed_images(torch.cat(batch.images))  # [C * B, N, D], camera by camera
    visual = visual.unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2)  # [B, C * N, D]
    x = torch.cat([visual, model.embed_text(batch.tokens)], 1)
    length = x.shape[1]
    rope = model.rope(torch.arange(length, device=x.device)[None])
    *layers, last = model.vlm.blocks()
    cache: list[KeyValue] = []
    for layer in layers:
        x, kv = layer(x, rope)
        cache.append(kv)
    normed, _ = last.input_layernorm(x)
    cache.append(last.keys_values(normed, rope))
    return cache, x[:, visual.shape[1] :], length


def losses(
    model: Pi05, head: LandmarkHead | None, batch: Batch, noise: Tensor, t: Tensor
) -> Losses:
    """Flow-matching loss of openpi: mean over all channels of |v(x_t, t) - (noise - actions)|^2.

    Args:
        model: In training mode.
        head: For the auxiliary loss.
        batch: B samples.
        noise: [R * B, H, A]: R draws a sample share one prefix pass.
        t: Flow times, [R * B].
    """
    kv, text, length = prefix(model, batch)
    repeats = len(noise) // len(batch.actions)
    actions = batch.actions.repeat(repeats, 1, 1)  # [R * B, H, A]
    kv = [(k.repeat(repeats, 1, 1, 1), v.repeat(repeats, 1, 1, 1)) for k, v in kv]
    share = t[:, None, None]
    x_t = share * noise + (1.0 - share) * actions
    velocity = model.denoise(x_t, t, kv, length)
    flow = mse_loss(velocity.float(), noise - actions)
    if head is None or batch.landmarks is None:
        return Losses(flow, torch.zeros((), device=flow.device))
    return Losses(flow, mse_loss(head(text), batch.landmarks))


def draw_times(count: int, random: torch.Generator) -> Tensor:
    """Flow times, [count], on the generator's device."""
    # Beta(a, 1) is U^(1/a): drawn this way it follows the generator.
    uniform = torch.rand(count, generator=random, device=random.device)
    return uniform ** (1.0 / TIME_ALPHA) * 0.999 + 0.001
