"""Demonstrations: within the limits, noise executed and not recorded, frames at the right times."""

import dataclasses

import numpy as np
import pytest

from safe_pruner_node.demonstrations.rollout import AFTERWARDS_S, demonstrate
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed

CONTROL_S = 0.01


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


def at_rate(robot, rate_hz):
    policy = dataclasses.replace(robot.policy, action_rate_hz=rate_hz)
    return dataclasses.replace(robot, policy=policy)


class Recorded(Episode):
    """Keeps the command of every control tick, as executed."""

    def __init__(self, task, robot):
        super().__init__(task, robot)
        self.commands = {}

    def advance(self, command, dt_s):
        self.commands.setdefault(int(self.elapsed / CONTROL_S + 1e-6), command)
        self.elapsed += dt_s
        super().advance(command, dt_s)

    elapsed = 0.0


def record(name, index, robot, **options):
    episode = Recorded(build_task(name, episode_seed("demonstration", index)), robot)
    done = demonstrate(episode, **options)
    ticks = sorted(episode.commands)
    assert ticks == list(range(len(ticks)))
    return done, np.stack([episode.commands[tick] for tick in ticks])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_commands_obey_position_velocity_and_acceleration_limits(name, robot):
    done, commands = record(name, 0, robot, noise_rad=0, mistake_chance=0)
    limits = robot.limits
    assert done.success
    assert np.all(commands >= limits.min_position - 1e-9)
    assert np.all(commands <= limits.max_position + 1e-9)
    rate = np.diff(commands, axis=0) / CONTROL_S
    assert np.all(np.abs(rate) <= limits.max_velocity * (1 + 1e-6))
    assert np.all(np.abs(np.diff(rate, axis=0)) / CONTROL_S <= limits.max_acceleration * 1.001)
    # The experts move so gently that the limits hardly matter; fingers snap.
    arms = ~robot.layout.gripper
    assert np.abs(np.diff(rate, axis=0))[:, arms].max() / CONTROL_S < 7.5


def test_noise_is_executed_and_not_recorded(robot):
    robot = at_rate(robot, 20)  # every fifth control tick
    noisy, executed = record("throw_basketball", 1, robot, mistake_chance=0)
    calm, meant = record("throw_basketball", 1, robot, noise_rad=0, mistake_chance=0)
    labels = np.stack([frame.action for frame in calm.frames])
    np.testing.assert_allclose(labels, meant[::5][: len(labels)], atol=1e-9)
    # The script is the same until noise changes when a job is done.
    common = min(len(noisy.frames), len(calm.frames)) - 40
    same = np.stack([frame.action for frame in noisy.frames])[:common]
    np.testing.assert_allclose(same, labels[:common], atol=1e-9)
    error = executed[::5][:common] - same
    assert 0.002 < error[:, :14].std() < 0.008
    np.testing.assert_allclose(error[:, 14:], 0, atol=1e-9)
    # Slow enough for a policy to see and to correct.
    steps = np.diff(executed[: 5 * common] - meant[: 5 * common], axis=0)
    assert np.abs(steps).max() / CONTROL_S < 0.2
    assert noisy.success


@pytest.mark.parametrize("rate_hz", [15, 30, 7])
def test_frames_come_at_the_policys_rate_and_a_little_longer_than_the_job(robot, rate_hz):
    done, _ = record("throw_basketball", 3, at_rate(robot, rate_hz), mistake_chance=0)
    times = np.array([frame.snapshot.time_s for frame in done.frames])
    np.testing.assert_allclose(times, np.arange(len(times)) / rate_hz, atol=2.1e-3)  # physics step
    assert done.success
    assert done.seconds + AFTERWARDS_S - 1 / rate_hz <= times[-1] <= done.seconds + AFTERWARDS_S


def test_a_frame_is_what_was_measured_and_what_was_in_force(robot):
    done, _ = record("pick_and_place", 3, robot, noise_rad=0, mistake_chance=0)
    first, states = done.frames[0], np.stack([frame.state for frame in done.frames])
    np.testing.assert_allclose(first.action, first.state, atol=0.02)
    lag = np.stack([frame.action for frame in done.frames]) - states
    arms = ~robot.layout.gripper
    assert 0.001 < np.abs(lag[:, arms]).max() < 0.15  # some 40 ms behind the command
    assert done.frames[0].landmarks.shape == (2, 3)
    carried = done.frames[-1].landmarks
    assert np.linalg.norm(carried[0, :2] - carried[1, :2]) < 0.09  # the thing is on the plate


def test_the_same_episode_is_the_same_demonstration(robot):
    first, again = (record("pick_and_place", 1, robot)[0] for _ in range(2))
    assert len(first.frames) == len(again.frames)
    for one, other in zip(first.frames, again.frames, strict=True):
        np.testing.assert_array_equal(one.snapshot.qpos, other.snapshot.qpos)
        np.testing.assert_array_equal(one.action, other.action)
    assert dataclasses.replace(first, frames=()) == dataclasses.replace(again, frames=())


def test_a_job_that_cannot_be_done_is_no_success(robot):
    task = build_task("pick_and_place", episode_seed("demonstration", 4))
    episode = Episode(task, robot)
    joint = episode.sim.data.joint(task.target.body)
    joint.qpos[:3] = [2.0, 0.0, 0.05]  # on the floor behind the table
    done = demonstrate(episode)
    assert not done.success
    assert done.seconds <= task.time_limit_s + CONTROL_S
