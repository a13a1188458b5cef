"""Where an image lies in the model's square, and which tokens see only the black around it."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.inference.overlay import PATCH
from safe_pruner_node.pi05.transforms import resize_with_pad
from safe_pruner_node.types import FloatArray, RgbImage


def black_tokens(record: SaliencyRecord) -> NDArray[np.bool_]:
    """True where a token's patch lies fully in a letterbox band, [N_vis]."""
    masks = []
    for name, tokens in record.cameras:
        grid = math.isqrt(tokens)
        shown = _shown(record.about["resolution"][name], grid)
        masks.append(~shown.reshape(grid, PATCH, grid, PATCH).any((1, 3)).ravel())
    return np.concatenate(masks)


def map_over_image(rgb: RgbImage, saliency: FloatArray, resolution: tuple[int, int]) -> FloatArray:
    """One camera's map as large as its image, bands cut off.

    Args:
        rgb: The image, for its size.
        saliency: One value per token, [tokens].
        resolution: Height and width of the camera's images when they went into the model.

    Returns:
        [height, width] of `rgb`.
    """
    grid = math.isqrt(len(saliency))
    shown = _shown(resolution, grid)
    square = np.kron(saliency.reshape(grid, grid), np.ones((PATCH, PATCH)))
    part = square[shown.any(1)][:, shown.any(0)]
    size = (rgb.shape[1], rgb.shape[0])
    return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_NEAREST), dtype=np.float64)


def _shown(resolution: tuple[int, int], grid: int) -> NDArray[np.bool_]:
    """True where the square shows the image and not a band, [side, side]."""
    white: RgbImage = np.full((*resolution, 3), 255, np.uint8)
    return np.asarray(resize_with_pad(white, grid * PATCH)[..., 0] > 0)
