"""How much of a file the kernel still holds in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)


def cached_share(path: Path) -> float:
    """Share of a file's pages that can be read without the disk, 0..1, as the kernel says.

    Args:
        path: A file that is not empty.

    Raises:
        OSError: It cannot be read, or the kernel does not say.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)  # read nowhere: only its address is asked for
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        address, n_bytes = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content))
        failed = _LIBC.mincore(address, n_bytes, ctypes.c_void_p(pages.ctypes.data))
        del content  # the map closes when nothing points into it
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return float(np.mean(pages & 1))
