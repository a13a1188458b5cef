"""Attention inside images in one kernel of our own: `image_attention.cu`.

Shapes: N rows (patches of all images), D width, h heads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from safe_pruner_node.engine.cuda.available import ARCH, available
from safe_pruner_node.pi05.config import VisionConfig

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "image_attention"

DIM, KEYS = 72, 256
"""Channels of a head, patches of an image."""
WARPGROUPS = 2
"""Of a program; 64 rows each."""
SHARED_BYTES = 2 * KEYS * DIM * 2 + 1024


class Arguments(ctypes.Structure):
    """`ImageAttention` of the source."""

    _fields_ = (("qkv", ctypes.c_void_p), ("out", ctypes.c_void_p))


def defines(heads: int) -> dict[str, int]:
    """Macros of the source."""
    return {"HEADS": heads, "DIM": DIM, "KEYS": KEYS, "WARPGROUPS": WARPGROUPS}


def fits(config: VisionConfig, weight: Tensor) -> bool:
    """True when the kernel is for a tower, and for where its weights are.

    Args:
        config: The tower's sizes.
        weight: One of its matrices.
    """
    return (config.width // config.heads, config.tokens) == (DIM, KEYS) and available(weight)


class ImageAttention:
    """Attention of towers with so many heads, on the current device.

    Args:
        heads: h.

    Raises:
        RuntimeError: The kernel does not compile.
    """

    def __init__(self, heads: int) -> None:
        # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
        from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

        self._heads = heads
        source = SOURCE.read_text()
        self._kernel = CudaKernel(source, NAME, ARCH, defines(heads), SHARED_BYTES)

    def __call__(self, qkv: Tensor) -> Tensor:
        """Attention of every image's patches to each other.

        Args:
            qkv: Queries, keys, values, bf16, contiguous, [N, 3D]; N is a multiple of `KEYS`.

        Returns:
            [N, D].
        """
        rows, columns = qkv.shape
        out = qkv.new_empty(rows, columns // 3)  # [N, D]
        blocks = rows * self._heads // (64 * WARPGROUPS)
        given = Arguments(qkv.data_ptr(), out.data_ptr())
        self._kernel.launch(blocks, 128 * WARPGROUPS, given, dependent=True)
        return out
