"""The S1 as a MuJoCo model of primitive shapes, built from :mod:`joint_table`.

The frames, axes, limits and efforts are the URDF's. The shapes, masses and gains are ours: the
official meshes (320k faces) are too slow for software rendering, and the arms are gravity
compensated, so that masses are felt in contacts only. The four-bar gripper is two coupled slides.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.twin.joint_table import (
    ARM,
    ARM_BASE,
    ARM_END,
    HEAD,
    SIDES,
    TORSO,
    TORSO_END,
    Joint,
    Origin,
    Vector,
    joint_names,
)
from safe_pruner_node.twin.shapes import box, capsule, cylinder, ellipsoid, looking

WHITE = (0.93, 0.935, 0.95, 1.0)
PEARL = (0.82, 0.83, 0.86, 1.0)
GREY = (0.34, 0.36, 0.40, 1.0)
DARK = (0.13, 0.14, 0.16, 1.0)
RUBBER = (0.09, 0.09, 0.10, 1.0)
ACCENT = (0.16, 0.52, 0.86, 1.0)
LENS = (0.03, 0.04, 0.07, 1.0)

CHASSIS_HEIGHT = 0.097
"""Torso base above the floor, m."""

FINGER_STROKE = 0.05
"""Way of each finger from closed to open, m: 100 units of the gripper."""

# Contact bits. Each arm collides with the other arm and with things, never with itself.
THINGS = 1
ARM_BIT = {"left": 2, "right": 4}
EVERYTHING = 7

HEAD_FOVY_DEG = 70.0
WRIST_FOVY_DEG = 75.0


@dataclass(frozen=True)
class Link:
    """Mass (kg), centre of mass (m) and principal inertia (kg m^2) of a link, in its frame."""

    mass: float
    centre: Vector
    inertia: Vector


ARM_LINKS = (
    Link(0.60, (0.0, 0.0, -0.05), (2e-3, 2e-3, 1e-3)),
    Link(0.50, (0.0, 0.02, 0.0), (1e-3, 1e-3, 1e-3)),
    Link(0.90, (0.01, 0.0, 0.15), (8e-3, 8e-3, 1e-3)),
    Link(0.35, (0.0, 0.0, 0.0), (5e-4, 5e-4, 4e-4)),
    Link(0.55, (0.0, 0.0, 0.15), (4e-3, 4e-3, 5e-4)),
    Link(0.15, (0.0, 0.0, 0.0), (1e-4, 1e-4, 1e-4)),
    Link(0.15, (0.0, -0.03, 0.0), (1e-4, 1e-4, 1e-4)),
)
GRIPPER_LINK = Link(0.40, (0.0, 0.0, 0.04), (6e-4, 6e-4, 4e-4))
FINGER_LINK = Link(0.06, (0.0, 0.0, 0.05), (6e-5, 6e-5, 1e-5))

# Position gains, N m/rad. With the armatures below every joint closes at 40-60 rad/s, critically
# damped: a lag of some 40 ms, about what a position-controlled arm shows.
ARM_GAINS = (1200.0, 1200.0, 800.0, 800.0, 250.0, 120.0, 120.0)
ARM_ARMATURE = (0.15, 0.15, 0.12, 0.12, 0.06, 0.03, 0.03)


def add_robot(spec: mujoco.MjSpec) -> None:
    """Adds the S1 at the origin of the world, facing +x, with cameras and actuators."""
    chassis = _add_chassis(spec)
    torso = _add_torso(spec, chassis)
    _add_head(spec, torso)
    end = _fixed(torso, "astribot_torso_end_effector", TORSO_END)
    for side in SIDES:
        _add_arm(spec, end, side)


def quaternion(origin: Origin) -> np.ndarray:
    """Orientation of an origin as a MuJoCo quaternion (w, x, y, z), [4]."""
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.array(origin.rpy, dtype=float), "XYZ")
    return quat


def _fixed(parent: mujoco.MjsBody, name: str, origin: Origin) -> mujoco.MjsBody:
    return parent.add_body(name=name, pos=origin.xyz, quat=quaternion(origin), gravcomp=1)


def _add_link(
    spec: mujoco.MjSpec,
    parent: mujoco.MjsBody,
    name: str,
    joint: Joint,
    link: Link,
    *,
    gain: float,
    armature: float,
) -> mujoco.MjsBody:
    """A link on a position-controlled revolute joint of the table."""
    body = _fixed(parent, name.replace("_joint_", "_link_"), joint.origin)
    _set_inertia(body, link)
    body.add_joint(
        name=name,
        type=mujoco.mjtJoint.mjJNT_HINGE,
        axis=(0, 0, 1),
        range=(joint.lower, joint.upper),
        armature=armature,
        damping=0.5,
    )
    actuator = spec.add_actuator(
        name=name,
        target=name,
        trntype=mujoco.mjtTrn.mjTRN_JOINT,
        ctrllimited=True,
        ctrlrange=(joint.lower, joint.upper),
        forcelimited=True,
        forcerange=(-joint.effort, joint.effort),
    )
    actuator.set_to_position(kp=gain, dampratio=1.0)
    return body


def _set_inertia(body: mujoco.MjsBody, link: Link) -> None:
    body.explicitinertial = True
    body.mass = link.mass
    body.ipos = link.centre
    body.inertia = link.inertia


def _add_chassis(spec: mujoco.MjSpec) -> mujoco.MjsBody:
    """The mobile base on three servo joints: x, y, yaw."""
    body = spec.worldbody.add_body(name="astribot_chassis", pos=(0, 0, CHASSIS_HEIGHT), gravcomp=1)
    _set_inertia(body, Link(60.0, (0, 0, 0), (3.0, 3.0, 4.0)))
    slide, hinge = mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE
    axes = ((slide, (1, 0, 0)), (slide, (0, 1, 0)), (hinge, (0, 0, 1)))
    for name, (kind, axis) in zip(joint_names("astribot_chassis"), axes, strict=True):
        body.add_joint(name=name, type=kind, axis=axis, damping=10)
        actuator = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        actuator.set_to_position(kp=20000.0, dampratio=1.0)
    cylinder(body, (0, 0, -0.085), (0, 0, -0.03), 0.27, DARK)
    cylinder(body, (0, 0, -0.03), (0, 0, 0.03), 0.285, WHITE)
    cylinder(body, (0, 0, -0.005), (0, 0, 0.005), 0.287, ACCENT)
    cylinder(body, (0, 0, 0.03), (0, 0, 0.055), 0.25, PEARL)
    cylinder(body, (0, 0, 0.055), (0, 0, 0.10), 0.11, GREY)
    return body


def _add_torso(spec: mujoco.MjSpec, chassis: mujoco.MjsBody) -> mujoco.MjsBody:
    """Two leg-like links, a waist and the chest; returns torso_4."""
    links = (
        Link(8.0, (-0.19, 0, 0), (0.02, 0.12, 0.12)),
        Link(8.0, (-0.19, 0, 0), (0.02, 0.12, 0.12)),
        Link(1.0, (0, 0, 0), (0.01, 0.01, 0.01)),
        Link(10.0, (0, 0, 0.2), (0.2, 0.15, 0.1)),
    )
    bodies = []
    parent = chassis
    for name, joint, link in zip(joint_names("astribot_torso"), TORSO, links, strict=True):
        # The URDF's efforts suit its masses with brakes and springs that the twin lacks.
        strong = Joint(joint.origin, joint.lower, joint.upper, 2000.0)
        parent = _add_link(spec, parent, name, strong, link, gain=30000.0, armature=2.0)
        bodies.append(parent)
    shin, thigh, waist, chest = bodies
    for body, length in ((shin, 0.38), (thigh, 0.39)):
        for y in (-0.052, 0.052):
            capsule(body, (-0.02, 0, y), (-length + 0.02, 0, y), 0.045, WHITE)
        box(body, (-length / 2, 0, 0), (length / 2 - 0.05, 0.035, 0.06), PEARL)
    for body in (shin, thigh, waist):
        cylinder(body, (0, 0, -0.105), (0, 0, 0.105), 0.066, GREY)
        cylinder(body, (0, 0, -0.109), (0, 0, 0.109), 0.04, WHITE)
    cylinder(chest, (0, 0, 0.0), (0, 0, 0.12), 0.075, GREY)
    ellipsoid(chest, (0.0, 0, 0.14), (0.095, 0.105, 0.10), PEARL)
    ellipsoid(chest, (0.0, 0, 0.28), (0.115, 0.145, 0.165), WHITE)
    capsule(chest, (0, -0.09, 0.365), (0, 0.09, 0.365), 0.078, WHITE)
    cylinder(chest, (0.100, 0, 0.315), (0.1165, 0, 0.315), 0.02, ACCENT)
    cylinder(chest, (0, 0, 0.42), (0, 0, 0.50), 0.042, GREY)
    return chest


def _add_head(spec: mujoco.MjSpec, torso: mujoco.MjsBody) -> None:
    """Pan and tilt; the tilt link's -y is up, its x is forward."""
    links = (
        Link(0.3, (0, 0, 0), (1e-3, 1e-3, 1e-3)),
        Link(1.0, (0, -0.1, 0), (6e-3, 6e-3, 6e-3)),
    )
    parent = torso
    for name, joint, link in zip(joint_names("astribot_head"), HEAD, links, strict=True):
        parent = _add_link(spec, parent, name, joint, link, gain=150.0, armature=0.05)
    head = parent
    cylinder(head, (0, 0, -0.05), (0, 0, 0.05), 0.03, GREY)
    ellipsoid(head, (0.0, -0.105, 0), (0.088, 0.105, 0.085), WHITE)
    ellipsoid(head, (0.028, -0.112, 0), (0.070, 0.066, 0.073), DARK)
    for z in (-0.089, 0.089):
        cylinder(head, (0, -0.11, z - 0.006), (0, -0.11, z + 0.006), 0.03, PEARL)
    cylinder(head, (0.09, -0.12, 0.0), (0.101, -0.12, 0.0), 0.012, LENS)
    head.add_camera(
        name="head",
        pos=(0.105, -0.12, 0),
        quat=looking((1, 0, 0), up=(0, -1, 0)),
        fovy=HEAD_FOVY_DEG,
    )


