"""The simulated robot behind the wire: holding, moving, gripping, refusing, repeating itself."""

import mujoco
import numpy as np
import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.twin.joint_table import PART_DOF
from safe_pruner_node.twin.sim import PARTS, TwinSim

ARMS = ("astribot_arm_left", "astribot_arm_right")


@pytest.fixture(scope="module")
def shared():
    """One compiled twin; every test starts it afresh with ``reset``."""
    return TwinSim("table", seed=0)


@pytest.fixture
def sim(shared):
    shared.reset()
    return shared


def positions(sim):
    return np.concatenate([sim.joint_state(part).position for part in PARTS])


def test_holds_home_against_gravity(sim):
    home = np.concatenate([sim.home[part] for part in PARTS])
    sim.step(2.0)
    np.testing.assert_allclose(positions(sim), home, atol=5e-3)


def test_motors_report_the_weight_they_bear(sim):
    """Gravity compensation is how the twin holds; a real motor shows it as torque."""
    sim.step(0.5)
    assert np.abs(sim.joint_state("astribot_arm_left").torque).max() > 0.5


@pytest.mark.parametrize("part", [p for p in PARTS if "gripper" not in p])
def test_commanded_move_arrives(sim, part):
    target = sim.home[part] + np.where(np.arange(PART_DOF[part]) % 2 == 0, -0.1, 0.1)
    sim.set_command(part, target)
    sim.step(2.0)
    state = sim.joint_state(part)
    np.testing.assert_allclose(state.position, target, atol=5e-3)
    np.testing.assert_allclose(state.velocity, 0, atol=2e-2)


def test_an_arm_follows_within_a_tenth_of_a_second(sim):
    """Slower than this and a policy at 30 Hz would act on a robot that is not there yet."""
    part, before = "astribot_arm_left", sim.home["astribot_arm_left"]
    sim.set_command(part, before + 0.05)
    sim.step(0.1)
    moved = sim.joint_state(part).position - before
    assert np.all(moved > 0.04)
    assert np.all(moved < 0.06)


def test_velocity_is_the_derivative_of_position(sim):
    for part, step in (("astribot_arm_right", 0.2), ("astribot_gripper_right", 60.0)):
        sim.set_command(part, sim.home[part] + step)
        sim.step(0.03)
        before, state = sim.joint_state(part).position, None
        sim.step(0.002)
        state = sim.joint_state(part)
        np.testing.assert_allclose(
            (state.position - before) / 0.002, state.velocity, rtol=1e-6, atol=1e-9
        )


def test_commands_beyond_a_limit_stop_at_the_limit(sim):
    sim.set_command("astribot_arm_left", sim.home["astribot_arm_left"] + [0, 0, 0, 9, 0, 0, 0])
    sim.step(2.0)
    assert sim.joint_state("astribot_arm_left").position[3] <= 2.61 + 0.02


def test_gripper_polarity_and_units(sim):
    """0 is open, 100 is closed: fingers a stroke apart, then touching."""
    part = "astribot_gripper_left"

    def gap():
        a, b = (sim.data.body(f"{part}_finger_{label}").xpos for label in "ab")
        return np.linalg.norm(a - b)

    assert sim.joint_state(part).position == pytest.approx(0.0, abs=1)
    assert gap() == pytest.approx(0.10, abs=2e-3)
    sim.set_command(part, [100.0])
    sim.step(1.0)
    assert sim.joint_state(part).position == pytest.approx(100.0, abs=1)
    assert gap() == pytest.approx(0.0, abs=2e-3)
    sim.set_command(part, [50.0])
    sim.step(1.0)
    assert sim.joint_state(part).position == pytest.approx(50.0, abs=1)


def test_gripper_grips_and_lifts_a_cube(sim):
    pinch = sim.data.site("astribot_gripper_left_pinch")
    joint = sim.model.joint("red_cube")
    # Held where the fingers are while they close, as a person would hand it over.
    pose = np.concatenate([pinch.xpos, sim.data.body("astribot_gripper_left").xquat])
    sim.set_command("astribot_gripper_left", [100.0])
    for _ in range(200):
        sim.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 7] = pose
        sim.data.qvel[joint.dofadr[0] : joint.dofadr[0] + 6] = 0
        sim.step(0.002)
    held = sim.joint_state("astribot_gripper_left").position[0]
    assert held == pytest.approx(100 * (1 - 0.024 / 0.05), abs=6)  # a cube of 48 mm is in between
    lift = sim.home["astribot_arm_left"].copy()
    lift[3] += 0.35
    sim.set_command("astribot_arm_left", lift)
    sim.step(2.0)
    assert pinch.xpos[2] > pose[2] + 0.05
    assert np.linalg.norm(sim.data.body("red_cube").xpos - pinch.xpos) < 0.02


