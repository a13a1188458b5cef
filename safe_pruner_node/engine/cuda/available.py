"""Where kernels of this room that are for any model in bf16 can run."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

ARCH, CAPABILITY = "sm_90a", (9, 0)
"""What they are compiled for: no GPU before or after it has these instructions."""


def available(weight: Tensor) -> bool:
    """True when they are for where a model's weights are, and can be compiled.

    Args:
        weight: One of its matrices.
    """
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(weight.device) != CAPABILITY:
        return False
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
