import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from safe_pruner_node.pi05.checkpoint import save_openpi
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
        scale = 0.02 if parameter.ndim == 4 else 0.2  # patches add up 588 pixels
        parameter.normal_(0.0, scale, generator=random)
    return model


@pytest.fixture(scope="session")
def tiny_model():
    return random_tiny


@pytest.fixture(scope="session")
def tiny_224():
    """TINY at openpi's fixed image size."""
    return replace(TINY, vision=replace(TINY.vision, image=224))


@pytest.fixture(scope="session")
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


def run_openpi_side(command, directory):
    """Run a command of `openpi_side.py` on a folder, in which it leaves its answer."""
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


@pytest.fixture(scope="session")
def run_openpi():
    return run_openpi_side


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Names, shapes and types of openpi's full-size model, from its own class on meta."""
    directory = tmp_path_factory.mktemp("published")
    run_openpi_side("keys", directory)
    return json.loads((directory / "answer.json").read_text())


CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def write_case(directory, model, stats, seed, valid_cameras, n_tokens):
    """Weights and one padded query, as openpi gets them; returns the trimmed query."""
    random = torch.Generator().manual_seed(100 + seed)
    config = model.config
    save_openpi(directory, model, stats, "robot")
    dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    sizes = json.dumps({**config.to_json(), "dtype": dtype})
    (directory / "sizes.json").write_text(sizes)
    size = config.vision.image
    images = {c: torch.rand(1, 3, size, size, generator=random) * 2 - 1 for c in valid_cameras}
    noise = torch.randn(1, config.horizon, config.action_dim, generator=random)
    tokens = torch.randint(0, config.vocab_size, (1, n_tokens), generator=random)
    padded = torch.zeros(1, config.max_prompt_tokens, dtype=torch.long)
    padded[:, :n_tokens] = tokens
    empty = -torch.ones(1, 3, size, size)
    np.savez(
        directory / "query.npz",
        noise=noise,
        tokens=padded,
        token_mask=torch.arange(config.max_prompt_tokens)[None] < n_tokens,
        **{f"image_{c}": images.get(c, empty) for c in CAMERAS},
        **{f"mask_{c}": np.array([c in images]) for c in CAMERAS},
    )
    return list(images.values()), tokens, noise


@pytest.fixture(scope="session")
def make_case():
    return write_case
