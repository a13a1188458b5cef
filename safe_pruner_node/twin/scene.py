"""What stands around the robot: room, light, table and objects. Scenes are named and seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.twin.joint_table import Vector
from safe_pruner_node.twin.model import EVERYTHING, THINGS, add_robot
from safe_pruner_node.twin.shapes import Rgba, looking

TABLE_CENTRE = (0.74, 0.0)
TABLE_HALF = (0.36, 0.62, 0.018)
TABLE_TOP_M = 0.78
"""Height of the table's surface above the floor."""

OBJECT_FRICTION = (1.0, 0.02, 0.001)


@dataclass(frozen=True)
class Scene:
    """A scene ready to compile.

    Attributes:
        name: Key in :data:`SCENES`, or ``task``.
        spec: Robot, room and objects.
        objects: Bodies that can be picked up, each on a free joint of its own name.
        posture: Where a person parks the parts that a policy does not drive, robot units.
    """

    name: str
    spec: mujoco.MjSpec
    objects: tuple[str, ...]
    posture: Mapping[str, tuple[float, ...]]


TABLE_POSTURE = {"astribot_torso": (0.35, -0.7, 0.7, 0.0), "astribot_head": (0.0, 0.55)}
"""Leaning over the table, eyes on it: every object is within reach of an arm.

From the upright home posture an arm reaches 0.5 m forward at table height; from here 0.7 m."""

Furnish = Callable[[mujoco.MjSpec, np.random.Generator], tuple[str, ...]]
"""Adds a scene's things to a room with the robot in it; returns the movable bodies."""


def build_scene(scene: str | Furnish, seed: int, *, timestep_s: float = 0.002) -> Scene:
    """Builds a scene.

    Args:
        scene: Key in :data:`SCENES`, or what furnishes the room (a task's ``furnish``).
        seed: Places the objects; the same seed gives the same scene.
        timestep_s: Physics step, s.

    Raises:
        ConfigError: No scene of that name.
    """
    name = scene if isinstance(scene, str) else "task"
    if isinstance(scene, str):
        if scene not in SCENES:
            raise ConfigError("parameter", "scene", scene, f"one of {', '.join(sorted(SCENES))}")
        scene = SCENES[scene]
    spec = mujoco.MjSpec()
    spec.modelname = f"astribot_s1_{name}"
    spec.compiler.degree = False
    spec.option.timestep = timestep_s
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    _add_room(spec)
    add_robot(spec)
    objects = scene(spec, np.random.default_rng(seed))
    return Scene(name, spec, objects, TABLE_POSTURE)


def _add_room(spec: mujoco.MjSpec) -> None:
    """Floor, light and a plain bright background. No shadows: they cost software rendering 5x."""
    visual = spec.visual
    visual.headlight.ambient = (0.42, 0.42, 0.43)
    visual.headlight.diffuse = (0.16, 0.16, 0.16)
    visual.headlight.specular = (0.05, 0.05, 0.05)
    visual.map.znear = 0.01
    visual.map.zfar = 30
    visual.map.haze = 0.25
    visual.rgba.haze = (0.90, 0.92, 0.94, 1)
    visual.quality.shadowsize = 0
    visual.quality.offsamples = 0
    # Coarser than the default (28, 16, 4): a quarter less time per image, hardly seen.
    visual.quality.numslices = 20
    visual.quality.numstacks = 10
    visual.quality.numquads = 1
    spec.stat.extent = 1.0
    spec.stat.center = (0.6, 0, 0.9)
    spec.add_texture(
        name="sky",
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=(0.93, 0.95, 0.97),
        rgb2=(0.80, 0.83, 0.87),
        width=128,
        height=128,
    )
    world = spec.worldbody
    world.add_geom(
        name="floor",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=(6, 6, 0.1),
        rgba=(0.80, 0.81, 0.83, 1),
        contype=THINGS,
        conaffinity=EVERYTHING,
    )
    for position, direction, strength in (
        ((1.5, 1.2, 3.0), (-0.45, -0.35, -1.0), 0.44),  # key, from the front left
        ((0.5, -2.0, 2.2), (0.1, 0.9, -0.7), 0.20),  # fill, from the right
    ):
        world.add_light(
            pos=position,
            dir=direction,
            type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
            castshadow=False,
            diffuse=(strength,) * 3,
            specular=(0.25 * strength,) * 3,
            ambient=(0, 0, 0),
        )
    world.add_camera(
        name="overview",
        pos=(2.05, -1.35, 1.75),
        quat=looking((-1.62, 1.41, -0.84), up=(0, 0, 1)),
        fovy=41,
    )


