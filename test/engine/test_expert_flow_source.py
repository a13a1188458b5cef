"""`expert_flow.cu` and what Python says about it are the same."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from image_reference import images_of, prefixes

from safe_pruner_node.engine.cuda import expert_flow
from safe_pruner_node.engine.cuda.available import ARCH
from safe_pruner_node.engine.cuda.expert_flow import Flow, Layer, defines
from safe_pruner_node.engine.cuda.source import read_source
from safe_pruner_node.engine.resident_images import point_prefix

TEXT = read_source(expert_flow.SOURCE)
LINES = re.compile(r"^(?:typedef|constexpr int|static_assert\().*;", re.MULTILINE)
BLOCKS = re.compile(r"^(?:struct (?:Layer|Flow)|enum Counter) \{.*?^\};", re.MULTILINE | re.DOTALL)
PARTS_OF = re.compile(r"^__device__ .* int parts_of\(.*\}$", re.MULTILINE)
PREPARE = re.compile(r'^extern "C" __global__ [^\n]* prepare\(.*?^\}', re.MULTILINE | re.DOTALL)
ON_THE_HOST = """
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
struct uint4 { unsigned x, y, z, w; };
static struct { int x; } threadIdx, blockIdx, gridDim;
"""
RUN = """
extern "C" void run(const Flow *flow, int programs) {
  gridDim.x = programs;
  for (blockIdx.x = 0; blockIdx.x < programs; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) prepare(*flow);
}
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def declared():
    """The source's constants and structures, in C++ of any compiler."""
    macros = [f"#define {name} {value}" for name, value in defines(10, 50, 32).items()]
    blocks = BLOCKS.findall(TEXT)
    assert len(blocks) == 3
    return [*macros, *LINES.findall(TEXT), *blocks]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """`prepare` of the source, compiled for the host."""
    (parts_of,), (kernel,) = PARTS_OF.findall(TEXT), PREPARE.findall(TEXT)
    library = tmp_path_factory.mktemp("kernel") / "prepare.so"
    text = "\n".join([ON_THE_HOST, *declared(), parts_of, kernel, RUN])
    command = ["c++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(library)], input=text, text=True, check=True)
    return ctypes.CDLL(str(library)).run


@needs_compiler
def test_the_prefix_is_laid_out_with_room_for_the_suffix_and_all_else_is_zero(prepare):
    horizon, cache = 50, prefixes("cpu")
    lengths = [keys.shape[2] for keys, _ in cache]
    flow = Flow()
    *_, images = point_prefix(flow, cache, horizon)
    images.fill_(float("nan"))
    zeros, behind = torch.ones(2, 1 << 20, dtype=torch.uint8).unbind()
    flow.zeros, flow.n_zeros = zeros.data_ptr(), len(zeros) // expert_flow.WORD
    prepare(ctypes.byref(flow), expert_flow.preparing(lengths, horizon))
    assert torch.equal(images, images_of(cache, horizon))
    assert not zeros.any()
    assert behind.all()


@needs_compiler
def test_structures_and_constants_are_the_source_s():
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
    lines = [*declared(), *(f'static_assert({check}, "");' for check in checks)]
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

    cubin = compile_cubin(TEXT, ARCH, defines(10, horizon, 32))
    assert cubin.startswith(b"\x7fELF")
    for name in (expert_flow.NAME, expert_flow.PREPARE):
        assert name.encode() in cubin


def test_what_does_not_compile_is_an_error_with_the_compiler_s_words():
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    pytest.importorskip("triton", reason="compiled kernels are kept where Triton keeps its own")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    with pytest.raises(RuntimeError, match="static assertion failed"):
        compile_cubin(TEXT, ARCH, defines(10, 65, 32))
