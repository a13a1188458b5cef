"""What several rooms' tests need: a checkpoint that fits the S1 and steps in milliseconds."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# Without a GPU the kernels' tests run in Triton's interpreter; Triton looks when it is loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Triton and Mesa's software GL have an LLVM each. In one process Triton has to be loaded first,
# else it crashes; the evaluation loads its policy before it draws.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A random-weight S1 checkpoint in openpi layout, 64 tokens per camera."""
    from safe_pruner_node.pi05 import nano
    from safe_pruner_node.pi05.checkpoint import save_openpi
    from safe_pruner_node.pi05.config import NANO

    config = replace(
        NANO,
        vision=replace(NANO.vision, width=32, depth=1, mlp=32, heads=2, image=112),
        vlm=replace(NANO.vlm, width=32, depth=5, mlp=48, heads=2, head_dim=16),
        expert=replace(NANO.expert, width=48, depth=5, mlp=48, heads=2, head_dim=16),
        action_dim=32,  # the S1's 16 padded, as in the published model
        horizon=50,
        name="small",
    )
    directory = tmp_path_factory.mktemp("small_checkpoint")
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(nano.train_tokenizer(config.vocab_size))
    model = nano.random_model(config, seed=0)
    save_openpi(directory, model, nano.s1_norm_stats(), nano.ASSET_ID, tokenizer)
    return directory
