"""Modes: who may move the joints, and what brings a run to its end."""

import numpy as np
import pytest

from safe_pruner_node.control.settings import ControlSettings
from safe_pruner_node.control.supervisor import ControlSupervisor, Mode
from safe_pruner_node.errors import ConfigError

DT = 0.01
ACTION_DT = 1.0 / 30.0

FAR = np.array([1.2, 0.5, 30.0])


def test_nothing_is_commanded_before_the_first_measured_state(rig):
    r = rig()
    assert r.tick(5, measure=False).position is None
    assert r.supervisor.counters.ticks == 5


def test_nothing_is_commanded_on_a_state_measured_long_ago(rig):
    r = rig()
    r.supervisor.on_state(r.home, r.now - 10.0)
    assert r.tick(measure=False).position is None


def test_command_begins_at_the_measured_joints_and_holds_them(rig):
    r = rig()
    r.tick()
    r.measured = r.home + 0.05  # the arm sags; the command does not follow it down
    output = r.tick(20)
    np.testing.assert_array_equal(r.commands, np.broadcast_to(r.home, (21, 3)))
    assert (output.mode, output.hold_reason) == (Mode.HOLD, "not started")
    assert output.chunk_time_s is None


def test_hold_lasts_without_further_states(rig):
    r = rig()
    r.tick()
    np.testing.assert_array_equal(r.tick(100, measure=False).position, r.home)


def test_start_waits_for_the_first_chunk(rig):
    r = rig().start()
    output = r.tick(3)
    assert output.armed
    assert output.mode is Mode.HOLD
    assert output.hold_reason == "waiting for the first chunk"
    assert r.supervisor.wants_query(r.now)
    assert r.offer().ok
    output = r.tick()
    assert (output.mode, output.armed, output.hold_reason) == (Mode.POLICY, False, "")
    assert output.remaining_actions == r.supervisor.remaining_actions == 29
    assert output.epoch == r.supervisor.epoch


def test_start_begins_a_new_epoch(rig):
    r = rig()
    before = r.supervisor.epoch
    r.start()
    assert r.supervisor.epoch > before
    assert not r.offer(epoch=before).ok
    assert r.tick().mode is Mode.HOLD


def test_start_is_refused_without_worker_or_states(rig):
    r = rig()
    assert r.supervisor.start(r.now).message == "policy worker not ready"
    r.supervisor.on_worker_ready(r.now)
    assert r.supervisor.start(r.now).message == "no measured joint state"
    r.tick()
    r.tick(50, measure=False)
    outcome = r.supervisor.start(r.now)
    assert not outcome.ok
    assert outcome.message.startswith("joint states stale (0.5")


def test_start_twice_changes_nothing(rig):
    r = rig().run()
    epoch = r.supervisor.epoch
    assert r.supervisor.start(r.now).ok
    assert r.supervisor.epoch == epoch
    assert r.tick().mode is Mode.POLICY


def test_start_is_refused_when_something_else_moved_the_robot(rig):
    r = rig()
    r.supervisor.on_worker_ready(r.now)
    r.tick()
    r.measured = FAR
    r.tick()
    outcome = r.supervisor.start(r.now)
    assert not outcome.ok
    assert outcome.message == ("command held of joint 0 is 0.2, measured 1.2, tolerance 0.1")
    r.supervisor.reset()
    np.testing.assert_array_equal(r.tick().position, FAR)
    assert r.supervisor.start(r.now).ok


def test_reset_begins_a_new_stream(rig):
    """As at a second activation, a while after the first."""
    r = rig().run()
    r.tick(20)
    r.supervisor.reset()
    r.now += 60.0
    assert r.tick(measure=False).position is None
    output = r.tick()
    assert (output.mode, output.hold_reason) == (Mode.HOLD, "not started")
    assert output.counters.ticks == 2
    assert output.counters.holds == 0
    assert not r.offer().ok