def _add_arm(spec: mujoco.MjSpec, torso_end: mujoco.MjsBody, side: str) -> None:
    part = f"astribot_arm_{side}"
    base = _fixed(torso_end, f"{part}_base", ARM_BASE[side])
    cylinder(base, (0, 0, -0.02), (0, 0, 0.045), 0.052, GREY)
    parent = base
    links = []
    for i, (name, joint) in enumerate(zip(joint_names(part), ARM, strict=True)):
        parent = _add_link(
            spec, parent, name, joint, ARM_LINKS[i], gain=ARM_GAINS[i], armature=ARM_ARMATURE[i]
        )
        links.append(parent)
    bit = ARM_BIT[side]
    capsule(links[0], (0, 0, -0.035), (0, 0, 0), 0.058, WHITE)
    cylinder(links[1], (0, 0, -0.064), (0, 0, 0.064), 0.042, GREY)
    capsule(links[2], (0, 0, 0.03), (0.02, 0, 0.26), 0.047, WHITE, bit=bit)
    cylinder(links[2], (0.008, 0, 0.115), (0.009, 0, 0.125), 0.0478, ACCENT)
    cylinder(links[3], (0, 0, -0.052), (0, 0, 0.052), 0.044, GREY)
    cylinder(links[3], (0, 0, -0.055), (0, 0, 0.055), 0.026, WHITE)
    capsule(links[4], (0, 0, 0.04), (0, 0, 0.225), 0.040, WHITE, bit=bit)
    cylinder(links[5], (0, 0, -0.040), (0, 0, 0.040), 0.034, GREY)
    cylinder(links[6], (0, -0.052, 0), (0, 0, 0), 0.031, PEARL)
    links[6].add_site(
        name=f"{part}_end_effector", pos=ARM_END.xyz, quat=quaternion(ARM_END), group=4
    )
    _add_gripper(spec, links[6], side)


