"""PIL's bilinear resize where PIL does not run: the same pixels from tensors on a GPU.

`ImagingResample` of Pillow, for 8-bit channels: fixed-point weights with 22 fractional bits, along
the rows first, rounded to 8 bits, then along the columns. Sums of integers have no order, so every
device gives the same bits. Pillow 13 begins with the columns where an image is much taller than
wide; such an image differs by one grey level here and there, as it does between versions of Pillow.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

_FRACTION_BITS = 22
"""Pillow's PRECISION_BITS: 32, less the 8 of a pixel and 2 against overflow."""
_HALF = 1 << (_FRACTION_BITS - 1)


def resize_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize images as PIL's BILINEAR does: antialiased when it shrinks.

    Args:
        pixels: uint8, [B, h, w, 3].
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        uint8, [B, height, width, 3].
    """
    return _resize_axis(_resize_axis(pixels, 2, width), 1, height)


def _resize_axis(pixels: Tensor, axis: int, length: int) -> Tensor:
    """Resize rows (1) or columns (2) of [B, h, w, 3]; T old pixels may be part of a new one."""
    source, weights = _taps(pixels.shape[axis], length, pixels.device)
    taps = pixels.index_select(axis, source.flatten()).unflatten(axis, source.shape)
    weights = weights.view(*weights.shape, *[1] * (pixels.ndim - axis - 1))  # [length, T, 1...]
    total = (taps * weights).sum(axis + 1, dtype=torch.int32)
    # Bilinear weights are not negative and add up to one: nothing to clip.
    rounded: Tensor = (total + _HALF) >> _FRACTION_BITS
    return rounded.to(torch.uint8)


@cache
def _taps(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which old pixels make a new one, and how much of each: int32, [n_out, T] both.

    In Pillow's order of operations (`precompute_coeffs`, `normalize_coeffs_8bpc`), because a
    weight that differs in its last bit may round a pixel the other way.

    Kept for good: a captured graph reads the tensors where they are.
    """
    scale = n_in / n_out
    reach = max(scale, 1.0)  # half the width of the triangle, old pixels
    centre = (np.arange(n_out) + 0.5) * scale  # [n_out]
    first = np.maximum(np.trunc(centre - reach + 0.5), 0.0)
    end = np.minimum(np.trunc(centre + reach + 0.5), n_in)
    source = first[:, None] + np.arange(int(np.ceil(reach)) * 2 + 1)  # [n_out, T]
    distance = np.abs((source - centre[:, None] + 0.5) * (1.0 / reach))
    weights = np.where(source < end[:, None], np.maximum(1.0 - distance, 0.0), 0.0)
    total = np.cumsum(weights, axis=1)[:, -1:]  # one after the other, as a C loop adds
    fixed = np.trunc(0.5 + weights / total * (1 << _FRACTION_BITS))
    source = np.minimum(source, n_in - 1)  # beyond the end the weight is 0
    return (
        torch.from_numpy(source.astype(np.int32)).to(device),
        torch.from_numpy(fixed.astype(np.int32)).to(device),
    )