def test_start_is_refused_far_outside_the_limits(rig):
    """What a wrong unit or polarity looks like."""
    r = rig()
    r.supervisor.on_worker_ready(r.now)
    r.measured = np.array([0.2, 0.5, 170.0])
    output = r.tick()
    assert output.position is None, "nonsense is not sent back to the robot"
    assert "measured 170, tolerance 20" in output.hold_reason
    outcome = r.supervisor.start(r.now)
    assert not outcome.ok
    assert "joint 2" in outcome.message
    r.measured = r.home
    output = r.tick()
    np.testing.assert_array_equal(output.position, r.home)
    assert output.hold_reason == "not started"


def test_noise_between_actions_is_not_amplified(rig):
    """Actions shake by 5 mrad, faster than the joint can follow; the joint stays near the mean."""
    r = rig().run()
    noise = np.random.default_rng(0)
    worst = 0.0
    for _ in range(20):
        chunk = r.chunk(begin=r.home, goal=r.home)
        chunk.actions[:, 0] += 0.005 * noise.standard_normal(30)
        assert r.supervisor.on_chunk(chunk, r.now).ok
        r.tick(30)
        worst = max(worst, np.max(np.abs(r.commands[-30:, 0] - r.home[0])))
    assert worst < 0.025


def test_policy_moves_the_joints_through_the_chunk(rig):
    r = rig().run()
    goal = r.home + np.array([0.2, 0.2, 20.0])
    r.offer(goal, horizon=60)
    output = r.tick(195)
    assert np.all(np.abs(output.position - goal) <= [5e-3, 5e-3, 0.5])
    assert r.supervisor.counters.accepted_chunks == 2
    assert 0.0 < output.max_step <= 1.0


def test_output_says_which_chunk_it_follows(rig):
    r = rig().run()
    r.tick(10)
    asked_s = r.now - 0.05
    r.offer(time_s=asked_s)
    assert r.tick().chunk_time_s == asked_s


def test_chunks_are_refused_while_nobody_started(rig):
    r = rig()
    r.supervisor.on_worker_ready(r.now)
    r.tick()
    outcome = r.offer(FAR)
    assert not outcome.ok
    assert outcome.message == "HOLD: not started"
    assert r.tick().mode is Mode.HOLD


def test_stop_brakes_to_rest_and_holds(rig):
    r = rig().run()
    r.offer(FAR, horizon=20)
    moving = r.tick(30)
    assert np.any(np.abs(moving.velocity) > 0.1)
    r.supervisor.stop("asked to")
    output = r.tick(150)
    assert (output.mode, output.hold_reason) == (Mode.HOLD, "asked to")
    np.testing.assert_array_equal(output.velocity, 0.0)
    np.testing.assert_array_equal(r.tick(10).position, output.position)
    assert output.counters.holds == 1


def test_chunk_in_flight_over_a_stop_is_dropped(rig):
    r = rig().run()
    in_flight = r.chunk(FAR)
    r.supervisor.stop("asked to")
    assert r.supervisor.start(r.now).ok
    outcome = r.supervisor.on_chunk(in_flight, r.now)
    assert not outcome.ok
    assert "epoch" in outcome.message


def test_first_action_far_from_the_measured_joints_is_refused(rig):
    r = rig().start()
    outcome = r.offer(begin=r.home + np.array([0.0, 0.3, 0.0]))
    assert not outcome.ok
    assert outcome.message == "first action of joint 1 is 0.8, measured 0.5, tolerance 0.1"
    output = r.tick(20)
    assert (output.mode, output.armed) == (Mode.HOLD, False)
    assert output.hold_reason == outcome.message
    np.testing.assert_array_equal(output.position, r.home)
    assert not r.offer().ok, "the run is over until the next start"


def test_joints_that_are_not_commanded_need_no_tolerance(rig):
    r = rig(first_action_tolerance=np.array([0.1, 0.1, np.inf])).start()
    assert r.offer(begin=r.home + np.array([0.0, 0.0, 60.0])).ok


