"""Patches to tokens is the convolution and the positions, on a GPU or in Triton's interpreter."""

# ruff: noqa: E402 - what follows the skips needs Triton

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from torch.nn.functional import conv2d

from safe_pruner_node.engine.kernels.patches import patch_tokens, patch_weights

DEVICE = "cpu" if INTERPRETED else "cuda"


def off(a, expected):
    return float((a - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5 if INTERPRETED else 1e-3),  # a GPU multiplies as TF32
        (torch.bfloat16, 1.8e-3),  # 1.6e-3 are the result's own rounding
    ],
)
@pytest.mark.parametrize(("patch", "along"), [(14, 4), (14, 9), (6, 2)])
def test_it_is_the_convolution(patch, along, dtype, tolerance):
    torch.manual_seed(0)
    images = torch.rand(2, 3, patch * along, patch * along, device=DEVICE) * 2 - 1
    weight = torch.randn(72, 3, patch, patch, device=DEVICE) / patch
    bias, position = torch.randn(72, device=DEVICE), torch.randn(along**2, 72, device=DEVICE)
    expected = conv2d(images.double(), weight.double(), bias.double(), stride=patch)
    expected = expected.flatten(2).transpose(1, 2) + position  # [C, (S/P)^2, D]
    packed = patch_weights(weight, dtype)
    found = patch_tokens(images, packed, bias, position, dtype)
    assert found.dtype == dtype
    assert off(found.double(), expected.flatten(0, 1)) < tolerance
    # Channels last is how cameras see
    again = patch_tokens(
        images.to(memory_format=torch.channels_last), packed, bias, position, dtype
    )
    assert torch.equal(again, found)
