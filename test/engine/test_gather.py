"""Rows brought together by one kernel are those that torch brings, to the bit."""

# ruff: noqa: E402 - what follows the skips needs Triton

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from torch.nn.functional import embedding

from safe_pruner_node.engine.kernels.gather import embed_rows, kept_rows

DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.bfloat16, torch.float32]


def rows(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n_visual", "n_text", "width"), [(5, 3, 32), (1, 1, 24), (4, 7, 136)])
def test_visual_tokens_and_embeddings(dtype, n_visual, n_text, width):
    torch.manual_seed(0)
    z, table = rows(n_visual, width, dtype=dtype), rows(40, width, dtype=dtype)
    tokens = torch.randint(40, (n_text,), device=DEVICE)
    expected = torch.cat([z, embedding(tokens, table) * width**0.5])
    assert torch.equal(embed_rows(z, tokens, table, width**0.5), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n_kept", "n_text"), [(1, 1), (5, 3), (9, 4)])
@pytest.mark.parametrize(("width", "channels"), [(32, 32), (24, 40)])
def test_kept_rows(dtype, n_kept, n_text, width, channels):
    torch.manual_seed(0)
    n_visual = 9
    x, normed = rows(2, n_visual + n_text, width, dtype=dtype)
    text = rows(n_text, channels, dtype=dtype)
    keep = torch.randperm(n_visual, device=DEVICE)[:n_kept].sort().values
    query = torch.zeros(n_kept + n_text, channels, device=DEVICE, dtype=dtype)
    found_x, found_normed, positions = kept_rows(x, normed, text, keep, query)
    expected = torch.cat([keep, torch.arange(n_visual, len(x), device=DEVICE)])
    assert torch.equal(positions, expected)
    assert torch.equal(found_x, x[expected])
    assert torch.equal(found_normed, normed[keep])
    assert torch.equal(query[n_kept:], text)
    assert not query[:n_kept].any()  # those are somebody else's
