"""What a worker process does to itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

RESIDENT = """
import sys
from safe_pruner_node.inference.process import keep_freed_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident_bytes()
images = [bytearray(b"x") * 2_000_000 for _ in range(8)]
del images
print(resident_bytes() - before)
"""


@pytest.mark.parametrize(("keep", "least", "most"), [("keep", 14e6, 40e6), ("return", 0, 2e6)])
def test_freed_images_stay_with_the_process(keep, least, most):
    """Without it glibc gives them back, and every step pays for their pages again."""
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, keep], check=True, capture_output=True, text=True
    )
    assert least <= int(run.stdout) <= most
