"""Block sizes of the flow's kernels: found by `test/engine/fused_flow_checks.py --tune`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PairTiles:
    """Of a product of two column blocks.

    Attributes:
        columns: Pairs of columns per program; a power of two, at least 16.
        depth: Elements of K per turn of the loop.
        warps: Warps per program.
        stages: Turns whose loads are under way at once.
    """

    columns: int
    depth: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class SplitTiles:
    """Of a product that is split along K.

    Attributes:
        columns: Columns per program.
        splits: Parts of K.
        depth: Elements of K per turn of the loop.
        warps: Warps per program.
        stages: Turns whose loads are under way at once.
    """

    columns: int
    splits: int
    depth: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class AttentionTiles:
    """Of the suffix attention.

    Attributes:
        rows: Query rows per program.
        keys: Keys per program.
        warps: Warps per program.
        joined: Rows per program of the joining kernel.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 8
    joined: int = 4


@dataclass(frozen=True)
class FlowTiles:
    """Of every kernel of the flow.

    Attributes:
        qkv: Queries, keys and values.
        attention: Attention.
        o: The attention's output projection.
        gate_up: Gate and up.
        down: Down projection.
        dependent: Programmatic dependent launch, on GPUs that have it (SM 9.0).
    """

    qkv: PairTiles = PairTiles(16, 128)
    attention: AttentionTiles = AttentionTiles()
    o: SplitTiles = SplitTiles(64, 8, 128)
    gate_up: PairTiles = PairTiles(32, 128)
    down: SplitTiles = SplitTiles(64, 8, 128)
    dependent: bool = True
