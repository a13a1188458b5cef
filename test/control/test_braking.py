import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safe_pruner_node.control.braking import JointState, hard_brake, plan_brake, stopping_speed

share = st.floats(-1.0, 1.0)
positive = st.floats(0.5, 50.0)


def one(p, v, a):
    return JointState(np.array([p]), np.array([v]), np.array([a]))


@settings(deadline=None, max_examples=50)
@given(velocity=st.floats(-10.0, 10.0), share=share, a=positive, j=st.floats(10.0, 2000.0))
@example(velocity=-0.5, share=1.0, a=8.0, j=20.0)  # still moving back, already pushed forward
@example(velocity=0.5, share=-1.0, a=8.0, j=20.0)
def test_brake_ends_at_rest_within_acceleration_and_jerk(velocity, share, a, j):
    start = one(0.3, velocity, share * a)
    plan = plan_brake(start, np.array([a]), np.array([j]))
    end_s = float(np.sum(plan.duration))
    assert abs(plan.at(end_s).velocity[0]) < 1e-6
    assert abs(plan.at(end_s).acceleration[0]) < 1e-6
    times = np.linspace(0.0, end_s, 400)
    states = [plan.at(float(t)) for t in times]
    acceleration = np.array([s.acceleration[0] for s in states])
    assert np.max(np.abs(acceleration)) <= a + 1e-9
    if end_s > 1e-6:
        assert np.max(np.abs(np.diff(acceleration))) <= j * (times[1] - times[0]) + 1e-6
    # the reported extremes are those of the motion
    position = np.array([s.position[0] for s in states])
    low, high = plan.extremes()
    assert low[0] <= np.min(position) + 1e-9
    assert high[0] >= np.max(position) - 1e-9
    resolution = 1e-9 + (abs(velocity) + a) * end_s / 100.0
    assert low[0] >= np.min(position) - resolution
    assert high[0] <= np.max(position) + resolution


@settings(deadline=None, max_examples=50)
@given(velocity=st.floats(-5.0, 5.0), share=share, when=st.floats(0.0, 1.0))
def test_braking_again_halfway_ends_at_the_same_place(velocity, share, when):
    a, j = np.array([8.0]), np.array([80.0])
    plan = plan_brake(one(0.0, velocity, share * 8.0), a, j)
    total = np.sum(plan.duration, axis=0)
    again = plan_brake(plan.at(when * total), a, j)
    end = again.at(np.sum(again.duration, axis=0))
    np.testing.assert_allclose(end.position, plan.at(total).position, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(distance=st.floats(1e-6, 10.0), a=positive, j=st.floats(10.0, 2000.0))
def test_stopping_speed_stops_exactly_at_the_distance(distance, a, j):
    a, j = np.array([a]), np.array([j])
    speed = stopping_speed(np.array([distance]), a, j)
    plan = plan_brake(JointState(np.zeros(1), speed, np.zeros(1)), a, j)
    np.testing.assert_allclose(plan.extremes()[1], distance, rtol=1e-6, atol=1e-9)


def test_stopping_speed_at_a_limit_and_without_one():
    a, j = np.array([8.0, 8.0]), np.array([80.0, 80.0])
    np.testing.assert_array_equal(stopping_speed(np.array([0.0, np.inf]), a, j), [0.0, np.inf])


def test_hard_brake_uses_the_whole_acceleration_and_does_not_turn_round():
    state, dt, a = one(0.0, 1.0, 3.0), 0.01, np.array([8.0])
    speeds = []
    for _ in range(20):
        state = hard_brake(state, a, dt)
        speeds.append(state.velocity[0])
    assert np.isclose(speeds[0], 1.0 - 8.0 * dt)
    assert min(speeds) == 0.0
    assert speeds[-1] == 0.0
    np.testing.assert_allclose(state.position, 1.0 / (2.0 * 8.0), rtol=0.02)
