"""Products of the fused path against fp32 and cuBLAS: needs a GPU of SM 9.0, and no pytest.

python test/engine/product_checks.py [plans to try per product]
"""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_time import graph_us

from safe_pruner_node.engine.cuda.product import After, Plan
from safe_pruner_node.engine.cuda.product_plan import cycles, plans
from safe_pruner_node.engine.products import Products
from safe_pruner_node.engine.projection import Projection
from safe_pruner_node.engine.tensor_core_products import TensorCoreProducts


@dataclass(frozen=True)
class Case:
    """A product of the policy: rows, features, depth, what follows, most splits, layers."""

    name: str
    n: int
    features: int
    depth: int
    after: After
    splits: int
    layers: int


CASES = [
    Case("vision qkv", 768, 3456, 1152, After.BIAS, 1, 27),
    Case("vision out", 768, 1152, 1152, After.NOTHING, 4, 27),
    Case("vision fc1", 768, 4304, 1152, After.BIAS_GELU, 1, 27),
    Case("vision fc2", 768, 1152, 4304, After.NOTHING, 6, 27),
    Case("pruned qkv", 320, 2560, 2048, After.NOTHING, 2, 15),
    Case("pruned out", 320, 2048, 2048, After.NOTHING, 4, 15),
    Case("pruned gate, up", 320, 32768, 2048, After.GATED, 1, 15),
    Case("pruned down", 320, 2048, 16384, After.NOTHING, 8, 15),
    Case("full qkv", 896, 2560, 2048, After.NOTHING, 1, 15),
    Case("full out", 896, 2048, 2048, After.NOTHING, 2, 15),
    Case("full gate, up", 896, 32768, 2048, After.GATED, 1, 15),
    Case("full down", 896, 2048, 16384, After.NOTHING, 4, 15),
]


ODD = [
    (Plan(32, splits=2), After.NOTHING),
    (Plan(64, 2, 1, 2), After.NOTHING),
    (Plan(96, 1, 1, 2), After.BIAS),
    (Plan(64, 1, 2, 1), After.BIAS_GELU),
    (Plan(64, 2, 1, 2), After.GATED),
    (Plan(64, 2, 2, 1), After.GATED),
]
"""Every kind of cluster, and whatever follows."""
ODD_SIZES = [(77, 272, 200), (1, 16, 72), (300, 1072, 1096)]
"""Rows, features, depth that no tile divides."""
BAR = 4e-3
"""Relative error, of which rounding to bf16 is 1.7e-3."""


def reference(after, x, weight, bias):
    """In fp32."""
    y = x.float() @ weight.float().T
    if after in (After.BIAS, After.BIAS_GELU):
        y += bias.float()
    gelu = torch.nn.functional.gelu
    if after is After.BIAS_GELU:
        return gelu(y, approximate="tanh")
    if after is After.GATED:
        return gelu(y[:, ::2], approximate="tanh") * y[:, 1::2]
    return y


@torch.inference_mode()
def check_odd(products, plan, after, sizes):
    """Compare a product whose sizes no tile divides."""
    n, features, depth = sizes
    random = torch.Generator("cuda").manual_seed(0)
    normal = {"device": "cuda", "dtype": torch.bfloat16, "generator": random}
    x, bias = torch.randn(n, depth, **normal), torch.randn(features, **normal)
    weight = torch.randn(features, depth, **normal).mul_(depth**-0.5)
    biased = bias if after in (After.BIAS, After.BIAS_GELU) else None
    found = products.run(x, weight, plan, after, biased).float().sum(0)
    expected = reference(after, x, weight, bias)
    assert found.shape == expected.shape
    off = float((found - expected).norm() / expected.norm())
    assert off < BAR, (plan, after, sizes, off)


def by_libraries(case, x, weight, bias):
    """The same by cuBLAS and Triton."""
    products = Products()
    if case.after is After.BIAS:
        return products.linear(x, weight, bias)[None]
    if case.after is After.BIAS_GELU:
        return products.linear_gelu(x, weight, bias)[None]
    if case.after is After.GATED:
        return products.gated(x, Projection(weight), None)[None]
    return products.terms(x, Projection(weight))


def best_plans(case, most):
    """The first by the model."""
    found = plans(case.n, case.depth, case.after, case.splits)
    sizes = case.n, case.features, case.depth, case.after, 132
    return sorted(found, key=lambda plan: cycles(plan, *sizes))[:most]


@torch.inference_mode()
def measure(case, products, tried):
    """Print errors and times of the best plans by the model."""
    random = torch.Generator("cuda").manual_seed(0)
    normal = {"device": "cuda", "dtype": torch.bfloat16, "generator": random}
    x = torch.randn(case.n, case.depth, **normal)
    bias = torch.randn(case.features, **normal)
    weights = [
        torch.randn(case.features, case.depth, **normal).mul_(case.depth**-0.5)
        for _ in range(case.layers)
    ]
    expected = reference(case.after, x, weights[0], bias)
    plain = by_libraries(case, x, weights[0], bias).float().sum(0)
    off = float((plain - expected).norm() / expected.norm())
    us = graph_us([lambda w=w: by_libraries(case, x, w, bias) for w in weights])
    flop = 2 * case.n * case.features * case.depth
    print(
        f"{case.name:16} libraries {off:.2e} {us:6.1f} us {flop / us / 1e6:4.0f} TFLOP/s",
        flush=True,
    )
    for plan in tried:
        got = products.run(x, weights[0], plan, case.after, bias).float().sum(0)
        off = float((got - expected).norm() / expected.norm())
        again = products.run(x, weights[0], plan, case.after, bias).float().sum(0)
        us = graph_us(
            [lambda w=w, p=plan: products.run(x, w, p, case.after, bias) for w in weights]
        )
        shape = f"{plan.rows:3} x {plan.features} "
        shape += f"c{plan.cluster_features}x{plan.cluster_rows} s{plan.splits}"
        model = cycles(plan, case.n, case.features, case.depth, case.after, 132) / 1980
        print(
            f"  {shape:24} {off:.2e} {us:6.1f} us {flop / us / 1e6:4.0f} TFLOP/s  model {model:.1f}"
            f"{'' if torch.equal(got, again) else '  NOT THE SAME TWICE'}",
            flush=True,
        )


def main():
    """Compile everything side by side, then measure."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    torch.zeros(1, device="cuda")
    products = TensorCoreProducts(torch.device("cuda", 0))
    tried = {case: best_plans(case, most) for case in CASES}

    def compiled(job):
        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda")
        products.kernel(*job)

    with ThreadPoolExecutor(16) as pool:
        jobs = {(plan, case.after) for case, chosen in tried.items() for plan in chosen}
        jobs.update(ODD)
        list(pool.map(compiled, jobs))
    print("compiled", len(jobs), flush=True)
    for (plan, after), sizes in itertools.product(ODD, ODD_SIZES):
        check_odd(products, plan, after, sizes)
    print("sizes that no tile divides: right", flush=True)
    for case in CASES:
        measure(case, products, tried[case])


if __name__ == "__main__":
    main()
