"""The stages of a policy step that run the model: pure functions that a `Runner` may capture.

So none of them reads a value back, makes a tensor out of Python numbers on the host, or keeps
anything. Arguments that are no tensors come first: they are what a `Runner` calls fixed.

Shapes: B = 1, C cameras, N_vis visual tokens of all cameras, T text tokens, N = N_vis + T, D VLM
width, H horizon, A action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_pruner_node.engine.flow import (
    ActionFlow,
    DeepProbe,
    DeepSettings,
    FlowProbe,
    FlowSchedule,
)
from safe_pruner_node.engine.prefix import EarlyPrefix, prefill_early
from safe_pruner_node.pi05.model import KeyValue, Pi05


def see(model: Pi05, images: Tensor) -> Tensor:
    """Projector outputs [N_vis, D] of one image per camera, [C, 3, S, S]."""
    return model.embed_images(images).flatten(0, 1)


def read(model: Pi05, z: Tensor, tokens: Tensor) -> list[KeyValue]:
    """Keys and values of every layer, nothing pruned: z [N_vis, D], tokens [1, T]."""
    return model.prefill(_prefix(model, z, tokens))


def read_early(model: Pi05, layer: int, z: Tensor, tokens: Tensor) -> EarlyPrefix:
    """The prefill up to the decision at layer ls; see `prefill_early`."""
    return prefill_early(model, _prefix(model, z, tokens), len(z), layer)


def probe(
    model: Pi05, schedule: FlowSchedule, prefix_len: int, early: EarlyPrefix, noise: Tensor
) -> FlowProbe:
    """The first ls expert layers of the first denoise step; see `ActionFlow.probe`."""
    return ActionFlow(model, schedule, noise, prefix_len).probe(early.cache)


def denoise(
    model: Pi05,
    schedule: FlowSchedule,
    prefix_len: int,
    deep: DeepSettings | None,
    cache: Sequence[KeyValue],
    noise: Tensor,
    probed: FlowProbe | None,
) -> tuple[Tensor, Tensor | None]:
    """Integrate the flow.

    Args:
        model: The policy.
        schedule: Times and conditions.
        prefix_len: Valid prefix tokens BEFORE pruning, N.
        deep: Which saliency to take on the way; None takes none.
        cache: Keys and values of every layer; lengths may differ.
        noise: Initial noise, [1, H, A].
        probed: What `probe` gave on the same noise; None begins at the first layer.

    Returns:
        Normalised actions [1, H, A], and the deep saliency [n_deep, N_vis] if asked for.
    """
    watch = None if deep is None else DeepProbe(deep, len(schedule))
    actions = ActionFlow(model, schedule, noise, prefix_len).run(cache, probed, watch)
    return actions, None if watch is None else watch.saliency()


def _prefix(model: Pi05, z: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([z[None], model.embed_text(tokens)], 1)  # [1, N, D]