@pytest.mark.parametrize("kind", ["nan", "shape"])
def test_bad_chunks_in_a_row_end_the_run(rig, kind):
    r = rig().run()
    for count in range(3):
        chunk = r.chunk(FAR, horizon=40)
        if kind == "nan":
            chunk.actions[7, 1] = np.nan
        else:
            chunk = r.chunk(np.zeros(3), begin=np.zeros(3))
            object.__setattr__(chunk, "actions", np.zeros((30, 5)))
        assert r.tick().mode is Mode.POLICY
        assert not r.supervisor.on_chunk(chunk, r.now).ok
        assert r.supervisor.counters.dropped_chunks == count + 1
    output = r.tick()
    assert output.mode is Mode.HOLD
    assert output.hold_reason.startswith("3 bad chunks in a row")
    np.testing.assert_allclose(r.commands[-1], r.home)


def test_a_good_chunk_between_bad_ones_keeps_the_run(rig):
    r = rig().run()
    for _ in range(6):
        chunk = r.chunk()
        chunk.actions[0, 0] = np.inf
        assert not r.supervisor.on_chunk(chunk, r.now).ok
        r.tick()
        assert r.offer().ok
    assert r.tick().mode is Mode.POLICY


def test_emergency_stop_is_latched(rig):
    r = rig().run()
    r.offer(FAR, horizon=20)
    r.tick(30)
    r.supervisor.emergency_stop("button")
    held = r.tick(60)
    assert (held.mode, held.hold_reason) == (Mode.ESTOP, "button")
    np.testing.assert_array_equal(held.velocity, 0.0)
    # nothing but the reset gets it out
    assert r.supervisor.start(r.now).message == "emergency stop is latched: button"
    r.supervisor.stop("asked to")
    r.supervisor.on_worker_lost(r.now)
    r.supervisor.on_worker_ready(r.now)
    assert not r.offer().ok
    assert r.supervisor.counters.holds == 1
    r.supervisor.reset()
    output = r.tick(5)
    assert (output.mode, output.hold_reason) == (Mode.ESTOP, "button")
    assert r.supervisor.clear_emergency_stop().ok
    output = r.tick()
    assert (output.mode, output.hold_reason) == (Mode.HOLD, "emergency stop cleared")
    assert not output.armed
    assert not r.supervisor.clear_emergency_stop().ok


def test_emergency_stop_stops_sooner_than_a_stop(rig):
    ticks = []
    for stop in ("stop", "emergency_stop"):
        r = rig().run()
        r.offer(FAR, horizon=20)
        r.tick(30)
        getattr(r.supervisor, stop)("now")
        before = len(r.outputs)
        while np.any(r.tick().velocity):
            pass
        ticks.append(len(r.outputs) - before)
        second = np.abs(np.diff(r.commands, 2, axis=0))
        assert np.all(second <= r.limits.max_acceleration * 0.01**2 * (1 + 1e-6) + 2e-9)
    assert ticks[1] < ticks[0]


def test_emergency_stop_before_any_state_commands_nothing(rig):
    r = rig()
    r.supervisor.emergency_stop("button")
    assert r.tick(measure=False).position is None
    assert r.tick().mode is Mode.ESTOP


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dt_s": 0.0}, "dt_s"),
        ({"blend_s": -0.1}, "blend_s"),
        ({"max_state_age_s": np.nan}, "max_state_age_s"),
        ({"starvation_timeout_s": np.inf}, "starvation_timeout_s"),
        ({"first_chunk_timeout_s": 0.0}, "first_chunk_timeout_s"),
        ({"max_clock_jump_s": 0.005}, "max_clock_jump_s"),
        ({"max_bad_chunks": 0}, "max_bad_chunks"),
        ({"first_action_tolerance": np.array([0.1, 0.0])}, "first_action_tolerance"),
    ],
)
def test_wrong_settings_are_named(change, key):
    good = {"dt_s": 0.01, "first_action_tolerance": np.ones(2)}
    with pytest.raises(ConfigError, match=key):
        ControlSettings(**{**good, **change})


