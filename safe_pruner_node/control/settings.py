"""What the supervisor needs to be told, validated once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class ControlSettings:
    """Settings of the control side.

    Attributes:
        dt_s: Control period, seconds.
        first_action_tolerance: Largest distance between the measured joints and the first
            action of a run, robot units, [dof]; inf for joints that are not commanded.
        blend_s: Time over which a new chunk replaces the one playing, seconds; 0 switches at
            once and leaves smoothing to the limits.
        max_state_age_s: Joint states older than this end POLICY, seconds.
        starvation_timeout_s: How long POLICY rests at the end of its last chunk, waiting for
            the next, before it becomes HOLD, seconds.
        first_chunk_timeout_s: How long a start waits for its first chunk, seconds.
        max_clock_jump_s: A gap between two ticks above this, or any step back, ends POLICY.
        max_bad_chunks: Malformed or non-finite chunks in a row that end POLICY.
        auto_resume: Take up POLICY again by itself after a lost worker, stale joint states or
            starvation. Never after a stop, a refused chunk, a clock jump or an emergency stop.

    Raises:
        ConfigError: A value out of range.
    """

    dt_s: float
    first_action_tolerance: FloatArray
    blend_s: float = 0.1
    max_state_age_s: float = 0.1
    starvation_timeout_s: float = 2.0
    first_chunk_timeout_s: float = 10.0
    max_clock_jump_s: float = 0.5
    max_bad_chunks: int = 3
    auto_resume: bool = False

    def __post_init__(self) -> None:
        for name in ("dt_s", "max_state_age_s", "first_chunk_timeout_s", "max_clock_jump_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0.0):
                raise ConfigError("control", name, value, "a positive finite number")
        for name in ("blend_s", "starvation_timeout_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0.0):
                raise ConfigError("control", name, value, "a finite number, at least 0")
        if self.max_clock_jump_s <= self.dt_s:
            expected = f"more than one control period ({self.dt_s:g} s)"
            raise ConfigError("control", "max_clock_jump_s", self.max_clock_jump_s, expected)
        if self.max_bad_chunks < 1:
            raise ConfigError("control", "max_bad_chunks", self.max_bad_chunks, "at least 1")
        tolerance = np.array(self.first_action_tolerance, dtype=np.float64)
        if tolerance.ndim != 1 or not np.all(tolerance > 0.0):
            found, expected = tolerance.tolist(), "one positive number per joint"
            raise ConfigError("control", "first_action_tolerance", found, expected)
        object.__setattr__(self, "first_action_tolerance", tolerance)
