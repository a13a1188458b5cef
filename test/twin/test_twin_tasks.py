"""The tasks: seeds that never meet, scenes that repeat, judges that are not fooled."""

import numpy as np
import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.experts.hand import up
from safe_pruner_node.twin.scene import TABLE_TOP_M
from safe_pruner_node.twin.tasks.base import position
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.pack_doll import CARTON, DOLL, LID, LID_OPEN_RAD, PackDoll
from safe_pruner_node.twin.tasks.pick_and_place import PLATE, PickAndPlace
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import EPISODES_PER_SPLIT, SPLITS, episode_seed
from safe_pruner_node.twin.tasks.throw_basketball import BALL, HOOP, ThrowBasketball
from safe_pruner_node.twin.tasks.toys import TOYS


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


def put(sim, body, where):
    """Teleports a free body and lets it come to rest."""
    joint = sim.data.joint(body)
    joint.qpos[:3] = where
    joint.qvel[:] = 0
    sim.step(0.5)


def test_splits_never_share_a_seed():
    ranges = [
        (episode_seed(split, 0), episode_seed(split, EPISODES_PER_SPLIT - 1)) for split in SPLITS
    ]
    for (_, last), (first, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
        assert last < first


@pytest.mark.parametrize(
    ("split", "index"), [("test", 0), ("evaluation", -1), ("evaluation", 10**6)]
)
def test_a_seed_outside_of_its_split_is_refused(split, index):
    with pytest.raises(ConfigError):
        episode_seed(split, index)


def test_unknown_task_is_refused_by_name():
    with pytest.raises(ConfigError, match="juggling"):
        build_task("juggling", 0)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_seed_decides_the_whole_episode(name):
    def episode(seed):
        task = build_task(name, seed)
        sim = task.build_sim()
        light = np.concatenate([sim.model.light_diffuse.ravel(), sim.model.cam_pos.ravel()])
        return task.prompt, sim.data.qpos.copy(), light

    first, again, other = episode(3), episode(3), episode(4)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(first[2], again[2])
    assert not np.allclose(first[2], other[2])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_nothing_is_done_before_anything_was_done(name):
    for seed in range(3):
        task = build_task(name, seed)
        sim = task.build_sim()
        assert task.progress(sim) == 0
        sim.step(1.0)
        assert not task.is_success(sim)
        assert task.progress(sim) == 0


def test_all_ten_toys_are_asked_for_and_differ():
    asked = {PickAndPlace(seed).target.words for seed in range(100)}
    assert asked == {toy.words for toy in TOYS}
    assert len({toy.rgba for toy in TOYS}) == len({toy.shape for toy in TOYS}) == 10


def test_pick_and_place_asks_for_both_arms():
    sides = set()
    for seed in range(8):
        task = PickAndPlace(seed)
        sides.add(position(task.build_sim(), task.target.body)[1] > 0)
    assert sides == {True, False}


def test_the_named_thing_on_the_plate_is_success_and_another_one_is_not():
    task = PickAndPlace(0)
    sim = task.build_sim()
    over = position(sim, PLATE) + up(0.012)
    put(sim, task.toys[1].body, over + up(task.toys[1].lift_m))
    assert not task.is_success(sim)
    sim.reset()
    put(sim, task.target.body, over + up(task.target.lift_m))
    assert task.is_success(sim)
    assert task.progress(sim) == 100


def test_beside_the_plate_or_falling_onto_it_is_no_success():
    task = PickAndPlace(0)
    sim = task.build_sim()
    plate = position(sim, PLATE)
    put(sim, task.target.body, [plate[0] - 0.13, plate[1], TABLE_TOP_M + task.target.lift_m])
    assert not task.is_success(sim)
    joint = sim.data.joint(task.target.body)
    joint.qpos[:3] = plate + up(0.3)
    sim.step(0.15)
    assert not task.is_success(sim)


def test_progress_keeps_the_furthest_stage():
    task = PickAndPlace(0)
    sim = task.build_sim()
    put(sim, task.target.body, position(sim, PLATE) + up(0.012 + task.target.lift_m))
    assert task.progress(sim) == 100
    put(sim, task.target.body, [0.5, 0.5, TABLE_TOP_M + task.target.lift_m])
    assert task.progress(sim) == 100


def test_a_command_moves_the_robot_and_a_bad_one_is_refused(robot):
    episode = Episode(PickAndPlace(0), robot)
    command = episode.state()
    command[3] += 0.2
    for _ in range(60):
        episode.advance(command, 0.01)
    assert episode.time_s == pytest.approx(0.6)
    assert episode.state()[3] == pytest.approx(command[3], abs=0.02)
    with pytest.raises(ConfigError):
        episode.advance(np.full(16, np.nan), 0.01)
    with pytest.raises(ConfigError):
        episode.advance(command[:7], 0.01)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_landmarks_are_what_to_take_and_where_it_goes(name):
    task = build_task(name, 1)
    sim = task.build_sim()
    taken, goal = task.landmarks(sim)
    assert taken.shape == goal.shape == (3,)
    moved = sim.objects[0]
    put(sim, moved, [0.45, 0.0, TABLE_TOP_M + 0.05])
    after = task.landmarks(sim)
    np.testing.assert_allclose(after[0], position(sim, moved))
    np.testing.assert_allclose(after[1], goal, atol=1e-3)


def test_an_episode_ends_when_its_time_is_up(robot):
    episode = Episode(PickAndPlace(0), robot)
    assert not episode.over
    episode.sim.data.time = PickAndPlace.time_limit_s
    assert episode.over
    assert not episode.success


def set_lid(sim, angle_rad):
    joint = sim.data.joint(LID)
    joint.qpos[0] = angle_rad - LID_OPEN_RAD
    joint.qvel[0] = 0


def test_the_lid_stays_open_by_itself_and_falls_shut_once_past_upright():
    task = PackDoll(0)
    sim = task.build_sim()
    sim.step(2.0)
    assert task.lid_angle(sim) == pytest.approx(LID_OPEN_RAD, abs=0.02)
    set_lid(sim, 1.3)
    sim.step(2.0)
    assert task.lid_angle(sim) == pytest.approx(0.0, abs=0.05)


def test_packing_needs_the_doll_and_the_lid():
    task = PackDoll(0)
    sim = task.build_sim()
    set_lid(sim, 0.05)
    sim.step(1.0)
    assert not task.is_success(sim)  # closed over nothing
    sim.reset()
    put(sim, DOLL, position(sim, CARTON) + up(0.04))
    assert task.doll_inside(sim)
    assert not task.is_success(sim)  # inside, but open
    assert task.progress(sim) == 55
    set_lid(sim, 1.3)
    sim.step(2.0)
    assert task.is_success(sim)
    assert task.progress(sim) == 100


def test_a_doll_on_the_lid_is_not_inside():
    task = PackDoll(0)
    sim = task.build_sim()
    set_lid(sim, 0.0)
    put(sim, DOLL, position(sim, CARTON) + up(0.135))
    assert not task.is_success(sim)


def test_packing_changes_hands_with_the_seed():
    assert {PackDoll(seed).doll_side for seed in range(8)} == {-1, 1}


def fly(task, sim, *, start, velocity):
    """Lets the ball fly from somewhere, watched as an episode does."""
    joint = sim.data.joint(BALL)
    joint.qpos[:3] = start
    joint.qvel[:] = [*velocity, 0, 0, 0]
    for _ in range(200):
        sim.step(1 / 240)
        task.watch(sim)


def thrown_from(task, away_m):
    """Whether a ball that the hand let go ``away_m`` before the hoop counts when it goes in."""
    sim = task.build_sim()
    hoop = position(sim, HOOP)
    task._last_touch = hoop + np.array([-away_m, 0, 0.22])  # the hand, without the hand
    fly(task, sim, start=hoop + up(0.15), velocity=(0, 0, 0))
    return task.is_success(sim)


def test_a_throw_through_the_hoop_scores():
    assert thrown_from(ThrowBasketball(0), 0.2)


def test_dropping_the_ball_from_over_the_hoop_does_not_score():
    assert not thrown_from(ThrowBasketball(0), 0.05)


def test_a_ball_that_no_hand_threw_or_that_misses_does_not_score():
    task = ThrowBasketball(0)
    sim = task.build_sim()
    hoop = position(sim, HOOP)
    fly(task, sim, start=hoop + up(0.15), velocity=(0, 0, 0))
    assert not task.is_success(sim)
    sim.reset()
    task._last_touch = hoop - np.array([0.3, 0, 0])
    fly(task, sim, start=hoop + np.array([0, 0.16, 0.15]), velocity=(0, 0, 0))
    assert not task.is_success(sim)


def test_a_ball_pushed_up_through_the_hoop_does_not_score():
    task = ThrowBasketball(0)
    sim = task.build_sim()
    hoop = position(sim, HOOP)
    task._last_touch = hoop - np.array([0.3, 0, 0])
    joint = sim.data.joint(BALL)
    joint.qpos[:3] = hoop - up(0.05)
    joint.qvel[:3] = [0, 0, 2.0]
    for _ in range(24):  # up, not yet down again
        sim.step(1 / 240)
        task.watch(sim)
    assert position(sim, BALL)[2] > hoop[2]
    assert not task.is_success(sim)
