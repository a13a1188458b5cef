"""Faults: the command stream goes on, comes to rest, and returns only where it may."""

import numpy as np
import pytest

from safe_pruner_node.control.supervisor import Mode

SOMEWHERE = np.array([0.8, 0.9, 60.0])


def moving(rig, **changes):
    """In POLICY, half a second into a movement."""
    r = rig(**changes).run()
    r.offer(SOMEWHERE, horizon=40)
    r.tick(50)
    assert np.any(np.abs(r.outputs[-1].velocity) > 0.05)
    return r


def assert_no_jump(r):
    """No command step above the velocity limit, no kink above the acceleration limit."""
    slack = 1.0 + 1e-6
    first, second = np.abs(np.diff(r.commands, axis=0)), np.abs(np.diff(r.commands, 2, axis=0))
    assert np.all(first <= r.limits.max_velocity * 0.01 * slack)
    assert np.all(second <= r.limits.max_acceleration * 0.01**2 * slack + 2e-9)


def test_starvation_comes_to_rest_and_a_new_chunk_resumes(rig):
    r = moving(rig, starvation_timeout_s=10.0)
    output = r.tick(250)
    assert output.starved
    assert (output.mode, output.hold_reason) == (Mode.POLICY, "starved")
    assert output.remaining_actions == 0
    np.testing.assert_array_equal(output.velocity, 0.0)
    starved = r.supervisor.counters.starved_ticks
    assert starved > 100
    assert r.supervisor.wants_query(r.now)
    assert r.offer(r.home, horizon=60).ok
    output = r.tick(190)
    assert (output.mode, output.hold_reason, output.starved) == (Mode.POLICY, "", False)
    assert np.all(np.abs(output.position - r.home) <= [0.05, 0.05, 5.0])
    assert r.supervisor.counters.starved_ticks == starved
    assert r.supervisor.counters.holds == 0
    assert_no_jump(r)


def test_long_starvation_becomes_hold(rig):
    r = moving(rig)
    output = r.tick(300)
    assert (output.mode, output.hold_reason, output.armed) == (Mode.HOLD, "starved", False)
    assert r.supervisor.counters.holds == 1
    assert not r.offer().ok
    assert_no_jump(r)


def test_long_starvation_arms_again_when_allowed(rig):
    r = moving(rig, auto_resume=True, first_chunk_timeout_s=60.0)
    epoch = r.supervisor.epoch
    r.measured = SOMEWHERE
    output = r.tick(300)
    assert (output.mode, output.armed) == (Mode.HOLD, True)
    assert r.supervisor.epoch > epoch
    assert r.offer().ok
    assert r.tick().mode is Mode.POLICY


def test_worker_death_holds_until_a_person_starts_again(rig):
    r = moving(rig)
    r.supervisor.on_worker_lost(r.now)
    output = r.tick()
    assert (output.mode, output.hold_reason) == (Mode.HOLD, "worker lost")
    r.measured = r.tick(100).position
    assert r.supervisor.start(r.now).message == "policy worker not ready"
    r.supervisor.on_worker_ready(r.now)
    output = r.tick(10)
    assert (output.mode, output.armed) == (Mode.HOLD, False)
    assert output.hold_reason == "worker was lost, is ready again"
    np.testing.assert_allclose(r.supervisor.counters.worker_downtime_s, 1.01)
    assert r.supervisor.start(r.now).ok
    assert r.offer().ok
    assert r.tick().mode is Mode.POLICY
    assert_no_jump(r)


def test_worker_death_resumes_by_itself_when_allowed(rig):
    r = moving(rig, auto_resume=True)
    in_flight = r.chunk(SOMEWHERE)
    for _ in range(2):
        r.supervisor.on_worker_lost(r.now)
        r.measured = r.tick(100).position
        r.supervisor.on_worker_ready(r.now)
        output = r.tick()
        assert output.armed
        assert not r.supervisor.on_chunk(in_flight, r.now).ok, "from the dead worker"
        assert r.offer(SOMEWHERE).ok
        assert r.tick(3).mode is Mode.POLICY
    assert r.supervisor.counters.holds == 2
    assert_no_jump(r)


