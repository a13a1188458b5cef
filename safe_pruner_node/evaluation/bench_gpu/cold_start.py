"""Section ``cold_start``: from the worker's spawn to ready where no kernel was ever compiled.

What ``end_to_end`` measures on its start is a machine that has run the policy before. Here every
compiler's cache is an empty folder, as after an installation.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safe_pruner_node.evaluation.bench_gpu.end_to_end import ROBOT, Worker, made_checkpoint
from safe_pruner_node.evaluation.bench_gpu.page_cache import cached_share
from safe_pruner_node.evaluation.bench_gpu.section import Bench
from safe_pruner_node.pi05.checkpoint import WEIGHTS
from safe_pruner_node.resources import resource

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Environment variables that say where compiled kernels are kept."""


def cold_start(bench: Bench) -> Iterator[dict[str, Any]]:
    """Start the node's worker once, with empty compiler caches.

    Yields:
        When it was ready and what it did until then, as ``end_to_end`` has it, and the share of
        the checkpoint's weights that was in the page cache before.

    Raises:
        RuntimeError: The worker failed or died.
    """
    with made_checkpoint(bench, resource(ROBOT)) as settings, empty_caches():
        in_memory = cached_share(settings.engine.checkpoint / WEIGHTS)
        worker = Worker(settings)
        try:
            start = worker.start()
        finally:
            worker.client.stop()
    bench.say(f"worker ready after {start['ready_s']:.1f} s, compiling every kernel")
    yield {"start": start, "checkpoint_in_page_cache": in_memory}


@contextmanager
def empty_caches() -> Iterator[None]:
    """For this process and those that it spawns."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory() as folder:
        for name in CACHES:
            os.environ[name] = str(Path(folder) / name)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
