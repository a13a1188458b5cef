"""The action expert's flow: ten passes over one prefix cache, with the saliency they show.

Each layer owns one key/value buffer, [prefix | suffix]: the prefix is written once, the suffix
part is overwritten by every pass, so nothing is concatenated inside the loop.

Shapes: B = 1, H horizon, A action_dim, D expert width, h query heads, g key heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from safe_pruner_node.engine.attention import attend, key_bias
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import GemmaLayer, KeyValue, Pi05, Rope, flow_schedule
from safe_pruner_node.pruning.padding import valid_keys
from safe_pruner_node.pruning.saliency import visual_saliency


class FlowSchedule:
    """What does not change from one policy query to the next: times, Euler step, conditions.

    Two of the same model and number of steps are equal.

    Args:
        model: The policy.
        steps: Euler steps.
    """

    @torch.inference_mode()
    def __init__(self, model: Pi05, steps: int) -> None:
        self._model = model
        times, self.dt = flow_schedule(steps)
        self.conditions = tuple(  # adaRMS condition of each step, [1, D]
            model.time_condition(torch.tensor([t], device=model.device)) for t in times
        )

    def __len__(self) -> int:
        return len(self.conditions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowSchedule):
            return NotImplemented
        return self._model is other._model and len(self) == len(other)

    def __hash__(self) -> int:
        return hash((id(self._model), len(self)))


@dataclass(frozen=True)
class DeepSettings:
    """Which action-to-visual saliency to take from the expert.

    Attributes:
        layers: Expert layers to watch (the deep set).
        n_visual: Visual tokens at the front of the prefix, none pruned.
        over: As in `visual_saliency`.
        steps: Denoise steps to watch: ``mean`` of all, ``first`` or ``last``.
    """

    layers: tuple[int, ...]
    n_visual: int
    over: str
    steps: str


@dataclass(frozen=True)
class AttendedKeys:
    """What the action rows of one layer attend to: prefix, then suffix.

    Attributes:
        k: Keys, [1, g, N + H, d].
        v: Values, likewise.
        valid: True where a key is no padding of the prompt, [N + H] bool; None: all are.
        bias: What hides the others, see `key_bias`; None: nothing to hide.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None
    bias: Tensor | None


class DeepProbe:
    """Collects that saliency over the denoise steps.

    Args:
        settings: What to watch.
        n_steps: Denoise steps there are.
    """

    def __init__(self, settings: DeepSettings, n_steps: int) -> None:
        self._settings = settings
        watched = {"mean": range(n_steps), "first": (0,), "last": (n_steps - 1,)}
        self._steps = frozenset(watched[settings.steps])
        self._sums: dict[int, Tensor] = {}

    def see(self, step: int, layer: int, query: Tensor, keys: AttendedKeys) -> None:
        """Take queries [1, h, H, d] over a layer's keys into account, if watched."""
        if layer not in self._settings.layers or step not in self._steps:
            return
        n_visual, over = self._settings.n_visual, self._settings.over
        saliency = visual_saliency(query[0], keys.k[0], n_visual, over, valid=keys.valid)
        known = self._sums.get(layer)
        self._sums[layer] = saliency if known is None else known + saliency

    def saliency(self) -> Tensor:
        """Mean over the watched steps, one row per layer, [n_layers, N_vis]."""
        rows = [self._sums[layer] for layer in self._settings.layers]
        return torch.stack(rows) / len(self._steps)


@dataclass(frozen=True)
class FlowProbe:
    """The first layers of the first denoise step.

    Attributes:
        x: Hidden states after them, [1, H, D].
        queries: What each of them used, [1, h, H, d].
        suffix: Keys and values that each of them made, [1, g, H, d].
        keys: Keys that the last of them attended to, prefix then suffix, [1, g, N + H, d].
    """

    x: Tensor
    queries: tuple[Tensor, ...]
    suffix: tuple[KeyValue, ...]
    keys: Tensor


