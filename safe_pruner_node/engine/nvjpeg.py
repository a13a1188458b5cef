"""JPEG decoded on the GPU, by nvJPEG as torchvision has it."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from safe_pruner_node.errors import ConfigError

_LOG = logging.getLogger(__name__)
_PROBE_SIZE, _PROBE_COLOR = (48, 32), (200, 40, 90)
_PROBE_TOLERANCE = 8
"""Grey levels; JPEG itself takes two or three."""


class NvJpeg:
    """Decodes JPEGs into a CUDA device's memory. Its pixels are not libjpeg's to the last bits.

    Args:
        device: Where the images are to be.

    Raises:
        ImportError: torchvision is not there.
        AttributeError: torchvision is not whole.
        OSError: One of its libraries is not there.
        RuntimeError: It does not fit torch, has no nvJPEG, or nvJPEG does not decode.
    """

    def __init__(self, device: torch.device) -> None:
        # torchvision is no requirement: only who decodes with it imports it.
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415

        self._decode_jpeg, self._mode, self._device = decode_jpeg, ImageReadMode.RGB, device
        self._complained = False
        self._probe()

    def decode(self, jpegs: Sequence[bytes]) -> list[Tensor] | None:
        """Decode a batch; the host waits for it.

        Args:
            jpegs: Whole files.

        Returns:
            uint8, [h, w, 3] each, whose memory is [3, h, w]; whatever runs next on the current
            stream may read them. None: nvJPEG does not take one of them.
        """
        try:
            return self._decode(jpegs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._complained:  # once: it may go on like this, 30 times a second
                _LOG.warning("nvJPEG does not take a frame, the CPU will: %s", _first_line(error))
                self._complained = True
            return None

    def _decode(self, jpegs: Sequence[bytes]) -> list[Tensor]:
        # A tensor wants memory that it could write to.
        data = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        images = self._decode_jpeg(data, mode=self._mode, device=self._device)  # [3, h, w] each
        return [image.permute(1, 2, 0) for image in images]

    def _probe(self) -> None:
        """Decode an image whose pixels are known."""
        file = io.BytesIO()
        Image.new("RGB", _PROBE_SIZE, _PROBE_COLOR).save(file, "JPEG")
        (pixels,) = self._decode([file.getvalue()])
        width, height = _PROBE_SIZE
        error = pixels.cpu().int() - torch.tensor(_PROBE_COLOR)  # [h, w, 3]
        if pixels.shape != (height, width, 3) or int(error.abs().max()) > _PROBE_TOLERANCE:
            raise RuntimeError("nvJPEG decodes an image to another one")


def choose_decoder(name: str, device: torch.device) -> NvJpeg | None:
    """The decoder of a name in `settings.IMAGE_DECODERS`; None leaves it to the CPU.

    Raises:
        ConfigError: ``nvjpeg`` where there is no GPU, or where it does not decode.
    """
    if name == "cpu" or (name == "auto" and device.type != "cuda"):
        return None
    expected = "auto or cpu, or a GPU and the torchvision that fits torch"
    if device.type != "cuda":
        raise ConfigError(
            "parameter", "image_decoder", f"{name}, on device {device.type}", expected
        )
    try:
        return NvJpeg(device)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = _first_line(error)
    if name == "nvjpeg":
        raise ConfigError("parameter", "image_decoder", f"{name}, but {reason}", expected)
    _LOG.warning("JPEG is decoded by the CPU: %s", reason)
    return None


def _first_line(error: Exception) -> str:
    """What an error says, without the stack that torch's C++ adds to it."""
    return (str(error).splitlines() or [type(error).__name__])[0]