def test_resumed_run_checks_its_first_action_again(rig):
    r = moving(rig, auto_resume=True)
    r.supervisor.on_worker_lost(r.now)
    r.measured = r.tick(100).position
    r.supervisor.on_worker_ready(r.now)
    r.tick()
    assert not r.offer(begin=r.measured + np.array([0.5, 0.0, 0.0])).ok
    assert r.tick(10).mode is Mode.HOLD


@pytest.mark.parametrize("ending", ["stop", "emergency_stop"])
def test_nothing_resumes_after_a_person_ended_it(rig, ending):
    r = moving(rig, auto_resume=True)
    r.supervisor.on_worker_lost(r.now)
    getattr(r.supervisor, ending)("asked to")
    r.measured = r.tick(100).position
    r.supervisor.on_worker_ready(r.now)
    if ending == "emergency_stop":
        r.supervisor.clear_emergency_stop()
    assert not r.tick(10).armed


def test_first_worker_does_not_start_anything(rig):
    r = rig(auto_resume=True)
    r.tick()
    r.supervisor.on_worker_ready(r.now)
    assert not r.tick(5).armed


@pytest.mark.parametrize("auto_resume", [False, True])
def test_stale_joint_states_hold(rig, auto_resume):
    r = moving(rig, auto_resume=auto_resume)
    output = r.tick(9, measure=False)
    assert output.mode is Mode.POLICY
    output = r.tick(3, measure=False)
    assert output.mode is Mode.HOLD
    assert output.hold_reason.startswith("joint states stale")
    r.measured = r.tick(100, measure=False).position
    assert r.tick(2).armed is auto_resume
    assert_no_jump(r)


def test_states_that_are_not_finite_count_as_none(rig):
    r = moving(rig)
    r.measured = np.array([np.nan, 0.0, 0.0])
    assert r.tick(15).mode is Mode.HOLD
    r.supervisor.on_state(np.zeros(5), r.now)
    assert r.supervisor.counters.dropped_states == 16


@pytest.mark.parametrize("jump_s", [-50.0, -0.02, 5.0])
def test_clock_jump_ends_the_run_without_a_jump_of_the_command(rig, jump_s):
    r = moving(rig, auto_resume=True)
    epoch = r.supervisor.epoch
    in_flight = r.chunk(SOMEWHERE, horizon=400)
    r.now += jump_s
    output = r.tick()
    assert output.mode is Mode.HOLD
    assert output.hold_reason.startswith("clock jumped by")
    assert r.supervisor.epoch > epoch
    assert not r.supervisor.on_chunk(in_flight, r.now).ok
    r.measured = r.tick(100).position
    assert not r.tick(10).armed, "a person has to start it again"
    assert r.supervisor.start(r.now).ok
    assert_no_jump(r)


def test_state_from_before_a_backward_jump_is_not_fresh(rig):
    r = moving(rig)
    before = r.now
    r.now -= 100.0
    for _ in range(5):
        r.now += 0.01
        r.supervisor.on_state(r.measured, before)  # the reader repeats the last message it had
        r.supervisor.tick(r.now)
    assert r.supervisor.start(r.now).message.startswith("joint states stale")


def test_skipped_ticks_do_not_make_the_command_jump(rig):
    r = moving(rig)
    for _ in range(5):
        r.now += 0.08  # the machine was busy; the target is 9 periods on
        r.tick(2)
    assert r.outputs[-1].mode is Mode.POLICY
    assert_no_jump(r)


def test_waiting_for_the_first_chunk_ends(rig):
    r = rig().start()
    assert r.tick(95).armed
    output = r.tick(10)
    assert not output.armed
    assert output.hold_reason == "no chunk within 1 s of the start"


def test_late_chunk_is_dropped_and_the_run_goes_on(rig):
    r = moving(rig)
    assert "older" in r.offer(time_s=r.now - 1.0, horizon=60).message
    assert "ended" in r.offer(time_s=r.now - 2.0, horizon=5).message
    assert r.tick().mode is Mode.POLICY
    assert r.supervisor.counters.dropped_chunks == 2