class ActionFlow:
    """Denoises one chunk.

    `probe` may run the first layers of the first step before the later layers' prefix exists;
    `run` then goes on from there instead of repeating them. Neither changes what it is given.

    Args:
        model: The policy.
        schedule: Times and conditions.
        n_visual: Visual tokens BEFORE pruning: with the text they are where the suffix positions
            start.
        prompt: The text at the end of each layer's prefix.
        noise: Initial noise, [1, H, A].
    """

    def __init__(
        self, model: Pi05, schedule: FlowSchedule, n_visual: int, prompt: Prompt, noise: Tensor
    ) -> None:
        self._model = model
        self._schedule = schedule
        self._prompt = prompt
        self._noise = noise
        self._horizon = noise.shape[1]
        n_text = prompt.slots if prompt.n_valid is None else prompt.n_valid
        positions = n_visual + n_text + torch.arange(self._horizon, device=noise.device)[None]
        self._rope: Rope = model.rope(positions)
        self._blocks = model.expert.blocks()

    def probe(self, cache: Sequence[KeyValue]) -> FlowProbe:
        """Run as many layers of the first step as the prefix cache has.

        Args:
            cache: Keys and values of layers 0..ls-1.
        """
        buffers = self._buffers(cache, ())
        x, cond = self._model.embed_actions(self._noise), self._schedule.conditions[0]
        queries = []
        for layer in range(len(cache)):
            x, query = expert_layer(self._blocks[layer], x, self._rope, cond, buffers[layer])
            queries.append(query)
        suffix = tuple((b.k[:, :, -self._horizon :], b.v[:, :, -self._horizon :]) for b in buffers)
        return FlowProbe(x, tuple(queries), suffix, buffers[-1].k)

    def run(
        self,
        cache: Sequence[KeyValue],
        probed: FlowProbe | None = None,
        deep: DeepProbe | None = None,
    ) -> Tensor:
        """Integrate from noise to actions.

        Args:
            cache: Keys and values of every layer; lengths may differ.
            probed: What `probe` gave; None begins at the first layer.
            deep: Collects saliency on the way.

        Returns:
            Normalised actions, [1, H, A].
        """
        buffers = self._buffers(cache, () if probed is None else probed.suffix)
        x_t = self._noise
        for step, cond in enumerate(self._schedule.conditions):
            x, start = self._model.embed_actions(x_t), 0
            if step == 0 and probed is not None:
                x, start = probed.x, len(probed.queries)
                if deep is not None:
                    for layer, query in enumerate(probed.queries):
                        deep.see(step, layer, query, buffers[layer])
            for layer in range(start, len(self._blocks)):
                x, query = expert_layer(self._blocks[layer], x, self._rope, cond, buffers[layer])
                if deep is not None:
                    deep.see(step, layer, query, buffers[layer])
            x_t = x_t + self._schedule.dt * self._model.velocity(x, cond)
        return x_t

    def _buffers(self, cache: Sequence[KeyValue], known: Sequence[KeyValue]) -> list[AttendedKeys]:
        """Per layer the prefix with room for the suffix behind it, or with the known suffix."""
        masks = {n: self._masks(n, cache[0][0].dtype) for n in {k.shape[2] for k, _ in cache}}
        buffers = []
        for (k, v), own in zip_longest(cache, known):
            shape = (*k.shape[:2], self._horizon, k.shape[3])
            own_k, own_v = own or (k.new_empty(shape), v.new_empty(shape))
            whole = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
            buffers.append(AttendedKeys(*whole, *masks[k.shape[2]]))
        return buffers

    def _masks(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Which of n prefix keys and the suffix are valid, and the bias that hides the others."""
        slots, n_text = self._prompt.slots, self._prompt.n_valid
        if n_text is None:
            return None, None
        valid = valid_keys(n + self._horizon, n - slots, slots, n_text)
        return valid, key_bias(valid, dtype)


def expert_layer(
    block: GemmaLayer, x: Tensor, rope: Rope, cond: Tensor, keys: AttendedKeys
) -> tuple[Tensor, Tensor]:
    """One expert layer on x [1, H, D]: hidden states [1, H, D] and its queries [1, h, H, d].

    The suffix's own keys and values are written behind the prefix in `keys`.
    """
    horizon = x.shape[1]
    query, own_k, own_v, gate = block.qkv(x, rope, cond)
    keys.k[:, :, -horizon:] = own_k
    keys.v[:, :, -horizon:] = own_v
    return block.finish(x, attend(block, query, keys.k, keys.v, keys.bias), gate, cond), query
