import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.nano import train_tokenizer
from safe_pruner_node.pi05.transforms import FeatureStats, NormStats

ROOT = Path(__file__).resolve().parents[2]
PARITY_PYTHON = ROOT / ".venv-parity/bin/python"


def random_tiny(seed, config=TINY):
    """Every parameter random, the norms' too, so that no mechanism is idle."""
    model = Pi05(config).eval().requires_grad_(requires_grad=False)
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.2, generator=random)
    return model


@pytest.fixture
def tiny_model():
    return random_tiny


@pytest.fixture
def tiny_224():
    """TINY at openpi's fixed image size."""
    return replace(TINY, vision=replace(TINY.vision, image=224))


@pytest.fixture
def norm_stats():
    random = np.random.default_rng(0)

    def feature():
        q01 = random.normal(size=16)
        q99 = q01 + random.uniform(0.1, 2.0, size=16)
        return FeatureStats((q01 + q99) / 2, (q99 - q01) / 4, q01, q99)

    return NormStats(feature(), feature())


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(1024))
    return path


@pytest.fixture
def run_openpi(tmp_path):
    """Run a command of `openpi_side.py` on a folder, in which it leaves its answer."""

    def run(command, directory=tmp_path):
        assert PARITY_PYTHON.is_file(), (
            f"{PARITY_PYTHON.relative_to(ROOT)} is missing: `tools/setup.sh parity`, part of "
            "`make test`, installs openpi's own model; parity cannot be judged without it"
        )
        done = subprocess.run(
            [PARITY_PYTHON, Path(__file__).with_name("openpi_side.py"), command, directory],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run
