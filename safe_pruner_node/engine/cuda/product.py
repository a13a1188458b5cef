"""What `product.cu` is compiled for and launched with.

Shapes: N rows, F features (rows of the weight matrix), K depth.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from math import ceil
from pathlib import Path

from safe_pruner_node.engine.cuda.source import read_source

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "product"

THREADS = 384
DEPTH = 64
"""Of one step along K: 128 bytes, as long as a row of an operand in shared memory can be."""
GATES = 128
"""Features of two groups of warps, 64 each; of a gated tile the gates, with as many rows that they
are multiplied with."""
MOST_ROWS, ROW_STEP = 256, 32
"""Of a tile."""
MOST_SUMS = 160
"""Registers of a thread for its sums."""
MOST_STAGES = 8
STAGING_BYTES = 2 * 2 * 32 * 128
"""Shared memory through which results leave."""
MOST_SHARED = 227 * 1024


class After(IntEnum):
    """What follows the product, `AFTER` of the source."""

    NOTHING = 0
    BIAS = 1
    BIAS_GELU = 2
    GATED = 3
    """gelu(gate) * up of a weight matrix whose rows alternate."""


class Map(ctypes.Structure):
    """`Map` of the source: a tensor map as the driver encodes it, at a multiple of 64 bytes."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class Product(ctypes.Structure):
    """`Product` of the source."""

    _fields_ = (
        ("weights", Map),
        ("inputs", Map),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n", "out_features", "depth_steps", "splits")),
        *((name, ctypes.c_int) for name in ("feature_groups", "row_groups")),
        ("padding", ctypes.c_byte * 24),  # a structure's size is a multiple of its alignment
    )


@dataclass(frozen=True)
class Plan:
    """How a product is cut.

    Attributes:
        rows: Of a tile, a multiple of 32 up to 256.
        pieces: Products of 64 features that a group of warps does with each step along K.
        cluster_features: Blocks of a cluster that have the same rows.
        cluster_rows: Blocks of a cluster that have the same features.
        splits: Parts of K, whose sums are terms of their own.
    """

    rows: int
    pieces: int = 1
    cluster_features: int = 1
    cluster_rows: int = 1
    splits: int = 1

    @property
    def features(self) -> int:
        """Of a tile."""
        return GATES * self.pieces

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_features * self.cluster_rows

    @property
    def sums(self) -> int:
        """Registers of a thread for its sums."""
        return self.rows // 2 * self.pieces

    @property
    def stage_bytes(self) -> int:
        """Operands of one step, in shared memory."""
        return (self.features + self.rows) * DEPTH * 2

    @property
    def stages(self) -> int:
        """Steps whose operands are in shared memory at once."""
        room = MOST_SHARED - 1024 - STAGING_BYTES - 16 * MOST_STAGES
        return min(MOST_STAGES, room // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block; 1024 to align it."""
        return 1024 + self.stages * (self.stage_bytes + 16) + STAGING_BYTES

    def groups(self, n: int, features: int) -> tuple[int, int]:
        """Tiles that a cluster does at once: of features, of rows."""
        return (
            ceil(ceil(features / self.features) / self.cluster_features),
            ceil(ceil(n / self.rows) / self.cluster_rows),
        )

    def units(self, n: int, features: int) -> int:
        """What clusters have to do, one after the other."""
        by_features, by_rows = self.groups(n, features)
        return self.splits * by_features * by_rows

    def defines(self, after: After) -> dict[str, int]:
        """Macros of the source."""
        return {
            "ROWS": self.rows,
            "PIECES": self.pieces,
            "CLUSTER_F": self.cluster_features,
            "CLUSTER_N": self.cluster_rows,
            "STAGES": self.stages,
            "AFTER": int(after),
        }


def source(plan: Plan) -> str:
    """CUDA C++ for a plan: the file, and `multiply`, whose registers are listed one by one."""
    sums = plan.rows // 2
    places = ",".join(f"%{i}" for i in range(sums))
    registers = ", ".join(f'"+f"(c[{i}])' for i in range(sums))
    multiply = f"""
__device__ __forceinline__ void multiply(float (&c)[SUMS], u64 a, u64 b, int accumulate) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{sums + 2}, 0; "
               "wgmma.mma_async.sync.aligned.m64n{plan.rows}k16.f32.bf16.bf16 "
               "{{{places}}}, %{sums}, %{sums + 1}, p, 1, 1, 0, 0;}}"
               : {registers} : "l"(a), "l"(b), "r"(accumulate));
}}
"""
    return read_source(SOURCE) + multiply
