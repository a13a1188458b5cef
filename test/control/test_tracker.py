import numpy as np
import pytest
import ruckig
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.control.tracker import LimitedTracker

ARM = JointLimits(
    min_position=np.array([-2.0, -0.1, 0.0, -np.inf]),
    max_position=np.array([2.0, 1.5, 100.0, np.inf]),
    max_velocity=np.array([2.0, 15.0, 1000.0, 1.0]),
    max_acceleration=np.array([8.0, 60.0, 4000.0, 3.0]),
    max_jerk=np.array([80.0, 3000.0, 80000.0, 20.0]),
)
SCALE = np.array([1.0, 1.0, 30.0, 1.0])
HOME = np.array([0.0, 0.5, 50.0, 0.0])
RIGHT = np.array([1.0, 0.0, 0.0, 0.0])


def run(tracker, begin, velocity, ticks, dt_s=0.01):
    """Follow a target that moves at a constant velocity."""
    return [tracker.track(begin + velocity * k * dt_s, velocity).position for k in range(ticks)]


def assert_within_limits(commands, dt_s, limits=ARM, *, jerk=True):
    """Every command inside, and its differences within the rates."""
    p = np.asarray(commands)
    assert np.all(np.isfinite(p))
    assert np.all(p >= limits.min_position)
    assert np.all(p <= limits.max_position)
    slack = 1.0 + 1e-6
    assert np.all(np.abs(np.diff(p, axis=0)) <= limits.max_velocity * dt_s * slack + 1e-9)
    second = np.abs(np.diff(p, 2, axis=0))
    assert np.all(second <= limits.max_acceleration * dt_s**2 * slack + 2e-9)
    if jerk:
        third = np.abs(np.diff(p, 3, axis=0))
        assert np.all(third <= limits.max_jerk * dt_s**3 * slack + 4e-9)


targets = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.lists(st.floats(-10.0, 10.0), min_size=4, max_size=4),
        st.lists(st.floats(-50.0, 50.0), min_size=4, max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=50)
@given(targets=targets, dt_s=st.sampled_from([0.004, 0.01]))
def test_no_target_drives_the_command_out_of_any_limit(targets, dt_s):
    tracker = LimitedTracker(ARM, dt_s)
    tracker.reset(HOME)
    commands = [HOME, HOME, HOME]
    for ticks, position, velocity, brake in targets:
        for k in range(ticks):
            moving = np.array(position) + np.array(velocity) * k * dt_s
            command = (
                tracker.brake()
                if brake
                else tracker.track(SCALE * moving, SCALE * np.array(velocity))
            )
            commands.append(command.position)
    assert_within_limits(commands, dt_s)


def test_slow_target_is_followed_without_lag():
    dt_s = 0.004
    tracker = LimitedTracker(ARM, dt_s)
    tracker.reset(HOME)
    errors = []
    for k in range(1500):
        t = k * dt_s
        target = HOME + SCALE * 0.1 * np.sin(2.0 * t)
        command = tracker.track(target, SCALE * 0.2 * np.cos(2.0 * t))
        errors.append(np.abs(command.position - target) / SCALE)
    assert np.max(errors[500:]) < 1e-3
    assert not command.clamped


def test_resting_target_is_reached_and_kept():
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    goal = np.array([1.0, 1.5, 100.0, 0.3])
    for _ in range(400):
        command = tracker.track(goal, np.zeros(4))
    np.testing.assert_allclose(command.position, goal, atol=1e-6)
    np.testing.assert_allclose(command.velocity, 0.0, atol=1e-6)


def test_target_running_into_a_limit_is_stopped_at_it():
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    commands = []
    for k in range(400):
        target = HOME + SCALE * 1.5 * k * 0.01
        command = tracker.track(target, SCALE * 1.5)
        commands.append(command.position)
    assert command.clamped
    assert_within_limits(commands, 0.01)
    np.testing.assert_allclose(command.position[:3], ARM.max_position[:3], atol=1e-3)


