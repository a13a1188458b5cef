"""Joint offsets: the small difference between a joint's encoder and its true angle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.strict import STRICT, did_you_mean, load_yaml
from safe_pruner_node.types import FloatArray

LARGEST_OFFSET_RAD = 0.35
"""A larger one is degrees, or another joint: homing errors are a few degrees."""


@dataclass(frozen=True, config=STRICT)
class _OffsetsFile:
    joint_offsets_rad: Mapping[str, tuple[float, ...]]


def load_joint_offsets(path: Path, dof: Mapping[str, int]) -> dict[str, FloatArray]:
    """Reads ``joint_offsets_rad.<part>: [...]``; true angle = measured + offset.

    Args:
        path: The file.
        dof: Parts that can have offsets (in rad) and their number of joints.

    Returns:
        Part name to offsets, rad, [dof]; parts not in the file are not in the result.

    Raises:
        ConfigError: Unknown part, wrong count, or an offset above `LARGEST_OFFSET_RAD`.
    """
    offsets = load_yaml(path, _OffsetsFile).joint_offsets_rad
    for part, values in offsets.items():
        key = f"joint_offsets_rad.{part}"
        if part not in dof:
            raise ConfigError(path, key, "a part without angles", did_you_mean(part, dof))
        if len(values) != dof[part]:
            found = f"{len(values)} values"
            raise ConfigError(path, key, found, f"{dof[part]}, one per joint")
        for i, value in enumerate(values):
            if abs(value) > LARGEST_OFFSET_RAD:
                expected = f"at most {LARGEST_OFFSET_RAD} rad either way (degrees perhaps?)"
                raise ConfigError(path, f"{key}[{i}]", f"{value:g}", expected)
    return {part: np.array(values) for part, values in offsets.items()}
