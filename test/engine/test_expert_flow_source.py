"""`expert_flow.cu` and what Python says about it are the same."""

import ctypes
import re
import shutil
import subprocess

import pytest

from safe_pruner_node.engine.cuda import expert_flow
from safe_pruner_node.engine.cuda.expert_flow import Flow, Layer, defines

TEXT = expert_flow.SOURCE.read_text()
LINES = re.compile(r"^(?:typedef|constexpr int|static_assert\().*;", re.MULTILINE)
BLOCKS = re.compile(r"^(?:struct (?:Layer|Flow)|enum Counter) \{.*?^\};", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_structures_and_constants_are_the_source_s():
    macros = [f"#define {name} {value}" for name, value in defines(10, 50, 32).items()]
    declared = [*LINES.findall(TEXT), *(blocks := BLOCKS.findall(TEXT))]
    assert len(blocks) == 3
    checks = [
        f"PROGRAMS == {expert_flow.PROGRAMS}",
        f"SHARES == {expert_flow.SHARES}",
        f"THREADS == {expert_flow.THREADS}",
        f"KEYS == {expert_flow.KEYS}",
        f"CHUNK == {expert_flow.CHUNK} * {expert_flow.CHUNK}",
        f"HIDDEN + SHARES == {expert_flow.COUNTERS}",
        f"SCRATCH_AT + 640 + 1024 == {expert_flow.SHARED_BYTES}",
        *layout(Layer),
        *layout(Flow),
    ]
    lines = [*macros, *declared, *(f'static_assert({check}, "");' for check in checks)]
    command = ["c++", "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def layout(structure: type[ctypes.Structure]) -> list[str]:
    """That a structure of the source has these fields in these places, and no others."""
    name = structure.__name__
    checks = [f"sizeof({name}) == {ctypes.sizeof(structure)}"]
    for field, *_ in structure._fields_:
        place = getattr(structure, field)
        checks.append(f"__builtin_offsetof({name}, {field}) == {place.offset}")
        checks.append(f"sizeof((({name} *)0)->{field}) == {place.size}")
    return checks


@pytest.mark.parametrize("horizon", [50, 10])
def test_it_compiles(horizon):
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    pytest.importorskip("triton", reason="compiled kernels are kept where Triton keeps its own")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    cubin = compile_cubin(TEXT, expert_flow.ARCH, defines(10, horizon, 32))
    assert cubin.startswith(b"\x7fELF")
    assert expert_flow.NAME.encode() in cubin


def test_what_does_not_compile_is_an_error_with_the_compiler_s_words():
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    pytest.importorskip("triton", reason="compiled kernels are kept where Triton keeps its own")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    with pytest.raises(RuntimeError, match="static assertion failed"):
        compile_cubin(TEXT, expert_flow.ARCH, defines(10, 65, 32))
