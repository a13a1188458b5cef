"""Pack Doll: one hand puts the doll in the box, the other closes the hinged lid."""

from __future__ import annotations

import mujoco
import numpy as np

from safe_pruner_node.twin.scene import TABLE_TOP_M, add_object, add_solid, add_table
from safe_pruner_node.twin.shapes import Rgba
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.base import Point, Task, jittered, position, touched_by_robot
from safe_pruner_node.types import FloatArray

BOX = mujoco.mjtGeom.mjGEOM_BOX
DOLL = "doll"
CARTON = "carton"
LID = "lid"

CARTON_HALF_M = (0.095, 0.09)
CARTON_HEIGHT_M = 0.10
WALL_M = 0.004
"""Half the thickness of a wall."""

LID_OPEN_RAD = 1.85
"""From closed to open: beyond upright, so that it stays open by itself."""

LID_HINGE_M = (0.094, 0.105)
"""The hinge beside the carton's middle and above the table, m."""

CLOSED_WITHIN_RAD = 0.1
DOLL_HALF_HEIGHT_M = 0.022


class PackDoll(Task):
    """Two arms, one after the other. Which arm does which is the seed's choice.

    Attributes:
        doll_side: +1 when the doll stands on the left, -1 on the right; the lid is hinged on
            the other side.
    """

    name = "pack_doll"
    time_limit_s = 30.0

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.doll_side = int(np.random.default_rng([seed, 1]).choice((-1, 1)))

    @property
    def prompt(self) -> str:
        """Both halves of the job."""
        return "put the pink doll in the box and close the lid"

    def lid_angle(self, sim: TwinSim) -> float:
        """Angle of the lid above closed, rad."""
        return LID_OPEN_RAD + float(sim.data.joint(LID).qpos[0])

    def doll_inside(self, sim: TwinSim) -> bool:
        """Whether the doll is between the carton's walls and below its rim."""
        offset = position(sim, DOLL) - position(sim, CARTON)
        sideways = np.abs(offset[:2]) < np.array(CARTON_HALF_M) - 2 * WALL_M
        return bool(sideways.all() and 0 < offset[2] < CARTON_HEIGHT_M - WALL_M)

    def landmarks(self, sim: TwinSim) -> FloatArray:
        """The doll and the carton."""
        return np.stack([position(sim, DOLL), position(sim, CARTON)])

    def is_success(self, sim: TwinSim) -> bool:
        """The doll inside, the lid closed, and no hand holding it down."""
        return (
            self.doll_inside(sim)
            and self.lid_angle(sim) < CLOSED_WITHIN_RAD
            and not touched_by_robot(sim, LID)
            and not touched_by_robot(sim, DOLL)
        )

    def _stage(self, sim: TwinSim) -> float:
        """15 touched, 30 lifted, 55 let go in the box, 80 lid beyond upright with it inside."""
        touched = touched_by_robot(sim, DOLL)
        if self.doll_inside(sim) and not touched:
            return 80.0 if self.lid_angle(sim) < np.pi / 2 else 55.0
        if touched:
            lifted = position(sim, DOLL)[2] > TABLE_TOP_M + DOLL_HALF_HEIGHT_M + 0.03
            return 30.0 if lifted else 15.0
        return 0.0

    def _furnish(self, spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
        add_table(spec)
        x, y = rng.uniform(0.57, 0.62), rng.uniform(-0.03, 0.03)
        _add_carton(spec, (float(x), float(y)), -self.doll_side, rng)
        place = (rng.uniform(0.50, 0.62), self.doll_side * rng.uniform(0.21, 0.33))
        _add_doll(spec, (float(place[0]), float(place[1])), rng)
        return (DOLL,)


def _add_doll(spec: mujoco.MjSpec, place: Point, rng: np.random.Generator) -> None:
    body = add_object(spec, DOLL, *place, DOLL_HALF_HEIGHT_M)
    turn = rng.uniform(-np.pi, np.pi) / 2
    body.quat = (np.cos(turn), 0, 0, np.sin(turn))
    dress = jittered((0.93, 0.45, 0.62, 1), rng)
    skin = jittered((0.97, 0.84, 0.74, 1), rng, 0.03)
    kinds = mujoco.mjtGeom
    add_solid(body, kinds.mjGEOM_CYLINDER, (0.022, DOLL_HALF_HEIGHT_M), dress, 0.05)
    add_solid(body, kinds.mjGEOM_SPHERE, (0.019,), skin, 0.01, (0, 0, 0.037))
    hair: Rgba = (0.35, 0.20, 0.10, 1)
    add_solid(body, kinds.mjGEOM_SPHERE, (0.018,), hair, 0.001, (-0.004, 0, 0.042))


def _add_carton(
    spec: mujoco.MjSpec, place: Point, hinge_side: int, rng: np.random.Generator
) -> None:
    """A box fixed to the table, its lid hinged on the left (+1) or the right (-1)."""
    brown = jittered((0.62, 0.46, 0.30, 1), rng)
    light = jittered((0.74, 0.58, 0.40, 1), rng, 0.03)
    body = spec.worldbody.add_body(name=CARTON, pos=(*place, TABLE_TOP_M))
    half_x, half_y = CARTON_HALF_M
    half_z = CARTON_HEIGHT_M / 2
    add_solid(body, BOX, (half_x, half_y, WALL_M), brown, 0.1, (0, 0, WALL_M))
    for sign in (-1, 1):
        wall_x, wall_y = sign * (half_x - WALL_M), sign * (half_y - WALL_M)
        add_solid(body, BOX, (WALL_M, half_y, half_z), brown, 0.1, (wall_x, 0, half_z))
        add_solid(body, BOX, (half_x, WALL_M, half_z), brown, 0.1, (0, wall_y, half_z))
    # The lid is drawn open, so that the twin's zero is open and it starts there. Turned by
    # -side * angle about x, what points away from the hinge goes up.
    hinge_y, hinge_z = LID_HINGE_M
    turn = -hinge_side * LID_OPEN_RAD / 2
    lid = body.add_body(
        name=LID, pos=(0, hinge_side * hinge_y, hinge_z), quat=(np.cos(turn), np.sin(turn), 0, 0)
    )
    lid.add_joint(
        name=LID,
        type=mujoco.mjtJoint.mjJNT_HINGE,
        axis=(-hinge_side, 0, 0),
        range=(-LID_OPEN_RAD, 0.0),
        damping=0.02,
        frictionloss=0.01,
        armature=1e-4,
    )
    add_solid(lid, BOX, (half_x, half_y, 0.003), light, 0.06, (0, -hinge_side * half_y, 0))
