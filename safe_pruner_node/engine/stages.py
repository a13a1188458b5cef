"""The stages of a policy step on the device: pure functions that a `Runner` may capture.

So none of them reads a value back, makes a tensor out of Python numbers on the host, or keeps
anything. Arguments that are no tensors come first: they are what a `Runner` calls fixed.

Shapes: B = 1, C cameras, N_vis visual tokens of all cameras, T slots of the prompt, N = N_vis + T,
K visual tokens kept, D VLM width, H horizon, A action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from safe_pruner_node.engine import prefix
from safe_pruner_node.engine.flow import (
    ActionFlow,
    DeepProbe,
    DeepSettings,
    FlowProbe,
    FlowSchedule,
)
from safe_pruner_node.engine.prefix import EarlyPrefix
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import KeyValue, Pi05
from safe_pruner_node.pi05.transforms import Origin, to_model_images


def fit(size: int, origin: Origin, pixels: Sequence[Tensor]) -> Tensor:
    """Fit camera images into the squares that the model sees; see `to_model_images`.

    Args:
        size: Pixels per side of a square, S.
        origin: Whose resize to use.
        pixels: One image per camera, [h, w, 3] uint8; neighbours of one size are resized together.

    Returns:
        fp32 in [-1, 1], [C, 3, S, S].
    """
    alike = [torch.stack(list(group)) for _, group in groupby(pixels, lambda image: image.shape)]
    return torch.cat([to_model_images(batch, size, origin) for batch in alike])


def see(model: Pi05, images: Tensor) -> Tensor:
    """Projector outputs [N_vis, D] of one image per camera, [C, 3, S, S]."""
    return model.embed_images(images).flatten(0, 1)


def read(model: Pi05, z: Tensor, prompt: Prompt) -> list[KeyValue]:
    """Keys and values of every layer, nothing pruned, of z [N_vis, D] and the prompt."""
    return prefix.prefill(model, _prefix(model, z, prompt), len(z), prompt.n_valid)


def read_early(model: Pi05, layer: int, z: Tensor, prompt: Prompt) -> EarlyPrefix:
    """The prefill up to the decision at layer ls; see `prefix.prefill_early`."""
    x = _prefix(model, z, prompt)
    return prefix.prefill_early(model, x, len(z), layer, prompt.n_valid)


def prefill_late(model: Pi05, early: EarlyPrefix, keep: Tensor | None) -> list[KeyValue]:
    """The rest of the prefill for the visual tokens `keep` [K]; see `prefix.prefill_late`."""
    return prefix.prefill_late(model, early, keep)


def probe(
    model: Pi05,
    schedule: FlowSchedule,
    n_visual: int,
    early: EarlyPrefix,
    noise: Tensor,
    prompt: Prompt,
) -> FlowProbe:
    """The first ls expert layers of the first denoise step; see `ActionFlow.probe`."""
    return ActionFlow(model, schedule, n_visual, prompt, noise).probe(early.cache)


def denoise(
    model: Pi05,
    schedule: FlowSchedule,
    n_visual: int,
    deep: DeepSettings | None,
    cache: Sequence[KeyValue],
    noise: Tensor,
    probed: FlowProbe | None,
    prompt: Prompt,
) -> tuple[Tensor, Tensor | None]:
    """Integrate the flow.

    Args:
        model: The policy.
        schedule: Times and conditions.
        n_visual: Visual tokens BEFORE pruning, N_vis.
        deep: Which saliency to take on the way; None takes none.
        cache: Keys and values of every layer; lengths may differ.
        noise: Initial noise, [1, H, A].
        probed: What `probe` gave on the same noise; None begins at the first layer.
        prompt: The text at the end of each layer's prefix.

    Returns:
        Normalised actions [1, H, A], and the deep saliency [n_deep, N_vis] if asked for.
    """
    watch = None if deep is None else DeepProbe(deep, len(schedule))
    actions = ActionFlow(model, schedule, n_visual, prompt, noise).run(cache, probed, watch)
    return actions, None if watch is None else watch.saliency()


def _prefix(model: Pi05, z: Tensor, prompt: Prompt) -> Tensor:
    return torch.cat([z[None], model.embed_text(prompt.tokens)], 1)  # [1, N, D]
