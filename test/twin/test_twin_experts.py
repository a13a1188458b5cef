"""The scripted experts: they finish, within the robot's limits, and try again."""

import numpy as np
import pytest

from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.experts.registry import EXPERTS, build_expert
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


def rollout(name, seed, robot, noise_rad=0.004, mistake_chance=0.1, disturb=None):
    episode = Episode(build_task(name, seed), robot)
    expert = build_expert(episode, noise_rad, mistake_chance)
    executed, meant = [], []
    while not episode.over:
        if disturb is not None:
            disturb(episode)
        action, label = expert.act()
        episode.step(action)
        executed.append(action)
        meant.append(label)
    return episode, expert, np.array(executed), np.array(meant)


def test_every_task_has_an_expert():
    assert set(EXPERTS) == set(TASKS)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_expert_finishes_within_the_robots_limits(name, robot):
    solved = 0
    for index in range(3):
        episode, _, executed, meant = rollout(name, episode_seed("demonstration", index), robot)
        solved += episode.success
        limits = robot.limits
        assert np.all(executed >= limits.min_position - 1e-9)
        assert np.all(executed <= limits.max_position + 1e-9)
        rate = np.abs(np.diff(meant, axis=0)) / episode.dt_s
        assert np.all(rate <= limits.max_velocity + 1e-6)
    assert solved >= 2  # measured: well over nine in ten


def test_the_same_episode_is_the_same_demonstration(robot):
    seed = episode_seed("demonstration", 1)
    first, again = (rollout("pick_and_place", seed, robot)[2] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_noise_is_executed_and_not_meant(robot):
    seed = episode_seed("demonstration", 1)
    _, _, executed, meant = rollout("pick_and_place", seed, robot)
    error = executed - meant
    assert 0.002 < error[:, :14].std() < 0.006
    np.testing.assert_array_equal(error[:, 14:], 0)
    _, _, executed, meant = rollout("pick_and_place", seed, robot, noise_rad=0)
    np.testing.assert_array_equal(executed, meant)


def test_a_thing_that_is_knocked_away_is_picked_up_again(robot):
    moved = []

    def knock(episode):
        body = episode.task.target.body
        where = position(episode.sim, body)
        if not moved and where[2] > 0.86:  # just lifted: out of the fingers, back to the table
            joint = episode.sim.data.joint(body)
            joint.qpos[:3] = [0.52, 0.30 * np.sign(where[1]), 0.83]
            joint.qvel[:] = 0
            moved.append(True)

    episode, expert, _, _ = rollout(
        "pick_and_place", episode_seed("demonstration", 2), robot, disturb=knock
    )
    assert moved
    assert expert.tries >= 2
    assert episode.success


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_an_empty_hand_tries_again(name, robot):
    seed = episode_seed("demonstration", 5)
    episode, expert, _, _ = rollout(name, seed, robot, mistake_chance=1.0)
    assert expert.tries >= 2
    assert episode.success


def test_packing_uses_both_hands(robot):
    _, _, _, meant = rollout("pack_doll", episode_seed("demonstration", 0), robot)
    way = np.abs(np.diff(meant, axis=0)).sum(axis=0)
    assert way[:7].max() > 1
    assert way[7:14].max() > 1
