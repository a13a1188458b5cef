"""Ten graspable things, no two of the same shape or colour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.twin.scene import add_object, add_solid
from safe_pruner_node.twin.shapes import Rgba
from safe_pruner_node.twin.tasks.base import Point, jittered

BOX = mujoco.mjtGeom.mjGEOM_BOX
CYLINDER = mujoco.mjtGeom.mjGEOM_CYLINDER

Shape = Callable[[mujoco.MjsBody, Rgba], None]


@dataclass(frozen=True)
class Toy:
    """A thing with a name.

    Attributes:
        words: What the prompt calls it.
        rgba: Its colour before jitter.
        lift_m: Its origin above the table when it stands.
        shape: Adds its geoms; the origin is where fingers should close, along x or y.
    """

    words: str
    rgba: Rgba
    lift_m: float
    shape: Shape

    @property
    def body(self) -> str:
        """Name of the body in the model."""
        return self.words.replace(" ", "_")


def _cube(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, BOX, (0.022, 0.022, 0.022), rgba, 0.05)


def _brick(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, BOX, (0.036, 0.019, 0.022), rgba, 0.06)


def _can(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, CYLINDER, (0.026, 0.040), rgba, 0.07)


def _ball(body: mujoco.MjsBody, rgba: Rgba) -> None:
    ball = add_solid(body, mujoco.mjtGeom.mjGEOM_SPHERE, (0.028,), rgba, 0.04)
    _let_it_come_to_rest(ball)


def _bottle(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, CYLINDER, (0.024, 0.032), rgba, 0.06)
    add_solid(body, CYLINDER, (0.010, 0.014), rgba, 0.005, (0, 0, 0.046))


def _hexagon(body: mujoco.MjsBody, rgba: Rgba) -> None:
    for k in range(3):
        half = 0.026
        plate = add_solid(body, BOX, (half / np.sqrt(3), half, 0.022), rgba, 0.02)
        plate.quat = (np.cos(k * np.pi / 6), 0, 0, np.sin(k * np.pi / 6))


def _cross(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, BOX, (0.030, 0.012, 0.022), rgba, 0.025)
    add_solid(body, BOX, (0.012, 0.030, 0.022), rgba, 0.025)


def _egg(body: mujoco.MjsBody, rgba: Rgba) -> None:
    egg = add_solid(body, mujoco.mjtGeom.mjGEOM_ELLIPSOID, (0.034, 0.024, 0.024), rgba, 0.05)
    _let_it_come_to_rest(egg)


def _arch(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, BOX, (0.034, 0.018, 0.009), rgba, 0.03, (0, 0, 0.013))
    for x in (-0.025, 0.025):
        add_solid(body, BOX, (0.009, 0.018, 0.013), rgba, 0.015, (x, 0, -0.009))


def _puck(body: mujoco.MjsBody, rgba: Rgba) -> None:
    add_solid(body, CYLINDER, (0.028, 0.022), rgba, 0.05)


def _let_it_come_to_rest(geom: mujoco.MjsGeom) -> None:
    geom.condim, geom.friction = 6, (1.0, 0.02, 0.002)


TOYS = (
    Toy("red cube", (0.86, 0.12, 0.12, 1), 0.022, _cube),
    Toy("green brick", (0.16, 0.62, 0.24, 1), 0.022, _brick),
    Toy("blue can", (0.12, 0.30, 0.82, 1), 0.040, _can),
    Toy("orange ball", (0.97, 0.52, 0.08, 1), 0.028, _ball),
    Toy("pink bottle", (0.96, 0.50, 0.68, 1), 0.032, _bottle),
    Toy("yellow hexagon", (0.97, 0.84, 0.14, 1), 0.022, _hexagon),
    Toy("purple cross", (0.48, 0.20, 0.66, 1), 0.022, _cross),
    Toy("white egg", (0.93, 0.93, 0.90, 1), 0.024, _egg),
    Toy("cyan arch", (0.10, 0.74, 0.80, 1), 0.022, _arch),
    Toy("black puck", (0.10, 0.10, 0.11, 1), 0.022, _puck),
)


def add_toy(spec: mujoco.MjSpec, toy: Toy, place: Point, rng: np.random.Generator) -> None:
    """Stands a toy on the table, turned by up to 0.2 rad."""
    body = add_object(spec, toy.body, *place, toy.lift_m)
    half = rng.uniform(-0.2, 0.2) / 2
    body.quat = (np.cos(half), 0, 0, np.sin(half))
    toy.shape(body, jittered(toy.rgba, rng))
