"""Options of a kernel that is launched as a dependent of the one before it; see `launch.py`."""

from __future__ import annotations

from functools import cache

import torch


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Options of a launch on a device whose kernel has the parameter ``PDL``.

    Args:
        device: Where it runs; only GPUs from SM 9.0 on have dependent launches.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    # Triton's interpreter does not know the option, so nobody else is given it
    return {"PDL": True, "launch_pdl": True}
