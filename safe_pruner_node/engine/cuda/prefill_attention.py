"""Attention of the language model's prefill in one kernel of our own: `prefill_attention.cu`.

Shapes: N query tokens, h query heads, M keys, d channels of a head.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from safe_pruner_node.engine.cuda.available import ARCH, available
from safe_pruner_node.pi05.config import GemmaConfig
from safe_pruner_node.pi05.model import KeyValue

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "prefill_attention"

THREADS, ROWS, KEYS, DIM, MOST_PARTS = 256, 128, 64, 256, 8
"""Of a program its threads and query rows; keys of a block; d; programs that share the keys."""
SHARED_BYTES = 2 * ROWS * DIM + 4 * 2 * KEYS * DIM + 4 * ROWS + 1024


class Arguments(ctypes.Structure):
    """`PrefillAttention` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "valid", "out")),
        *((name, ctypes.c_int) for name in ("n_rows", "n_keys", "n_text")),
    )


def fits(config: GemmaConfig, weight: Tensor) -> bool:
    """True when the kernel is for a language model, and for where its weights are.

    Args:
        config: The model's sizes.
        weight: One of its matrices.
    """
    return (config.head_dim, config.kv_heads) == (DIM, 1) and available(weight)


def parts(tiles: int, n_keys: int, multiprocessors: int) -> int:
    """How many programs share the keys of a tile of rows: all that can run at once.

    Args:
        tiles: Of rows.
        n_keys: M.
        multiprocessors: Of the GPU; each has room for one program.
    """
    return max(1, min(multiprocessors // tiles, -(-n_keys // KEYS), MOST_PARTS))


class PrefillAttention:
    """Attention whose query heads all share one key/value head, on the current device.

    Raises:
        RuntimeError: The kernel does not compile.
    """

    def __init__(self) -> None:
        # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
        from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

        self._kernel = CudaKernel(SOURCE.read_text(), NAME, ARCH, {}, SHARED_BYTES)
        self._multiprocessors = torch.cuda.get_device_properties().multi_processor_count

    def __call__(
        self, query: Tensor, cache: KeyValue, valid_text: Tensor | None, n_text: int
    ) -> Tensor:
        """Attention of every query to all keys.

        Args:
            query: bf16, contiguous, [N, h, d].
            cache: Keys and values, contiguous, [1, 1, M, d] each.
            valid_text: How many of the last `n_text` keys are attended, [] int64, on the device;
                None: all.
            n_text: Keys that may be padding at their end; only with `valid_text`.

        Returns:
            [N, h * d].
        """
        keys, values = cache
        rows, n_keys = query.shape[0] * query.shape[1], keys.shape[2]
        out = query.new_empty(len(query), query.shape[1] * DIM)  # [N, h * d]
        pointers = (query, keys, values, valid_text, out)
        given = Arguments(
            *(None if t is None else t.data_ptr() for t in pointers), rows, n_keys, n_text
        )
        tiles = -(-rows // ROWS)
        shares = parts(tiles, n_keys, self._multiprocessors)
        self._kernel.launch(tiles * shares, THREADS, given, cluster=shares, dependent=True)
        return out
