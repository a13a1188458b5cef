"""Products of the fused stages in a kernel of our own: `cuda/product.cu`.

Shapes: N rows, D width of the input, F features of the result, S terms.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_pruner_node.engine.cuda.available import ARCH, available
from safe_pruner_node.engine.cuda.product import (
    DEPTH,
    GATES,
    NAME,
    THREADS,
    After,
    Map,
    Plan,
    Product,
    source,
)
from safe_pruner_node.engine.cuda.product_plan import plan_for
from safe_pruner_node.engine.products import MANY_ROWS, Products
from safe_pruner_node.engine.projection import Projection

if TYPE_CHECKING:
    from safe_pruner_node.engine.cuda.compile import CudaKernel

MOST_TERMS = 8
"""A sum that is left to who reads it; each is written and read once more."""

ALIGNED = 8
"""Numbers of 16 bytes: rows that are brought and written are a multiple of it."""


class TensorCoreProducts(Products):
    """The same products, faster where a model is in bf16.

    FP8, and gate and up of many rows, stay with the libraries: there ours is no faster. So do
    matrices whose rows or results are no multiple of 16 bytes, which it cannot bring or write.

    Args:
        device: Where the weights are; `available` there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.note = "products: one kernel of our own"
        gpu = torch.cuda.get_device_properties(device)
        self._multiprocessors = gpu.multi_processor_count
        self._kernels: dict[tuple[Plan, After], CudaKernel] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A projection with a bias; see `Products.linear`."""
        if not _aligned(weight, len(weight)):
            return super().linear(x, weight, bias)
        return self._planned(x, weight, After.BIAS, bias)[0]

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A projection with a bias, then GELU; see `Products.linear_gelu`."""
        if not _aligned(weight, len(weight)):
            return super().linear_gelu(x, weight, bias)
        return self._planned(x, weight, After.BIAS_GELU, bias)[0]

    def terms(self, x: Tensor, projection: Projection) -> Tensor:
        """Terms of a projection; see `Products.terms`."""
        weight = projection.weight
        if projection.scales is not None or not _aligned(weight, len(weight)):
            return super().terms(x, projection)
        return self._planned(x, weight, After.NOTHING)

    def gated(self, x: Tensor, gate_up: Projection, scale: float | None) -> Tensor:
        """gelu(gate) * up; see `Products.gated`."""
        weight = gate_up.weight
        ours = gate_up.scales is None and len(x) < MANY_ROWS
        if not (ours and _aligned(weight, len(weight) // 2)):
            return super().gated(x, gate_up, scale)
        return self._planned(x, weight, After.GATED)[0]

    def _planned(
        self, x: Tensor, weight: Tensor, after: After, bias: Tensor | None = None
    ) -> Tensor:
        splits = MOST_TERMS if after is After.NOTHING else 1
        (n, depth), features = x.shape, len(weight)
        plan = plan_for(n, features, depth, after, splits, self._multiprocessors)
        return self.run(x, weight, plan, after, bias)

    def kernel(self, plan: Plan, after: After) -> CudaKernel:
        """The kernel for a plan, compiled at its first use.

        Raises:
            RuntimeError: It does not compile.
        """
        if (plan, after) not in self._kernels:
            # NVIDIA's bindings are no requirement: only who runs this kernel imports them.
            from safe_pruner_node.engine.cuda.compile import CudaKernel  # noqa: PLC0415

            self._kernels[plan, after] = CudaKernel(
                source(plan), NAME, ARCH, plan.defines(after), plan.shared_bytes
            )
        return self._kernels[plan, after]

    def run(
        self, x: Tensor, weight: Tensor, plan: Plan, after: After, bias: Tensor | None = None
    ) -> Tensor:
        """x @ weight.T and what follows, cut as `plan` says.

        Args:
            x: [N, D] bf16.
            weight: [F, D] bf16, contiguous; gates and what they are multiplied with alternate.
            plan: How it is cut.
            after: What follows.
            bias: [F] bf16; only where one follows.

        Returns:
            [S, N, F], gated [1, N, F / 2].

        Raises:
            ValueError: An operand is of another type or not laid out so: the kernel would read
                something else.
        """
        operands = [x, weight] if bias is None else [x, weight, bias]
        if any(operand.dtype != torch.bfloat16 for operand in operands):
            found = ", ".join(str(operand.dtype) for operand in operands)
            raise ValueError(f"the kernel multiplies bf16, not {found}")
        if x.stride(1) != 1 or not weight.is_contiguous():
            raise ValueError("the kernel reads whole rows and a contiguous weight")
        (n, depth), features = x.shape, len(weight)
        out_features = features // 2 if after is After.GATED else features
        out = x.new_empty(plan.splits, n, out_features)
        by_features, by_rows = plan.groups(n, features)
        argument = Product(
            weights=_weight_map(weight, plan, gated=after is After.GATED),
            inputs=_map(x, [depth, n], [x.stride(0)], [DEPTH, plan.rows // plan.cluster_features]),
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            n=n,
            out_features=out_features,
            depth_steps=-(-depth // DEPTH),
            splits=plan.splits,
            feature_groups=by_features,
            row_groups=by_rows,
        )
        clusters = min(plan.units(n, features), self._multiprocessors // plan.cluster)
        self.kernel(plan, after).launch(
            clusters * plan.cluster, THREADS, argument, cluster=plan.cluster, dependent=True
        )
        return out


def unsupported(weight: Tensor) -> str | None:
    """Why a model's products cannot run in this kernel; None when they can.

    Args:
        weight: One of its matrices.
    """
    return None if available(weight) else "no SM 9.0 GPU with cuda-bindings, or no bf16"


def _aligned(weight: Tensor, out_features: int) -> bool:
    """True when rows of a weight matrix [F, D], and of what it gives, are multiples of 16 bytes."""
    return weight.shape[1] % ALIGNED == 0 and out_features % ALIGNED == 0


def _weight_map(weight: Tensor, plan: Plan, *, gated: bool) -> Map:
    """Of all rows, or of the even and of the odd ones."""
    features, depth = weight.shape
    kinds = 2 if gated else 1
    rows = GATES if gated else plan.features // plan.cluster_rows
    sizes, strides = [depth, features // kinds, kinds], [depth * kinds, depth]
    return _map(weight, sizes, strides, [DEPTH, rows, 1])


def _map(tensor: Tensor, sizes: list[int], strides: list[int], box: list[int]) -> Map:
    """A tensor map of bf16 numbers, innermost first; what is outside reads as zero."""
    from cuda.bindings import driver  # noqa: PLC0415 - as above

    status, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(sizes),
        tensor.data_ptr(),
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * tensor.element_size()) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        # What a row of 256 bytes has besides is what the next step reads.
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value:
        raise RuntimeError(f"CUDA: {status}")
    return Map.from_buffer_copy(ctypes.string_at(encoded.getPtr(), ctypes.sizeof(Map)))
