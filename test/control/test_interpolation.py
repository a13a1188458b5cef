import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from safe_pruner_node.control.interpolation import hermite, monotone_tangents, smoothstep

DT = 1.0 / 30.0
any_actions = arrays(
    np.float64, st.tuples(st.integers(2, 12), st.just(2)), elements=st.floats(-100.0, 100.0)
)


@settings(deadline=None, max_examples=50)
@given(actions=any_actions)
def test_curve_passes_through_every_action_at_its_time(actions):
    tangents = monotone_tangents(actions, DT)
    for index, action in enumerate(actions):
        position, _ = hermite(actions, tangents, DT, index * DT)
        np.testing.assert_allclose(position, action, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(actions=any_actions, where=st.floats(0.0, 1.0))
def test_curve_stays_between_neighbouring_actions(actions, where):
    tangents = monotone_tangents(actions, DT)
    for index in range(len(actions) - 1):
        position, _ = hermite(actions, tangents, DT, (index + where) * DT)
        low = np.minimum(actions[index], actions[index + 1])
        high = np.maximum(actions[index], actions[index + 1])
        assert np.all(position >= low - 1e-9)
        assert np.all(position <= high + 1e-9)


@settings(deadline=None, max_examples=50)
@given(actions=any_actions, where=st.floats(0.02, 0.98))
def test_velocity_is_the_derivative_and_is_continuous(actions, where):
    tangents = monotone_tangents(actions, DT)
    step = 1e-6
    for index in range(len(actions) - 1):
        time_s = (index + where) * DT
        before, _ = hermite(actions, tangents, DT, time_s - step)
        after, _ = hermite(actions, tangents, DT, time_s + step)
        _, velocity = hermite(actions, tangents, DT, time_s)
        np.testing.assert_allclose((after - before) / (2 * step), velocity, rtol=1e-3, atol=1e-1)
    for index in range(1, len(actions) - 1):
        _, before = hermite(actions, tangents, DT, index * DT - 1e-10)
        _, after = hermite(actions, tangents, DT, index * DT + 1e-10)
        np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-2)


def test_straight_line_has_constant_velocity():
    actions = np.linspace(0.0, 1.0, 7)[:, None]
    tangents = monotone_tangents(actions, DT)
    for time_s in np.linspace(0.0, 6 * DT, 50):
        position, velocity = hermite(actions, tangents, DT, time_s)
        np.testing.assert_allclose(position, time_s / (6 * DT), atol=1e-12)
        np.testing.assert_allclose(velocity, 1.0 / (6 * DT), atol=1e-9)


def test_outside_of_the_chunk_the_nearest_action_is_held_at_rest():
    actions = np.array([[1.0], [2.0], [3.0]])
    tangents = monotone_tangents(actions, DT)
    for time_s, expected in ((-1.0, 1.0), (10.0, 3.0)):
        position, velocity = hermite(actions, tangents, DT, time_s)
        assert position[0] == expected
        assert velocity[0] == 0.0


def test_single_action_is_held():
    actions = np.array([[4.0]])
    position, velocity = hermite(actions, monotone_tangents(actions, DT), DT, 0.0)
    assert (position[0], velocity[0]) == (4.0, 0.0)


def test_smoothstep_ends_flat():
    assert smoothstep(0.0) == (0.0, 0.0)
    assert smoothstep(1.0) == (1.0, 0.0)
    assert smoothstep(0.5) == (0.5, 1.5)
