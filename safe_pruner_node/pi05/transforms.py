"""What openpi and lerobot do to numbers and pixels before and after the model.

openpi: `openpi.transforms` and `openpi_client.image_tools`. lerobot: `NormalizerProcessorStep`
and `resize_with_pad_torch`. A checkpoint gets the treatment it was trained with (its `Origin`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from safe_pruner_node.pi05.resample import resize_bilinear
from safe_pruner_node.types import FloatArray, RgbImage

Origin: TypeAlias = Literal["openpi", "lerobot"]
NormMode: TypeAlias = Literal["quantile", "mean_std", "identity"]

OPENPI_EPS = 1e-6
"""openpi adds it to q99 - q01 and to std."""
LEROBOT_EPS = 1e-8
"""lerobot adds it to std, in the forward direction only; its quantiles have none."""


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one feature over the training data, [dim] each; absent ones are None."""

    mean: FloatArray | None = None
    std: FloatArray | None = None
    q01: FloatArray | None = None
    q99: FloatArray | None = None

    @property
    def dim(self) -> int:
        """Number of channels the statistics are for."""
        return next(len(s) for s in (self.q01, self.mean, self.std, self.q99) if s is not None)


@dataclass(frozen=True)
class NormStats:
    """How a checkpoint normalises its state and its actions.

    Attributes:
        state: Statistics of the proprioceptive state.
        actions: Statistics of the actions.
        origin: Whose formulas to use.
        state_mode: What the state is normalised by.
        action_mode: What the actions are normalised by.
    """

    state: FeatureStats
    actions: FeatureStats
    origin: Origin = "openpi"
    state_mode: NormMode = "quantile"
    action_mode: NormMode = "quantile"

    def normalize_state(self, state: FloatArray) -> FloatArray:
        """Map a state [..., dim] in robot units to the model's."""
        stats = self.state
        if self.state_mode == "quantile":
            return normalize_quantile(state, _known(stats.q01), _known(stats.q99), self._eps)
        if self.state_mode == "mean_std":
            eps = OPENPI_EPS if self.origin == "openpi" else LEROBOT_EPS
            return normalize_mean_std(state, _known(stats.mean), _known(stats.std), eps)
        return state

    def unnormalize_actions(self, actions: FloatArray) -> FloatArray:
        """Map model actions [..., A] to the robot's own [..., dim]; the padding is dropped."""
        stats = self.actions
        actions = actions[..., : stats.dim]
        if self.action_mode == "quantile":
            return unnormalize_quantile(actions, _known(stats.q01), _known(stats.q99), self._eps)
        if self.action_mode == "mean_std":
            eps = OPENPI_EPS if self.origin == "openpi" else 0.0
            return unnormalize_mean_std(actions, _known(stats.mean), _known(stats.std), eps)
        return actions

    @property
    def _eps(self) -> float:
        return OPENPI_EPS if self.origin == "openpi" else 0.0


def _known(values: FloatArray | None) -> FloatArray:
    if values is None:  # the loaders check that the mode's statistics are there
        raise ValueError("statistics of the chosen normalisation mode are absent")
    return values


def normalize_quantile(
    x: FloatArray, q01: FloatArray, q99: FloatArray, eps: float = OPENPI_EPS
) -> FloatArray:
    """Map [q01, q99] to [-1, 1], values outside go outside; all [..., dim]."""
    return (x - q01) / (q99 - q01 + eps) * 2.0 - 1.0


def unnormalize_quantile(
    x: FloatArray, q01: FloatArray, q99: FloatArray, eps: float = OPENPI_EPS
) -> FloatArray:
    """Inverse of `normalize_quantile`."""
    return (x + 1.0) / 2.0 * (q99 - q01 + eps) + q01


def normalize_mean_std(x: FloatArray, mean: FloatArray, std: FloatArray, eps: float) -> FloatArray:
    """Map to zero mean and unit deviation; all [..., dim]."""
    return (x - mean) / (std + eps)


