"""Block sizes of the flow's kernels: found by `test/engine/fused_flow_checks.py --tune`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from safe_pruner_node.pi05.config import Pi05Config


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
    warps: int = 4
    joined: int = 4

    def parts(self, n_keys: int) -> int:
        """Blocks that so many keys make."""
        return -(-n_keys // self.keys)


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
        prefetch: With it, weights are asked for before the inputs are there.
    """

    qkv: PairTiles = PairTiles(32, 128)
    attention: AttentionTiles = AttentionTiles()
    o: SplitTiles = SplitTiles(32, 2, 256)
    gate_up: PairTiles = PairTiles(32, 128)
    down: SplitTiles = SplitTiles(32, 4, 256)
    dependent: bool = True
    prefetch: bool = True

    def fitted(self, config: Pi05Config) -> FlowTiles:
        """The same, with blocks made smaller where they do not divide the model's sizes."""
        expert, qkv, gate_up = config.expert, self.qkv, self.gate_up
        return replace(
            self,
            qkv=replace(
                qkv,
                columns=_divisor(expert.head_dim // 2, qkv.columns),
                depth=_divisor(expert.width, qkv.depth),
            ),
            attention=replace(
                self.attention,
                # A block of keys has visual tokens alone or none: saliency is a matter of blocks.
                keys=_divisor(config.vision.tokens, self.attention.keys),
            ),
            gate_up=replace(
                gate_up,
                columns=_divisor(expert.mlp, gate_up.columns),
                depth=_divisor(expert.width, gate_up.depth),
            ),
            o=_fitted_split(self.o, expert.heads * expert.head_dim, expert.width),
            down=_fitted_split(self.down, expert.mlp, expert.width),
        )


LEAST = 16
"""Columns and depth that a tensor core's product has at least."""

MOST_CHANNELS = 256
"""Of a head: as long as one row of a tensor descriptor's block may be."""


def unfit(config: Pi05Config) -> str | None:
    """Why no tiles fit a model; None when some do."""
    expert = config.expert
    if expert.kv_heads != 1:
        return f"{expert.kv_heads} key/value heads, the kernels are for 1"
    if expert.head_dim & (expert.head_dim - 1) or not 2 * LEAST <= expert.head_dim <= MOST_CHANNELS:
        return f"head_dim {expert.head_dim}, not a power of two in {2 * LEAST}..{MOST_CHANNELS}"
    for name, size in (
        ("width", expert.width),
        ("mlp", expert.mlp),
        ("tokens per camera", config.vision.tokens),
    ):
        if size % LEAST:
            return f"{name} {size}, not a multiple of {LEAST}"
    return None


def _divisor(size: int, wanted: int) -> int:
    """The greatest power of two up to `wanted` that divides `size`."""
    return min(wanted, size & -size)


def _fitted_split(tiles: SplitTiles, depth: int, width: int) -> SplitTiles:
    splits = _divisor(depth // LEAST, tiles.splits)
    return replace(
        tiles,
        columns=_divisor(width, tiles.columns),
        splits=splits,
        depth=_divisor(depth // splits, tiles.depth),
    )
