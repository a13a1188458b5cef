"""A projection as the sum of projections of parts of its input, each of them a GEMM of one batch.

A GEMM with few rows and columns and a long inner dimension has too few output tiles for all
multiprocessors. Parts of the inner dimension give more; who reads the result adds them up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_linear(x: Tensor, weight: Tensor, at_most: int) -> Tensor:
    """Terms of x projected by a weight.

    Args:
        x: Rows, [N, D].
        weight: [D_out, D].
        at_most: Terms wanted; fewer where D does not split into multiples of 8 (16 bytes, what
            tensor cores are fed with).

    Returns:
        S terms whose sum is the projection, [S, N, D_out].
    """
    width = x.shape[1]
    terms = max(s for s in range(1, at_most + 1) if s == 1 or width % (8 * s) == 0)
    if terms == 1:
        return (x @ weight.T)[None]
    parts = x.unflatten(1, (terms, -1)).transpose(0, 1)  # [S, N, D/S]
    return torch.bmm(parts, weight.unflatten(1, (terms, -1)).permute(1, 2, 0))
