"""The flow of `flow.py` in six kernels per expert layer.

Per layer: norm + query/key/value + rotary embedding; attention over a share of the keys; the shares
joined; output projection + gated residual; norm + gate/up + GELU; down projection + gated residual.
One more kernel leads from an Euler step to the next. The adaptive norms are evaluated beforehand
for the fixed flow times, and folded into the products (`kernels/modulated_pair.py`).

Shapes: B = 1, H horizon, A action_dim, D expert width, h query heads, d head_dim, R = h * H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from safe_pruner_node.engine.expert_weights import (
    ExpertLayer,
    StepModulation,
    pack_expert,
    step_modulation,
)
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.kernels.flow_step import flow_step_kernel
from safe_pruner_node.engine.kernels.gated_residual import gated_residual_kernel
from safe_pruner_node.engine.kernels.modulated_pair import gate_up_kernel, query_key_value_kernel
from safe_pruner_node.engine.kernels.suffix_attention import (
    join_attention_kernel,
    suffix_attention_kernel,
)
from safe_pruner_node.engine.kernels.suffix_saliency import suffix_saliency_kernel
from safe_pruner_node.engine.kernels.tiles import FlowTiles, SplitTiles
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import KeyValue, Pi05

MOST_ROWS = 64
"""Suffix rows per program of a product: the least a Hopper tensor core works on at once."""
SALIENCY_ROWS, SALIENCY_KEYS = 16, 64


@dataclass(frozen=True)
class _Suffix:
    """Buffers of one call; every layer writes over the last one's.

    Attributes:
        x: Hidden states, [H, D].
        scaled: The same, times 1 + scale of the next norm, [H, D].
        squares_o: Sums of squares of x after attention, one per column block, [H, n] fp32.
        squares_down: Likewise after the MLP.
        qkv: Queries, keys, values, [h + 2, H, d].
        parts: Attention over each block of keys, [P, R, d] fp32.
        lse: Log of the softmax's sum over each block, [P, R] fp32.
        attended: Attention's output, [H, h * d].
        hidden: The MLP's inside, [H, M].
        scratch: Parts of split products, fp32.
        counts: Arrivals at each output tile, int32, zero between kernels.
        cos: Rotary table, [H, d].
        sin: Rotary table, [H, d].
    """

    x: Tensor
    scaled: Tensor
    squares_o: Tensor
    squares_down: Tensor
    qkv: Tensor
    parts: Tensor
    lse: Tensor
    attended: Tensor
    hidden: Tensor
    scratch: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor


class FusedFlow:
    """Denoises chunks of one model.

    Args:
        model: The policy; its expert's projections become views of packed ones.
        tiles: Block sizes.
    """

    def __init__(self, model: Pi05, tiles: FlowTiles | None = None) -> None:
        self._model = model
        self._config = model.config.expert
        self._layers = pack_expert(model)
        self._tiles = (tiles or FlowTiles()).fitted(self._config)
        device = model.device
        self._dependent = (
            self._tiles.dependent
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) >= (9, 0)
        )
        # Pieces of 256 elements, see `prefetch_weights`
        sizes = (self._config.width, self._config.mlp // self._tiles.down.splits)
        sizes += (self._config.heads * self._config.head_dim // self._tiles.o.splits,)
        self._prefetch = (
            self._dependent
            and self._tiles.prefetch
            and all(size % 256 == 0 and size & (size - 1) == 0 for size in sizes)
        )
        self._modulations: dict[FlowSchedule, tuple[StepModulation, ...]] = {}

    def denoise(
        self,
        schedule: FlowSchedule,
        n_visual: int,
        deep: DeepSettings | None,
        cache: Sequence[KeyValue],
        noise: Tensor,
        probed: FlowProbe | None,  # noqa: ARG002 - to repeat it costs less than to go on from it
        prompt: Prompt,
    ) -> tuple[Tensor, Tensor | None]:
        """Integrate the flow; arguments and results are those of `stages.denoise`."""
        steps = self._modulation(schedule)
        actions = noise[0].float().clone()  # [H, A]
        text = prompt.slots if prompt.n_valid is None else prompt.n_valid
        positions = torch.arange(noise.shape[1], device=noise.device) + n_visual + text
        own = self._suffix(noise, positions, max(k.shape[2] for k, _ in cache))
        shares = None if deep is None else self._shares(deep, own, len(steps))
        self._advance(own, actions, None, steps[0], schedule.dt)
        for number, step in enumerate(steps):
            for index, (layer, pair) in enumerate(zip(self._layers, cache, strict=True)):
                self._attention(own, layer, step, index, pair, prompt)
                if deep is not None and shares is not None:
                    place = _place(deep, number, len(steps), index)
                    if place is not None:
                        self._watch(own, pair, prompt, deep, shares[place])
                self._mlp(own, layer, step, index)
            following = steps[min(number + 1, len(steps) - 1)]  # after the last: nobody reads it
            self._advance(own, actions, step, following, schedule.dt)
        if shares is None:
            return actions[None], None
        # [watched steps, n_deep, row blocks, N_vis] to [n_deep, N_vis]
        heads, horizon, _ = own.qkv.shape
        rows = (heads - 2) * horizon * shares.shape[0]
        return actions[None], shares.sum((0, 2)) / rows

    def _modulation(self, schedule: FlowSchedule) -> tuple[StepModulation, ...]:
        if schedule not in self._modulations:
            self._modulations[schedule] = tuple(
                step_modulation(self._model, self._layers, c) for c in schedule.conditions
            )
        return self._modulations[schedule]

    def _suffix(self, noise: Tensor, positions: Tensor, longest: int) -> _Suffix:
        config, tiles, model = self._config, self._tiles, self._model
        horizon = noise.shape[1]
        x = noise.new_empty(horizon, config.width, dtype=model.dtype)
        single = partial(x.new_empty, dtype=torch.float32)
        cos, sin = (table[0] for table in model.rope(positions[None]))  # [H, d] each
        block = self._rows(horizon)
        padded = math.ceil(horizon / block) * block
        n_tiles = padded // block * max(config.width // t.columns for t in (tiles.o, tiles.down))
        splits = max(tiles.o.splits, tiles.down.splits)
        rows = config.heads * horizon
        parts = self._parts(longest, horizon)
        return _Suffix(
            x=x,
            scaled=torch.empty_like(x),
            squares_o=single(horizon, config.width // tiles.o.columns),
            squares_down=single(horizon, config.width // tiles.down.columns),
            qkv=x.new_empty(config.heads + 2, horizon, config.head_dim),
            parts=single(parts, rows, config.head_dim),
            lse=single(parts, rows),
            attended=x.new_empty(horizon, config.heads * config.head_dim),
            hidden=x.new_empty(horizon, config.mlp),
            scratch=single(splits * padded * config.width),
            counts=torch.zeros(n_tiles, dtype=torch.int32, device=x.device),
            cos=cos,
            sin=sin,
        )

    def _rows(self, horizon: int) -> int:
        return min(MOST_ROWS, max(16, triton.next_power_of_2(horizon)))

    def _attention(
        self,
        own: _Suffix,
        layer: ExpertLayer,
        step: StepModulation,
        index: int,
        pair: KeyValue,
        prompt: Prompt,
    ) -> None:
        config, tiles = self._config, self._tiles
        horizon = len(own.x)
        block, modulation = self._rows(horizon), step.attention[index]
        blocks = triton.cdiv(horizon, block)
        pairs = (config.heads + 2) * config.head_dim // 2
        query_key_value_kernel[(pairs // tiles.qkv.columns, blocks)](
            own.scaled,
            own.squares_down,
            layer.qkv,
            modulation.bias,
            own.cos,
            own.sin,
            own.qkv,
            horizon,
            HEADS=config.heads,
            HEAD_DIM=config.head_dim,
            WIDTH=config.width,
            **_squares(own.squares_down),
            BLOCK_M=block,
            BLOCK_N=tiles.qkv.columns,
            BLOCK_K=tiles.qkv.depth,
            num_warps=tiles.qkv.warps,
            num_stages=tiles.qkv.stages,
            PREFETCH=self._prefetch,
            **self._launch(),
        )
        attention, rows, prefix = tiles.attention, config.heads * horizon, pair[0].shape[2]
        parts = self._parts(prefix, horizon)
        suffix_attention_kernel[(triton.cdiv(rows, attention.rows), parts)](
            own.qkv,
            *pair,
            own.qkv[-2],
            own.qkv[-1],
            prompt.tokens if prompt.n_valid is None else prompt.n_valid,
            own.parts,
            own.lse,
            rows,
            prefix,
            horizon,
            prompt.slots,
            config.head_dim**-0.5 / math.log(2.0),
            MASKED=prompt.n_valid is not None,
            HEAD_DIM=config.head_dim,
            BLOCK_M=attention.rows,
            BLOCK_N=attention.keys,
            num_warps=attention.warps,
            **self._launch(),
        )
        join_attention_kernel[(triton.cdiv(rows, attention.joined),)](
            own.parts,
            own.lse,
            own.attended,
            rows,
            horizon,
            HEADS=config.heads,
            PARTS=parts,
            HEAD_DIM=config.head_dim,
            BLOCK_M=attention.joined,
            num_warps=4,
            **self._launch(),
        )
        scale = step.mlp[index].scale
        self._project(own, own.attended, layer.o, modulation.gate, scale, own.squares_o, tiles.o)

    def _mlp(self, own: _Suffix, layer: ExpertLayer, step: StepModulation, index: int) -> None:
        config, tiles = self._config, self._tiles.gate_up
        horizon = len(own.x)
        block, modulation = self._rows(horizon), step.mlp[index]
        gate_up_kernel[(config.mlp // tiles.columns, triton.cdiv(horizon, block))](
            own.scaled,
            own.squares_o,
            layer.gate_up,
            modulation.bias,
            own.hidden,
            horizon,
            MLP=config.mlp,
            WIDTH=config.width,
            **_squares(own.squares_o),
            BLOCK_M=block,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            PREFETCH=self._prefetch,
            **self._launch(),
        )
        # The scale of the next layer's norm; after the last layer nobody reads the product.
        scale = step.attention[min(index + 1, len(self._layers) - 1)].scale
        self._project(
            own,
            own.hidden,
            layer.down,
            modulation.gate,
            scale,
            own.squares_down,
            self._tiles.down,
        )

    def _project(
        self,
        own: _Suffix,
        a: Tensor,
        weight: Tensor,
        gate: Tensor,
        next_scale: Tensor,
        squares: Tensor,
        tiles: SplitTiles,
    ) -> None:
        horizon, (width, depth) = len(own.x), weight.shape
        block = self._rows(horizon)
        grid = (width // tiles.columns, tiles.splits, triton.cdiv(horizon, block))
        gated_residual_kernel[grid](
            a,
            weight,
            own.x,
            gate,
            next_scale,
            own.scaled,
            squares,
            own.scratch,
            own.counts,
            horizon,
            N=width,
            K=depth,
            SPLITS=tiles.splits,
            BLOCK_M=block,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            PREFETCH=self._prefetch,
            **self._launch(),
        )

    def _advance(
        self,
        own: _Suffix,
        actions: Tensor,
        step: StepModulation | None,
        following: StepModulation,
        dt: float,
    ) -> None:
        """The end of an Euler step (None: there was none yet) and the beginning of the next."""
        model, width = self._model, self._config.width
        into, out = model.action_in_proj, model.action_out_proj
        final = following.final if step is None else step.final
        flow_step_kernel[(len(own.x),)](
            own.x,
            own.scaled,
            own.squares_down,
            actions,
            following.attention[0].scale,
            final.scale,
            final.shift,
            out.weight,
            out.bias,
            into.weight,
            into.bias,
            dt,
            WIDTH=width,
            ACTION_DIM=actions.shape[1],
            FIRST=step is None,
            **_squares(own.squares_down),
            BLOCK_A=triton.next_power_of_2(actions.shape[1]),
            BLOCK_D=min(256, width & -width),  # a power of two that divides the width
            num_warps=8,
            **self._launch(),
        )

    def _parts(self, prefix: int, horizon: int) -> int:
        """Blocks of keys: of the prefix, then of the suffix."""
        keys = self._tiles.attention.keys
        return int(triton.cdiv(prefix, keys) + triton.cdiv(horizon, keys))

    def _shares(self, deep: DeepSettings, own: _Suffix, n_steps: int) -> Tensor:
        """Room for every watched step, layer and block of rows."""
        rows = self._config.heads * len(own.x)
        watched = n_steps if deep.steps == "mean" else 1
        blocks = triton.cdiv(rows, SALIENCY_ROWS)
        return own.lse.new_empty(watched, len(deep.layers), blocks, deep.n_visual)

    def _watch(
        self, own: _Suffix, pair: KeyValue, prompt: Prompt, deep: DeepSettings, shares: Tensor
    ) -> None:
        """Write the saliency of this layer, [row blocks, N_vis], into `shares`."""
        config, horizon = self._config, len(own.x)
        rows = config.heads * horizon
        suffix_saliency_kernel[(triton.cdiv(rows, SALIENCY_ROWS),)](
            own.qkv,
            pair[0],
            own.qkv[-2],
            prompt.tokens if prompt.n_valid is None else prompt.n_valid,
            shares,
            rows,
            deep.n_visual,
            pair[0].shape[2],
            horizon,
            prompt.slots,
            config.head_dim**-0.5 / math.log(2.0),
            OVER_ALL=deep.over == "all",
            MASKED=prompt.n_valid is not None,
            HEAD_DIM=config.head_dim,
            BLOCK_M=SALIENCY_ROWS,
            BLOCK_N=SALIENCY_KEYS,
            num_warps=4,
            **self._launch(),
        )

    def _launch(self) -> dict[str, bool]:
        # `launch_pdl` is an option of the launch: the interpreter of kernels does not know it
        return {"PDL": True, "launch_pdl": True} if self._dependent else {"PDL": False}


def _place(deep: DeepSettings, step: int, n_steps: int, layer: int) -> tuple[int, int] | None:
    """Of a step and layer among the watched ones; None: nobody watches it."""
    watched = {"mean": step, "first": step, "last": step - (n_steps - 1)}[deep.steps]
    if layer not in deep.layers or (deep.steps != "mean" and watched != 0):
        return None
    return watched, deep.layers.index(layer)


def _squares(squares: Tensor) -> dict[str, int]:
    return {"SQUARES": squares.shape[1], "BLOCK_S": triton.next_power_of_2(squares.shape[1])}
