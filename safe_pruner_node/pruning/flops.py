"""What a prefill costs, by the paper's formula and as executed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillSize:
    """Sizes of a language model that a cost depends on.

    Attributes:
        width: d of the paper.
        mlp: m of the paper.
        depth: L of the paper.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels per head.
    """

    width: int
    mlp: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int


def paper_layer(n: int, width: int, mlp: int) -> float:
    """C(N) = 4Nd^2 + 2N^2 d + 3Ndm of one layer (appendix C); a multiply-add counts once."""
    return float(4 * n * width**2 + 2 * n**2 * width + 3 * n * width * mlp)


def paper_prefill(
    n: int, size: PrefillSize, layer: int | None = None, n_kept: int | None = None
) -> float:
    """Cost of L layers, ls C(N) + (L - ls) C(N~) (appendix C).

    Args:
        n: Prefix tokens N before pruning.
        size: The language model.
        layer: ls; None when nothing is pruned.
        n_kept: Prefix tokens N~ after pruning.
    """
    if layer is None or n_kept is None:
        return size.depth * paper_layer(n, size.width, size.mlp)
    full = layer * paper_layer(n, size.width, size.mlp)
    return full + (size.depth - layer) * paper_layer(n_kept, size.width, size.mlp)


def layer_macs(n: int, size: PrefillSize, n_rows: int | None = None) -> float:
    """Multiply-adds of one layer with its true key/value width.

    Args:
        n: Tokens whose keys and values are computed.
        size: The language model.
        n_rows: Tokens that have a query and go through attention and MLP; None is all.
    """
    rows = n if n_rows is None else n_rows
    query_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    keys_values = 2 * n * size.width * kv_width
    query_output = 2 * rows * size.width * query_width
    attention = 2 * rows * n * query_width
    return float(keys_values + query_output + attention + 3 * rows * size.width * size.mlp)


def executed_prefill(
    n: int, size: PrefillSize, layer: int | None = None, n_kept: int | None = None
) -> float:
    """Floating point operations of the layers as this project runs them: 2 per multiply-add.

    The last layer computes keys and values only, and on a pruned step layer ls-1 computes
    queries, attention and MLP of the kept rows only. Arguments as `paper_prefill`.
    """
    last_n = n if n_kept is None or layer is None else n_kept
    last = layer_macs(last_n, size, n_rows=0)
    if layer is None or n_kept is None:
        return 2.0 * ((size.depth - 1) * layer_macs(n, size) + last)
    full = (layer - 1) * layer_macs(n, size)
    boundary = layer_macs(n, size, n_rows=n_kept)
    late = (size.depth - layer - 1) * layer_macs(n_kept, size)
    return 2.0 * (full + boundary + late + last)
