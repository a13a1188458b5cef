"""Primitive shapes: the few ways in which the twin draws and collides things."""

from __future__ import annotations

import mujoco
import numpy as np

from safe_pruner_node.twin.joint_table import Vector

Rgba = tuple[float, float, float, float]

PAD_FRICTION = (1.5, 0.05, 0.001)
"""Sliding, torsional and rolling friction of the finger pads."""


def capsule(
    body: mujoco.MjsBody, start: Vector, end: Vector, radius: float, rgba: Rgba, *, bit: int = 0
) -> mujoco.MjsGeom:
    """A capsule of the robot; ``bit`` is its contact bit, 0 for a mere decoration."""
    return _robot_geom(
        body, mujoco.mjtGeom.mjGEOM_CAPSULE, rgba, bit, fromto=(*start, *end), size=(radius, 0, 0)
    )


def cylinder(
    body: mujoco.MjsBody, start: Vector, end: Vector, radius: float, rgba: Rgba, *, bit: int = 0
) -> mujoco.MjsGeom:
    """A cylinder of the robot between two points."""
    return _robot_geom(
        body, mujoco.mjtGeom.mjGEOM_CYLINDER, rgba, bit, fromto=(*start, *end), size=(radius, 0, 0)
    )


def ellipsoid(
    body: mujoco.MjsBody, centre: Vector, radii: Vector, rgba: Rgba, *, bit: int = 0
) -> mujoco.MjsGeom:
    """An ellipsoid of the robot."""
    return _robot_geom(body, mujoco.mjtGeom.mjGEOM_ELLIPSOID, rgba, bit, pos=centre, size=radii)


def box(
    body: mujoco.MjsBody,
    centre: Vector,
    half: Vector,
    rgba: Rgba,
    *,
    bit: int = 0,
    pad: bool = False,
) -> mujoco.MjsGeom:
    """A box of the robot; ``pad`` gives it the grip of a rubber finger pad."""
    geom = _robot_geom(body, mujoco.mjtGeom.mjGEOM_BOX, rgba, bit, pos=centre, size=half)
    if pad:
        geom.friction = PAD_FRICTION
        geom.condim = 4
        geom.priority = 1
        geom.solref[:2] = (0.004, 1.0)
    return geom


def looking(direction: Vector, *, up: Vector) -> np.ndarray:
    """Orientation of a camera that looks along a direction, as a quaternion (w, x, y, z), [4].

    MuJoCo's cameras look along their own -z with +y up in the image.
    """
    back = -np.asarray(direction, dtype=float)
    back /= np.linalg.norm(back)
    right = np.cross(np.asarray(up, dtype=float), back)
    right /= np.linalg.norm(right)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quat


def _robot_geom(
    body: mujoco.MjsBody, kind: mujoco.mjtGeom, rgba: Rgba, bit: int, **placing: object
) -> mujoco.MjsGeom:
    # A contact needs one geom's bit in the other's affinity; an arm's own geoms share neither.
    affinity = 7 & ~bit if bit else 0
    return body.add_geom(type=kind, rgba=rgba, contype=bit, conaffinity=affinity, mass=0, **placing)
