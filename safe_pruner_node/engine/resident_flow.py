"""The flow of `flow.py` in one launch that stays on the GPU for all of it: `cuda/expert_flow.cu`.

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
from safe_pruner_node.engine.expert_weights import (
    ExpertLayer,
    Modulation,
    StepModulation,
    pack_expert,
    step_modulation,
)
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.resident_images import key_images, layer_images
from safe_pruner_node.pi05.config import PI05
from safe_pruner_node.pi05.model import KeyValue, Pi05

if TYPE_CHECKING:
    from safe_pruner_node.engine.cuda.compile import CudaKernel

MOST_ACTION_DIM = 32
PADDED_ROWS = 8
"""Images of action rows have whole eights of them."""


def unsupported(model: Pi05) -> str | None:
    """Why a model cannot run in this kernel where it is; None when it can."""
    if model.device.type != "cuda":
        return f"device {model.device.type}, it is for CUDA"
    gpu = torch.cuda.get_device_properties(model.device)
    found, needed = gpu.multi_processor_count, kernel.PROGRAMS
    if (gpu.major, gpu.minor) != kernel.CAPABILITY or found < needed:
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
        self._kernels: dict[tuple[int, int], CudaKernel] = {}
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
        """
        horizon, device = noise.shape[1], noise.device
        actions = noise[0].float().clone()  # [H, A]
        own_cache = key_images(cache, horizon)
        tensors = {
            **self._modulation(schedule),
            **self._projections(),
            **self._rope(n_visual, prompt, horizon),
            **_buffers(horizon, device),
            "actions": actions,
        }
        if prompt.n_valid is not None:
            tensors["n_valid"] = prompt.n_valid
        flow = kernel.Flow(dt=schedule.dt, n_slots=prompt.slots, n_visual=n_visual)
        if deep is not None:
            tensors |= _watch(flow, deep, len(schedule), horizon, device)
        for name, tensor in tensors.items():
            setattr(flow, name, tensor.data_ptr())
        parts = self._point_layers(flow, cache, own_cache, horizon)
        compiled = self._kernel(len(schedule), horizon)
        compiled.launch(kernel.PROGRAMS, kernel.THREADS, flow)
        del parts  # until here
        if deep is None:
            return actions[None], None
        return actions[None], _by_layer(tensors["saliency"], deep, horizon)

    def _kernel(self, steps: int, horizon: int) -> CudaKernel:
        if (steps, horizon) not in self._kernels:
            # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
            from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

            defines = kernel.defines(steps, horizon, self._model.config.action_dim)
            compiled = CudaKernel(
                kernel.SOURCE.read_text(), kernel.NAME, kernel.ARCH, defines, kernel.SHARED_BYTES
            )
            if compiled.blocks_at_once(kernel.THREADS) < kernel.PROGRAMS:
                # They wait for each other: were one left out, the others would never end.
                needed = kernel.PROGRAMS
                raise RuntimeError(f"the resident flow needs {needed} multiprocessors at once")
            self._kernels[steps, horizon] = compiled
        return self._kernels[steps, horizon]

    def _modulation(self, schedule: FlowSchedule) -> dict[str, Tensor]:
        if schedule not in self._modulations:
            self._modulations[schedule] = _tables(self._model, self._layers, schedule)
        return self._modulations[schedule]

    def _projections(self) -> dict[str, Tensor]:
        into, out = self._model.action_in_proj, self._model.action_out_proj
        return {
            "in_weight": into.weight,
            "in_bias": into.bias,
            "out_weight": out.weight,
            "out_bias": out.bias,
        }

    def _rope(self, n_visual: int, prompt: Prompt, horizon: int) -> dict[str, Tensor]:
        text = prompt.slots if prompt.n_valid is None else prompt.n_valid
        positions = torch.arange(horizon, device=self._model.device) + n_visual + text  # [H]
        cos, sin = self._model.rope(positions[None])
        return {"cos": cos[0], "sin": sin[0]}  # [H, d] each

    def _point_layers(
        self, flow: kernel.Flow, cache: Sequence[KeyValue], own_cache: list[Tensor], horizon: int
    ) -> list[Tensor]:
        """Fill in `flow.layers`; returns what was allocated for it."""
        lengths = [k.shape[2] for k, _ in cache]
        parts = {n: _parts(n, horizon, self._model.device) for n in set(lengths)}
        layers = zip(
            flow.layers, self._images, own_cache, lengths, kernel.kinds(lengths), strict=True
        )
        for layer, images, pair, n, kind in layers:
            for name in kernel.WEIGHTS:
                setattr(layer, name, getattr(images, name).data_ptr())
            for name, tensor in zip(("keys", "values"), pair, strict=True):
                setattr(layer, name, tensor.data_ptr())
            for name, tensor in parts[n].items():
                setattr(layer, name, tensor.data_ptr())
            layer.n_prefix = n
            layer.of_kind, layer.kinds = kind
        return [tensor for buffers in parts.values() for tensor in buffers.values()]


