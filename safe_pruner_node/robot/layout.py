"""State and action layout: which joints, in which order, and their units for the policy.

Every public S1 deployment orders its vectors differently, so the order is configuration
(``layouts`` in the robot file) and this class is the only place that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.robot.policy import PolicyConfig
from safe_pruner_node.types import FloatArray

GRIPPER_OPEN = 0.0
GRIPPER_CLOSED = 100.0
"""Gripper units of the robot's own messages: 0 is open, 100 is closed (vendor SDK)."""


@dataclass(frozen=True)
class Segment:
    """The joints of one part, side by side in the vector.

    Attributes:
        part: Part name, such as ``astribot_arm_left``.
        joint_names: Joint names, in order.
        commanded: False for a part that is observed but never driven.
        gripper: True when the unit is 0 (open) to 100 (closed) and not rad.
    """

    part: str
    joint_names: tuple[str, ...]
    commanded: bool
    gripper: bool

    @property
    def dof(self) -> int:
        """Number of joints."""
        return len(self.joint_names)


@dataclass(frozen=True)
class Layout:
    """Order of the state and action vectors, and their conversion to the policy's units.

    Attributes:
        name: Name in the robot file (``s1_16``, ``s1_25_parts``, ``s1_25_lerobot``).
        segments: Parts in vector order.
        policy: The units and the action convention of the checkpoint.
    """

    name: str
    segments: tuple[Segment, ...]
    policy: PolicyConfig

    @cached_property
    def dof(self) -> int:
        """Length of the state and action vectors."""
        return sum(segment.dof for segment in self.segments)

    @cached_property
    def joint_names(self) -> tuple[str, ...]:
        """Joint names in vector order."""
        return tuple(name for segment in self.segments for name in segment.joint_names)

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Part name to its place in the vector."""
        ends = np.cumsum([segment.dof for segment in self.segments])
        return {
            segment.part: slice(int(end) - segment.dof, int(end))
            for segment, end in zip(self.segments, ends, strict=True)
        }

    @cached_property
    def commanded(self) -> NDArray[np.bool_]:
        """True where the joint is driven, [dof]."""
        return np.repeat([s.commanded for s in self.segments], [s.dof for s in self.segments])

    @cached_property
    def gripper(self) -> NDArray[np.bool_]:
        """True where the unit is the gripper's 0..100, [dof]."""
        return np.repeat([s.gripper for s in self.segments], [s.dof for s in self.segments])

    def join(self, by_part: Mapping[str, FloatArray]) -> FloatArray:
        """One vector from the parts' vectors, [dof]. Parts outside the layout are left out."""
        return np.concatenate([by_part[segment.part] for segment in self.segments])

    def to_policy_state(self, state: FloatArray) -> FloatArray:
        """A robot state in the units of the checkpoint.

        Args:
            state: Robot units (rad, gripper 0 open..100 closed), [dof].

        Returns:
            Policy units, [dof].
        """
        opened, closed = self.policy.gripper_open, self.policy.gripper_closed
        fraction = (state - GRIPPER_OPEN) / (GRIPPER_CLOSED - GRIPPER_OPEN)
        return np.where(self.gripper, opened + fraction * (closed - opened), state)

    def to_robot_actions(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """A chunk of the policy as absolute targets of the robot.

        With delta actions every action of the chunk is relative to the state that the policy
        saw, and grippers stay absolute (openpi's ``DeltaActions`` mask). Joints that are never
        driven keep the observed value, whatever the policy says about them.

        Args:
            actions: Policy units, [horizon, dof].
            state: The observed state in robot units, [dof].

        Returns:
            Absolute targets in robot units, [horizon, dof].
        """
        opened, closed = self.policy.gripper_open, self.policy.gripper_closed
        fraction = (actions - opened) / (closed - opened)
        grippers = GRIPPER_OPEN + fraction * (GRIPPER_CLOSED - GRIPPER_OPEN)
        joints = actions + state if self.policy.actions == "delta" else actions
        targets = np.where(self.gripper, grippers, joints)
        return np.where(self.commanded, targets, state)

    def to_policy_actions(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """Absolute targets as the policy's chunk: the inverse of `to_robot_actions`.

        Args:
            actions: Absolute targets in robot units, [..., horizon, dof].
            state: The state that was observed when the chunk was asked for, [..., dof].

        Returns:
            Policy units, [..., horizon, dof].
        """
        joints = actions
        if self.policy.actions == "delta":
            joints = actions - np.where(self.gripper, 0.0, state)[..., None, :]
        opened, closed = self.policy.gripper_open, self.policy.gripper_closed
        fraction = (actions - GRIPPER_OPEN) / (GRIPPER_CLOSED - GRIPPER_OPEN)
        return np.where(self.gripper, opened + fraction * (closed - opened), joints)