@pytest.mark.parametrize(
    ("part", "values", "word"),
    [
        ("astribot_arm_left", [0.0] * 6, "6 values"),
        ("astribot_arm_left", [], "0 values"),
        ("astribot_arm_left", [0.0] * 6 + [np.nan], "nan"),
        ("astribot_gripper_left", [np.inf], "inf"),
        ("astribot_arm_leftt", [0.0] * 7, "astribot_arm_leftt"),
    ],
)
def test_wrong_commands_are_refused_and_change_nothing(sim, part, values, word):
    before = sim.data.ctrl.copy()
    with pytest.raises(ConfigError, match=word):
        sim.set_command(part, values)
    np.testing.assert_array_equal(sim.data.ctrl, before)


def test_home_of_the_wrong_size_is_refused():
    with pytest.raises(ConfigError, match=r"home: astribot_arm_left: found 2 values"):
        TwinSim("empty", home={"astribot_arm_left": np.zeros(2)})


def test_unknown_scene_is_refused():
    with pytest.raises(ConfigError, match="scene: found kitchen, expected one of empty, table"):
        TwinSim("kitchen")


def test_same_seed_and_commands_give_the_same_run_to_the_last_bit():
    def run(seed):
        sim = TwinSim("table", seed)
        rng = np.random.default_rng(3)
        trace = []
        for _ in range(60):
            for part in ARMS:
                sim.set_command(part, sim.home[part] + rng.normal(0, 0.3, 7))
            sim.step(0.01)
            trace.append(sim.data.qpos.copy())
        return np.array(trace)

    np.testing.assert_array_equal(run(4), run(4))
    assert not np.array_equal(run(4), run(5))  # other places for the objects


def test_reset_repeats_a_run(sim):
    sim.set_command("astribot_arm_left", sim.home["astribot_arm_left"] + 0.2)
    sim.step(0.5)
    first = sim.data.qpos.copy()
    sim.step(0.0013)  # less than a physics step: what is left over must be forgotten, too
    sim.reset()
    sim.set_command("astribot_arm_left", sim.home["astribot_arm_left"] + 0.2)
    sim.step(0.5)
    np.testing.assert_array_equal(sim.data.qpos, first)


@pytest.mark.parametrize("dt", [0.004, 0.0033, 0.01, 1 / 30])
def test_time_does_not_drift_from_the_sum_of_the_ticks(sim, dt):
    for _ in range(100):
        sim.step(dt)
    assert sim.time_s == pytest.approx(100 * dt, abs=sim.model.opt.timestep)


@pytest.mark.parametrize("seed", range(5))
def test_objects_rest_on_the_table_and_within_reach(seed):
    sim = TwinSim("table", seed)
    before = np.array([sim.data.body(name).xpos for name in sim.objects])
    sim.step(1.0)
    after = np.array([sim.data.body(name).xpos for name in sim.objects])
    np.testing.assert_allclose(after, before, atol=2e-3)
    assert np.all((after[:, 2] > 0.77) & (after[:, 2] < 0.86))
    assert np.all((after[:, 0] > 0.45) & (after[:, 0] < 0.80))
    home_contacts = {
        sim.model.body(sim.model.geom_bodyid[geom]).name
        for contact in sim.data.contact
        for geom in (contact.geom1, contact.geom2)
    }
    assert not any(name.startswith("astribot") for name in home_contacts)


def test_an_arm_stops_at_the_table(sim):
    """The robot cannot pass its hand through the table."""
    down = sim.home["astribot_arm_left"].copy()
    down[3] -= 0.5
    sim.set_command("astribot_arm_left", down)
    sim.step(2.0)
    for label in "ab":
        finger = sim.data.body(f"astribot_gripper_left_finger_{label}")
        tip = finger.xpos + finger.xmat.reshape(3, 3) @ [0, 0, 0.095]
        assert tip[2] > 0.76


def test_the_hands_do_not_pass_through_each_other(sim):
    inwards = np.eye(7)[2] * 0.9
    for side, sign in (("left", 1), ("right", -1)):
        part = f"astribot_arm_{side}"
        sim.set_command(part, sim.home[part] + sign * inwards)
    sim.step(2.0)
    left, right = (sim.data.site(f"astribot_gripper_{s}_pinch").xpos for s in ("left", "right"))
    assert left[1] > right[1]  # alone, each would end 9 cm beyond the middle


def test_model_is_stable_when_thrown_about(sim):
    """Full-range step commands on every joint: warnings would mean a diverging simulation."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        for part in ARMS:
            sim.set_command(part, rng.uniform(-2.5, 2.5, 7))
        sim.step(0.1)
    bad = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL)
    assert sum(sim.data.warning[int(kind)].number for kind in bad) == 0
    assert np.isfinite(sim.data.qpos).all()
