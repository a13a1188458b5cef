"""Joint motions that begin and end gently, and may begin before the last one has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from safe_pruner_node.robot.limits import LimitArrays
from safe_pruner_node.types import FloatArray

Shape = Callable[[float], float]
"""Share of the way (0 to 1) done at a share of the time (0 to 1)."""

LIMITS_SHARE = 0.6
"""Share of a joint's limits that one motion uses: overlapping motions and noise come on top."""


@dataclass(frozen=True)
class Motion:
    """A displacement of some joints over some time.

    Attributes:
        path: Displacements at equal shares of the way, the first zero, rad, [points, dof].
        start_s: When it begins, s.
        seconds: How long it takes, s.
        shape: How it is spread over that time.
    """

    path: FloatArray
    start_s: float
    seconds: float
    shape: Shape

    def done(self, time_s: float) -> FloatArray:
        """Displacement up to a time, rad, [dof]."""
        share = min(max((time_s - self.start_s) / self.seconds, 0.0), 1.0)
        place = self.shape(share) * (len(self.path) - 1)
        before = min(int(place), len(self.path) - 2)
        first, second = self.path[before], self.path[before + 1]
        return np.asarray(first + (place - before) * (second - first), dtype=np.float64)


def minimum_jerk(share: float) -> float:
    """The shape of least jerk from rest to rest."""
    return share**3 * (10 - 15 * share + 6 * share**2)


def shortest_s(way: FloatArray, limits: LimitArrays, place: slice) -> float:
    """Time that a minimum-jerk motion needs within its share of the limits, s.

    Args:
        way: Displacement, rad, [dof].
        limits: Limits of the whole robot.
        place: Which of them are this part's.
    """
    distance = np.abs(way)
    # Largest velocity, acceleration and jerk of the shape over unit time: 15/8, 10/sqrt(3), 60.
    needs = (
        15 / 8 * distance / (LIMITS_SHARE * limits.max_velocity[place]),
        np.sqrt(10 / np.sqrt(3) * distance / (LIMITS_SHARE * limits.max_acceleration[place])),
        np.cbrt(60 * distance / (LIMITS_SHARE * limits.max_jerk[place])),
    )
    return float(np.max(needs))
