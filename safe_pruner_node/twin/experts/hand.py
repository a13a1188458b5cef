"""Poses of a hand: where the fingers pinch and how the hand is turned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class HandPose:
    """Pinch point in the world, m, [3], and orientation, [3, 3].

    The third column points along the fingers, the first from one finger to the other.
    """

    position: FloatArray
    rotation: FloatArray

    def moved(self, offset: FloatArray) -> HandPose:
        """The same orientation, moved by an offset in the world, m."""
        return HandPose(self.position + offset, self.rotation)


def up(height_m: float) -> FloatArray:
    """A vertical offset, m, [3]."""
    return np.array([0.0, 0.0, height_m])


def facing_down(tilt_rad: float, yaw_rad: float = 0.0) -> FloatArray:
    """Orientation of a hand that reaches down and forwards with its camera on top, [3, 3].

    Args:
        tilt_rad: Angle of the fingers from straight down towards +x.
        yaw_rad: Turn about the vertical.
    """
    fingers = np.array([np.sin(tilt_rad), 0.0, -np.cos(tilt_rad)])
    across = np.array([0.0, 1.0, 0.0])
    level = np.stack([across, np.cross(fingers, across), fingers], axis=1)
    return np.asarray(Rotation.from_euler("z", yaw_rad).as_matrix() @ level, dtype=np.float64)


def between(start: HandPose, end: HandPose, fraction: float) -> HandPose:
    """Straight line and shortest turn from start (0) to end (1)."""
    turn = Rotation.from_matrix(start.rotation.T @ end.rotation).as_rotvec()
    rotation = start.rotation @ Rotation.from_rotvec(fraction * turn).as_matrix()
    return HandPose(start.position + fraction * (end.position - start.position), rotation)


def turn_angle(start: HandPose, end: HandPose) -> float:
    """Angle between two orientations, rad."""
    return float(Rotation.from_matrix(start.rotation.T @ end.rotation).magnitude())
