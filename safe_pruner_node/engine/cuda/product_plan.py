"""How to cut a product into tiles: by a simple model of what a multiprocessor does with one.

The model is off by 24 % at most for what was measured on an H200, 57 plans of 12 products with 320
to 896 rows (`python test/engine/product_checks.py`); what it chooses is within 5 % of the best of
those, with what further terms cost their reader.

Shapes: N rows, F features, K depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product as every
from math import ceil

from safe_pruner_node.engine.cuda.product import (
    DEPTH,
    MOST_ROWS,
    MOST_SUMS,
    ROW_STEP,
    After,
    Plan,
)

CLUSTERS = ((1, 2), (2, 1), (1, 1))
"""Blocks with the same features and rows. More than two find no place on all multiprocessors of an
H200: 30 clusters of four, 39 of three."""

TENSOR_CORES = 2048
"""Multiply-adds a cycle."""
SHARED_MEMORY = 128
"""Bytes a cycle: what tensor cores read, and what is brought for them."""
ARRIVING = 60
"""Bytes a cycle that come from L2."""
MEMORY = 1950
"""Bytes a cycle for the whole GPU."""
LEAVING = 1000
"""Likewise, of further terms, which are written and read again."""
OVERHEAD = 1.15
"""Of a step over its slowest resource."""
BEGINNING = 3000
"""Cycles from the end of the kernel before to the first product, and from the last to the end."""
PER_ROW = {After.NOTHING: 12, After.BIAS: 12, After.BIAS_GELU: 16, After.GATED: 8}
"""Cycles in which a tile's results leave, for a row of 128 features."""


def cycles(
    plan: Plan, n: int, features: int, depth: int, after: After, multiprocessors: int
) -> float:
    """What a product takes, in cycles of the multiprocessors."""
    steps = ceil(ceil(depth / DEPTH) / plan.splits)
    arithmetic = DEPTH * plan.features * plan.rows / TENSOR_CORES
    # Every product reads its own 64 features and all rows of the tile, 16 of K at a time.
    operands = DEPTH // 16 * 2 * plan.pieces * (64 + plan.rows) * 32
    step = max(
        arithmetic,
        (operands + plan.stage_bytes) / SHARED_MEMORY,
        plan.stage_bytes / ARRIVING,
    )
    tile = OVERHEAD * steps * step + PER_ROW[after] * plan.pieces * plan.rows
    rounds = ceil(plan.units(n, features) / (multiprocessors // plan.cluster))
    leaving = (plan.splits - 1) * n * features * 2 / LEAVING
    return BEGINNING + max(rounds * tile, features * depth * 2 / MEMORY) + leaving


def plans(n: int, depth: int, after: After, most_splits: int) -> Iterator[Plan]:
    """All that the kernel can do."""
    steps = ceil(depth / DEPTH)
    for cluster, pieces, rows, splits in every(
        CLUSTERS, (1, 2), range(ROW_STEP, MOST_ROWS + 1, ROW_STEP), range(1, most_splits + 1)
    ):
        plan = Plan(rows, pieces, *cluster, splits)
        whole = ceil(steps / splits) * (splits - 1) < steps  # no split is left with nothing
        useful = rows < n + ROW_STEP and (plan.cluster_rows == 1 or rows < n)
        gated = after is not After.GATED or pieces == 2
        if whole and useful and gated and plan.sums <= MOST_SUMS:
            yield plan


@cache
def plan_for(
    n: int, features: int, depth: int, after: After, most_splits: int, multiprocessors: int
) -> Plan:
    """The best plan by the model.

    Args:
        n: Rows, 1 or more.
        features: Of the weight matrix, gates and what they are multiplied with both.
        depth: K.
        after: What follows; only `NOTHING` can be split.
        most_splits: Terms that may be left to who reads the result.
        multiprocessors: Of the GPU.
    """
    return min(
        plans(n, depth, after, most_splits),
        key=lambda plan: cycles(plan, n, features, depth, after, multiprocessors),
    )
