"""Which towers and GPUs get `image_attention.cu`, and what it is compiled for and given."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton_interpreter  # noqa: F401
from fused_prefix_checks import SMALL, Case, off, random_policy, random_query
from torch.nn.functional import scaled_dot_product_attention

from safe_pruner_node.engine import fused_vision
from safe_pruner_node.engine.cuda import available, image_attention
from safe_pruner_node.engine.cuda.image_attention import (
    Arguments,
    ImageAttention,
    defines,
    fits,
    shared_bytes,
    warpgroups_for,
)
from safe_pruner_node.engine.cuda.source import read_source
from safe_pruner_node.engine.fused_vision import FusedVision
from safe_pruner_node.pi05.config import PI05

TEXT = read_source(image_attention.SOURCE)
LINES = re.compile(r"^(?:typedef|constexpr int|static_assert\().*;", re.MULTILINE)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STRUCTURE = re.compile(r"^struct ImageAttention \{.*?^\};", re.MULTILINE | re.DOTALL)


def plain(qkv, heads, tokens=256):
    """Attended rows [N, D] of queries, keys and values [N, 3D]."""
    parts = qkv.view(-1, tokens, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    out = scaled_dot_product_attention(*parts)  # [C, h, P, d]
    return out.transpose(1, 2).reshape(len(qkv), -1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_structure_and_constants_are_the_source_s(warpgroups):
    macros = [f"#define {name} {value}" for name, value in defines(16, warpgroups).items()]
    declared = [*LINES.findall(TEXT), *STRUCTURE.findall(TEXT)]
    checks = [
        f"THREADS == {128 * warpgroups}",
        f"ROWS == {image_attention.ROWS * warpgroups}",
        f"SHARED_BYTES == {shared_bytes(warpgroups)}",
        "sizeof(ImageAttention) == 16",
        f"__builtin_offsetof(ImageAttention, out) == {Arguments.out.offset}",
    ]
    lines = [*macros, *declared, *(f'static_assert({check}, "");' for check in checks)]
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("warpgroups", [1, 2])
def test_it_compiles(warpgroups):
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    cubin = compile_cubin(TEXT, available.ARCH, defines(16, warpgroups))
    assert image_attention.NAME.encode() in cubin


@pytest.mark.parametrize(
    ("capability", "change", "fit"),
    [
        ((9, 0), {}, True),
        ((8, 9), {}, False),
        ((10, 0), {}, False),  # it has no `wgmma`
        ((9, 0), {"dtype": torch.float32}, False),
        ((9, 0), {"device": torch.device("cpu")}, False),
        ((9, 0), {"config": replace(PI05.vision, heads=8)}, False),
        ((9, 0), {"config": replace(PI05.vision, image=448)}, False),
        ((9, 0), {"bindings": None}, False),
    ],
)
def test_what_the_kernel_is_for(monkeypatch, capability, change, fit):
    given = {
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "config": PI05.vision,
        "bindings": object(),
    } | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(available, "find_spec", lambda _: given["bindings"])
    assert fits(given["config"], SimpleNamespace(**given)) is fit


@pytest.mark.parametrize(("tiles", "warpgroups"), [(64, 1), (132, 1), (133, 2), (192, 2)])
def test_two_warpgroups_where_there_are_many_tiles(tiles, warpgroups):
    assert warpgroups_for(tiles, 132) == warpgroups


def test_it_is_launched_for_every_row_of_every_head(monkeypatch):
    made, calls = [], []

    class Kernel:
        def __init__(self, *given):
            made.append(given[-2:])

        def launch(self, blocks, threads, argument, *, dependent):
            calls.append((blocks, threads, argument.qkv, argument.out, dependent))

    module = "safe_pruner_node.engine.cuda.compile"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(CudaKernel=Kernel))
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    attention = ImageAttention(16)
    for images, warpgroups in ((1, 1), (3, 2), (1, 1)):
        qkv = torch.empty(images * 256, 3 * 1152, dtype=torch.bfloat16)
        out = attention(qkv)
        assert (out.shape, out.dtype) == ((images * 256, 1152), qkv.dtype)
        blocks, threads, *pointers, dependent = calls.pop()
        assert threads == 128 * warpgroups
        assert blocks * threads // 2 == images * 256 * 16  # two threads for a row of a head
        assert pointers == [qkv.data_ptr(), out.data_ptr()]
        assert dependent
    # Compiled when first needed, and once
    assert made == [(defines(16, n), shared_bytes(n)) for n in (1, 2)]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_a_tower_that_fits_hands_it_packed_rows(monkeypatch):
    model = random_policy(SMALL, "cpu", lambda _: torch.float32)
    images, _, _ = random_query(SMALL, Case(2, 1, None, None), "cpu")
    monkeypatch.setattr(fused_vision, "fits", lambda *_: True)
    calls = []

    def kernel(heads):
        def run(qkv):
            calls.append(qkv.shape)
            return plain(qkv, heads, SMALL.vision.tokens)

        return run

    monkeypatch.setattr(fused_vision, "ImageAttention", kernel)
    found = FusedVision(model)(images)
    assert off(found, model.embed_images(images).flatten(0, 1)) < 1e-5
    assert calls == [(2 * SMALL.vision.tokens, 3 * SMALL.vision.width)] * SMALL.vision.depth


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of SM 9.0",
)
@pytest.mark.parametrize("images", [1, 3])
def test_it_is_attention(images):
    torch.manual_seed(0)
    qkv = torch.randn(images * 256, 3 * 1152, device="cuda", dtype=torch.bfloat16) * 2
    assert off(ImageAttention(16)(qkv), plain(qkv.float(), 16)) < 4e-3