def unnormalize_mean_std(
    x: FloatArray, mean: FloatArray, std: FloatArray, eps: float
) -> FloatArray:
    """Inverse of `normalize_mean_std` with the same eps."""
    return x * (std + eps) + mean


def pad_to_dim(x: FloatArray, dim: int) -> FloatArray:
    """Zero-pad the last axis to `dim` channels; wider input is returned as it is."""
    missing = max(0, dim - x.shape[-1])
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def absolute_actions(
    actions: FloatArray, state: FloatArray, delta_mask: NDArray[np.bool_]
) -> FloatArray:
    """Add the state to the channels that the policy predicts relative to it.

    Args:
        actions: Unnormalised actions, [H, dim].
        state: State the actions are relative to, in the same units, [dim].
        delta_mask: True where the channel is a delta, [dim].
    """
    return actions + np.where(delta_mask, state, 0.0)


def resize_with_pad(image: RgbImage, size: int) -> RgbImage:
    """Fit an image into a black square of side `size`, centred, as openpi does.

    PIL bilinear: antialiased when it shrinks.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    new_height, new_width = _fitted(height, width, size)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return square


def resize_with_pad_tensor(pixels: Tensor, size: int) -> Tensor:
    """`resize_with_pad` of [B, h, w, 3] on any device, see `resample`: [B, size, size, 3]."""
    height, width = pixels.shape[1:3]
    if height == width == size:
        return pixels
    new_height, new_width = _fitted(height, width, size)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    squares = pixels.new_zeros(len(pixels), size, size, 3)
    inside = squares[:, top : top + new_height, left : left + new_width]
    inside.copy_(resize_bilinear(pixels, new_height, new_width))
    return squares


def resize_with_pad_torch(images: Tensor, size: int) -> Tensor:
    """Fit images [B, 3, h, w] in [0, 1] into black squares, as lerobot does: no antialiasing."""
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    new_height, new_width = _fitted(height, width, size)
    resized = interpolate(
        images, size=(new_height, new_width), mode="bilinear", align_corners=False
    ).clamp(0.0, 1.0)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    bottom, right = size - new_height - top, size - new_width - left
    return pad(resized, (left, right, top, bottom))


def to_model_images(pixels: Tensor, size: int, origin: Origin = "openpi") -> Tensor:
    """Turn RGB images into the model's input, on the device where they are.

    openpi's has the same bits on every device (but see `resample` for tall images); of lerobot's
    the last ones may differ.

    Args:
        pixels: uint8, [B, h, w, 3].
        size: Pixels per side of the square that the model sees, S.
        origin: Whose resize to use.

    Returns:
        fp32 in [-1, 1], [B, 3, S, S].
    """
    if origin == "openpi":
        squares = _squares(pixels, size)  # [B, S, S, 3]
        values = _levels(pixels.device).index_select(0, squares.flatten().int())
        return values.view(squares.shape).permute(0, 3, 1, 2)
    unit = pixels.permute(0, 3, 1, 2).float() / 255.0  # [B, 3, h, w]
    return resize_with_pad_torch(unit, size) * 2.0 - 1.0


def _squares(pixels: Tensor, size: int) -> Tensor:
    """`resize_with_pad` where the images are: PIL on a CPU, what equals it elsewhere."""
    if pixels.device.type == "cpu":
        return torch.from_numpy(
            np.stack([resize_with_pad(image, size) for image in pixels.numpy()])
        )
    return resize_with_pad_tensor(pixels, size)


@cache
def _levels(device: torch.device) -> Tensor:
    """What the model gets for each of the 256 grey levels, fp32.

    A table, because a GPU divides by a constant as it multiplies by its reciprocal: other bits.
    Kept for good: a captured graph reads it where it is.
    """
    return (torch.arange(256.0) / 255.0 * 2.0 - 1.0).to(device)


def _fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after scaling the longer side to `size`."""
    ratio = max(width / size, height / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))