def test_tolerance_of_another_size_than_the_limits_is_named(limits):
    settings = ControlSettings(dt_s=0.01, first_action_tolerance=np.ones(7))
    with pytest.raises(ConfigError, match=r"first_action_tolerance: found 7, .*\(3\)"):
        ControlSupervisor(settings, limits)


def test_the_first_chunk_begins_with_its_first_action(rig):
    """The joints stood still while it was computed: nothing of it has passed."""
    r = rig().start()
    r.tick(40)
    goal = r.home + np.array([0.5, 0.5, 30.0])
    assert r.offer(goal, time_s=r.now - 0.4).ok
    begun = r.tick().position
    assert np.all(np.abs(begun - r.home) < 0.02 * np.abs(goal - r.home))
    assert r.supervisor.remaining_actions >= 29


def test_a_first_chunk_that_took_longer_than_it_lasts_is_dropped(rig):
    """What it saw is too long ago, though the joints stood still."""
    r = rig().start()
    outcome = r.offer(time_s=r.now - 2.0)
    assert not outcome.ok
    assert "ended" in outcome.message


def test_a_later_chunk_is_compensated_for_its_delay(rig):
    r = rig(blend_s=0.0).run()
    r.tick(60)
    begin = r.outputs[-1].position
    assert r.offer(begin + 0.3, begin=begin, time_s=r.now - 0.4).ok
    assert r.tick().remaining_actions == 30 - 13  # 0.41 s at 30 actions a second have passed


def test_a_query_waits_until_it_shows_the_chunk_before_it(rig):
    """As long as the answer took, once the chunk is blended in."""
    r = rig(blend_s=0.1).run()
    r.tick(40)
    assert r.offer(time_s=r.now - 0.25).ok
    accepted = r.now
    while not r.supervisor.wants_query(r.now):
        assert r.now < accepted + 1.0
        r.tick()
    assert r.now - accepted == pytest.approx(0.35, abs=DT)
    r.supervisor.stop("by hand")
    assert not r.supervisor.wants_query(r.now + 10)
    assert r.supervisor.start(r.now).ok
    assert r.supervisor.wants_query(r.now)  # armed: the joints stand still


def test_a_query_never_waits_for_the_chunk_to_run_out(rig):
    """A chunk of 0.97 s that took 0.6 s leaves 0.37 s; the answer needs another 0.6 s."""
    r = rig(blend_s=0.1).run()
    r.tick(70)
    assert r.offer(time_s=r.now - 0.6).ok
    assert r.supervisor.wants_query(r.now)


def play(rig, delay_s):
    """A policy that goes on from what it sees, answering late; returns the commands."""
    r = rig(blend_s=0.1).start()
    pending = None
    for _ in range(600):
        output = r.tick()
        r.measured = output.position
        if pending is None and r.supervisor.wants_query(r.now):
            seen = output.position
            pending = (r.now + delay_s, r.now, seen)
        if pending is not None and r.now >= pending[0]:
            rate = np.array([0.2, 0.2, 5.0])
            goal = pending[2] + rate * 29 * ACTION_DT
            r.offer(goal, begin=pending[2], time_s=pending[1])
            pending = None
    return r.commands


def test_a_slow_policy_goes_forward_only(rig):
    """Steady motion from a policy that only knows where the joints are: never back and forth."""
    commands = play(rig, delay_s=0.2)
    steps = np.diff(commands[100:, 0])
    assert steps.min() > -1e-6
    speed = (commands[-1, 0] - commands[100, 0]) / (len(steps) * DT)
    assert speed == pytest.approx(0.2, rel=0.25)
