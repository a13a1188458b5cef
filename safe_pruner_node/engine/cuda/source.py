"""A kernel's source as one text: the compiler is given no files."""

from __future__ import annotations

import re
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def read_source(path: Path) -> str:
    """CUDA C++ of a file, with what it includes from its folder in place."""
    return _INCLUDE.sub(lambda found: (path.parent / found[1]).read_text(), path.read_text())
