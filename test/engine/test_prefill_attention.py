"""What `prefill_attention.cu` is compiled for, given and asked for."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from safe_pruner_node.engine.cuda import available, prefill_attention
from safe_pruner_node.engine.cuda.prefill_attention import (
    Arguments,
    PrefillAttention,
    fits,
    parts,
)
from safe_pruner_node.pi05.config import PI05

TEXT = prefill_attention.SOURCE.read_text()
LINES = re.compile(r"^(?:typedef|constexpr int).*;", re.MULTILINE)
STRUCTURE = re.compile(r"^struct PrefillAttention \{.*?^\};", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_structure_and_constants_are_the_source_s():
    names = ("THREADS", "ROWS", "KEYS", "DIM", "MOST_PARTS", "SHARED_BYTES")
    checks = [f"{name} == {getattr(prefill_attention, name)}" for name in names]
    structure = STRUCTURE.search(TEXT).group()
    for field, _ in Arguments._fields_:
        offset = getattr(Arguments, field).offset
        checks.append(f"__builtin_offsetof(PrefillAttention, {field}) == {offset}")
    lines = [*LINES.findall(TEXT), structure, *(f'static_assert({c}, "");' for c in checks)]
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_it_compiles():
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    pytest.importorskip("triton", reason="compiled kernels are kept where Triton keeps its own")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    assert prefill_attention.NAME.encode() in compile_cubin(TEXT, available.ARCH, {})


@pytest.mark.parametrize(
    ("rows", "keys", "expected"),
    [
        (2560, 320, 5),  # as many as there are blocks
        (7168, 896, 2),
        (128, 64, 1),
        (128, 896, 8),
        (20000, 2500, 1),
    ],
)
def test_so_many_programs_share_keys(rows, keys, expected):
    assert parts(-(-rows // 128), keys, 132) == expected


@pytest.mark.parametrize(
    ("change", "fit"),
    [
        ({}, True),
        ({"capability": (10, 0)}, False),
        ({"dtype": torch.float32}, False),
        ({"config": replace(PI05.vlm, head_dim=128)}, False),
        ({"config": replace(PI05.vlm, kv_heads=2)}, False),
        ({"bindings": None}, False),
    ],
)
def test_what_the_kernel_is_for(monkeypatch, change, fit):
    given = {
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "config": PI05.vlm,
        "bindings": object(),
        "capability": (9, 0),
    } | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: given["capability"])
    monkeypatch.setattr(available, "find_spec", lambda _: given["bindings"])
    assert fits(given["config"], SimpleNamespace(**given)) is fit


def test_it_is_launched_in_clusters(monkeypatch):
    calls = []

    class Kernel:
        def __init__(self, *_):
            pass

        def launch(self, *given, **options):
            calls.append((given, options))

    module = "safe_pruner_node.engine.cuda.compile"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(CudaKernel=Kernel))
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    query = torch.empty(33, 8, 256, dtype=torch.bfloat16)
    cache = torch.empty(2, 1, 1, 300, 256, dtype=torch.bfloat16).unbind(0)
    valid = torch.tensor(7)
    out = PrefillAttention()(query, cache, valid, 20)
    assert (out.shape, out.dtype) == ((33, 2048), query.dtype)
    (((blocks, threads, argument), options),) = calls
    assert (blocks, threads) == (3 * 5, 256)
    assert options == {"cluster": 5, "dependent": True}
    tensors = (query, *cache, valid, out)
    assert [getattr(argument, name) for name, _ in Arguments._fields_] == [
        *(t.data_ptr() for t in tensors),
        33 * 8,
        300,
        20,
    ]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of SM 9.0",
)
@pytest.mark.parametrize(("tokens", "valid"), [(320, None), (301, 7), (896, 20), (17, 1)])
def test_it_is_attention(tokens, valid):
    torch.manual_seed(0)
    q, k, v = torch.randn(10, tokens, 256, device="cuda", dtype=torch.bfloat16).split((8, 1, 1))
    limit = tokens if valid is None else tokens - 16 + valid
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k[:, :limit].float(), v[:, :limit].float()
    )  # [h, N, d]
    given = None if valid is None else torch.tensor(valid, device="cuda")
    query = q.transpose(0, 1).contiguous()  # [N, h, d]
    found = PrefillAttention()(query, (k[None], v[None]), given, 16).unflatten(1, (8, -1))
    expected = expected.transpose(0, 1)
    assert (found.float() - expected).norm() / expected.norm() < 4e-3