def test_clamped_says_that_the_request_was_altered():
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    assert not tracker.track(HOME, np.zeros(4)).clamped
    # one joint asked to move by more than its velocity allows in one tick
    assert tracker.track(HOME + np.array([0.0, 0.0, 0.0, 0.05]), np.zeros(4)).clamped
    tracker.reset(HOME)
    outside = HOME.copy()
    outside[1] = -0.10001
    tracker.reset(np.array([0.0, -0.1, 50.0, 0.0]))
    assert tracker.track(outside, np.zeros(4)).clamped


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308])
def test_absurd_target_cannot_harm(bad):
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    commands = [HOME] * 3 + run(tracker, HOME, 0.8 * SCALE, 50)
    for _ in range(20):
        for position, velocity in ((HOME + bad, SCALE), (HOME, HOME * 0.0 + bad)):
            command = tracker.track(position, velocity)
            commands.append(command.position)
    assert_within_limits(commands, 0.01)


def test_brake_comes_to_rest_and_stays():
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    run(tracker, HOME, 0.8 * SCALE, 60)
    assert not tracker.at_rest
    commands = [tracker.brake().position for _ in range(300)]
    assert tracker.at_rest
    np.testing.assert_array_equal(commands[-1], commands[-50])


def test_hard_brake_stops_sooner_and_within_the_acceleration():
    stops = []
    for hard in (False, True):
        tracker = LimitedTracker(ARM, 0.01)
        tracker.reset(HOME)
        commands = run(tracker, HOME, RIGHT, 60)
        ticks = 0
        while not tracker.at_rest:
            commands.append(tracker.brake(hard=hard).position)
            ticks += 1
        stops.append(ticks)
        assert_within_limits(commands, 0.01, jerk=not hard)
    assert stops[1] < stops[0]


@pytest.mark.parametrize("softly", [True, False])
def test_hard_brake_once_begun_is_not_softened(softly):
    """A soft brake from full deceleration would overshoot into a limit nearby."""
    tracker = LimitedTracker(ARM, 0.01)
    tracker.reset(HOME)
    run(tracker, HOME, 2.0 * RIGHT, 60)
    speeds = [tracker.brake(hard=True).velocity[0]]
    while not tracker.at_rest:
        after = tracker.brake() if softly else tracker.track(HOME + 3.0 * RIGHT, 2.0 * RIGHT)
        speeds.append(after.velocity[0])
    assert min(speeds) == 0.0
    assert len(speeds) > 10
    decelerations = -np.diff(speeds)[:-1] / 0.01
    np.testing.assert_allclose(decelerations, ARM.max_acceleration[0], rtol=1e-6)


def test_start_outside_the_limits_does_not_jump_and_only_comes_in():
    tracker = LimitedTracker(ARM, 0.01)
    start = np.array([2.05, -0.12, 101.0, 0.0])
    tracker.reset(start)
    commands = [start] + [
        tracker.track(np.array([3.0, -1.0, 130.0, 0.0]), np.zeros(4)).position for _ in range(300)
    ]
    commands = np.array(commands)
    assert np.all(np.abs(np.diff(commands, axis=0)) <= ARM.max_velocity * 0.01 + 1e-9)
    assert np.all(np.diff(commands[:, 0]) <= 1e-9)
    assert np.all(np.diff(commands[:, 1]) >= -1e-9)
    np.testing.assert_allclose(commands[-1][:3], [2.0, -0.1, 100.0], atol=1e-6)
    # once inside, the limits are the limits
    run(tracker, np.array([1.5, 0.4, 60.0, 0.0]), np.zeros(4), 200)
    outwards = np.array([1.0, -1.0, 80.0, 0.0])
    commands = np.array(run(tracker, np.array([1.5, 0.4, 60.0, 0.0]), outwards, 200))
    assert np.all(commands >= ARM.min_position)
    assert np.all(commands <= ARM.max_position)


@pytest.mark.parametrize("failure", ["raises", "returns"])
def test_solver_failure_brakes_within_limits_and_is_counted(failure):
    dt_s = 0.01
    tracker = LimitedTracker(ARM, dt_s)
    tracker.reset(HOME)
    commands = [HOME, HOME, HOME]
    commands += run(tracker, HOME, 0.8 * SCALE, 60)

    class Broken:
        def calculate(self, *_):
            if failure == "raises":
                raise ruckig.RuckigError("forced")
            return ruckig.Result.ErrorExecutionTimeCalculation

    working, tracker._solver = tracker._solver, Broken()
    commands += run(tracker, HOME + SCALE * 0.48, 0.8 * SCALE, 200)
    assert tracker.at_rest
    assert tracker.solver_errors == 200
    tracker._solver = working
    commands += run(tracker, HOME, 0.0 * SCALE, 300)
    assert_within_limits(commands, dt_s)
    np.testing.assert_allclose(commands[-1], HOME, atol=1e-6)
