"""What a joint may do: position, velocity, acceleration and jerk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class JointLimits:
    """Limits of every joint in layout order, margins already taken off.

    Attributes:
        min_position: Lower bound, rad (gripper 0..100), [dof]; -inf for none.
        max_position: Upper bound, [dof]; inf for none.
        max_velocity: Largest speed either way, rad/s, [dof].
        max_acceleration: Largest acceleration either way, rad/s^2, [dof].
        max_jerk: Largest jerk either way, rad/s^3, [dof].

    Raises:
        ConfigError: Arrays of different sizes, lower not below upper, or a rate that is not
            positive and finite.
    """

    min_position: FloatArray
    max_position: FloatArray
    max_velocity: FloatArray
    max_acceleration: FloatArray
    max_jerk: FloatArray

    def __post_init__(self) -> None:
        dof = np.asarray(self.min_position).shape
        for name in self.__dataclass_fields__:
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.ndim != 1 or values.shape != dof or values.size == 0:
                expected = f"one value per joint, {list(dof)}"
                raise ConfigError("limits", name, list(values.shape), expected)
            object.__setattr__(self, name, values.copy())
        for joint in np.flatnonzero(~(self.min_position < self.max_position)):
            found = f"{self.min_position[joint]:g} .. {self.max_position[joint]:g}"
            raise ConfigError("limits", f"position of joint {joint}", found, "lower below upper")
        for name in ("max_velocity", "max_acceleration", "max_jerk"):
            values = getattr(self, name)
            for joint in np.flatnonzero(~(np.isfinite(values) & (values > 0.0))):
                found, key = f"{values[joint]:g}", f"{name} of joint {joint}"
                raise ConfigError("limits", key, found, "a positive finite number")

    @property
    def dof(self) -> int:
        """Number of joints."""
        return len(self.min_position)