def _add_gripper(spec: mujoco.MjSpec, wrist: mujoco.MjsBody, side: str) -> None:
    """Palm, two coupled fingers and the wrist camera; z points along the fingers."""
    part = f"astribot_gripper_{side}"
    bit = ARM_BIT[side]
    palm = wrist.add_body(
        name=part,
        pos=(0, -0.048, 0),
        quat=quaternion(Origin((0, 0, 0), (np.pi / 2, 0, 0))),
        gravcomp=1,
    )
    _set_inertia(palm, GRIPPER_LINK)
    cylinder(palm, (0, 0, 0.0), (0, 0, 0.022), 0.036, GREY)
    box(palm, (0, 0, 0.045), (0.047, 0.027, 0.026), DARK, bit=bit)
    box(palm, (0, 0, 0.062), (0.047, 0.0275, 0.003), ACCENT)
    palm.add_site(name=f"{part}_pinch", pos=(0, 0, 0.152), group=4)
    fingers = []
    for label, sign in (("a", 1), ("b", -1)):
        name = f"{part}_finger_{label}"
        finger = palm.add_body(name=name, pos=(0, 0, 0.07), gravcomp=1)
        _set_inertia(finger, FINGER_LINK)
        finger.add_joint(
            name=name,
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=(sign, 0, 0),
            range=(0, FINGER_STROKE),
            armature=0.1,
            damping=5,
        )
        box(finger, (sign * 0.014, 0, 0.012), (0.007, 0.015, 0.018), GREY)
        box(finger, (sign * 0.012, 0, 0.050), (0.005, 0.012, 0.045), PEARL, bit=bit)
        box(finger, (sign * 0.0035, 0, 0.075), (0.0035, 0.0115, 0.022), RUBBER, bit=bit, pad=True)
        fingers.append(name)
    _couple_fingers(spec, part, fingers)
    # Over the palm, looking along the fingers at what they hold.
    box(palm, (0, 0.052, 0.024), (0.011, 0.027, 0.005), DARK)
    box(palm, (0, 0.080, 0.028), (0.036, 0.010, 0.009), GREY)
    cylinder(palm, (0, 0.080, 0.036), (0, 0.080, 0.038), 0.007, LENS)
    palm.add_camera(
        name=f"{side}_wrist",
        pos=(0, 0.080, 0.040),
        quat=looking((0, -0.40, 0.92), up=(0, 1, 0)),
        fovy=WRIST_FOVY_DEG,
    )


def _couple_fingers(spec: mujoco.MjSpec, part: str, fingers: list[str]) -> None:
    """One actuator drives both fingers and they stay symmetric, like the four-bar."""
    equality = spec.add_equality(
        type=mujoco.mjtEq.mjEQ_JOINT,
        objtype=mujoco.mjtObj.mjOBJ_JOINT,
        name1=fingers[0],
        name2=fingers[1],
    )
    equality.data[:5] = (0, 1, 0, 0, 0)
    tendon = spec.add_tendon(name=part)
    for finger in fingers:
        tendon.wrap_joint(finger, 0.5)
    actuator = spec.add_actuator(
        name=f"{part}_joint_1",
        target=part,
        trntype=mujoco.mjtTrn.mjTRN_TENDON,
        ctrllimited=True,
        ctrlrange=(0, FINGER_STROKE),
        forcelimited=True,
        forcerange=(-80, 80),
    )
    actuator.set_to_position(kp=4000.0, kv=60.0)
