import numpy as np
import pytest
import torch

from safe_pruner_node.pi05.config import NANO
from safe_pruner_node.pi05.nano import train_tokenizer
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.training.initial import fresh_model, grid_sines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(NANO.vocab_size))
    return PromptTokenizer(path, NANO.max_prompt_tokens)


def test_neighbouring_bins_of_the_state_look_alike(tokenizer):
    model = fresh_model(NANO, tokenizer, seed=0)
    rows = model.vlm.embed_tokens.weight.detach()
    ids = [tokenizer.piece_id(f"▁{value}") for value in range(256)]
    bins = torch.nn.functional.normalize(rows[ids], dim=-1)
    near = (bins[1:] * bins[:-1]).sum(-1)
    far = (bins[128:] * bins[:-128]).sum(-1)
    assert near.min() > 0.9
    assert far.max() < 0.8
    scale = float(rows.square().sum(-1).mean())
    assert 0.5 < scale < 2  # a unit row after the scaling by sqrt(D) on use


def test_patches_know_their_place():
    table = grid_sines(16, 192)
    gaps = torch.cdist(table, table)
    rows, columns = np.divmod(np.arange(256), 16)
    apart = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    nearest = gaps + 1e3 * torch.eye(256)
    assert (apart[np.arange(256), nearest.argmin(1).numpy()] == 1).all()


def test_every_weight_can_learn(tokenizer):
    model = fresh_model(NANO, tokenizer, seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
