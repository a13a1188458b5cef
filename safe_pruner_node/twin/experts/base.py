"""A scripted expert: a script over hand poses, inverse kinematics, and second tries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from safe_pruner_node.twin.experts.hand import HandPose
from safe_pruner_node.twin.experts.ik import ArmIk
from safe_pruner_node.twin.experts.motion import Motion, Shape, minimum_jerk, shortest_s
from safe_pruner_node.twin.joint_table import GRIPPER_OPEN, SIDES
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.types import FloatArray

Script = Iterator[None]
"""Yields once per tick."""

TICK_HZ = 30.0
"""Ticks of every expert per second, whatever the rates of policy and control."""

TICK_S = 1.0 / TICK_HZ

GRIPPER_PER_TICK = 9.0
"""Gripper units per tick: 270 per second, which the robot file's 400 leaves room for."""

SHORTEST_MOVE_S = 0.3
SLIDE_POINTS = 20


class Expert(ABC):
    """Says where the joints should go in one episode, looking at the simulator's own state.

    Hands go from pose to pose by minimum-jerk motions of the joints. What an arm does depends on
    where things are and on nothing else, so that a policy can learn it from what it sees.

    Args:
        episode: The episode; not advanced by the expert.
        seed: Of the mistakes.
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
        self.home = {side: sim.home[f"astribot_arm_{side}"] for side in SIDES}
        self.ik = ArmIk(episode.robot, {part: sim.home[part] for part in idle}, self.home)
        self._meant = episode.state()
        self._origin = {s: sim.joint_state(f"astribot_arm_{s}").position for s in SIDES}
        self._motions: dict[str, list[Motion]] = {side: [] for side in SIDES}
        self._fingers = dict.fromkeys(SIDES, GRIPPER_OPEN)
        self._ticks = 0
        self._running = self.script()

    @abstractmethod
    def script(self) -> Script:
        """The job, as moves and pauses."""

    def act(self) -> FloatArray:
        """Where the joints should be one tick from now, within their positions, [dof]."""
        if not self.done:
            self.done = next(self._running, True) is True
        self._ticks += 1
        robot = self.episode.robot
        meant = self._meant.copy()
        for side in SIDES:
            meant[robot.layout.slices[f"astribot_arm_{side}"]] = self._joints(side)
            gripper = robot.layout.slices[f"astribot_gripper_{side}"]
            way = self._fingers[side] - meant[gripper]
            meant[gripper] += np.clip(way, -GRIPPER_PER_TICK, GRIPPER_PER_TICK)
        limits = robot.limits
        self._meant = np.clip(meant, limits.min_position, limits.max_position)
        return self._meant

    def locate(self, body: str) -> FloatArray:
        """Where a thing is, m, [3]."""
        return position(self.episode.sim, body)

    def move(
        self, side: str, pose: HandPose, *, seconds: float = 0.0, early_s: float = 0.0
    ) -> Script:
        """Brings a hand to a pose.

        Args:
            side: Which hand.
            pose: Where to.
            seconds: At least how long to take; longer if the joints need it.
            early_s: How long before the end to go on with the script: the next motion begins
                while this one fades out, and the hand does not stop between them.
        """
        yield from self.turn(side, self.ik.solve(side, pose), seconds=seconds, early_s=early_s)

    def turn(
        self, side: str, joints: FloatArray, *, seconds: float = 0.0, early_s: float = 0.0
    ) -> Script:
        """As :meth:`move`, to joint positions, rad, [7]."""
        yield from self._follow(side, joints[None], seconds, early_s)

    def slide(
        self, side: str, pose: HandPose, *, seconds: float = 0.0, early_s: float = 0.0
    ) -> Script:
        """As :meth:`move`, on a straight line: where fingers must not touch what they enclose."""
        start = self.ik.pose(side, self.goal(side)).position
        shares = np.linspace(0, 1, SLIDE_POINTS)[1:]
        places = start + shares[:, None] * (pose.position - start)
        knots: list[FloatArray] = []
        for place in places:
            near = knots[-1] if knots else self.goal(side)
            knots.append(self.ik.solve(side, HandPose(place, pose.rotation), near))
        yield from self._follow(side, np.stack(knots), seconds, early_s)

    def _follow(self, side: str, knots: FloatArray, seconds: float, early_s: float) -> Script:
        """Passes joint positions at equal shares of the way, rad, [points, 7]."""
        limits = self.episode.robot.limits
        place = self.episode.robot.layout.slices[f"astribot_arm_{side}"]
        ways = knots - self.goal(side)
        seconds = max(seconds, shortest_s(ways[-1], limits, place), SHORTEST_MOVE_S)
        self.begin(side, np.vstack([np.zeros(7), ways]), seconds)
        yield from self.wait(seconds - early_s)

    def begin(
        self, side: str, path: FloatArray, seconds: float, shape: Shape = minimum_jerk
    ) -> None:
        """Begins a motion of an arm; see :class:`Motion` for its arguments."""
        self._motions[side].append(Motion(path, self._ticks * TICK_S, seconds, shape))

    def goal(self, side: str) -> FloatArray:
        """Where an arm will be when all its motions have ended, rad, [7]."""
        joints: FloatArray = self._origin[side].copy()
        for motion in self._motions[side]:
            joints += motion.path[-1]
        return joints

    def grip(self, side: str, units: float, *, seconds: float) -> Script:
        """Sets a gripper, 0 open to 100 closed, and gives it time."""
        self._fingers[side] = units
        yield from self.wait(seconds)

    def wait(self, seconds: float) -> Script:
        """Lets time pass."""
        for _ in range(round(seconds * TICK_HZ)):
            yield

    def _joints(self, side: str) -> FloatArray:
        """Where an arm should be at the end of this tick, rad, [7]."""
        now_s = self._ticks * TICK_S
        joints: FloatArray = self._origin[side].copy()
        for motion in self._motions[side]:
            joints += motion.done(now_s)
        return joints
