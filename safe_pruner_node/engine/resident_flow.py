"""The flow of `flow.py` in one launch that stays on the GPU for all of it: `cuda/expert_flow.cu`.

Shapes: H horizon, A action_dim, D expert width, h query heads, d head_dim, R = h * H, N prefix keys of
a layer, N_vis visual tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from safe_pruner_node.engine.expert_weights import ExpertLayer, pack_expert, step_modulation
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.config import PI05
from safe_pruner_node.pi05.model import KeyValue, Pi05

if TYPE_CHECKING:
    from safe_pruner_node.engine.cuda.compile import CudaKernel

SOURCE = Path(__file__).with_name("cuda") / "expert_flow.cu"

# Constants of the source.
PROGRAMS, SHARES, THREADS, KEYS = 128, 8, 256, 64
CHUNK = 64
"""Rows and columns of a chunk of an image."""
MOST_ROWS = 64
MOST_PARTS = 32
COUNTERS = 17 + 3 * SHARES
SHARED_BYTES = 231_936
CAPABILITY = (9, 0)
CLOCKS = False
EXTRA: dict[str, int] = {}

_WEIGHTS = ("qkv", "o", "gate_up", "down")
_MODULATION = (
    ("attention_scale", "attention", "scale"),
    ("attention_gate", "attention", "gate"),
    ("qkv_bias", "attention", "bias"),
    ("mlp_scale", "mlp", "scale"),
    ("mlp_gate", "mlp", "gate"),
    ("gate_up_bias", "mlp", "bias"),
)


def unsupported(model: Pi05) -> str | None:
    """Why a model cannot run in this kernel where it is; None when it can."""
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) != CAPABILITY:
        return "the kernel is for GPUs of SM 9.0"
    if model.config.expert != PI05.expert or model.dtype != torch.bfloat16:
        return "the kernel is for the expert of π0.5 in bf16"
    if model.config.action_dim > 32 or model.config.action_dim % 4:
        return f"action_dim {model.config.action_dim}, not a multiple of 4 up to 32"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "no cuda-bindings, which compile the kernel"
    return None


class ResidentFlow:
    """Denoises chunks of one model.

    Args:
        model: The policy, `unsupported` by nothing. Its expert's projections become views of packed
            ones; the kernel reads copies of them (0.6 GB), laid out its own way.
    """

    def __init__(self, model: Pi05) -> None:
        self._model = model
        self._layers = pack_expert(model)
        self._images = [_images(layer, model.config.expert.head_dim) for layer in self._layers]
        self._kernels: dict[tuple[int, int], CudaKernel] = {}
        self._modulations: dict[FlowSchedule, dict[str, Tensor]] = {}

    def fits(self, deep: DeepSettings | None, cache: Sequence[KeyValue], horizon: int) -> bool:
        """True when the kernel can do such a call."""
        keys = max(k.shape[2] for k, _ in cache) + horizon
        whole = deep is None or deep.n_visual % KEYS == 0
        return horizon <= MOST_ROWS and keys <= MOST_PARTS * KEYS and whole

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
        model, config = self._model, self._model.config.expert
        horizon, device = noise.shape[1], noise.device
        text = prompt.slots if prompt.n_valid is None else prompt.n_valid
        positions = torch.arange(horizon, device=device) + n_visual + text
        cos, sin = (table[0] for table in model.rope(positions[None]))  # [H, d] each
        own_cache = _key_images(cache, horizon)
        actions = noise[0].float().clone()  # [H, A]
        heads, out, into = config.heads, model.action_out_proj, model.action_in_proj
        rows = -(-horizon // 8) * 8
        n_exchanged = 2 * PROGRAMS * SHARES * 512
        tensors = {
            **self._modulation(schedule),
            "in_weight": into.weight,
            "in_bias": into.bias,
            "out_weight": out.weight,
            "out_bias": out.bias,
            "cos": cos,
            "sin": sin,
            "actions": actions,
            **_zeros(
                device,
                exchange=n_exchanged * 2,
                x=horizon * config.width * 4,
                scaled=rows * config.width * 2,
                queries=heads * CHUNK * config.head_dim * 2,
                attended=rows * heads * config.head_dim * 2,
                hidden=rows * config.mlp * 2,
                squares=PROGRAMS * MOST_ROWS * 4,
                counters=COUNTERS * 128,
            ),
        }
        if prompt.n_valid is not None:
            tensors["n_valid"] = prompt.n_valid
        parts = {
            n: _zeros(
                device,
                parts=-(-(n + horizon) // KEYS) * heads * MOST_ROWS * config.head_dim * 2,
                lse=-(-(n + horizon) // KEYS) * heads * horizon * 4,
            )
            for n in {k.shape[2] for k, _ in cache}
        }
        flow = _Flow(dt=schedule.dt, n_slots=prompt.slots, n_visual=n_visual)
        saliency = None
        if deep is not None:
            steps = _watched_steps(deep.steps, len(schedule))
            slots = len(steps) * len(deep.layers)
            saliency = noise.new_empty(slots, PROGRAMS, n_visual, dtype=torch.float32)
            tensors["saliency"] = saliency
            tensors["shares"] = noise.new_zeros(
                heads * horizon, n_visual, dtype=torch.float32
            )
            flow.over_all, flow.n_watched = deep.over == "all", len(deep.layers)
            flow.first_watched, flow.last_watched = steps[0], steps[-1]
            places = {layer: place for place, layer in enumerate(sorted(deep.layers))}
            flow.watched[:] = [places.get(layer, -1) for layer in range(config.depth)]
        for name, tensor in tensors.items():
            setattr(flow, name, tensor.data_ptr())
        for layer, images, pair, (k, _) in zip(
            flow.layers, self._images, own_cache, cache, strict=True
        ):
            for name in _WEIGHTS:
                setattr(layer, name, getattr(images, name).data_ptr())
            layer.keys, layer.values = pair[0].data_ptr(), pair[1].data_ptr()
            layer.n_prefix = k.shape[2]
            layer.parts, layer.lse = (t.data_ptr() for t in parts[layer.n_prefix].values())
        lengths = [layer.n_prefix for layer in flow.layers]
        for index, layer in enumerate(flow.layers):
            layer.of_kind = lengths[:index].count(layer.n_prefix)
            layer.kinds = lengths.count(layer.n_prefix)
        if CLOCKS:
            self.clocks = torch.zeros(PROGRAMS, 64, dtype=torch.int64, device=device)
            flow.clocks = self.clocks.data_ptr()
        self._kernel(len(schedule), horizon).launch(PROGRAMS, THREADS, flow)
        if deep is None or saliency is None:
            return actions[None], None
        # [steps * n_deep, programs, N_vis] to [n_deep, N_vis]
        by_layer = saliency.unflatten(0, (-1, len(deep.layers))).sum((0, 2))
        return actions[None], by_layer / (heads * horizon * len(steps))

    def _kernel(self, steps: int, horizon: int) -> CudaKernel:
        if (steps, horizon) not in self._kernels:
            # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
            from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

            expert = self._model.config.expert
            defines = {
                "WIDTH": expert.width,
                "MLP": expert.mlp,
                "HEADS": expert.heads,
                "HEAD_DIM": expert.head_dim,
                "DEPTH": expert.depth,
                "STEPS": steps,
                "HORIZON": horizon,
                "ACTION_DIM": self._model.config.action_dim,
                **EXTRA,
            }
            kernel = CudaKernel(SOURCE.read_text(), "expert_flow", defines, SHARED_BYTES)
            if kernel.blocks_at_once(THREADS) < PROGRAMS:
                # They wait for each other: were one left out, the GPU would hang.
                raise RuntimeError(f"fewer than {PROGRAMS} multiprocessors are free for the flow")
            self._kernels[steps, horizon] = kernel
        return self._kernels[steps, horizon]

    def _modulation(self, schedule: FlowSchedule) -> dict[str, Tensor]:
        """Of every step and layer, [S, L, .] fp32, and of the last norm, [S, D]."""
        if schedule not in self._modulations:
            steps = [step_modulation(self._model, self._layers, c) for c in schedule.conditions]
            tables = {
                name: torch.stack(
                    [torch.stack([getattr(m, field) for m in getattr(s, norm)]) for s in steps]
                )
                for name, norm, field in _MODULATION
            }
            tables["final_scale"] = torch.stack([s.final.scale for s in steps])
            tables["final_shift"] = torch.stack([s.final.shift for s in steps])
            self._modulations[schedule] = tables
        return self._modulations[schedule]


class _Layer(ctypes.Structure):
    """`Layer` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_WEIGHTS, "keys", "values", "parts", "lse")),
        ("n_prefix", ctypes.c_int),
        ("of_kind", ctypes.c_short),
        ("kinds", ctypes.c_short),
    )


