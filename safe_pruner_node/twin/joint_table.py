"""The S1's joints as numbers: origins, limits, names and the home pose.

Source: whole-body and per-part URDF of ``Astribot-Dev/astribot_descriptions`` (joint origins,
limits, efforts; every joint turns about its own z). Figures only; nothing was copied.
"""

from __future__ import annotations

from dataclasses import dataclass

Vector = tuple[float, float, float]

HALF_PI = 1.5708
"""As written in the URDF; the twin keeps its rounding so that both agree to 1e-6 m."""

SIDES = ("left", "right")


@dataclass(frozen=True)
class Origin:
    """A frame in its parent: ``xyz`` in m, ``rpy`` in rad (URDF: fixed axes, R = Rz Ry Rx)."""

    xyz: Vector
    rpy: Vector = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Joint:
    """One revolute joint about its own z.

    Attributes:
        origin: Joint frame in the previous joint's frame.
        lower: Lower position limit, rad.
        upper: Upper position limit, rad.
        effort: Largest torque, N m.
    """

    origin: Origin
    lower: float
    upper: float
    effort: float


TORSO = (
    Joint(Origin((0, 0, 0.12), (-HALF_PI, HALF_PI, 0)), -0.04, 1.3, 100),
    Joint(Origin((-0.38, 0, 0)), -2.3, 0.06, 100),
    Joint(Origin((-0.39, 0, 0)), -0.4, 2.3, 100),
    Joint(Origin((0, 0, 0), (HALF_PI, 0, -HALF_PI)), -1.2, 1.2, 100),
)
TORSO_END = Origin((0, 0, 0.34475))
"""Torso end effector in torso_4."""

ARM_BASE = {
    "left": Origin((0, 0.06449, 0.02348), (0, -1.22173, -HALF_PI)),
    "right": Origin((0, -0.06449, 0.02348), (0, -1.22173, HALF_PI)),
}
"""Arm bases in the torso end effector."""

ARM = (
    Joint(Origin((0, 0, 0.091)), -3.1, 3.1, 265),
    Joint(Origin((0, 0, 0), (HALF_PI, 0, 0)), -1.53, 0.46, 265),
    Joint(Origin((0, 0.05, 0), (HALF_PI, 0, -HALF_PI)), -3.1, 3.1, 132),
    Joint(Origin((0.03, 0, 0.309), (-HALF_PI, 0, 0)), -0.06, 2.61, 142),
    Joint(Origin((0, 0, 0), (HALF_PI, 0, 0)), -2.56, 2.56, 71),
    Joint(Origin((0, 0, 0.277), (-HALF_PI, 0, 0)), -0.76, 0.76, 20),
    Joint(Origin((0, 0, 0), (0, HALF_PI, 0)), -1.53, 1.53, 20),
)
ARM_END = Origin((0, -0.15, 0))
"""End effector in arm_7: the approach direction is arm_7's -y."""

HEAD = (
    Joint(Origin((0, 0, 0.468)), -1.57, 1.57, 100),
    Joint(Origin((0, 0, 0), (-HALF_PI, 0, 0)), -1.22, 1.22, 100),
)
"""Pan on torso_4, tilt above it."""

GRIPPER_OPEN = 0.0
GRIPPER_CLOSED = 100.0


def joint_names(part: str) -> tuple[str, ...]:
    """Joint names of a part in the order of its messages: ``<part>_joint_1``..."""
    return tuple(f"{part}_joint_{i}" for i in range(1, PART_DOF[part] + 1))


PART_DOF = {
    "astribot_chassis": 3,
    "astribot_torso": 4,
    "astribot_head": 2,
    "astribot_arm_left": 7,
    "astribot_gripper_left": 1,
    "astribot_arm_right": 7,
    "astribot_gripper_right": 1,
}
"""The seven parts of the robot and their degrees of freedom."""

HOME = {
    "astribot_chassis": (0.0, 0.0, 0.0),
    "astribot_torso": (0.29, -0.58, 0.29, 0.0),
    "astribot_head": (0.0, 0.55),
    "astribot_arm_left": (0.159, -0.022, -1.42, 1.66, -0.345, 0.115, 0.125),
    "astribot_gripper_left": (GRIPPER_OPEN,),
    "astribot_arm_right": (-0.159, -0.022, 1.42, 1.66, 0.345, 0.115, -0.125),
    "astribot_gripper_right": (GRIPPER_OPEN,),
}
"""Home pose, robot units."""
