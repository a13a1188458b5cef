"""Pick and Place: put the thing that the prompt names on the plate, among distractors."""

from __future__ import annotations

import mujoco
import numpy as np

from safe_pruner_node.twin.scene import TABLE_TOP_M, add_object, add_solid, add_table
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.base import (
    Point,
    Task,
    at_rest,
    jittered,
    position,
    touched_by_robot,
)
from safe_pruner_node.twin.tasks.toys import TOYS, add_toy
from safe_pruner_node.types import FloatArray

DISTRACTORS = 3
PLATE = "plate"
PLATE_RADIUS_M = 0.09
PLATE_HALF_HEIGHT_M = 0.006

# Where the named thing may stand, on either side: well within reach of the arm there; and where
# the others may. All apart enough for open fingers.
REACH_X_M = (0.49, 0.62)
REACH_Y_M = (0.15, 0.33)
OTHERS_X_M = (0.49, 0.72)
OTHERS_Y_M = (0.13, 0.40)
CLEARANCE_M = 0.12
PLATE_CLEARANCE_M = 0.16


class PickAndPlace(Task):
    """Ten things, one of them named; either arm may do it."""

    name = "pick_and_place"
    time_limit_s = 20.0

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        # Its own generator: what is asked for does not depend on how the scene is drawn.
        chosen = np.random.default_rng([seed, 1]).permutation(len(TOYS))[: 1 + DISTRACTORS]
        self.toys = tuple(TOYS[i] for i in chosen)
        self.target = self.toys[0]

    @property
    def prompt(self) -> str:
        """Names the thing."""
        return f"pick up the {self.target.words} and place it on the plate"

    def landmarks(self, sim: TwinSim) -> FloatArray:
        """The named thing and the plate."""
        return np.stack([position(sim, self.target.body), position(sim, PLATE)])

    def is_success(self, sim: TwinSim) -> bool:
        """On the plate, let go and at rest."""
        return (
            self._over_plate(sim)
            and position(sim, self.target.body)[2] < TABLE_TOP_M + 0.08
            and at_rest(sim, self.target.body)
            and not touched_by_robot(sim, self.target.body)
        )

    def _stage(self, sim: TwinSim) -> float:
        """20 touched, 50 lifted, 75 lifted over the plate."""
        lifted = position(sim, self.target.body)[2] > TABLE_TOP_M + self.target.lift_m + 0.03
        if touched_by_robot(sim, self.target.body):
            if lifted:
                return 75.0 if self._over_plate(sim) else 50.0
            return 20.0
        return 0.0

    def _over_plate(self, sim: TwinSim) -> bool:
        offset = position(sim, self.target.body) - position(sim, PLATE)
        return bool(np.hypot(*offset[:2]) < PLATE_RADIUS_M and offset[2] > PLATE_HALF_HEIGHT_M)

    def _furnish(self, spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
        add_table(spec)
        plate = (float(rng.uniform(0.55, 0.62)), float(rng.uniform(-0.03, 0.03)))
        _add_plate(spec, plate, rng)
        for toy, place in zip(self.toys, _places(plate, rng), strict=True):
            add_toy(spec, toy, place, rng)
        return (*(toy.body for toy in self.toys), PLATE)


def _places(plate: Point, rng: np.random.Generator) -> list[Point]:
    """Places on either side, the named thing's first, drawn anew until they are apart enough."""
    count = 1 + DISTRACTORS
    low = np.array([(REACH_X_M[0], REACH_Y_M[0])] + DISTRACTORS * [(OTHERS_X_M[0], OTHERS_Y_M[0])])
    high = np.array([(REACH_X_M[1], REACH_Y_M[1])] + DISTRACTORS * [(OTHERS_X_M[1], OTHERS_Y_M[1])])
    while True:
        points = rng.uniform(low, high)
        points[:, 1] *= rng.choice((-1, 1), count)
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        gaps[np.diag_indices(count)] = np.inf
        from_plate = np.linalg.norm(points - np.array(plate), axis=-1)
        if gaps.min() > CLEARANCE_M and from_plate.min() > PLATE_CLEARANCE_M:
            return [(x, y) for x, y in points.tolist()]


def _add_plate(spec: mujoco.MjSpec, place: Point, rng: np.random.Generator) -> None:
    body = add_object(spec, PLATE, *place, PLATE_HALF_HEIGHT_M)
    size = (PLATE_RADIUS_M, PLATE_HALF_HEIGHT_M)
    colour = jittered((0.80, 0.84, 0.88, 1), rng, 0.04)
    add_solid(body, mujoco.mjtGeom.mjGEOM_CYLINDER, size, colour, 0.4)
