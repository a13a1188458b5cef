"""Compiled kernels on disk, so that only the first start on a machine waits for the compiler.

They are where Triton keeps its own (TRITON_CACHE_DIR, else a folder in the home directory).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from triton.runtime.cache import get_cache_manager

_FILE = "kernel.cubin"
_DIGEST_BYTES = hashlib.sha256().digest_size


def key_of(*parts: str) -> str:
    """The same for the same parts: everything that a cubin depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cached(key: str, build: Callable[[], bytes]) -> bytes:
    """What was built for this key before, else what `build` gives now.

    A file that is damaged counts as none. Processes that build at the same time do no harm: a file
    is there whole or not at all.

    Args:
        key: From `key_of`.
        build: Makes the cubin; its errors pass, and nothing is kept.

    Raises:
        OSError: The folder cannot be written to; Triton's own kernels would say the same.
    """
    folder = get_cache_manager(key)
    path = folder.get_file(_FILE)
    known = None if path is None else _read(Path(path))
    if known is not None:
        return known
    cubin = build()
    folder.put(hashlib.sha256(cubin).digest() + cubin, _FILE)
    return cubin


def _read(path: Path) -> bytes | None:
    """The cubin behind its digest; None when it is not the one that was written."""
    content = path.read_bytes()
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if digest == hashlib.sha256(cubin).digest() else None
