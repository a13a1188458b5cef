"""The K best visual tokens, with a least number for every camera."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k_with_floors(scores: Tensor, k: int, cameras: Sequence[slice], floor: int = 0) -> Tensor:
    """Indices of the best `k` tokens such that every camera keeps its best `floor`.

    The floors are inside `k`, not on top of it. Ties go to the lower index. Shapes depend on
    the arguments alone and nothing is read back, so the call can be part of a CUDA graph.

    Args:
        scores: Token scores, [N].
        k: Tokens to keep, at most N.
        cameras: Each camera's token range.
        floor: Least number per camera; a camera with fewer tokens keeps them all.

    Returns:
        Ascending indices, [k] int64.
    """
    order = scores.argsort(descending=True, stable=True)  # [N], stable: lower index first
    if floor > 0:
        owed = torch.zeros(len(scores), dtype=torch.uint8, device=scores.device)
        for camera in cameras:
            best = scores[camera].argsort(descending=True, stable=True)[:floor]
            owed.index_fill_(0, camera.start + best, 1)  # no transfer, unlike owed[...] = 1
        # Owed tokens move to the front; within both groups the order by score stays.
        order = order[owed[order].argsort(descending=True, stable=True)]
    return order[:k].sort().values