def saliency_places(deep: DeepSettings) -> dict[int, int]:
    """Of every watched layer its row in what the kernel writes: it goes from layer to layer."""
    return {layer: place for place, layer in enumerate(sorted(deep.layers))}


def watched_steps(which: str, n_steps: int) -> range:
    """Steps that `DeepSettings.steps` speaks of."""
    return {"mean": range(n_steps), "first": range(1), "last": range(n_steps - 1, n_steps)}[which]


def _watch(
    flow: kernel.Flow, deep: DeepSettings, n_steps: int, horizon: int, device: torch.device
) -> dict[str, Tensor]:
    """Say what to watch, and give room for it."""
    steps, places = watched_steps(deep.steps, n_steps), saliency_places(deep)
    flow.over_all, flow.n_watched = deep.over == "all", len(places)
    flow.first_watched, flow.last_watched = steps[0], steps[-1]
    flow.watched[:] = [places.get(layer, -1) for layer in range(PI05.expert.depth)]
    slots, rows = len(steps) * len(places), PI05.expert.heads * horizon
    return {
        "saliency": torch.empty(slots, kernel.PROGRAMS, deep.n_visual, device=device),
        "shares": torch.zeros(rows, deep.n_visual, device=device),
    }


def _by_layer(saliency: Tensor, deep: DeepSettings, horizon: int) -> Tensor:
    """[S * n_deep, programs, N_vis] to the mean, [n_deep, N_vis], in the order of `deep.layers`."""
    places = saliency_places(deep)
    steps = len(saliency) // len(places)
    sums = saliency.unflatten(0, (steps, -1)).sum((0, 2))  # [n_deep, N_vis], by place
    rows = torch.stack([sums[places[layer]] for layer in deep.layers])
    return rows / (PI05.expert.heads * horizon * steps)


def _tables(
    model: Pi05, layers: Sequence[ExpertLayer], schedule: FlowSchedule
) -> dict[str, Tensor]:
    """Modulation of every step and layer, [S, L, .] fp32, and of the last norm, [S, D]."""
    steps = [step_modulation(model, layers, condition) for condition in schedule.conditions]
    tables = {name: _table(steps, name) for name in kernel.MODULATION}
    tables["final_scale"] = torch.stack([step.final.scale for step in steps])
    tables["final_shift"] = torch.stack([step.final.shift for step in steps])
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


def _buffers(horizon: int, device: torch.device) -> dict[str, Tensor]:
    """What programs leave for each other."""
    expert, rows = PI05.expert, -(-horizon // PADDED_ROWS) * PADDED_ROWS
    return _zeros(
        device,
        exchange=kernel.EXCHANGED * 2,
        x=horizon * expert.width * 4,
        scaled=rows * expert.width * 2,
        queries=expert.heads * kernel.MOST_ROWS * expert.head_dim * 2,
        attended=rows * expert.heads * expert.head_dim * 2,
        hidden=rows * expert.mlp * 2,
        squares=kernel.PROGRAMS * kernel.MOST_ROWS * 4,
        counters=kernel.COUNTERS * kernel.COUNTER_BYTES,
    )


def _parts(n_prefix: int, horizon: int, device: torch.device) -> dict[str, Tensor]:
    """Attention of every head's rows over each block of keys, bf16, and its log-sum, fp32."""
    expert, blocks = PI05.expert, kernel.blocks(n_prefix, horizon)
    return _zeros(
        device,
        parts=blocks * expert.heads * kernel.MOST_ROWS * expert.head_dim * 2,
        lse=blocks * expert.heads * horizon * 4,
    )


def _zeros(device: torch.device, **sizes: int) -> dict[str, Tensor]:
    """Buffers of so many bytes, zero, in one allocation."""
    aligned = {name: -(-size // 256) * 256 for name, size in sizes.items()}
    whole = torch.zeros(sum(aligned.values()), dtype=torch.uint8, device=device)
    return dict(zip(aligned, whole.split(list(aligned.values())), strict=True))
