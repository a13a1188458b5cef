"""The world behind the twin node: who is commanded how, and how often the judge looks."""

import numpy as np
import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.cameras import FULL_RESOLUTION
from safe_pruner_node.twin.experts.hand import up
from safe_pruner_node.twin.joint_table import HOME
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.pick_and_place import PLATE
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.throw_basketball import ThrowBasketball
from safe_pruner_node.twin.world import World


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


def test_a_scene_without_a_task_has_nothing_to_judge(robot):
    world = World(robot, FULL_RESOLUTION, scene="table", seed=3)
    world.advance(0.5)
    assert world.status is None
    assert world.sim.time_s == pytest.approx(0.5)


@pytest.mark.parametrize("task", ["", "pack_doll"])
def test_every_part_goes_where_it_is_told(robot, task):
    world = World(robot, FULL_RESOLUTION, task=task)
    arm = np.array(HOME["astribot_arm_right"]) + 0.1 * np.eye(7)[3]
    world.set_command("astribot_arm_right", arm)
    world.set_command("astribot_head", np.array([0.2, 0.4]))  # no policy drives it
    world.advance(1.5)
    right = world.sim.joint_state("astribot_arm_right").position
    np.testing.assert_allclose(right, arm, atol=0.02)
    head = world.sim.joint_state("astribot_head").position
    np.testing.assert_allclose(head, [0.2, 0.4], atol=0.02)
    left = world.sim.joint_state("astribot_arm_left").position
    np.testing.assert_allclose(left, HOME["astribot_arm_left"], atol=0.02)


def test_a_task_stands_in_the_same_pose_as_in_every_other_rollout(robot):
    """The harness lets the task build its own twin."""
    world = World(robot, FULL_RESOLUTION, task="pick_and_place", seed=5)
    other = build_task("pick_and_place", 5).build_sim()
    np.testing.assert_array_equal(world.sim.data.qpos, other.data.qpos)


def test_the_first_success_counts_with_its_time(robot):
    world = World(robot, FULL_RESOLUTION, task="pick_and_place", seed=5)
    task, sim = build_task("pick_and_place", 5), world.sim
    world.advance(0.3)
    status = world.status
    assert (status.prompt, status.progress, status.success_s) == (task.prompt, 0.0, None)

    def put(where):
        joint = sim.data.joint(task.target.body)
        joint.qpos[:3] = where
        joint.qvel[:] = 0

    put(position(sim, PLATE) + up(0.012 + task.target.lift_m))
    world.advance(0.5)
    done = world.status
    assert done.success
    assert 0.3 < done.success_s <= 0.8
    put([0.5, 0.5, TABLE_TOP_M + task.target.lift_m])
    world.advance(0.5)
    assert (world.status.success, world.status.success_s) == (True, done.success_s)
    assert world.status.progress == 100.0
    assert world.status.elapsed_s == pytest.approx(1.3)


def test_the_judge_looks_after_every_control_period(robot, monkeypatch):
    """A late tick makes up for much time at once; what flies past meanwhile must be seen."""
    looks_s = []
    monkeypatch.setattr(ThrowBasketball, "watch", lambda _, sim: looks_s.append(sim.time_s))
    world = World(robot, FULL_RESOLUTION, task="throw_basketball")
    for dt_s in (0.01, 0.1, 0.004):
        world.advance(dt_s)
    assert np.diff([0.0, *looks_s]).max() < 0.0101
    assert looks_s[-1] == pytest.approx(0.114)


def test_an_unknown_task_is_refused(robot):
    with pytest.raises(ConfigError, match="juggling"):
        World(robot, FULL_RESOLUTION, task="juggling")
