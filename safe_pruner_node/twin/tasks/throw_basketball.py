"""Throw Basketball: a ball must fly through a hoop, let go well before it."""

from __future__ import annotations

from itertools import pairwise

import mujoco
import numpy as np

from safe_pruner_node.twin.model import EVERYTHING, THINGS
from safe_pruner_node.twin.scene import TABLE_TOP_M, add_object, add_solid, add_table
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.base import Task, jittered, position, touched_by_robot
from safe_pruner_node.types import FloatArray

BALL = "ball"
HOOP = "hoop"
BALL_RADIUS_M = 0.028
HOOP_RADIUS_M = 0.115
RIM_M = 0.005
"""Half the thickness of the rim."""

FREE_FLIGHT_M = HOOP_RADIUS_M + BALL_RADIUS_M
"""The hand must have let go with the whole ball outside of the hoop, seen from above."""


class ThrowBasketball(Task):
    """Grasp, swing, let go. Lowering the ball into the hoop does not count.

    Attributes:
        side: +1 when ball and hoop are on the left, -1 on the right.
    """

    name = "throw_basketball"
    time_limit_s = 16.0

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.side = int(np.random.default_rng([seed, 1]).choice((-1, 1)))
        self._last_touch: FloatArray | None = None
        self._before: FloatArray | None = None
        self._scored = False

    @property
    def prompt(self) -> str:
        """The same in every episode."""
        return "pick up the orange basketball and throw it through the hoop"

    def watch(self, sim: TwinSim) -> None:
        """Notes where the robot last touched the ball and whether it crosses the rim's plane."""
        ball, hoop = position(sim, BALL), position(sim, HOOP)
        if touched_by_robot(sim, BALL):
            self._last_touch = ball
        before, self._before = self._before, ball
        if before is None or not before[2] > hoop[2] >= ball[2]:
            return
        share = (before[2] - hoop[2]) / (before[2] - ball[2])
        crossing = before + share * (ball - before)
        inside = np.hypot(*(crossing - hoop)[:2]) < HOOP_RADIUS_M - RIM_M
        if inside and self._last_touch is not None:
            away = np.hypot(*(self._last_touch - hoop)[:2])
            self._scored = self._scored or bool(away > FREE_FLIGHT_M)

    def landmarks(self, sim: TwinSim) -> FloatArray:
        """The ball and the hoop."""
        return np.stack([position(sim, BALL), position(sim, HOOP)])

    def is_success(self, sim: TwinSim) -> bool:  # noqa: ARG002 - seen while it happened
        """The ball has flown through the hoop from above."""
        return self._scored

    def _stage(self, sim: TwinSim) -> float:
        """20 touched, 40 lifted, 70 flying."""
        lifted = position(sim, BALL)[2] > TABLE_TOP_M + BALL_RADIUS_M + 0.03
        if touched_by_robot(sim, BALL):
            return 40.0 if lifted else 20.0
        return 70.0 if lifted else 0.0

    def _furnish(self, spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
        add_table(spec)
        x, y = rng.uniform(0.46, 0.56), self.side * rng.uniform(0.15, 0.29)
        ball = add_object(spec, BALL, float(x), float(y), BALL_RADIUS_M)
        shell = add_solid(
            ball,
            mujoco.mjtGeom.mjGEOM_SPHERE,
            (BALL_RADIUS_M,),
            jittered((0.95, 0.48, 0.10, 1), rng),
            0.03,
        )
        shell.condim, shell.friction = 6, (1.0, 0.02, 0.002)  # it comes to rest
        place = (
            float(rng.uniform(0.79, 0.85)),
            float(self.side * rng.uniform(0.16, 0.26)),
            TABLE_TOP_M + float(rng.uniform(0.10, 0.13)),
        )
        _add_hoop(spec, place, rng)
        return (BALL,)


def _add_hoop(
    spec: mujoco.MjSpec, place: tuple[float, float, float], rng: np.random.Generator
) -> None:
    """A rim of capsules on a post that stands behind it."""
    red = jittered((0.88, 0.20, 0.12, 1), rng)
    grey = (0.45, 0.46, 0.48, 1.0)
    body = spec.worldbody.add_body(name=HOOP, pos=place)
    capsule = mujoco.mjtGeom.mjGEOM_CAPSULE
    corners = np.linspace(0, 2 * np.pi, 17)
    rim = HOOP_RADIUS_M * np.stack([np.cos(corners), np.sin(corners)], axis=1)
    lines = [((*a, 0.0), (*b, 0.0), red) for a, b in pairwise(rim.tolist())]
    post = HOOP_RADIUS_M + 0.03
    lines.append(((HOOP_RADIUS_M, 0.0, 0.0), (post, 0.0, 0.0), grey))
    lines.append(((post, 0.0, 0.0), (post, 0.0, TABLE_TOP_M - place[2]), grey))
    for start, end, colour in lines:
        body.add_geom(
            type=capsule,
            fromto=(*start, *end),
            size=(RIM_M, 0, 0),
            rgba=colour,
            contype=THINGS,
            conaffinity=EVERYTHING,
        )
