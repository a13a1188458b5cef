"""Attention inside images in one kernel of our own: `image_attention.cu`.

Shapes: N rows (patches of all images), D width, h heads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_pruner_node.engine.cuda.available import ARCH, available
from safe_pruner_node.engine.cuda.source import read_source
from safe_pruner_node.pi05.config import VisionConfig

if TYPE_CHECKING:
    from safe_pruner_node.engine.cuda.compile import CudaKernel

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "image_attention"

DIM, KEYS = 72, 256
"""Channels of a head, patches of an image."""
ROWS = 64
"""Of a warpgroup."""


class Arguments(ctypes.Structure):
    """`ImageAttention` of the source."""

    _fields_ = (("qkv", ctypes.c_void_p), ("out", ctypes.c_void_p))


def defines(heads: int, warpgroups: int) -> dict[str, int]:
    """Macros of the source."""
    return {"HEADS": heads, "DIM": DIM, "KEYS": KEYS, "WARPGROUPS": warpgroups}


def shared_bytes(warpgroups: int) -> int:
    """Of a program: keys, values and its rows."""
    return (2 * KEYS + warpgroups * ROWS) * DIM * 2 + 1024


def warpgroups_for(tiles: int, multiprocessors: int) -> int:
    """Warpgroups of a program: two share keys and values, where not all tiles run at once.

    Args:
        tiles: Of `ROWS` rows of one head.
        multiprocessors: Of the GPU.
    """
    return 1 if tiles <= multiprocessors else 2


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
    """

    def __init__(self, heads: int) -> None:
        self._heads = heads
        self._multiprocessors = torch.cuda.get_device_properties().multi_processor_count
        self._kernels: dict[int, CudaKernel] = {}

    def __call__(self, qkv: Tensor) -> Tensor:
        """Attention of every image's patches to each other.

        Args:
            qkv: Queries, keys, values, bf16, contiguous, [N, 3D]; N is a multiple of `KEYS`.

        Returns:
            [N, D].

        Raises:
            RuntimeError: The kernel does not compile.
        """
        rows, columns = qkv.shape
        out = qkv.new_empty(rows, columns // 3)  # [N, D]
        tiles = rows * self._heads // ROWS
        warpgroups = warpgroups_for(tiles, self._multiprocessors)
        given = Arguments(qkv.data_ptr(), out.data_ptr())
        kernel = self._kernel(warpgroups)
        kernel.launch(tiles // warpgroups, 128 * warpgroups, given, dependent=True)
        return out

    def _kernel(self, warpgroups: int) -> CudaKernel:
        # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
        from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

        if warpgroups not in self._kernels:
            source, macros = read_source(SOURCE), defines(self._heads, warpgroups)
            shared = shared_bytes(warpgroups)
            self._kernels[warpgroups] = CudaKernel(source, NAME, ARCH, macros, shared)
        return self._kernels[warpgroups]
