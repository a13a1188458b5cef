"""The action expert's flow: ten passes over one prefix cache, with the saliency they show.

Each layer owns one key/value buffer, [prefix | suffix]: the prefix is written once, the suffix
part is overwritten by every pass, so nothing is concatenated inside the loop.

Shapes: B = 1, H horizon, A action_dim, D expert width, h query heads, g key heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_pruner_node.pi05.model import KeyValue, Pi05, Rope, flow_schedule
from safe_pruner_node.pruning.saliency import visual_saliency


class FlowSchedule:
    """What does not change from one policy query to the next: times, Euler step, conditions.

    Args:
        model: The policy.
        steps: Euler steps.
    """

    @torch.inference_mode()
    def __init__(self, model: Pi05, steps: int) -> None:
        times, self.dt = flow_schedule(steps)
        self.conditions = tuple(  # adaRMS condition of each step, [1, D]
            model.time_condition(torch.tensor([t], device=model.device)) for t in times
        )

    def __len__(self) -> int:
        return len(self.conditions)


class DeepProbe:
    """Collects the action-to-visual saliency of chosen expert layers over the denoise steps.

    Args:
        layers: Expert layers to watch (the deep set).
        n_visual: Visual tokens at the front of the prefix, none pruned.
        over: As in `visual_saliency`.
        steps: Denoise steps to watch: ``mean`` of all, ``first`` or ``last``.
        n_steps: Denoise steps there are.
    """

    def __init__(
        self, layers: Sequence[int], n_visual: int, over: str, steps: str, n_steps: int
    ) -> None:
        self.layers = tuple(layers)
        self._n_visual = n_visual
        self._over = over
        watched = {"mean": range(n_steps), "first": (0,), "last": (n_steps - 1,)}
        self._steps = frozenset(watched[steps])
        self._sums: dict[int, Tensor] = {}

    def see(self, step: int, layer: int, query: Tensor, keys: Tensor) -> None:
        """Take queries [1, h, H, d] over keys [1, g, N + H, d] into account, if watched."""
        if layer not in self.layers or step not in self._steps:
            return
        saliency = visual_saliency(query[0], keys[0], self._n_visual, self._over)
        known = self._sums.get(layer)
        self._sums[layer] = saliency if known is None else known + saliency

    def saliency(self) -> Tensor:
        """Mean over the watched steps, one row per layer, [n_layers, N_vis]."""
        return torch.stack([self._sums[layer] for layer in self.layers]) / len(self._steps)


class ActionFlow:
    """Denoises one chunk.

    `probe` may run the first layers of the first step before the later layers' prefix exists;
    `run` then goes on from there instead of repeating them.

    Args:
        model: The policy.
        schedule: Times and conditions.
        noise: Initial noise, [1, H, A].
        prefix_len: Valid prefix tokens BEFORE pruning: the suffix positions start there.
    """

    def __init__(self, model: Pi05, schedule: FlowSchedule, noise: Tensor, prefix_len: int) -> None:
        self._model = model
        self._schedule = schedule
        self._noise = noise
        self._horizon = noise.shape[1]
        positions = prefix_len + torch.arange(self._horizon, device=noise.device)[None]
        self._rope: Rope = model.rope(positions)
        self._blocks = model.expert.blocks()
        self._buffers: list[KeyValue] = []
        self._probed: Tensor | None = None
        self._probed_queries: list[Tensor] = []

    def probe(self, cache: Sequence[KeyValue]) -> tuple[Tensor, Tensor]:
        """Run as many layers of the first step as the prefix cache has.

        Args:
            cache: Keys and values of layers 0..ls-1.

        Returns:
            Queries of layer ls-1, [h, H, d], and its keys, prefix then suffix, [g, N + H, d].
        """
        self._attach(cache)
        x = self._model.embed_actions(self._noise)
        cond = self._schedule.conditions[0]
        for layer in range(len(cache)):
            x, query = self._layer(layer, x, cond)
            self._probed_queries.append(query)
        self._probed = x
        return self._probed_queries[-1][0], self._buffers[len(cache) - 1][0][0]

    def run(self, cache: Sequence[KeyValue], deep: DeepProbe | None = None) -> Tensor:
        """Integrate from noise to actions.

        Args:
            cache: Keys and values of every layer; lengths may differ.
            deep: Collects saliency on the way.

        Returns:
            Normalised actions, [1, H, A].
        """
        self._attach(cache[len(self._buffers) :])
        x_t = self._noise
        for step, cond in enumerate(self._schedule.conditions):
            x, start = self._model.embed_actions(x_t), 0
            if step == 0 and self._probed is not None:
                x, start = self._probed, len(self._probed_queries)
                if deep is not None:
                    for layer, query in enumerate(self._probed_queries):
                        deep.see(step, layer, query, self._buffers[layer][0])
            for layer in range(start, len(self._blocks)):
                x, query = self._layer(layer, x, cond)
                if deep is not None:
                    deep.see(step, layer, query, self._buffers[layer][0])
            x_t = x_t + self._schedule.dt * self._model.velocity(x, cond)
        return x_t

    def _attach(self, cache: Sequence[KeyValue]) -> None:
        """Copy prefix keys and values into buffers with room for the suffix."""
        for pair in cache:
            k, v = (
                torch.cat([t, t.new_empty(*t.shape[:2], self._horizon, t.shape[3])], 2)
                for t in pair
            )
            self._buffers.append((k, v))

    def _layer(self, layer: int, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """One expert layer: hidden states [1, H, D] and the queries [1, h, H, d] it used."""
        block, (k, v) = self._blocks[layer], self._buffers[layer]
        query, own_k, own_v, gate = block.qkv(x, self._rope, cond)
        k[:, :, -self._horizon :] = own_k
        v[:, :, -self._horizon :] = own_v
        return block.finish(x, block.attend(query, k, v), gate, cond), query
