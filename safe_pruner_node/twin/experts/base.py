"""A scripted expert: a script over hand poses, inverse kinematics, noise, and second tries."""

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
"""Yields once per action."""

NOISE_MEMORY = 0.9
"""Part of the action noise that stays from one action to the next (an AR(1) process)."""

GRIPPER_PER_ACTION = 12.0
"""Gripper units per action: 360 per second, below the robot file's 400."""

SETTLE_M = 0.004
SETTLE_TICKS = 30


class Expert(ABC):
    """Writes the actions of one episode, looking at the simulator's own state.

    Args:
        episode: The episode; not stepped by the expert.
        seed: Of the noise and of the choices between equal ways.
        noise_rad: Standard deviation of the noise on arm targets; 0 for none.
        mistake_chance: How often a grasp is aimed wrong on purpose, so that demonstrations
            show what to do with empty fingers.
    """

    def __init__(
        self, episode: Episode, seed: int, noise_rad: float = 0.004, mistake_chance: float = 0.1
    ) -> None:
        self.episode = episode
        self.rng = np.random.default_rng([seed, 2])
        self.mistake_chance = mistake_chance
        self.tries = 0
        self.done = False
        sim, layout = episode.sim, episode.robot.layout
        idle = ("astribot_torso", "astribot_head")
        arms = {s: sim.joint_state(f"astribot_arm_{s}").position for s in SIDES}
        self._ik = ArmIk(episode.robot, {part: sim.home[part] for part in idle}, arms)
        self._targets = {side: self._ik.pose(side) for side in SIDES}
        self._fingers = dict.fromkeys(SIDES, GRIPPER_OPEN)
        self._action = episode.state()
        self._noise = np.zeros(layout.dof)
        self._noise_rad = np.where(layout.gripper, 0.0, noise_rad)
        self._running = self.script()

    @abstractmethod
    def script(self) -> Script:
        """The job, as moves and pauses."""

    def act(self) -> tuple[FloatArray, FloatArray]:
        """The next action.

        Returns:
            What to execute, and what was meant (the same without noise: the label to learn, so
            that demonstrations show how to come back), both [dof], robot units.
        """
        if not self.done:
            self.done = next(self._running, True) is True
        robot = self.episode.robot
        arms = self._ik.solve(self._targets)
        meant = self._action.copy()
        for side in SIDES:
            meant[robot.layout.slices[f"astribot_arm_{side}"]] = arms[side]
            gripper = robot.layout.slices[f"astribot_gripper_{side}"]
            way = self._fingers[side] - meant[gripper]
            meant[gripper] += np.clip(way, -GRIPPER_PER_ACTION, GRIPPER_PER_ACTION)
        limits = robot.limits
        meant = np.clip(meant, limits.min_position, limits.max_position)
        self._action = meant
        fresh = np.sqrt(1 - NOISE_MEMORY**2) * self.rng.normal(size=meant.size)
        self._noise = NOISE_MEMORY * self._noise + fresh * self._noise_rad
        executed = np.clip(meant + self._noise, limits.min_position, limits.max_position)
        return executed, meant

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
        ticks = max(int(np.ceil(seconds / self.episode.dt_s)), 2)
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
