"""A scripted expert: a script over hand poses, inverse kinematics, and second tries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from safe_pruner_node.twin.experts.hand import HandPose, between, turn_angle
from safe_pruner_node.twin.experts.ik import ArmIk
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN, SIDES
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.types import FloatArray

Script = Iterator[None]
"""Yields once per tick."""

TICK_HZ = 30.0
"""Ticks of every expert per second, whatever the rates of policy and control."""

TICK_S = 1.0 / TICK_HZ

GRIPPER_PER_TICK = 12.0
"""Gripper units per tick: 360 per second, below the robot file's 400."""

SETTLE_M = 0.004
SETTLE_TICKS = 30


class Expert(ABC):
    """Says where the joints should go in one episode, looking at the simulator's own state.

    Args:
        episode: The episode; not stepped by the expert.
        seed: Of the choices between equal ways.
        mistake_chance: How often a grasp is aimed wrong on purpose, so that demonstrations
            show what to do with empty fingers.
    """

    def __init__(self, episode: Episode, seed: int, mistake_chance: float) -> None:
        self.episode = episode
        self.rng = np.random.default_rng([seed, 2])
        self.mistake_chance = mistake_chance
        self.tries = 0
        self.done = False
        sim = episode.sim
        idle = ("astribot_torso", "astribot_head")
        arms = {s: sim.joint_state(f"astribot_arm_{s}").position for s in SIDES}
        self._ik = ArmIk(episode.robot, {part: sim.home[part] for part in idle}, arms, TICK_S)
        self._targets = {side: self._ik.pose(side) for side in SIDES}
        self._fingers = dict.fromkeys(SIDES, GRIPPER_OPEN)
        self._meant = episode.state()
        self._running = self.script()

    @abstractmethod
    def script(self) -> Script:
        """The job, as moves and pauses."""

    def act(self) -> FloatArray:
        """Where the joints should be one tick from now, within their positions, [dof]."""
        if not self.done:
            self.done = next(self._running, True) is True
        robot = self.episode.robot
        arms = self._ik.solve(self._targets)
        meant = self._meant.copy()
        for side in SIDES:
            meant[robot.layout.slices[f"astribot_arm_{side}"]] = arms[side]
            gripper = robot.layout.slices[f"astribot_gripper_{side}"]
            way = self._fingers[side] - meant[gripper]
            meant[gripper] += np.clip(way, -GRIPPER_PER_TICK, GRIPPER_PER_TICK)
        limits = robot.limits
        self._meant = np.clip(meant, limits.min_position, limits.max_position)
        return self._meant

    def pinch(self, side: str) -> FloatArray:
        """Where a hand's pinch point really is, m, [3]."""
        return np.array(self.episode.sim.data.site(f"astribot_gripper_{side}_pinch").xpos)

    def target(self, side: str) -> HandPose:
        """Where a hand is told to be."""
        return self._targets[side]

    def move(self, side: str, pose: HandPose, *, speed_m_s: float = 0.35) -> Script:
        """Goes to a pose on a straight line, smoothly, and waits to arrive."""
        yield from self.sweep(side, pose, speed_m_s=speed_m_s)
        for _ in range(SETTLE_TICKS):
            if np.linalg.norm(self.pinch(side) - pose.position) < SETTLE_M:
                break
            yield

    def sweep(self, side: str, pose: HandPose, *, speed_m_s: float = 0.35) -> Script:
        """As :meth:`move`, without waiting at the end."""
        start = self._targets[side]
        distance = float(np.linalg.norm(pose.position - start.position))
        seconds = max(distance / speed_m_s, turn_angle(start, pose) / 1.5)
        ticks = max(int(np.ceil(seconds * TICK_HZ)), 2)
        for k in range(1, ticks + 1):
            share = k / ticks
            self._targets[side] = between(start, pose, share * share * (3 - 2 * share))
            yield

    def grip(self, side: str, units: float, *, ticks: int = 15) -> Script:
        """Sets a gripper, 0 open to 100 closed, and gives it time."""
        self._fingers[side] = units
        yield from self.wait(ticks)

    def wait(self, ticks: int) -> Script:
        """Holds still."""
        for _ in range(ticks):
            yield
