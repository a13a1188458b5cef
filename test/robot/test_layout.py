"""Layouts: order, gripper units and polarity, absolute and delta actions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.robot.layout import Layout, Segment

GOOD = Path(__file__).resolve().parents[2] / "config" / "astribot_s1.yaml"
BASE = load_robot_config(GOOD).layout
TORSO = Segment("astribot_torso", ("a", "b", "c", "d"), commanded=False, gripper=False)
BODY = dataclasses.replace(BASE, segments=(TORSO, *BASE.segments))

few = settings(deadline=None, max_examples=50)
angles = st.floats(-3.0, 3.0)
scales = st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 100.0]), st.sampled_from([1.0, 0.04, -7.0]))


def convention(layout, actions, scale=(0.0, 100.0)):
    policy = dataclasses.replace(
        layout.policy, actions=actions, gripper_open=scale[0], gripper_closed=scale[1]
    )
    return dataclasses.replace(layout, policy=policy)


def states(layout):
    units = np.where(layout.gripper, 100.0 / 6.0, 1.0)
    offset = np.where(layout.gripper, 50.0, 0.0)
    return arrays(np.float64, layout.dof, elements=angles).map(lambda x: x * units + offset)


@few
@given(state=states(BODY), scale=scales)
def test_absolute_actions_are_the_inverse_of_the_state(state, scale):
    layout = convention(BODY, "absolute", scale)
    chunk = np.stack([layout.to_policy_state(state)] * 3)
    np.testing.assert_allclose(layout.to_robot_actions(chunk, state), [state] * 3, atol=1e-9)


@few
@given(state=states(BASE), target=states(BASE), scale=scales)
def test_delta_actions_move_arms_from_the_observed_state_and_grippers_absolutely(
    state, target, scale
):
    layout = convention(BASE, "delta", scale)
    actions = np.where(layout.gripper, layout.to_policy_state(target), target - state)
    np.testing.assert_allclose(layout.to_robot_actions(actions[None], state)[0], target, atol=1e-9)


@few
@given(state=states(BODY), actions=arrays(np.float64, (4, BODY.dof), elements=angles))
@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_what_is_only_observed_keeps_its_place(kind, state, actions):
    layout = convention(BODY, kind)
    targets = layout.to_robot_actions(actions, state)
    assert targets.shape == (4, layout.dof)
    np.testing.assert_array_equal(targets[:, :4], np.stack([state[:4]] * 4))


def test_join_puts_every_part_in_its_place_in_any_order():
    state = np.arange(float(BODY.dof))
    by_part = {part: state[place] for part, place in reversed(BODY.slices.items())}
    np.testing.assert_array_equal(BODY.join(by_part), state)


def test_polarity_of_a_policy_that_calls_open_one():
    layout = convention(BASE, "absolute", (1.0, 0.0))
    state = np.zeros(16)
    state[14:] = 0.0, 100.0  # left open, right closed
    np.testing.assert_array_equal(layout.to_policy_state(state)[14:], [1.0, 0.0])
    action = np.zeros((1, 16))
    action[0, 14:] = 1.0, 0.25
    np.testing.assert_allclose(layout.to_robot_actions(action, state)[0, 14:], [0.0, 75.0])


def test_deltas_do_not_accumulate_along_a_chunk():
    layout = convention(BASE, "delta")
    state = np.full(16, 0.5)
    targets = layout.to_robot_actions(np.full((3, 16), 0.1), state)
    np.testing.assert_allclose(targets[:, :14], 0.6)


def test_names_and_masks_follow_the_segments():
    layout = Layout("t", (TORSO, BASE.segments[2], BASE.segments[0]), BASE.policy)
    assert layout.joint_names[4:6] == (
        "astribot_gripper_left_joint_L1",
        "astribot_arm_left_joint_1",
    )
    assert layout.gripper.tolist() == [False] * 4 + [True] + [False] * 7
    assert layout.commanded.tolist() == [False] * 4 + [True] * 8
    assert layout.slices["astribot_arm_left"] == slice(5, 12)
