"""The way of camera images to the device: one copy into pinned memory, one transfer from there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safe_pruner_node.types import RgbImage


@dataclass(frozen=True)
class _Slot:
    """Memory for one camera's image, [h, w, 3] uint8.

    Attributes:
        image: The host's side, pinned where the device is a GPU.
        host: The same memory as a tensor.
        device: The device's side; on a CPU the same memory once more.
    """

    image: RgbImage
    host: Tensor
    device: Tensor


class Staging:
    """Memory for the images of one step, kept for the next one.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: dict[int, _Slot] = {}

    @torch.inference_mode()
    def place(self, camera: int, image: RgbImage) -> RgbImage:
        """Copy an image and begin its transfer; threads may do so for a camera each.

        Args:
            camera: Its place in the prefix.
            image: uint8, [h, w, 3], any strides.

        Returns:
            The copy, which `on_device` knows again; valid until the camera's next image.
        """
        slot = self._slots.get(camera)
        if slot is None or slot.image.shape != image.shape:
            slot = self._slots[camera] = self._slot(image.shape)
        np.copyto(slot.image, image)
        if slot.device is not slot.host:
            slot.device.copy_(slot.host, non_blocking=True)
        return slot.image

    def on_device(self, camera: int, image: RgbImage) -> Tensor:
        """An image on the device, [h, w, 3] uint8; it is placed now if it has not been yet.

        Args:
            camera: Its place in the prefix.
            image: What `place` gave, or any other.
        """
        slot = self._slots.get(camera)
        if slot is None or slot.image is not image:
            self.place(camera, image)
        return self._slots[camera].device

    def _slot(self, shape: tuple[int, ...]) -> _Slot:
        if self._device.type == "cpu":
            host = torch.empty(shape, dtype=torch.uint8)
            return _Slot(host.numpy(), host, host)
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return _Slot(host.numpy(), host, torch.empty_like(host, device=self._device))
