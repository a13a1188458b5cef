"""Grasping a thing on the table, again if it slips."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.twin.experts.base import Expert, Script
from safe_pruner_node.twin.experts.hand import HandPose, facing_down, up
from safe_pruner_node.twin.joint_table import GRIPPER_CLOSED, GRIPPER_OPEN
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position

TILT_RAD = 0.6
"""Within 0.5 to 0.9 rad from straight down an arm reaches the whole workspace."""

APPROACH_M = 0.10
LIFT_M = 0.11
TRIES = 4

REACH_S = 1.1
DESCEND_S = 0.8
CLOSE_S = 0.35
LIFT_S = 0.7
OPEN_S = 0.2
BLEND_S = 0.2
"""How long a motion fades into the next."""

MISTAKE_M = (-0.065, 0.0, 0.01)
"""Short of the thing: the fingers close in front of it."""

LOWEST_PINCH_M = 0.026
"""Pinch point above the table when the tips of a tilted hand all but touch it."""


def side_of(expert: Expert, body: str) -> str:
    """The hand on a body's side of the robot."""
    return "left" if position(expert.episode.sim, body)[1] > 0 else "right"


def grasp(
    expert: Expert,
    side: str,
    body: str,
    *,
    above_m: float = 0.0,
    closed: float = GRIPPER_CLOSED,
) -> Script:
    """Grasps and lifts a body; looks anew where it is before every further try.

    Ends a little before the lift does, so that what follows can flow from it.

    Args:
        expert: Whose hand.
        side: Which hand.
        body: What.
        above_m: Where to pinch, above the body's origin.
        closed: Gripper units to close to.
    """
    sim = expert.episode.sim
    # Fingers close across the arm, whatever the thing's turn: they turn it.
    rotation = facing_down(TILT_RAD)
    for k in range(TRIES):
        expert.tries += 1
        wrong = k == 0 and expert.rng.uniform() < expert.mistake_chance
        at = expert.locate(body) + up(above_m)
        if wrong:
            at += expert.rng.uniform(0.85, 1.0) * np.array(MISTAKE_M)
        at[2] = max(at[2], TABLE_TOP_M + LOWEST_PINCH_M)
        over = HandPose(at - APPROACH_M * rotation[:, 2], rotation)
        yield from expert.move(side, over, seconds=REACH_S, early_s=BLEND_S)
        yield from expert.slide(side, HandPose(at, rotation), seconds=DESCEND_S)
        yield from expert.grip(side, closed, seconds=CLOSE_S)
        before = position(sim, body)[2]
        lifted = HandPose(at + up(LIFT_M), rotation)
        yield from expert.slide(side, lifted, seconds=LIFT_S, early_s=BLEND_S)
        if position(sim, body)[2] > before + LIFT_M / 2:
            return
        yield from expert.grip(side, GRIPPER_OPEN, seconds=OPEN_S)
