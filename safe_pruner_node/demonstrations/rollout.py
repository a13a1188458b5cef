"""One demonstration: the expert through the robot's control limits, seen at the policy's rate."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.control.tracker import LimitedTracker
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.cameras import Snapshot
from safe_pruner_node.twin.experts.base import TICK_HZ, TICK_S
from safe_pruner_node.twin.experts.registry import build_expert
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.types import FloatArray

AFTERWARDS_S = 0.7
"""Frames go on for this long after the job is done: a policy has to learn to withdraw, too."""

NOISE_TIME_S = 0.15
"""Time constant of each of the two low-pass filters that make the noise smooth, s."""


@dataclass(frozen=True)
class DemonstrationFrame:
    """What the robot saw and what it was told at one instant.

    Attributes:
        snapshot: Everything a renderer needs.
        state: Measured positions, robot units, [dof].
        action: The command in force, without the noise that was executed on top, [dof].
        landmarks: Where the thing to take is and where it goes, world, m, [2, 3].
    """

    snapshot: Snapshot
    state: FloatArray
    action: FloatArray
    landmarks: FloatArray


@dataclass(frozen=True)
class Demonstration:
    """One episode of an expert.

    Attributes:
        task: Name of the task.
        prompt: What the policy is told.
        seed: Seed of the episode.
        success: Whether the job was done in time.
        tries: Grasps it took.
        seconds: Simulated time until the job was done (until the end where it was not), s.
        frames: At the policy's action rate.
        clamped_share: Share of control ticks in which the expert meant more than the position or
            velocity limits allow (:class:`~safe_pruner_node.control.tracker.Command`).
    """

    task: str
    prompt: str
    seed: int
    success: bool
    tries: int
    seconds: float
    frames: tuple[DemonstrationFrame, ...]
    clamped_share: float = 0.0


def demonstrate(
    episode: Episode,
    *,
    noise_rad: float = 0.005,
    mistake_chance: float = 0.07,
    control_rate_hz: float = 100.0,
) -> Demonstration:
    """Lets the expert do an episode.

    Noise is executed and not recorded: the demonstrations stray a little and show the way back.

    Args:
        episode: A fresh episode; it is over afterwards, and its twin's model can draw the frames.
        noise_rad: Standard deviation of the noise on the arms' commands; 0 for none.
        mistake_chance: How often a grasp is aimed wrong on purpose.
        control_rate_hz: Joint commands per second, not below the expert's 30 per second.
    """
    robot, task = episode.robot, episode.task
    frame_s, control_s = 1.0 / robot.policy.action_rate_hz, 1.0 / control_rate_hz
    commands = _Commands(episode, mistake_chance, control_s)
    noise = _Noise(robot, task.seed, noise_rad, control_s)
    frames: list[DemonstrationFrame] = []
    done_s: float | None = None
    tick, next_frame_s, clamped = 0, 0.0, 0
    while episode.time_s < task.time_limit_s:
        now_s = tick * control_s
        if done_s is not None and now_s > done_s + AFTERWARDS_S:
            break
        meant, velocity = commands.at(now_s)
        clamped += commands.clamped
        executed = noise.on(meant)
        elapsed_s = 0.0
        # A frame between two commands is taken at its own time, not at the nearest command's.
        while next_frame_s < now_s + control_s - 1e-9:
            into_s = max(next_frame_s - now_s, 0.0)
            if into_s > elapsed_s:
                episode.advance(executed, into_s - elapsed_s)
                elapsed_s = into_s
            frames.append(_frame(episode, meant + into_s * velocity))
            next_frame_s = len(frames) * frame_s
        episode.advance(executed, control_s - elapsed_s)
        tick += 1
        if done_s is None and (episode.success or commands.expert.done):
            done_s = tick * control_s
    return Demonstration(
        task=task.name,
        prompt=task.prompt,
        seed=task.seed,
        success=episode.success,
        tries=commands.expert.tries,
        seconds=tick * control_s if done_s is None else done_s,
        frames=tuple(frames),
        clamped_share=clamped / max(tick, 1),
    )


def _frame(episode: Episode, action: FloatArray) -> DemonstrationFrame:
    limits = episode.robot.limits
    return DemonstrationFrame(
        snapshot=episode.sim.snapshot(),
        state=episode.state(),
        action=np.clip(action, limits.min_position, limits.max_position),
        landmarks=episode.task.landmarks(episode.sim),
    )


class _Commands:
    """The expert's ticks as a stream of joint commands within the robot's limits.

    A uniform cubic B-spline through the last four targets is what the tracker follows: it moves
    without steps in velocity or acceleration, and stays between the targets.
    """

    def __init__(self, episode: Episode, mistake_chance: float, control_s: float) -> None:
        self.expert = build_expert(episode, mistake_chance)
        self.clamped = False
        start = episode.state()
        self._points = deque([start] * 4, maxlen=4)
        self._ticks = 0
        self._tracker = LimitedTracker(JointLimits(**vars(episode.robot.limits)), control_s)
        self._tracker.reset(start)

    def at(self, time_s: float) -> tuple[FloatArray, FloatArray]:
        """Position and velocity of the command at a time that only ever grows, each [dof]."""
        while self._ticks * TICK_S <= time_s + 1e-9:
            self._points.append(self.expert.act())
            self._ticks += 1
        position, velocity = _spline(np.stack(self._points), time_s * TICK_HZ - self._ticks + 1)
        command = self._tracker.track(position, velocity)
        self.clamped = command.clamped
        return command.position, command.velocity


def _spline(points: FloatArray, share: float) -> tuple[FloatArray, FloatArray]:
    """A cubic B-spline of four points one tick apart, at a share 0 to 1 of its middle span.

    Args:
        points: [4, dof].
        share: Of the span's tick.

    Returns:
        Position and velocity per second, each [dof].
    """
    u = share
    weights = np.array(
        [(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3]
    )
    slopes = np.array([-((1 - u) ** 2), 3 * u**2 - 4 * u, -3 * u**2 + 2 * u + 1, u**2])
    return weights / 6 @ points, slopes / 2 @ points * TICK_HZ


class _Noise:
    """Smooth noise on the arms: white noise through two low-pass filters."""

    def __init__(self, robot: RobotConfig, seed: int, noise_rad: float, control_s: float) -> None:
        limits = robot.limits
        self._low, self._high = limits.min_position, limits.max_position
        self._rng = np.random.default_rng([seed, 3])
        self._memory = float(np.exp(-control_s / NOISE_TIME_S))
        self._filters = np.zeros((2, robot.layout.dof))
        # Of what two such filters leave of white noise of unit variance.
        kept = self._memory**2
        deviation = (1 - self._memory) ** 2 * np.sqrt((1 + kept) / (1 - kept) ** 3)
        arms = robot.layout.commanded & ~robot.layout.gripper
        self._scale = np.where(arms, noise_rad / deviation, 0.0)

    def on(self, command: FloatArray) -> FloatArray:
        """The next command with noise, within the position limits, [dof]."""
        signal = self._rng.normal(size=command.size)
        for k in range(len(self._filters)):
            self._filters[k] += (1 - self._memory) * (signal - self._filters[k])
            signal = self._filters[k]
        noisy = command + self._scale * signal
        return np.asarray(np.clip(noisy, self._low, self._high), dtype=np.float64)
