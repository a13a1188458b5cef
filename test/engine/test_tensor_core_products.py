"""Which products go to the kernel of our own, and what it is launched with."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="what is left to the libraries needs Triton")

import triton_interpreter  # noqa: F401
from product_checks import ODD, ODD_SIZES, check_odd

from safe_pruner_node.engine.cuda.product import DEPTH, THREADS, After, Map, Plan
from safe_pruner_node.engine.products import MANY_ROWS, Products
from safe_pruner_node.engine.projection import Projection
from safe_pruner_node.engine.tensor_core_products import MOST_TERMS, TensorCoreProducts

MULTIPROCESSORS = 131
METHODS = {
    After.NOTHING: ("terms", lambda x, weight, _: (x, Projection(weight))),
    After.BIAS: ("linear", lambda *operands: operands),
    After.BIAS_GELU: ("linear_gelu", lambda *operands: operands),
    After.GATED: ("gated", lambda x, weight, _: (x, Projection(weight), None)),
}
"""What plans each, and what it takes."""


def operands(n, features, depth):
    """Rows, a weight matrix, a bias."""
    torch.manual_seed(0)
    tensors = torch.randn(n, depth), torch.randn(features, depth), torch.randn(features)
    return [tensor.bfloat16() for tensor in tensors]


class Driver:
    """Encodes maps as their numbers, and keeps what they are made of."""

    cuuint64_t = cuuint32_t = int

    def __init__(self):
        self.maps = []

    def __getattr__(self, name):
        return self if name.startswith("CU") else name

    def cuTensorMapEncodeTiled(self, _, rank, at, sizes, strides, box, steps, *rest):  # noqa: N802
        assert (len(sizes), len(strides), len(box), steps) == (rank, rank - 1, rank, [1] * rank)
        encoded = Map((ctypes.c_uint64 * 16)(*[len(self.maps)] * 16))
        self.maps.append(SimpleNamespace(at=at, sizes=sizes, strides=strides, box=box, rest=rest))
        pointer = SimpleNamespace(getPtr=lambda: ctypes.addressof(encoded))
        return SimpleNamespace(value=0), pointer


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=found))
    return found


@pytest.fixture
def products(monkeypatch):
    """On no GPU, with nobody to launch a kernel."""
    gpu = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    return TensorCoreProducts(torch.device("cuda"))


@pytest.fixture
def launched(products, monkeypatch):
    """What the kernel was launched with."""
    calls = []

    def kernel(plan, after):
        def launch(blocks, threads, argument, **options):
            calls.append((plan, after, blocks, threads, argument, options))

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(products, "kernel", kernel)
    return calls


def read_by(found, tensor):
    """What a map over a tensor reads, outermost first."""
    assert found.at == tensor.data_ptr()
    strides = [1, *(stride // tensor.element_size() for stride in found.strides)]
    return tensor.as_strided(found.sizes[::-1], strides[::-1])


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("wrong", ["x", "weight", "bias"])
def test_operands_of_another_type_are_refused(products, launched, wrong):
    x, weight, bias = operands(4, 16, 16)
    given = {"x": x, "weight": weight, "bias": bias}
    given[wrong] = given[wrong].float()
    with pytest.raises(ValueError, match=r"bf16, not .*float32"):
        products.run(plan=Plan(32), after=After.BIAS, **given)
    assert not launched


@pytest.mark.usefixtures("driver")
def test_operands_that_lie_otherwise_are_refused(products, launched):
    x, weight, _ = operands(16, 16, 16)
    for given in ((x.T, weight), (x, weight.T)):
        with pytest.raises(ValueError, match="whole rows"):
            products.run(*given, Plan(32), After.NOTHING)
    assert not launched


@pytest.mark.parametrize(
    ("plan", "after", "boxes", "blocks"),
    [
        (Plan(32), After.NOTHING, (128, 32), 3 * 3),
        (Plan(64, 1, 1, 2, 2), After.NOTHING, (64, 64), 2 * (2 * 3 * 1)),
        (Plan(64, 1, 2, 1), After.BIAS, (128, 32), 2 * (2 * 2)),
        (Plan(96, 2, 1, 2), After.BIAS_GELU, (128, 96), 2 * 2),
        (Plan(64, 2, 2, 1), After.GATED, (128, 32), 2 * (1 * 2)),
        (Plan(64, 2, 1, 2), After.GATED, (128, 64), 2 * (2 * 1)),
    ],
    ids=str,
)
def test_what_the_kernel_is_given(products, launched, driver, plan, after, boxes, blocks):
    n, features, depth = 77, 272, 200
    x, weight, bias = operands(n, features, depth)
    x = torch.cat([x, x], 1)[:, :depth]  # rows further apart than they are long
    gated, biased = after is After.GATED, after in (After.BIAS, After.BIAS_GELU)
    out = products.run(x, weight, plan, after, bias if biased else None)
    assert out.shape == (plan.splits, n, features // 2 if gated else features)
    ((*kernel, found_blocks, threads, argument, options),) = launched
    assert kernel == [plan, after]
    assert (found_blocks, threads) == (blocks, THREADS)
    assert options == {"cluster": plan.cluster, "dependent": True}
    assert (argument.out, argument.bias) == (out.data_ptr(), bias.data_ptr() if biased else None)
    assert (argument.n, argument.out_features, argument.depth_steps) == (n, out.shape[2], 4)
    assert (argument.splits, argument.feature_groups, argument.row_groups) == (
        plan.splits,
        *plan.groups(n, features),
    )
    of_weights, of_inputs = (driver.maps[m.opaque[0]] for m in (argument.weights, argument.inputs))
    weight_rows, rows = boxes
    assert of_inputs.box == [DEPTH, rows]
    assert torch.equal(read_by(of_inputs, x), x)
    assert of_weights.box == [DEPTH, weight_rows, 1]
    kinds = [weight[::2], weight[1::2]] if gated else [weight]
    assert torch.equal(read_by(of_weights, weight), torch.stack(kinds))


def test_no_more_blocks_than_are_there_at_once(products, launched, driver):
    x, weight, _ = operands(77, 128 * 132, 8)
    for plan, blocks in ((Plan(32), 131), (Plan(32, 1, 1, 2), 130), (Plan(64, 1, 2, 1), 130)):
        products.run(x, weight, plan, After.NOTHING)
        assert launched[-1][2] == blocks
    assert len(driver.maps) == 6


def test_a_map_that_is_refused_is_an_error(products, launched, driver, monkeypatch):
    refused = SimpleNamespace(value=1)
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *_: (refused, None), raising=False)
    with pytest.raises(RuntimeError, match="CUDA"):
        products.run(*operands(8, 8, 8)[:2], Plan(32), After.NOTHING)
    assert not launched


def chosen(products, monkeypatch, after, n, features, depth, **scales):
    """Who does a product of such sizes: ``ours`` or ``libraries``."""
    done = []
    name, given = METHODS[after]
    monkeypatch.setattr(Products, name, lambda *_: done.append("libraries"))

    def run(x, weight, plan, found, bias=None):
        assert (x.shape, len(weight), found) == ((n, depth), features, after)
        assert (bias is not None) == (after in (After.BIAS, After.BIAS_GELU))
        assert plan.splits <= (MOST_TERMS if after is After.NOTHING else 1)
        done.append("ours")
        return x[None]

    monkeypatch.setattr(products, "run", run)
    x, weight, bias = operands(n, features, depth)
    arguments = [
        Projection(a.weight, **scales) if isinstance(a, Projection) else a
        for a in given(x, weight, bias)
    ]
    getattr(products, name)(*arguments)
    (who,) = done
    return who


@pytest.mark.parametrize("after", After)
def test_rows_of_no_16_bytes_stay_with_the_libraries(products, monkeypatch, after):
    def who(*sizes):
        return chosen(products, monkeypatch, after, *sizes)

    assert who(77, 48, 72) == "ours"
    assert who(77, 48, 68) == "libraries"
    assert who(77, 44, 72) == "libraries"
    # Half of these are gates, so 20 come out.
    assert who(77, 40, 72) == ("libraries" if after is After.GATED else "ours")


def test_fp8_and_many_gated_rows_stay_with_the_libraries(products, monkeypatch):
    def who(after, n, **scales):
        return chosen(products, monkeypatch, after, n, 48, 64, **scales)

    assert who(After.GATED, MANY_ROWS - 1) == "ours"
    assert who(After.GATED, MANY_ROWS) == "libraries"
    assert who(After.NOTHING, MANY_ROWS) == "ours"
    for after in (After.NOTHING, After.GATED):
        assert who(after, 8, scales=object()) == "libraries"


def test_a_long_product_of_few_rows_is_left_as_terms(products, launched, driver):
    x, weight, _ = operands(320, 128, 16384)
    terms = products.terms(x, Projection(weight))
    ((plan, *_),) = launched
    assert 1 < plan.splits == len(terms)
    assert len(driver.maps) == 2


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of SM 9.0",
)
@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
@pytest.mark.parametrize(("plan", "after"), ODD, ids=str)
def test_it_is_the_product(plan, after, sizes):
    check_odd(TensorCoreProducts(torch.device("cuda", 0)), plan, after, sizes)
