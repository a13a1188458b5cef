"""Whatever happens around the supervisor, in whatever order: what reaches the robot is sound."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safe_pruner_node.control.supervisor import Mode
from safe_pruner_node.types import ActionChunk

DT = 0.01
number = st.one_of(st.floats(-10.0, 10.0), st.sampled_from([np.nan, np.inf, 0.2, 1e300, -1e300]))
event = st.one_of(
    st.tuples(
        st.just("chunk"),
        st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=12),
        st.floats(-0.5, 0.5),
    ),
    st.tuples(st.just("step"), st.floats(-1.0, 1.0), st.floats(-0.3, 0.1)),
    st.tuples(st.sampled_from(["start", "stop", "estop", "clear", "lost", "ready"])),
    st.tuples(st.just("jump"), st.floats(-3.0, 3.0)),
    st.tuples(st.just("blind"), st.booleans()),
)


class Storm:
    """Applies events to a rig, whose joints follow the command."""

    def __init__(self, rig):
        self.rig = rig
        self.blind = False

    def apply(self, event):
        rig, supervisor, kind = self.rig, self.rig.supervisor, event[0]
        if kind in ("chunk", "step"):
            if kind == "chunk":
                actions = np.array(event[1]) * [1.0, 1.0, 30.0]
            else:  # a sound chunk that leaps from the measured joints
                actions = np.linspace(0.0, 1.0, 10)[:, None] ** 0.1 * event[1] + rig.measured
            chunk = ActionChunk(actions, rig.now + event[2], 1.0 / 30.0, supervisor.epoch)
            supervisor.on_chunk(chunk, rig.now)
        elif kind == "jump":
            rig.now += event[1]
        elif kind == "blind":
            self.blind = event[1]
        else:
            {
                "start": lambda: supervisor.start(rig.now),
                "stop": lambda: supervisor.stop("storm"),
                "estop": lambda: supervisor.emergency_stop("storm"),
                "clear": supervisor.clear_emergency_stop,
                "lost": lambda: supervisor.on_worker_lost(rig.now),
                "ready": lambda: supervisor.on_worker_ready(rig.now),
            }[kind]()

    def tick(self, count):
        for _ in range(count):
            output = self.rig.tick(measure=not self.blind)
            if output.position is not None:
                self.rig.measured = output.position


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    events=st.lists(st.tuples(st.integers(0, 30), event), max_size=25),
    auto_resume=st.booleans(),
    blend_s=st.sampled_from([0.0, 0.1]),
)
def test_every_command_obeys_the_limits(rig, events, auto_resume, blend_s):
    r = rig(
        auto_resume=auto_resume,
        blend_s=blend_s,
        first_action_tolerance=np.full(3, np.inf),
    )
    storm = Storm(r)
    r.start()
    for ticks, happening in events:
        storm.apply(happening)
        storm.tick(ticks)
    storm.tick(60)
    p = np.vstack([r.home, r.home, r.commands])
    limits, slack = r.limits, 1.0 + 1e-6
    assert np.all(np.isfinite(p))
    assert np.all((p >= limits.min_position) & (p <= limits.max_position))
    assert np.all(np.abs(np.diff(p, axis=0)) <= limits.max_velocity * DT * slack + 1e-9)
    second = np.abs(np.diff(p, 2, axis=0))
    assert np.all(second <= limits.max_acceleration * DT**2 * slack + 2e-9)
    # one command a tick, from the first to the last
    assert len(r.commands) == r.supervisor.counters.ticks
    measured = np.max(np.abs(np.diff(p, axis=0)), axis=0)
    np.testing.assert_allclose(r.supervisor.counters.max_joint_step, measured, atol=1e-12)


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(events=st.lists(st.tuples(st.integers(0, 30), event), max_size=25))
def test_emergency_stop_ends_at_rest_whatever_follows(rig, events):
    r = rig(auto_resume=True, first_action_tolerance=np.full(3, np.inf)).run()
    r.offer(np.array([1.5, 1.2, 90.0]), horizon=15)
    r.tick(20)
    r.supervisor.emergency_stop("button")
    storm = Storm(r)
    for ticks, happening in events:
        if happening[0] != "clear":
            storm.apply(happening)
        storm.tick(ticks)
    storm.tick(100)
    assert r.outputs[-1].mode is Mode.ESTOP
    np.testing.assert_array_equal(r.outputs[-1].velocity, 0.0)
    np.testing.assert_array_equal(r.commands[-1], r.commands[-20])
