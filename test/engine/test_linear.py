"""Projections in tiles, and attention inside images, are the plain ones, whatever the tiles."""

# ruff: noqa: E402 - what follows the skips needs Triton

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from fused_prefix_checks import off
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from safe_pruner_node.engine.kernels.image_attention import image_attention
from safe_pruner_node.engine.kernels.linear import Tiles, linear
from safe_pruner_node.engine.kernels.normed_linear import (
    NormedWeight,
    normed_linear,
    residual_linear,
)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # fp32 tiles are too large for a GPU
TOLERANCE = 1e-5 if INTERPRETED else 4e-3


def gated(product):
    gate, up = product.unflatten(1, (-1, 2)).unbind(2)
    return gelu(gate, approximate="tanh") * up


THEN = {"": lambda y: y, "gelu": lambda y: gelu(y, approximate="tanh"), "glu": gated}


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("rest", [0, 64])
def test_a_projection_and_what_follows(then, persistent, rest):
    torch.manual_seed(0)
    tiles = Tiles(128, 64, rest=rest, persistent=persistent)
    rows, columns, width = 128 + rest + 70, 3 * 64 + 8, 72  # no tile's end is a matrix's end
    x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(columns, width, device=DEVICE, dtype=DTYPE) / 8
    bias = torch.randn(columns, device=DEVICE, dtype=DTYPE)
    expected = THEN[then](torch.addmm(bias.float(), x.float(), weight.float().T))
    assert off(linear(x, weight, bias, tiles, then=then)[0], expected) < TOLERANCE


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("rest", [0, 64])
def test_terms_of_a_split_projection_add_up(splits, rest):
    torch.manual_seed(0)
    rows, width = 128 + rest + 3, 5 * 64 + 16
    x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(72, width, device=DEVICE, dtype=DTYPE) / 8
    terms = linear(x, weight, None, Tiles(128, 64, rest=rest, splits=splits))
    assert terms.shape == (splits, rows, 72)
    span = -(-6 // splits) * 64
    first = x[:, :span].float() @ weight[:, :span].float().T
    assert off(terms[0], first) < TOLERANCE
    assert off(terms.float().sum(0), x.float() @ weight.float().T) < TOLERANCE


@pytest.mark.parametrize("dim", [16, 24, 72])
@pytest.mark.parametrize("tokens", [9, 64, 100])
def test_attention_inside_images(dim, tokens):
    torch.manual_seed(0)
    images, heads = 2, 3
    qkv = torch.randn(images * tokens, 3 * heads * dim, device=DEVICE, dtype=DTYPE)
    qkv[:, : heads * dim] *= 8  # large scores
    q, k, v = qkv.float().view(images, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)
    assert off(image_attention(qkv, tokens, heads), expected) < TOLERANCE


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


@pytest.mark.parametrize("activated", [False, True])
def test_a_norm_between_two_projections(activated):
    torch.manual_seed(0)
    rows, depth, width, columns = 70, 72, 136, 72
    a, x = random(rows, depth), random(rows, width) + 3  # a mean that is not small
    into, out = random(width, depth), random(columns, width)
    into_bias, g, b, out_bias = random(width), random(width), random(width), random(columns)
    tiles = Tiles(64, 64, warps=4)
    ready = residual_linear(a, into, into_bias, x, g, tiles)
    complete = x.float() + a.float() @ into.float().T + into_bias.float()
    assert off(ready.x, complete) < TOLERANCE
    found = normed_linear(ready, NormedWeight.of(out, out_bias, g, b), tiles, gelu=activated)
    normed = layer_norm(complete, (width,), g.float(), b.float(), 1e-6)
    expected = normed @ out.float().T + out_bias.float()
    if activated:
        expected = gelu(expected, approximate="tanh")
    assert off(found, expected) < 2 * TOLERANCE
