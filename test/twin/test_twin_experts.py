"""The scripted experts: hands where they should be, gentle motions, jobs done, second tries."""

import numpy as np
import pytest

from safe_pruner_node.demonstrations.rollout import demonstrate
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.experts.hand import HandPose, facing_down
from safe_pruner_node.twin.experts.ik import ArmIk
from safe_pruner_node.twin.experts.motion import Motion, minimum_jerk, shortest_s
from safe_pruner_node.twin.experts.registry import EXPERTS, build_expert
from safe_pruner_node.twin.experts.throw_basketball import (
    CRUISE_S,
    RAMP_S,
    RELEASE_S,
    SWING_S,
    fall_s,
    swing,
)
from safe_pruner_node.twin.joint_table import HOME, SIDES
from safe_pruner_node.twin.scene import TABLE_POSTURE, TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


@pytest.fixture(scope="module")
def ik(robot):
    home = {side: np.array(HOME[f"astribot_arm_{side}"]) for side in SIDES}
    return ArmIk(robot, {part: np.array(v) for part, v in TABLE_POSTURE.items()}, home)


class Disturbed(Episode):
    """An episode that somebody meddles with before every command."""

    def __init__(self, task, robot, before):
        super().__init__(task, robot)
        self.before = before

    def advance(self, command, dt_s):
        self.before(self)
        super().advance(command, dt_s)


def test_every_task_has_an_expert():
    assert set(EXPERTS) == set(TASKS)


@pytest.mark.parametrize("side", SIDES)
def test_hands_reach_where_things_are_within_the_limits(ik, robot, side):
    place = robot.layout.slices[f"astribot_arm_{side}"]
    sign = 1 if side == "left" else -1
    for x, y, z in [(0.49, 0.15, 0.03), (0.62, 0.33, 0.03), (0.58, 0.0, 0.12), (0.5, 0.3, 0.14)]:
        wanted = HandPose(np.array([x, sign * y, TABLE_TOP_M + z]), facing_down(0.6))
        joints = ik.solve(side, wanted)
        found = ik.pose(side, joints)
        assert np.linalg.norm(found.position - wanted.position) < 1e-3
        assert np.abs(found.rotation - wanted.rotation).max() < 0.03
        assert np.all(joints >= robot.limits.min_position[place] - 1e-6)
        assert np.all(joints <= robot.limits.max_position[place] + 1e-6)


def test_the_same_pose_is_the_same_joints_whatever_came_before(ik):
    pose = HandPose(np.array([0.55, 0.2, 0.85]), facing_down(0.6))
    first = ik.solve("left", pose)
    ik.solve("right", HandPose(np.array([0.5, -0.3, 0.95]), facing_down(0.9)))
    np.testing.assert_array_equal(ik.solve("left", pose), first)


def test_the_jacobian_is_the_velocity_of_the_pinch_point(ik):
    joints = np.array(HOME["astribot_arm_right"])
    step = np.array([0.2, -0.1, 0.3, 0.1, -0.2, 0.1, 0.2]) * 1e-5
    moved = ik.pose("right", joints + step).position - ik.pose("right", joints - step).position
    np.testing.assert_allclose(2 * ik.jacobian("right", joints) @ step, moved, atol=1e-9)


@pytest.mark.parametrize("distance", [0.02, 0.3, 2.0])
def test_the_shortest_motion_is_within_the_limits(robot, distance):
    place = robot.layout.slices["astribot_arm_left"]
    way = np.linspace(-1, 1, 7) * distance
    seconds = shortest_s(way, robot.limits, place)
    motion = Motion(np.stack([np.zeros(7), way]), 0.0, seconds, minimum_jerk)
    times = np.linspace(0, seconds, 2001)
    joints = np.stack([motion.done(time) for time in times])
    np.testing.assert_allclose(joints[[0, -1]], [np.zeros(7), way], atol=1e-12)
    rate = seconds / 2000
    limits = robot.limits
    for order, largest in [
        (1, limits.max_velocity),
        (2, limits.max_acceleration),
        (3, limits.max_jerk),
    ]:
        reached = np.abs(np.diff(joints, n=order, axis=0)).max(axis=0) / rate**order
        assert np.all(reached <= largest[place])


def test_a_path_is_followed_point_by_point():
    path = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    motion = Motion(path, 2.0, 4.0, lambda share: share)
    at = [motion.done(time).tolist() for time in (0.0, 3.0, 4.0, 5.0, 9.0)]
    assert at == [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1]]


def test_the_swing_is_fastest_and_even_where_the_ball_is_let_go():
    step = 1e-3
    times = np.arange(0, SWING_S, step)
    speed = np.gradient([swing(time / SWING_S) for time in times], step) * (RAMP_S + CRUISE_S)
    assert swing(0.0) == pytest.approx(0)
    assert swing(RELEASE_S / SWING_S) == pytest.approx(0.5)
    assert swing(1.0) == pytest.approx(1)
    around = np.abs(times - RELEASE_S) < CRUISE_S / 2 - step
    np.testing.assert_allclose(speed[around], 1, atol=1e-6)
    assert speed.max() < 1.001
    assert speed.min() > -1e-6


def test_a_ball_falls_as_long_as_it_should():
    t = fall_s(0.12, 0.85)
    assert 0.85 * t - 9.81 / 2 * t**2 == pytest.approx(-0.12)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_an_empty_hand_tries_again(name, robot):
    episode = Episode(build_task(name, episode_seed("demonstration", 5)), robot)
    done = demonstrate(episode, mistake_chance=1.0)
    assert done.tries >= 2
    assert done.success


def test_a_thing_that_is_knocked_away_is_picked_up_again(robot):
    knocked = []

    def knock(episode):
        body = episode.task.target.body
        where = position(episode.sim, body)
        if not knocked and where[2] > 0.86:  # just lifted: out of the fingers, back to the table
            joint = episode.sim.data.joint(body)
            joint.qpos[:3] = [0.52, 0.30 * np.sign(where[1]), 0.83]
            joint.qvel[:] = 0
            knocked.append(True)

    task = build_task("pick_and_place", episode_seed("demonstration", 2))
    done = demonstrate(Disturbed(task, robot, knock), mistake_chance=0)
    assert knocked
    assert done.tries >= 2
    assert done.success


def test_a_ball_that_misses_and_can_be_reached_is_thrown_again(robot):
    thrown = []

    def drop(episode):  # a gust of wind takes the first throw back to where the ball was
        ball = position(episode.sim, "ball")
        if not thrown and episode.progress == 70:
            joint = episode.sim.data.joint("ball")
            joint.qpos[:3] = [0.52, 0.22 * episode.task.side, 0.82]
            joint.qvel[:] = 0
            thrown.append(ball)

    task = build_task("throw_basketball", episode_seed("demonstration", 1))
    done = demonstrate(Disturbed(task, robot, drop), mistake_chance=0)
    assert thrown
    assert done.tries == 2
    assert done.success


def test_packing_uses_both_hands_and_ends_at_home(robot):
    episode = Episode(build_task("pack_doll", episode_seed("demonstration", 0)), robot)
    expert = build_expert(episode, mistake_chance=0)
    done = demonstrate(episode, mistake_chance=0)
    way = np.abs(np.diff([frame.action for frame in done.frames], axis=0)).sum(axis=0)
    assert way[:7].max() > 1
    assert way[7:14].max() > 1
    packing = "left" if episode.task.doll_side > 0 else "right"
    place = robot.layout.slices[f"astribot_arm_{packing}"]
    np.testing.assert_allclose(done.frames[-1].state[place], expert.home[packing], atol=0.05)
