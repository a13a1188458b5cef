"""Tensors that are remembered over many queries: who has a copy need not make another."""

from __future__ import annotations

import torch
from torch import Tensor


class Unchanging(Tensor):
    """A tensor that nobody writes; results of anything done with it are plain tensors."""

    # As torch's own `Parameter` does it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001


def snapshot(tensor: Tensor) -> Unchanging:
    """A copy in memory of its own, whatever is written to the tensor later."""
    return tensor.clone().as_subclass(Unchanging)
