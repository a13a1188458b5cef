import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # bench_gpu_side.py is imported by name


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Here and in processes of a test: the models are small, and on cores that others need too
    torch's threads spend far longer waiting for each other than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
