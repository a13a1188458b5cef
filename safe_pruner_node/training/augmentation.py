"""Image augmentation on the device: openpi's, or its colours alone.

openpi (`preprocess_observation`): a random crop of 95 % and a rotation of up to 5 degrees of
every camera that is not on a wrist; brightness 0.3, contrast 0.4 and saturation 0.5 of all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

AugmentationKind = Literal["openpi", "colour", "none"]

CROP_SHARE = 0.95
ROTATION_RAD = 0.0873  # 5 degrees
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5


def squares(frames: Tensor, size: int) -> Tensor:
    """Frames [B, h, w, 3] uint8 as the model's input [B, 3, size, size] in [-1, 1].

    Centred in a black square, as openpi's resize_with_pad leaves them.
    """
    images = frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    height, width = images.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    border = (left, size - width - left, top, size - height - top)
    return pad(images, border, value=-1.0)


def augmented(
    images: Tensor, kind: AugmentationKind, *, on_wrist: bool, random: torch.Generator
) -> Tensor:
    """Images [B, 3, S, S] in [-1, 1], each changed in its own way.

    Args:
        images: One camera's.
        kind: ``openpi``, ``colour`` (no geometry: for cameras whose mount jitters in the data)
            or ``none``.
        on_wrist: Wrist cameras are never cropped or turned.
        random: On the images' device.
    """
    if kind == "none":
        return images
    if kind == "openpi" and not on_wrist:
        images = _crop_and_turn(images, random)
    return _jitter_colours(images, random)


def _uniform(count: int, low: float, high: float, random: torch.Generator) -> Tensor:
    draw = torch.rand(count, generator=random, device=random.device)
    return low + (high - low) * draw


def _crop_and_turn(images: Tensor, random: torch.Generator) -> Tensor:
    count = len(images)
    angle = _uniform(count, -ROTATION_RAD, ROTATION_RAD, random)
    shift = [_uniform(count, CROP_SHARE - 1.0, 1.0 - CROP_SHARE, random) for _ in range(2)]
    cos, sin = CROP_SHARE * angle.cos(), CROP_SHARE * angle.sin()
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = affine_grid(rows, list(images.shape), align_corners=False)
    return grid_sample(images + 1.0, grid, align_corners=False) - 1.0  # black outside


def _jitter_colours(images: Tensor, random: torch.Generator) -> Tensor:
    """Brightness, contrast about the mean grey, saturation about each pixel's grey."""
    count = len(images)
    factors = (
        _uniform(count, 1 - amount, 1 + amount, random)[:, None, None, None]
        for amount in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    brightness, contrast, saturation = factors
    pixels = (images + 1.0) / 2.0 * brightness
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[None, :, None, None]
    grey = (pixels * weights).sum(1, keepdim=True)  # [B, 1, S, S]
    mean = grey.mean((1, 2, 3), keepdim=True)
    pixels = mean + contrast * (pixels - mean)
    grey = mean + contrast * (grey - mean)
    pixels = grey + saturation * (pixels - grey)
    return pixels.clamp(0.0, 1.0) * 2.0 - 1.0