def wood_texture(size: int = 256) -> np.ndarray:
    """A plank texture drawn with sines: no image file to ship, [size, size, 3] uint8."""
    rng = np.random.default_rng(7)
    across, along = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    plank = np.floor(across * 5)
    tone = rng.uniform(-0.05, 0.05, 6)[plank.astype(int)]
    shift = rng.uniform(0, 6, 6)[plank.astype(int)]
    wave = 0.03 * np.sin(5 * along + shift) + 0.015 * np.sin(13 * along + 2 * shift)
    rings = np.sin(2 * np.pi * 26 * (across + wave))
    fine = rng.normal(0, 1, (size // 16, size)).repeat(16, axis=0)
    seam = np.minimum(across * 5 % 1, 1 - across * 5 % 1) < 0.012
    light = 1 + tone + 0.035 * rings + 0.012 * fine - 0.16 * seam
    pixels = light[..., None] * np.array([208, 172, 128])
    return np.asarray(np.clip(pixels, 0, 255), dtype=np.uint8)


def add_table(spec: mujoco.MjSpec) -> None:
    """A wooden table in front of the robot."""
    texture = wood_texture()
    image = spec.add_texture(
        name="wood",
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        width=texture.shape[1],
        height=texture.shape[0],
        nchannel=3,
    )
    image.data = texture.tobytes()
    material = spec.add_material(name="wood", specular=0.1, shininess=0.2)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "wood"
    x, y = TABLE_CENTRE
    table = spec.worldbody.add_body(name="table", pos=(x, y, TABLE_TOP_M - TABLE_HALF[2]))
    box = mujoco.mjtGeom.mjGEOM_BOX
    table.add_geom(
        name="table_top",
        type=box,
        size=TABLE_HALF,
        material="wood",
        friction=OBJECT_FRICTION,
        contype=THINGS,
        conaffinity=EVERYTHING,
    )
    leg = (0.022, 0.022, (TABLE_TOP_M - 2 * TABLE_HALF[2]) / 2)
    for sx in (-1, 1):
        for sy in (-1, 1):
            table.add_geom(
                type=box,
                size=leg,
                pos=(
                    sx * (TABLE_HALF[0] - 0.05),
                    sy * (TABLE_HALF[1] - 0.05),
                    -TABLE_HALF[2] - leg[2],
                ),
                rgba=(0.86, 0.87, 0.88, 1),
                contype=0,
                conaffinity=0,
            )


def add_object(spec: mujoco.MjSpec, name: str, x: float, y: float, lift: float) -> mujoco.MjsBody:
    """An empty movable body on the table; ``lift`` is its origin above the surface, m."""
    body = spec.worldbody.add_body(name=name, pos=(x, y, TABLE_TOP_M + lift))
    body.add_freejoint(name=name)
    return body


def add_solid(
    body: mujoco.MjsBody,
    kind: mujoco.mjtGeom,
    size: tuple[float, ...],
    rgba: Rgba,
    mass: float,
    centre: Vector = (0, 0, 0),
) -> mujoco.MjsGeom:
    """One solid shape of an object."""
    return body.add_geom(
        type=kind,
        size=[*size, 0.0, 0.0][:3],
        pos=centre,
        rgba=rgba,
        mass=mass,
        friction=OBJECT_FRICTION,
        condim=4,
        contype=THINGS,
        conaffinity=EVERYTHING,
    )


def _table_scene(spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
    """A wooden table with a plate and things of distinct colour and shape within reach."""
    add_table(spec)
    geom = mujoco.mjtGeom
    slots = _slots(rng)

    def place(name: str, lift: float) -> mujoco.MjsBody:
        return add_object(spec, name, *slots[name], lift)

    add_solid(place("red_cube", 0.024), geom.mjGEOM_BOX, (0.024,) * 3, (0.83, 0.13, 0.12, 1), 0.06)
    add_solid(
        place("green_block", 0.02), geom.mjGEOM_BOX, (0.02, 0.035, 0.02), (0.2, 0.62, 0.3, 1), 0.06
    )
    can = place("blue_can", 0.055)
    add_solid(can, geom.mjGEOM_CYLINDER, (0.03, 0.055), (0.13, 0.33, 0.75, 1), 0.10)
    _trim(can, geom.mjGEOM_CYLINDER, (0.0304, 0.018), (0.92, 0.93, 0.95, 1))
    _trim(can, geom.mjGEOM_CYLINDER, (0.026, 0.0565), (0.8, 0.81, 0.83, 1))
    ball = place("orange_ball", 0.03)
    shell = add_solid(ball, geom.mjGEOM_SPHERE, (0.03,), (0.95, 0.50, 0.10, 1), 0.04)
    shell.condim, shell.friction = 6, (1.0, 0.02, 0.002)  # rolling friction: it comes to rest
    doll = place("pink_doll", 0.034)
    add_solid(doll, geom.mjGEOM_CAPSULE, (0.022, 0.012), (0.93, 0.55, 0.66, 1), 0.05)
    add_solid(doll, geom.mjGEOM_SPHERE, (0.021,), (0.97, 0.84, 0.74, 1), 0.01, (0, 0, 0.048))
    _cup(place("yellow_cup", 0.003))
    _plate(place("plate", 0.006))
    return tuple(slots)


def _slots(rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Object name to its place: fixed slots far enough apart, jittered by the seed."""
    slots = {
        "red_cube": (0.58, 0.17),
        "green_block": (0.59, -0.30),
        "blue_can": (0.72, 0.30),
        "orange_ball": (0.60, -0.15),
        "pink_doll": (0.74, -0.22),
        "yellow_cup": (0.76, 0.12),
        "plate": (0.60, 0.01),
    }
    jitter = rng.uniform(-0.02, 0.02, (len(slots), 2))
    return {
        name: (x + dx, y + dy)
        for (name, (x, y)), (dx, dy) in zip(slots.items(), jitter.tolist(), strict=True)
    }


def _trim(
    body: mujoco.MjsBody,
    kind: mujoco.mjtGeom,
    size: tuple[float, ...],
    rgba: Rgba,
    centre: Vector = (0, 0, 0),
) -> None:
    """A decoration without mass or contact."""
    body.add_geom(
        type=kind,
        size=[*size, 0.0, 0.0][:3],
        pos=centre,
        rgba=rgba,
        mass=0,
        contype=0,
        conaffinity=0,
    )


def _cup(body: mujoco.MjsBody) -> None:
    """A twelve-sided cup of thin walls."""
    yellow = (1.0, 0.86, 0.26, 1)
    box, radius, height, sides = mujoco.mjtGeom.mjGEOM_BOX, 0.034, 0.04, 12
    add_solid(body, mujoco.mjtGeom.mjGEOM_CYLINDER, (radius, 0.003), yellow, 0.03)
    half_width = radius * np.tan(np.pi / sides)
    for k in range(sides):
        angle = 2 * np.pi * k / sides
        wall = add_solid(
            body,
            box,
            (0.002, half_width + 0.0006, height),
            yellow,
            0.004,
            (radius * np.cos(angle), radius * np.sin(angle), height),
        )
        wall.quat = (np.cos(angle / 2), 0, 0, np.sin(angle / 2))


def _plate(body: mujoco.MjsBody) -> None:
    cylinder = mujoco.mjtGeom.mjGEOM_CYLINDER
    add_solid(body, cylinder, (0.075, 0.006), (0.95, 0.95, 0.93, 1), 0.25)
    _trim(body, cylinder, (0.058, 0.0064), (0.86, 0.88, 0.90, 1))


def _empty_scene(spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:  # noqa: ARG001
    """The robot alone."""
    return ()


SCENES: dict[str, Furnish] = {"table": _table_scene, "empty": _empty_scene}
"""Scene name to what furnishes it."""
