"""What `expert_flow.cu` is compiled for and launched with: its constants and structures."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from safe_pruner_node.pi05.config import PI05

SOURCE = Path(__file__).with_suffix(".cu")
NAME, PREPARE = "expert_flow", "prepare"
"""Its kernels: the flow, and what has to run before each."""

PROGRAMS, SHARES, THREADS, KEYS = 128, 8, 256, 64
CHUNK = 64
"""Rows and columns of a chunk of an image."""
MOST_ROWS = 64
"""Action rows: the columns of one product."""
MOST_KEYS = 32 * KEYS
"""Prefix and suffix: a warp joins the sums over the blocks of keys, a lane has one."""
COUNTERS, COUNTER_BYTES = 17 + 3 * SHARES, 128
EXCHANGED = 2 * PROGRAMS * SHARES * 512
"""Numbers that programs hand each other in a layer."""
WORD = 16
"""Bytes that a thread makes zero at once."""
SHARED_BYTES = 231_936

WEIGHTS = ("qkv", "o", "gate_up", "down")
MODULATION = (
    "attention_scale",
    "attention_gate",
    "qkv_bias",
    "mlp_scale",
    "mlp_gate",
    "gate_up_bias",
)
"""Of every step and layer, [S, L, .] fp32."""
PROJECTIONS = ("final_scale", "final_shift", "in_weight", "in_bias", "out_weight", "out_bias")
"""Of the actions, fp32, and what the last norm does at every step, [S, D] fp32."""
BUFFERS = (
    *("cos", "sin", "n_valid", "noise", "actions"),
    *("x", "scaled", "queries", "attended", "hidden", "squares", "exchange", "counters"),
    *("shares", "saliency", "zeros"),
)
"""What a call brings, what programs leave for each other, a keyframe's saliency, and all that is
zero at launch."""
PREFIX, IMAGES = ("prefix_keys", "prefix_values"), ("keys", "values")
"""Of every layer: where its keys and values are, and where the flow reads them."""


class Layer(ctypes.Structure):
    """`Layer` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*WEIGHTS, *PREFIX, *IMAGES, "parts", "lse")),
        ("n_prefix", ctypes.c_int),
        ("of_kind", ctypes.c_short),
        ("kinds", ctypes.c_short),
    )


class Flow(ctypes.Structure):
    """`Flow` of the source."""

    _fields_ = (
        ("layers", Layer * PI05.expert.depth),
        *((name, ctypes.c_void_p) for name in (*MODULATION, *PROJECTIONS, *BUFFERS)),
        ("n_zeros", ctypes.c_int),
        ("n_slots", ctypes.c_int),
        ("n_visual", ctypes.c_int),
        ("over_all", ctypes.c_int),
        ("first_watched", ctypes.c_int),
        ("last_watched", ctypes.c_int),
        ("watched", ctypes.c_int * PI05.expert.depth),
        ("dt", ctypes.c_float),
    )


def defines(steps: int, horizon: int, action_dim: int) -> dict[str, int]:
    """Macros of the source."""
    expert = PI05.expert
    return {
        "WIDTH": expert.width,
        "MLP": expert.mlp,
        "HEADS": expert.heads,
        "HEAD_DIM": expert.head_dim,
        "DEPTH": expert.depth,
        "STEPS": steps,
        "HORIZON": horizon,
        "ACTION_DIM": action_dim,
    }


def blocks(n_prefix: int, horizon: int) -> int:
    """Blocks of keys of a layer with so many prefix keys."""
    return -(-(n_prefix + horizon) // KEYS)


def preparing(lengths: Sequence[int], horizon: int) -> int:
    """Programs of `prepare` for layers with so many prefix keys."""
    return 2 * len(lengths) * blocks(max(lengths), horizon)


def kinds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Of each layer, which it is among those with as many prefix keys, and how many those are.

    They share memory for their attention's parts; whose turn it is, the count says.
    """
    return [(lengths[:index].count(n), lengths.count(n)) for index, n in enumerate(lengths)]
