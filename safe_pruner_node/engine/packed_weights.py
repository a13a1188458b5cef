"""Several projections of one input as one matrix, so that one GEMM computes them all.

The model's own parameters become views of the packed matrix: no weight is held twice, and every
other path goes on reading the same parameters. Packing again gives the same matrix, so graphs
captured before go on reading what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stack(*parameters: Tensor) -> Tensor:
    """One parameter's rows after the other's.

    Args:
        parameters: Of one type and device, equal but for their first axis; they become views of
            the result.

    Returns:
        Contiguous, [sum of rows, ...].
    """
    rows = [len(parameter) for parameter in parameters]
    shape = (sum(rows), *parameters[0].shape[1:])
    return _pack(parameters, shape, lambda whole: whole.split(rows))


def interleave(*parameters: Tensor) -> Tensor:
    """Rows of equal parameters in turn: of two, a 0, b 0, a 1, b 1 and so on.

    Args:
        parameters: Of one type, device and shape [F, D]; they become views of the result.

    Returns:
        Contiguous, [number of parameters * F, D].
    """
    rows, columns = parameters[0].shape
    shape = (rows, len(parameters), columns)
    return _pack(parameters, shape, lambda whole: whole.unbind(1)).flatten(0, 1)


def _pack(
    parameters: Sequence[Tensor],
    shape: tuple[int, ...],
    views: Callable[[Tensor], Sequence[Tensor]],
) -> Tensor:
    first = parameters[0].data
    if first.untyped_storage().nbytes() == math.prod(shape) * first.element_size():
        strides = torch.empty(shape, device="meta").stride()
        whole = first.as_strided(shape, strides, 0)
        pairs = zip(parameters, views(whole), strict=True)
        if all(_is(parameter.data, view) for parameter, view in pairs):
            return whole
    whole = first.new_empty(shape)
    for parameter, view in zip(parameters, views(whole), strict=True):
        view.copy_(parameter.data)
        parameter.data = view
    if whole.is_cuda:
        # Else torch keeps what the parameters had: blocks of half this size, of no use for the next
        # matrix.
        torch.cuda.empty_cache()
    return whole


def _is(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
