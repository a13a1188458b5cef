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
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.training.token_dropping import Kept, choose, gather_rows, late_saliency

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


@dataclass(frozen=True)
class Prefix:
    """A prefix pass that keeps the gradient.

    Attributes:
        kv: Keys and values of every layer.
        text: Text rows before the last layer, [B, T, D].
        length: Prefix tokens before any were left out.
        n_visual: Visual tokens among them.
    """

    kv: list[KeyValue]
    text: Tensor
    length: int
    n_visual: int


def prefix(model: Pi05, batch: Batch, kept: Kept | None = None) -> Prefix:
    """Run vision tower and language model.

    Args:
        model: The policy.
        batch: B samples.
        kept: Visual tokens that go on, as a pruner would choose; None: all of them.
    """
    count = len(batch.tokens)
    visual = model.embed_images(torch.cat(batch.images))  # [C * B, N, D], camera by camera
    visual = visual.unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2)  # [B, C * N, D]
    x = torch.cat([visual, model.embed_text(batch.tokens)], 1)
    length, n_visual = x.shape[1], visual.shape[1]
    rope = model.rope(torch.arange(length, device=x.device)[None])
    *layers, last = model.vlm.blocks()
    cache: list[KeyValue] = []
    for number, layer in enumerate(layers):
        if kept is not None and number == kept.layer:
            x = gather_rows(x, kept.tokens, n_visual)
            cos, sin = (gather_rows(table, kept.tokens, n_visual) for table in rope)
            rope = cos, sin
        x, kv = layer(x, rope)
        cache.append(kv)
    normed, _ = last.input_layernorm(x)
    cache.append(last.keys_values(normed, rope))
    return Prefix(cache, x[:, -batch.tokens.shape[1] :], length, n_visual)


def losses(
    model: Pi05,
    head: LandmarkHead | None,
    batch: Batch,
    noise: Tensor,
    t: Tensor,
    kept: Kept | None = None,
) -> Losses:
    """Flow-matching loss of openpi: mean over all channels of |v(x_t, t) - (noise - actions)|^2.

    Args:
        model: In training mode.
        head: For the auxiliary loss.
        batch: B samples.
        noise: [R * B, H, A]: R draws a sample share one prefix pass.
        t: Flow times, [R * B].
        kept: As in `prefix`.
    """
    seen = prefix(model, batch, kept)
    repeats = len(noise) // len(batch.actions)
    actions = batch.actions.repeat(repeats, 1, 1)  # [R * B, H, A]
    kv = [(k.repeat(repeats, 1, 1, 1), v.repeat(repeats, 1, 1, 1)) for k, v in seen.kv]
    share = t[:, None, None]
    x_t = share * noise + (1.0 - share) * actions
    velocity = model.denoise(x_t, t, kv, seen.length)
    flow = mse_loss(velocity.float(), noise - actions)
    if head is None or batch.landmarks is None:
        return Losses(flow, torch.zeros((), device=flow.device))
    return Losses(flow, mse_loss(head(seen.text), batch.landmarks))


@torch.no_grad()
def best_tokens(
    model: Pi05,
    batch: Batch,
    pruner: PrunerSettings,
    share: float,
    random: torch.Generator,
) -> Kept | None:
    """The visual tokens that the policy itself attends to late, seen in a pass without gradient.

    Args:
        model: The policy.
        batch: B samples.
        pruner: Says from which layer tokens are dropped and which layers are late.
        share: Of the visual tokens that go on; 1 keeps all and costs no pass.
        random: Of the flow noise and the blur of the choice.
    """
    if share >= 1.0:
        return None
    seen = prefix(model, batch)
    noise = torch.randn(batch.actions.shape, generator=random, device=random.device)
    t = draw_times(len(noise), random)
    x_t = t[:, None, None] * noise + (1.0 - t[:, None, None]) * batch.actions
    layers = pruner.deep_layers(model.config.vlm.depth)
    saliency = late_saliency(model, seen.kv, seen.length, seen.n_visual, x_t, t, layers)
    return Kept(pruner.layer, choose(saliency, round(share * seen.n_visual), random))


def draw_times(count: int, random: torch.Generator) -> Tensor:
    """Flow times, [count], on the generator's device."""
    # Beta(a, 1) is U^(1/a): drawn this way it follows the generator.
    uniform = torch.rand(count, generator=random, device=random.device)
    return uniform ** (1.0 / TIME_ALPHA) * 0.999 + 0.001
