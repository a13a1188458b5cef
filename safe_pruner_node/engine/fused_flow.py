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

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_pruner_node.engine.expert_weights import (
    ExpertLayer,
    StepModulation,
    pack_expert,
    step_modulation,
)
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.flow_buffers import FlowBuffers
from safe_pruner_node.engine.kernels.flow_step import flow_step_kernel
from safe_pruner_node.engine.kernels.gated_residual import gated_residual_kernel
from safe_pruner_node.engine.kernels.launch import PIECE
from safe_pruner_node.engine.kernels.modulated_pair import gate_up_kernel, query_key_value_kernel
from safe_pruner_node.engine.kernels.suffix_attention import (
    join_attention_kernel,
    suffix_attention_kernel,
)
from safe_pruner_node.engine.kernels.suffix_saliency import suffix_saliency_kernel
from safe_pruner_node.engine.kernels.tiles import FlowTiles, SplitTiles
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.model import KeyValue, Pi05


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
        self._tiles = (tiles or FlowTiles()).fitted(model.config)
        device = model.device
        self._dependent = (
            self._tiles.dependent
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) >= (9, 0)
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
        own = FlowBuffers.of(self._model, self._tiles, noise, n_visual, prompt, cache)
        shares = None if deep is None else self._shares(deep, own, len(steps))
        self._advance(own, actions, None, steps[0], schedule.dt)
        for number, step in enumerate(steps):
            for index, layer in enumerate(self._layers):
                self._attention(own, layer, step, index, prompt)
                if deep is not None and shares is not None:
                    place = _place(deep, number, len(steps), index)
                    if place is not None:
                        self._watch(own, index, deep, shares[place])
                self._mlp(own, layer, step, index)
            following = steps[min(number + 1, len(steps) - 1)]  # after the last: nobody reads it
            self._advance(own, actions, step, following, schedule.dt)
        if shares is None:
            return actions[None], None
        # [watched steps, n_deep, row blocks, N_vis] to [n_deep, N_vis]
        return actions[None], shares.sum((0, 2)) / (own.parts.shape[1] * len(shares))

    def _modulation(self, schedule: FlowSchedule) -> tuple[StepModulation, ...]:
        if schedule not in self._modulations:
            self._modulations[schedule] = tuple(
                step_modulation(self._model, self._layers, c) for c in schedule.conditions
            )
        return self._modulations[schedule]

    def _attention(
        self, own: FlowBuffers, layer: ExpertLayer, step: StepModulation, index: int, prompt: Prompt
    ) -> None:
        config, tiles = self._config, self._tiles.qkv
        horizon, (keys, values) = len(own.x), own.cache[index]
        prefix = len(keys) - horizon
        block, modulation = own.row_block, step.attention[index]
        pairs = (config.heads + 2) * config.head_dim // 2
        query_key_value_kernel[(pairs // tiles.columns, triton.cdiv(horizon, block))](
            TensorDescriptor.from_tensor(own.scaled, [block, tiles.depth]),
            own.squares_down,
            TensorDescriptor.from_tensor(layer.qkv, [tiles.columns, tiles.depth]),
            layer.qkv,
            modulation.bias,
            own.cos,
            own.sin,
            own.queries,
            keys[prefix:],
            values[prefix:],
            horizon,
            HEADS=config.heads,
            HEAD_DIM=config.head_dim,
            WIDTH=config.width,
            **_squares(own.squares_down),
            BLOCK_M=block,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **self._launch(config.width),
        )
        attention, rows, parts = (
            self._tiles.attention,
            own.parts.shape[1],
            self._tiles.attention.parts(len(keys)),
        )
        key_block = [attention.keys, config.head_dim]
        suffix_attention_kernel[(triton.cdiv(rows, attention.rows), parts)](
            TensorDescriptor.from_tensor(
                own.queries.flatten(0, 1), [attention.rows, config.head_dim]
            ),
            TensorDescriptor.from_tensor(keys, key_block),
            TensorDescriptor.from_tensor(values, key_block),
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
        next_scale = step.mlp[index].scale
        self._project(
            own, own.attended, layer.o, modulation.gate, next_scale, own.squares_o, self._tiles.o
        )

    def _mlp(self, own: FlowBuffers, layer: ExpertLayer, step: StepModulation, index: int) -> None:
        config, tiles = self._config, self._tiles.gate_up
        horizon = len(own.x)
        block, modulation = own.row_block, step.mlp[index]
        gate_up_kernel[(config.mlp // tiles.columns, triton.cdiv(horizon, block))](
            TensorDescriptor.from_tensor(own.scaled, [block, tiles.depth]),
            own.squares_o,
            TensorDescriptor.from_tensor(layer.gate_up, [tiles.columns, tiles.depth]),
            layer.gate_up,
            modulation.bias,
            TensorDescriptor.from_tensor(own.hidden, [block, tiles.columns]),
            horizon,
            MLP=config.mlp,
            WIDTH=config.width,
            **_squares(own.squares_o),
            BLOCK_M=block,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **self._launch(config.width),
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
        own: FlowBuffers,
        a: Tensor,
        weight: Tensor,
        gate: Tensor,
        next_scale: Tensor,
        squares: Tensor,
        tiles: SplitTiles,
    ) -> None:
        horizon, (width, depth) = len(own.x), weight.shape
        block = own.row_block
        grid = (width // tiles.columns, tiles.splits, triton.cdiv(horizon, block))
        gated_residual_kernel[grid](
            TensorDescriptor.from_tensor(a, [block, tiles.depth]),
            TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
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
            **self._launch(depth // tiles.splits),
        )

    def _advance(
        self,
        own: FlowBuffers,
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

    def _shares(self, deep: DeepSettings, own: FlowBuffers, n_steps: int) -> Tensor:
        """Room for every watched step, layer and block of rows."""
        watched = n_steps if deep.steps == "mean" else 1
        blocks = triton.cdiv(own.parts.shape[1], self._tiles.attention.rows)
        return own.lse.new_empty(watched, len(deep.layers), blocks, deep.n_visual)

    def _watch(self, own: FlowBuffers, index: int, deep: DeepSettings, shares: Tensor) -> None:
        """Write the saliency of this layer, [row blocks, N_vis], into `shares`."""
        head_dim, tiles, rows = self._config.head_dim, self._tiles.attention, own.parts.shape[1]
        keys = own.cache[index][0]
        parts = tiles.parts(len(keys))
        visual = deep.n_visual // tiles.keys
        suffix_saliency_kernel[(len(shares), visual)](
            TensorDescriptor.from_tensor(own.queries.flatten(0, 1), [tiles.rows, head_dim]),
            TensorDescriptor.from_tensor(keys, [tiles.keys, head_dim]),
            own.lse,
            shares,
            rows,
            deep.n_visual,
            parts if deep.over == "all" else visual,
            head_dim**-0.5 / math.log(2.0),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            BLOCK_P=triton.next_power_of_2(parts),
            num_warps=tiles.warps,
            **self._launch(),
        )

    def _launch(self, span: int | None = None) -> dict[str, bool]:
        """Options of a launch; `span` of a kernel that can prefetch rows of so many weights."""
        options = {"PDL": self._dependent}
        if self._dependent:  # the interpreter of kernels does not know this option
            options["launch_pdl"] = True
        if span is not None:
            whole = span % PIECE.value == 0 and span & (span - 1) == 0
            options["PREFETCH"] = self._dependent and self._tiles.prefetch and whole
        return options


def _place(deep: DeepSettings, step: int, n_steps: int, layer: int) -> tuple[int, int] | None:
    """Of a step and layer among the watched ones; None: nobody watches it."""
    watched = {"mean": step, "first": step, "last": step - (n_steps - 1)}[deep.steps]
    if layer not in deep.layers or (deep.steps != "mean" and watched != 0):
        return None
    return watched, deep.layers.index(layer)


def _squares(squares: Tensor) -> dict[str, int]:
    return {"SQUARES": squares.shape[1], "BLOCK_S": triton.next_power_of_2(squares.shape[1])}
