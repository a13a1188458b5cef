"""Poses of a hand: where the fingers pinch and how the hand is turned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class HandPose:
    """Pinch point in the world, m, [3], and orientation, [3, 3].

    The third column points along the fingers, the first from one finger to the other.
    """

    position: FloatArray
    rotation: FloatArray


def up(height_m: float) -> FloatArray:
    """A vertical offset, m, [3]."""
    return np.array([0.0, 0.0, height_m])


def facing_down(tilt_rad: float) -> FloatArray:
    """Orientation of a hand that reaches down and forwards with its camera on top, [3, 3].

    Args:
        tilt_rad: Angle of the fingers from straight down towards +x.
    """
    fingers = np.array([np.sin(tilt_rad), 0.0, -np.cos(tilt_rad)])
    across = np.array([0.0, 1.0, 0.0])
    return np.stack([across, np.cross(fingers, across), fingers], axis=1)