class _Flow(ctypes.Structure):
    """`Flow` of the source."""

    _fields_ = (
        ("layers", _Layer * PI05.expert.depth),
        *((name, ctypes.c_void_p) for name, _, _ in _MODULATION),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "final_scale final_shift in_weight in_bias out_weight out_bias cos sin n_valid "
                "actions x scaled queries attended hidden squares exchange counters "
                "shares saliency"
            ).split()
        ),
        *(
            (name, ctypes.c_int)
            for name in "n_slots n_visual over_all first_watched last_watched".split()
        ),
        ("watched", ctypes.c_int * PI05.expert.depth),
        ("n_watched", ctypes.c_int),
        ("dt", ctypes.c_float),
        ("clocks", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class _Images:
    """One layer's weights in chunks, one program's after the other's, [chunks, 64, 64]."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


def _images(layer: ExpertLayer, head_dim: int) -> _Images:
    half = head_dim // 2
    # [heads, halves, eighths, 16, D]: the channels that rotate together are in one tile
    qkv = layer.qkv.unflatten(0, (-1, 2, half // 16, 16)).transpose(1, 2)
    gate_up = layer.gate_up.unflatten(0, (2, PROGRAMS, -1)).transpose(0, 1)  # [programs, 2, 32, D]
    return _Images(
        qkv=_image(qkv.flatten(0, -2), 32),
        o=_shares(layer.o),
        gate_up=_image(gate_up.flatten(0, -2)),
        down=_shares(layer.down),
    )


def _shares(weight: Tensor) -> Tensor:
    """[out, K] to the image of tiles of 64 rows, each cut along K into SHARES."""
    pieces = weight.unflatten(0, (-1, CHUNK)).unflatten(2, (SHARES, -1))  # [T, 64, S, K/S]
    return _image(pieces.transpose(1, 2).flatten(0, -2))


def _image(rows: Tensor, height: int = CHUNK) -> Tensor:
    """[R, K] to chunks, [R / height, K / 64, height, 64], the pieces of every row swizzled."""
    return _swizzled(rows.unflatten(0, (-1, height)).unflatten(2, (-1, CHUNK)).transpose(1, 2))


def _swizzled(chunks: Tensor) -> Tensor:
    """[..., n, 64] with the eight 16-byte pieces of row r at piece ^ (r % 8)."""
    row = torch.arange(chunks.shape[-2], device=chunks.device)[:, None]
    pieces = torch.arange(8, device=chunks.device) ^ row % 8  # [n, 8]
    return chunks.unflatten(-1, (8, 8))[..., row, pieces, :].flatten(-2).contiguous()


def _key_images(cache: Sequence[KeyValue], horizon: int) -> list[Tensor]:
    """Per layer keys and values with room for the suffix, [2, P, d / 64, 64, 64], else zero."""
    images: list[Tensor] = []
    for n, layers in groupby(cache, key=lambda pair: pair[0].shape[2]):
        prefix = torch.stack([t[0, 0] for pair in layers for t in pair])  # [2 * layers, N, d]
        parts = -(-(n + horizon) // KEYS)
        padded = pad(prefix, (0, 0, 0, parts * KEYS - n)).unflatten(1, (parts, KEYS))
        whole = _swizzled(padded.unflatten(3, (-1, CHUNK)).transpose(2, 3))
        images += whole.unflatten(0, (-1, 2)).unbind()
    return images


def _zeros(device: torch.device, **sizes: int) -> dict[str, Tensor]:
    """Buffers of so many bytes, zero, in one allocation."""
    aligned = {name: -(-size // 256) * 256 for name, size in sizes.items()}
    whole = torch.zeros(sum(aligned.values()), dtype=torch.uint8, device=device)
    return dict(zip(aligned, whole.split(list(aligned.values())), strict=True))


def _watched_steps(which: str, n_steps: int) -> range:
    return {"mean": range(n_steps), "first": range(1), "last": range(n_steps - 1, n_steps)}[which]
