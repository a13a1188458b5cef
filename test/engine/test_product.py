"""`product.cu`, what Python says about it, and how products are cut."""

import ctypes
import re
import shutil
import subprocess
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.engine.cuda import product
from safe_pruner_node.engine.cuda.available import ARCH
from safe_pruner_node.engine.cuda.product import DEPTH, After, Map, Plan, Product
from safe_pruner_node.engine.cuda.product_plan import plan_for, plans
from safe_pruner_node.engine.cuda.source import read_source

TEXT = read_source(product.SOURCE)
LINES = re.compile(
    r"^(?:typedef|constexpr (?:int|bool)|static_assert\()[^\n]*;[^;\n]*$", re.MULTILINE
)
STRUCTURES = re.compile(
    r"^struct (?:alignas\(64\) Map|Product|Unit) \{.*?^\};", re.MULTILINE | re.DOTALL
)
UNITS = re.compile(r"^__device__ [^\n]* units\(.*?\}$", re.MULTILINE)
UNIT_OF = re.compile(r"^__device__ [^\n]* unit_of\(.*?^\}", re.MULTILINE | re.DOTALL)
ON_THE_HOST = """
#define __device__
#define __forceinline__ inline
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;
static int CLUSTER_F, CLUSTER_N;
static int min(int a, int b) { return a < b ? a : b; }
"""
RUN = """
extern "C" void run(const Product *product, int cluster_features, int cluster_rows, Unit *out) {
  CLUSTER_F = cluster_features, CLUSTER_N = cluster_rows;
  for (int number = 0; number < units(*product); number++)
    for (int rank = 0; rank < CLUSTER_F * CLUSTER_N; rank++)
      *out++ = unit_of(*product, number, rank);
}
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

SOME = [
    (Plan(32), After.NOTHING),
    (Plan(160, 1, 1, 2, 3), After.NOTHING),
    (Plan(160, 2, 1, 2, 8), After.NOTHING),
    (Plan(192, 1, 1, 2), After.BIAS),
    (Plan(96, 2, 2, 1), After.BIAS),
    (Plan(256, 1, 2, 1), After.BIAS_GELU),
    (Plan(160, 2, 1, 2), After.GATED),
    (Plan(64, 2, 1, 1), After.GATED),
    (Plan(64, 2, 2, 1), After.GATED),
]
PARTS = After.NOTHING, 8
"""A product whose sums may be terms."""
MEASURED = [
    ((768, 3456, 1152, After.BIAS, 1), (192, 1, 1, 2, 1)),
    ((768, 1152, 1152, *PARTS), (128, 1, 1, 2, 2)),
    ((768, 4304, 1152, After.BIAS_GELU, 1), (256, 1, 2, 1, 1)),
    ((768, 1152, 4304, *PARTS), (192, 1, 1, 2, 3)),
    ((320, 2560, 2048, *PARTS), (160, 1, 1, 2, 3)),
    ((320, 2048, 2048, *PARTS), (96, 1, 1, 2, 2)),
    ((320, 32768, 2048, After.GATED, 1), (160, 2, 1, 2, 1)),
    ((320, 2048, 16384, *PARTS), (160, 1, 1, 2, 4)),
    ((896, 2560, 2048, *PARTS), (160, 1, 1, 2, 1)),
    ((896, 2048, 2048, *PARTS), (224, 1, 1, 2, 2)),
    ((896, 32768, 2048, After.GATED, 1), (160, 2, 1, 2, 1)),
    ((896, 2048, 16384, *PARTS), (224, 1, 1, 2, 2)),
]


@needs_compiler
@pytest.mark.parametrize(("plan", "after"), SOME, ids=str)
def test_structures_and_constants_are_the_source_s(plan, after):
    macros = [f"#define {name} {value}" for name, value in plan.defines(after).items()]
    structures = STRUCTURES.findall(TEXT)
    assert len(structures) == 3
    checks = [
        f"THREADS == {product.THREADS}",
        f"DEPTH == {DEPTH}",
        f"GROUPS * 64 == {product.GATES}",
        f"FEATURES == {plan.features}",
        f"CLUSTER == {plan.cluster}",
        f"SUMS * PIECES == {plan.sums}",
        f"STAGE == {plan.stage_bytes}",
        f"BARRIERS_AT - OUT_AT == {product.STAGING_BYTES}",
        f"1024 + BARRIERS_AT + 2 * 8 * STAGES == {plan.shared_bytes}",
        "alignof(Product) == 64",
        f"sizeof(Map) == {ctypes.sizeof(Map)}",
        f"sizeof(Product) == {ctypes.sizeof(Product)}",
    ]
    for field, *_ in Product._fields_[:-1]:  # the last is what a compiler adds
        place = getattr(Product, field)
        checks.append(f"__builtin_offsetof(Product, {field}) == {place.offset}")
        checks.append(f"sizeof(((Product *)0)->{field}) == {place.size}")
    lines = [*macros, *LINES.findall(TEXT), *structures]
    lines += [f'static_assert({check}, "");' for check in checks]
    command = ["c++", "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("plan", "after"), SOME, ids=str)
def test_it_compiles(plan, after):
    pytest.importorskip("cuda.bindings", reason="only torch's CUDA builds bring the compiler")
    pytest.importorskip("triton", reason="compiled kernels are kept where Triton keeps its own")
    from safe_pruner_node.engine.cuda.compile import compile_cubin

    cubin = compile_cubin(product.source(plan), ARCH, plan.defines(after))
    assert cubin.startswith(b"\x7fELF")
    assert product.NAME.encode() in cubin


class Unit(ctypes.Structure):
    """`Unit` of the source."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("feature_tile", "row_tile", "split", "first_step", "steps")
    )


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """What the blocks of a plan have to do, by `unit_of` of the source, compiled for the host."""
    library = tmp_path_factory.mktemp("product") / "units.so"
    (count,), (unit_of,) = UNITS.findall(TEXT), UNIT_OF.findall(TEXT)
    text = "\n".join([ON_THE_HOST, *STRUCTURES.findall(TEXT), count, unit_of, RUN])
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(library)], input=text, text=True, check=True)
    run = ctypes.CDLL(str(library)).run

    def of(plan, n, features, depth):
        by_features, by_rows = plan.groups(n, features)
        steps = ceil(depth / DEPTH)
        argument = Product(
            n=n,
            out_features=features,
            depth_steps=steps,
            splits=plan.splits,
            feature_groups=by_features,
            row_groups=by_rows,
        )
        out = (Unit * (plan.units(n, features) * plan.cluster))()
        run(ctypes.byref(argument), plan.cluster_features, plan.cluster_rows, out)
        return out

    return of


