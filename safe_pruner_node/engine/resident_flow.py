"""The flow of `flow.py` in one launch that stays on the GPU for all of it: `cuda/expert_flow.cu`.

Before it a short one lays out the prefix and makes zero what has to be.

Shapes: H horizon, A action_dim, D expert width, h query heads, d head_dim, L layers, S Euler steps,
N_vis visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_pruner_node.engine.cuda import expert_flow as kernel
from safe_pruner_node.engine.cuda.available import ARCH, CAPABILITY
from safe_pruner_node.engine.cuda.source import read_source
from safe_pruner_node.engine.expert_weights import (
    ExpertLayer,
    Modulation,
    StepModulation,
    pack_expert,
    step_modulation,
)
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.resident_images import layer_images, point_prefix
from safe_pruner_node.pi05.config import PI05
from safe_pruner_node.pi05.model import KeyValue, Pi05

if TYPE_CHECKING:
    from safe_pruner_node.engine.cuda.compile import CudaKernel

MOST_ACTION_DIM = 32
PADDED_ROWS = 8
"""Images of action rows have whole eights of them."""
ALIGNED = 256
"""Bytes of which a buffer has a multiple."""


def unsupported(model: Pi05) -> str | None:
    """Why a model cannot run in this kernel where it is; None when it can."""
    if model.device.type != "cuda":
        return f"device {model.device.type}, it is for CUDA"
    gpu = torch.cuda.get_device_properties(model.device)
    found, needed = gpu.multi_processor_count, kernel.PROGRAMS
    if (gpu.major, gpu.minor) != CAPABILITY or found < needed:
        return f"{gpu.name}, it is for {needed} multiprocessors of SM 9.0"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "no cuda-bindings, which compile it"
    return _unfit(model)


def fits(deep: DeepSettings | None, cache: Sequence[KeyValue], horizon: int) -> bool:
    """True when the kernel can do such a call."""
    keys = max(k.shape[2] for k, _ in cache) + horizon
    whole = deep is None or deep.n_visual % kernel.KEYS == 0
    return horizon <= kernel.MOST_ROWS and keys <= kernel.MOST_KEYS and whole


def _unfit(model: Pi05) -> str | None:
    """Why the kernel is not for a model; None when it is."""
    config, projections = model.config, (model.action_in_proj, model.action_out_proj)
    if config.expert != PI05.expert:
        return "it is for the expert of π0.5"
    if model.dtype != torch.bfloat16 or any(p.weight.dtype != torch.float32 for p in projections):
        return "it is for a model in bf16 with the actions' projections in fp32"
    if config.action_dim > MOST_ACTION_DIM or config.action_dim % 4:
        return f"action_dim {config.action_dim}, not a multiple of 4 up to {MOST_ACTION_DIM}"
    return None


class ResidentFlow:
    """Denoises chunks of one model.

    The kernel reads copies of the expert's matrices in a layout of its own, 0.6 GB; the model's
    stay where they are, for `FusedFlow`, for the probe of the first layers and for who saves the
    model.

    Args:
        model: The policy, `unsupported` by nothing. Its expert's projections become views of packed
            ones.
    """

    def __init__(self, model: Pi05) -> None:
        self._model = model
        self._layers = pack_expert(model)
        self._images = [layer_images(layer, PI05.expert.head_dim) for layer in self._layers]
        positions = torch.arange(kernel.MOST_KEYS, device=model.device)  # [P]
        cos, sin = model.rope(positions[None])
        self._rope = {"cos": cos[0], "sin": sin[0]}  # [P, d] each
        self._kernels: dict[tuple[int, int], tuple[CudaKernel, CudaKernel]] = {}
        self._modulations: dict[FlowSchedule, dict[str, Tensor]] = {}

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
        """Integrate the flow; arguments and results are those of `stages.denoise`.

        What the kernel is given are addresses. Nothing that is allocated here is freed before the
        launch, and from then on the stream's order keeps it: who gets that memory writes later.

        Raises:
            RuntimeError: The kernel does not compile, or its programs do not run all at once.
            ValueError: Actions are at positions that no table reaches.
        """
        horizon, device = noise.shape[1], noise.device
        if n_visual + prompt.slots + horizon > kernel.MOST_KEYS:
            raise ValueError(f"positions beyond {kernel.MOST_KEYS}: the first layer is pruned")
        flow = kernel.Flow(dt=schedule.dt, n_slots=prompt.slots, n_visual=n_visual)
        kept = point_prefix(flow, cache, horizon)
        watched = {} if deep is None else _watch(flow, deep, len(schedule), horizon)
        lengths = [layer.n_prefix for layer in flow.layers]
        distinct = sorted(set(lengths))
        sizes = [_buffers(horizon) | watched, *(_parts(n, horizon) for n in distinct)]
        zeros, (buffers, *parts) = _room(sizes, device)
        self._point_layers(flow, dict(zip(distinct, parts, strict=True)))
        actions = torch.empty(noise.shape[1:], dtype=torch.float32, device=device)  # [H, A]
        tensors = {
            **self._modulation(schedule),
            **self._projections(),
            **self._rope,
            **buffers,
            "noise": noise[0].float().contiguous(),
            "actions": actions,
            "zeros": zeros,
        }
        if prompt.n_valid is not None:
            tensors["n_valid"] = prompt.n_valid
        for name, tensor in tensors.items():
            setattr(flow, name, tensor.data_ptr())
        flow.n_zeros = len(zeros) // kernel.WORD
        prepare, whole = self._kernel(len(schedule), horizon)
        prepare.launch(kernel.preparing(lengths, horizon), kernel.THREADS, flow)
        whole.launch(kernel.PROGRAMS, kernel.THREADS, flow)
        del kept  # until here
        if deep is None:
            return actions[None], None
        saliency = tensors["saliency"].view(torch.float32)
        return actions[None], _by_layer(saliency, len(deep.layers), n_visual)

    def _kernel(self, steps: int, horizon: int) -> tuple[CudaKernel, CudaKernel]:
        """What runs before the flow, and the flow."""
        if (steps, horizon) not in self._kernels:
            # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
            from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

            source, arch = read_source(kernel.SOURCE), ARCH
            defines = kernel.defines(steps, horizon, self._model.config.action_dim)
            prepare = CudaKernel(source, kernel.PREPARE, arch, defines, 0)
            whole = CudaKernel(source, kernel.NAME, arch, defines, kernel.SHARED_BYTES)
            if whole.blocks_at_once(kernel.THREADS) < kernel.PROGRAMS:
                # They wait for each other: were one left out, the others would never end.
                needed = kernel.PROGRAMS
                raise RuntimeError(f"the resident flow needs {needed} multiprocessors at once")
            self._kernels[steps, horizon] = prepare, whole
        return self._kernels[steps, horizon]

    def _modulation(self, schedule: FlowSchedule) -> dict[str, Tensor]:
        if schedule not in self._modulations:
            self._modulations[schedule] = _tables(self._model, self._layers, schedule)
        return self._modulations[schedule]

    def _projections(self) -> dict[str, Tensor]:
        into, out = self._model.action_in_proj, self._model.action_out_proj
        return {"in_bias": into.bias, "out_weight": out.weight, "out_bias": out.bias}

    def _point_layers(self, flow: kernel.Flow, parts: dict[int, dict[str, Tensor]]) -> None:
        """Fill in weights, and by the number of prefix keys what programs leave for each other."""
        lengths = [layer.n_prefix for layer in flow.layers]
        layers = zip(flow.layers, self._images, kernel.kinds(lengths), strict=True)
        for layer, images, kind in layers:
            for name in kernel.WEIGHTS:
                setattr(layer, name, getattr(images, name).data_ptr())
            for name, tensor in parts[layer.n_prefix].items():
                setattr(layer, name, tensor.data_ptr())
            layer.of_kind, layer.kinds = kind


def watched_steps(which: str, n_steps: int) -> range:
    """Steps that `DeepSettings.steps` speaks of."""
    return {"mean": range(n_steps), "first": range(1), "last": range(n_steps - 1, n_steps)}[which]


def _watch(flow: kernel.Flow, deep: DeepSettings, n_steps: int, horizon: int) -> dict[str, int]:
    """Say what to watch; returns the sizes of what that needs, bytes."""
    steps = watched_steps(deep.steps, n_steps)
    flow.over_all = deep.over == "all"
    flow.first_watched, flow.last_watched = steps[0], steps[-1]
    flow.watched[:] = [-1] * PI05.expert.depth
    for place, layer in enumerate(deep.layers):
        flow.watched[layer] = place
    return {
        "saliency": len(deep.layers) * kernel.PROGRAMS * deep.n_visual * 4,
        "shares": PI05.expert.heads * horizon * deep.n_visual * 4,
    }


def _by_layer(saliency: Tensor, n_deep: int, n_visual: int) -> Tensor:
    """What the programs have left, each of its rows, to [n_deep, N_vis]."""
    return saliency.view(n_deep, kernel.PROGRAMS, n_visual).sum(1)


def _tables(
    model: Pi05, layers: Sequence[ExpertLayer], schedule: FlowSchedule
) -> dict[str, Tensor]:
    """Modulation of every step and layer, [S, L, .] fp32, of the last norm, [S, D]; in_weight."""
    steps = [step_modulation(model, layers, condition) for condition in schedule.conditions]
    tables = {name: _table(steps, name) for name in kernel.MODULATION}
    tables["final_scale"] = torch.stack([step.final.scale for step in steps])
    tables["final_shift"] = torch.stack([step.final.shift for step in steps])
    # By channels, so that neighbouring threads, which have neighbouring channels, read one line.
    tables["in_weight"] = model.action_in_proj.weight.T.contiguous()  # [A, D]
    return tables


def _table(steps: Sequence[StepModulation], name: str) -> Tensor:
    norm, field = {
        "attention_scale": ("attention", "scale"),
        "attention_gate": ("attention", "gate"),
        "qkv_bias": ("attention", "bias"),
        "mlp_scale": ("mlp", "scale"),
        "mlp_gate": ("mlp", "gate"),
        "gate_up_bias": ("mlp", "bias"),
    }[name]
    layers: list[Sequence[Modulation]] = [getattr(step, norm) for step in steps]
    return torch.stack([torch.stack([getattr(m, field) for m in step]) for step in layers])


def _buffers(horizon: int) -> dict[str, int]:
    """Sizes of what programs leave for each other, bytes."""
    expert, rows = PI05.expert, -(-horizon // PADDED_ROWS) * PADDED_ROWS
    return {
        "exchange": kernel.EXCHANGED * 2,
        "x": horizon * expert.width * 4,
        "scaled": rows * expert.width * 2,
        "queries": expert.heads * kernel.MOST_ROWS * expert.head_dim * 2,
        "attended": rows * expert.heads * expert.head_dim * 2,
        "hidden": rows * expert.mlp * 2,
        "squares": kernel.PROGRAMS * kernel.MOST_ROWS * 4,
        "counters": kernel.COUNTERS * kernel.COUNTER_BYTES,
    }


def _parts(n_prefix: int, horizon: int) -> dict[str, int]:
    """The same of attention over each block of keys: every head's rows, bf16; log-sums, fp32."""
    expert, blocks = PI05.expert, kernel.blocks(n_prefix, horizon)
    return {
        "parts": blocks * expert.heads * kernel.MOST_ROWS * expert.head_dim * 2,
        "lse": blocks * expert.heads * horizon * 4,
    }


def _room(
    groups: Sequence[dict[str, int]], device: torch.device
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Memory for groups of buffers of so many bytes: all of it, and each of them."""
    sizes = [-(-size // ALIGNED) * ALIGNED for group in groups for size in group.values()]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    pieces = iter(whole.split(sizes))
    return whole, [{name: next(pieces) for name in group} for group in groups]
