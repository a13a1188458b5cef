"""How far the pixels of the GPU's JPEG decoder are from the CPU's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.engine import stages
from safe_pruner_node.engine.nvjpeg import NvJpeg
from safe_pruner_node.inference.policy_step import MARGIN
from safe_pruner_node.robot.codecs import image_to_rgb
from safe_pruner_node.types import CameraFrame, RgbImage

_LEVELS_PER_UNIT = 127.5
"""Grey levels, 0..255, in the model's range of -1 to 1."""


def decoder_difference(
    decoder: NvJpeg, frames: Iterable[CameraFrame], side: int
) -> dict[str, dict[str, float]]:
    """Grey levels between the two decoders' pixels, over all frames.

    Args:
        decoder: The GPU's.
        frames: JPEGs.
        side: Pixels per side of the square that the model sees.

    Returns:
        ``whole``: of the images as large as they are. ``fitted``: of what the model sees, where
        the CPU may have decoded at half the size. ``mean`` and ``max`` of both.

    Raises:
        RuntimeError: The decoder does not take a frame.
    """
    whole: list[NDArray] = []
    fitted: list[NDArray] = []
    for frame in frames:
        images = decoder.decode([frame.data])
        if images is None:
            raise RuntimeError("nvJPEG does not take the benchmark's frames")
        pixels = images[0]  # [h, w, 3]
        reference = torch.from_numpy(image_to_rgb(frame).astype(np.int16))
        whole.append((pixels.cpu().to(torch.int16) - reference).abs().numpy().ravel())
        usual = image_to_rgb(frame, enough=MARGIN * side)
        fitted.append(np.abs(_fitted(pixels, side) - _fitted(_on(pixels, usual), side)).ravel())
    return {"whole": _mean_and_max(whole), "fitted": _mean_and_max(fitted)}


def _on(pixels: Tensor, image: RgbImage) -> Tensor:
    return torch.from_numpy(image).to(pixels.device)


def _fitted(pixels: Tensor, side: int) -> NDArray[np.float32]:
    """What the model sees, in grey levels, [1, 3, side, side]."""
    values: NDArray[np.float32] = stages.fit(side, "openpi", [pixels]).cpu().numpy()
    values *= _LEVELS_PER_UNIT
    return values


def _mean_and_max(differences: list[NDArray]) -> dict[str, float]:
    together = np.concatenate(differences)
    return {"mean": float(together.mean(dtype=np.float64)), "max": float(together.max())}