@st.composite
def products(draw):
    """Rows, features, depth, what follows, most splits."""
    after = draw(st.sampled_from(After))
    splits = draw(st.integers(1, 8)) if after is After.NOTHING else 1
    depth = 8 * draw(st.integers(1, 100) | st.integers(1, 2000))
    return draw(st.integers(1, 1000)), 16 * draw(st.integers(1, 600)), depth, after, splits


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(products(), st.sampled_from([132, 114, 78]), st.randoms(use_true_random=False))
def test_every_sum_is_formed_once(units, wanted, multiprocessors, random):
    n, features, depth, after, most = wanted
    any_other = random.choice(list(plans(n, depth, after, most)))
    for plan in (plan_for(*wanted, multiprocessors), any_other):
        tiles = ceil(features / plan.features), ceil(n / plan.rows)
        # The last of a cluster's tiles may be behind the end.
        done = np.zeros((tiles[0] + 1, tiles[1] + 1, ceil(depth / DEPTH)), int)
        for unit in units(plan, n, features, depth):
            assert unit.steps > 0
            assert 0 <= unit.split < plan.splits
            assert unit.first_step + unit.steps <= done.shape[2]
            steps = slice(unit.first_step, unit.first_step + unit.steps)
            done[unit.feature_tile, unit.row_tile, steps] += 1
        assert (done[:-1, :-1] == 1).all()
        assert done.max() == 1


@needs_compiler
def test_splits_are_different_parts_of_k(units):
    plan = Plan(32, splits=3)
    found = [(u.split, u.first_step, u.steps) for u in units(plan, 32, 128, 8 * DEPTH)]
    assert found == [(0, 0, 3), (1, 3, 3), (2, 6, 2)]


@settings(max_examples=50, deadline=None)
@given(products())
def test_plans_are_in_bounds(wanted):
    n, _, depth, after, most = wanted
    found = list(plans(n, depth, after, most))
    assert found
    for plan in found:
        assert plan.rows % 32 == 0
        assert 32 <= plan.rows <= 256
        assert plan.sums <= 160
        assert 3 <= plan.stages <= 8
        assert plan.shared_bytes <= 227 * 1024
        assert 1 <= plan.splits <= most
        steps = ceil(depth / DEPTH)
        assert ceil(steps / ceil(steps / plan.splits)) == plan.splits  # none is empty
        if after is After.GATED:
            assert (plan.pieces, plan.splits) == (2, 1)
            assert plan.cluster_rows <= 2
        # Parts that blocks bring begin where a swizzled operand can: at a multiple of 1 KiB
        assert plan.rows // plan.cluster_features % 8 == 0
        assert plan.features // plan.cluster_rows % 8 == 0


@pytest.mark.parametrize(("wanted", "chosen"), MEASURED, ids=str)
def test_products_of_the_policy_are_cut_as_was_measured_to_be_best(wanted, chosen):
    assert plan_for(*wanted, 132) == Plan(*chosen)
