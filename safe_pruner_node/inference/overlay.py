"""Draws which image patches a step kept: pruned ones dimmed, kept ones as they are."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.types import RgbImage

PATCH = 14
"""Pixels per side of one patch of the vision tower (SigLIP So400m/14)."""
MAX_WIDTH = 480
_DIM = 0.35
_OUTLINE = (90, 220, 120)
_JPEG_QUALITY = 80


def draw_overlay(rgb: RgbImage, kept: NDArray[np.int64], n_tokens: int) -> RgbImage:
    """The image with pruned patches dimmed and a thin line around the kept ones.

    The model sees the image fitted into a square with black bars (``resize_with_pad``), and the
    patch grid covers that square. So each pixel is taken to its place in the square first; bars,
    and patches that lie in them, do not appear. Pixels of kept patches stay untouched: the line
    is drawn on the dimmed side.

    Args:
        rgb: What the policy saw, before resizing, [height, width, 3].
        kept: Kept token indices, row-major in the patch grid, [K].
        n_tokens: Tokens of this camera; a square number (256 is 16 x 16).

    Returns:
        [height, width, 3], at most ``MAX_WIDTH`` wide, aspect kept.
    """
    image = _shrink(rgb)
    grid = math.isqrt(n_tokens)
    is_kept = np.zeros(n_tokens, bool)
    is_kept[kept] = True
    if is_kept.all():
        return image
    rows, columns = _patch_of_pixels(rgb.shape[:2], image.shape[:2], grid)
    mask = is_kept.reshape(grid, grid)[rows][:, columns]  # [height, width]
    drawn = np.where(mask[..., None], image, image * _DIM).astype(np.uint8)
    grown: NDArray = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    drawn[grown.astype(bool) & ~mask] = _OUTLINE
    return drawn


def encode_jpeg(rgb: RgbImage) -> bytes:
    """JPEG bytes of an image [height, width, 3]."""
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)
    )
    return data.tobytes()


def _shrink(rgb: RgbImage) -> RgbImage:
    height, width = rgb.shape[:2]
    if width <= MAX_WIDTH:
        return rgb
    size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _patch_of_pixels(
    source: tuple[int, ...], drawn: tuple[int, ...], grid: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patch row of each pixel row and patch column of each pixel column of the drawn image."""
    side = grid * PATCH
    ratio = max(source) / side
    patches = []
    for length, pixels in zip(source, drawn, strict=True):
        fitted = max(1, int(length / ratio))  # whole pixels and centring as in resize_with_pad
        bar = (side - fitted) // 2
        in_square = bar + (np.arange(pixels) + 0.5) * fitted / pixels
        patches.append((in_square // PATCH).astype(np.int64))
    return patches[0], patches[1]
