"""The K best visual tokens, with a least number for every camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """How many tokens are kept; the same for every query of a kind.

    Attributes:
        k: Tokens kept of all cameras.
        floor: Least number per camera, inside `k`.
        tokens: Visual tokens of each camera, in prefix order.
    """

    k: int
    floor: int
    tokens: tuple[int, ...]


def select(selection: Selection, scores: Tensor) -> Tensor:
    """The tokens to keep by scores [N_vis]; see `top_k_with_floors`."""
    cameras = camera_slices(selection.tokens)
    return top_k_with_floors(scores, selection.k, cameras, selection.floor)


def camera_slices(tokens: Sequence[int]) -> tuple[slice, ...]:
    """Each camera's range of visual token indices, from the tokens of each."""
    slices, start = [], 0
    for count in tokens:
        slices.append(slice(start, start + count))
        start += count
    return tuple(slices)


def top_k_with_floors(scores: Tensor, k: int, cameras: Sequence[slice], floor: int = 0) -> Tensor:
    """Indices of the best `k` tokens such that every camera keeps its best `floor`.

    The floors are inside `k`, not on top of it. Ties go to the lower index, NaN counts as
    infinite. Shapes depend on the arguments alone and nothing is read back, so the call can be
    part of a CUDA graph. Ranks come from comparing every pair: at N <= 768 that is a few cheap
    kernels, and a sort on a GPU is not.

    Args:
        scores: Token scores, [N].
        k: Tokens to keep, at most N.
        cameras: Each camera's token range.
        floor: Least number per camera; a camera with fewer tokens keeps them all.

    Returns:
        Ascending indices, [k] int64.
    """
    n = len(scores)
    index = torch.arange(n, device=scores.device)
    values = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    tied = values[None] == values[:, None]
    # [N, N]: True where the token of the column goes before that of the row.
    before = (values[None] > values[:, None]) | (tied & (index[None] < index[:, None]))
    if floor > 0:
        owed = torch.zeros(n, dtype=torch.bool, device=scores.device)
        for camera in cameras:
            owed[camera] = before[camera, camera].sum(1) < floor
        n_owed = sum(min(floor, camera.stop - camera.start) for camera in cameras)
        keep = owed | ((before & ~owed).sum(1) < k - n_owed)
    else:
        keep = before.sum(1) < k
    # Kept tokens go to their place in ascending order, the others to one slot that is cut off.
    place = (keep.cumsum(0) - 1).masked_fill(~keep, k)  # [N]
    return index.new_empty(k + 1).scatter_(0, place, index)[:k]
