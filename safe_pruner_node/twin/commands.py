"""What the robot accepts on a command topic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import FloatArray

POSITION_MODE = 1


def command_positions(
    topic: str,
    joint_names: Sequence[str],
    *,
    mode: int,
    names: Sequence[str],
    values: Sequence[float],
) -> FloatArray:
    """Position targets of a ``RobotJointController`` message, [dof].

    Args:
        topic: Where it came from, for the error.
        joint_names: The part's joints in message order.
        mode: Must be 1, position.
        names: Empty, or exactly the part's joints: the order is the contract.
        values: N positions, or 2N with velocities, or 3N with torques as well. The twin follows
            the positions; the rest is feed-forward that it does not need.

    Raises:
        ConfigError: Anything else.
    """
    dof = len(joint_names)
    if mode != POSITION_MODE:
        raise ConfigError(topic, "mode", mode, "1 (position), the one mode of the twin")
    if names and list(names) != list(joint_names):
        raise ConfigError(topic, "name", list(names), f"none, or {list(joint_names)}")
    if len(values) not in {dof, 2 * dof, 3 * dof}:
        raise ConfigError(
            topic, "command", f"{len(values)} values", f"{dof}, {2 * dof} or {3 * dof}"
        )
    positions = np.asarray(values, dtype=np.float64)
    if not np.isfinite(positions).all():
        raise ConfigError(topic, "command", positions.tolist(), "finite values")
    return positions[:dof]
