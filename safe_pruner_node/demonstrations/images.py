"""The policy's own image size, without the black bands that it adds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from safe_pruner_node.types import RgbImage


def fit(image: RgbImage, size: int) -> RgbImage:
    """An image scaled so that its longer side is ``size``, as openpi scales it.

    These are the pixels between the bands of :func:`pi05.transforms.resize_with_pad` (PIL
    bilinear, antialiased): a policy sees in training what it will see on the robot.

    Args:
        image: [height, width, 3].
        size: Longer side of the result, pixels.
    """
    height, width = fitted(image.shape[0], image.shape[1], size)
    if (height, width) == image.shape[:2]:
        return image
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.uint8)


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after scaling the longer side to ``size``."""
    ratio = max(width / size, height / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))
