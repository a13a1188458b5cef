import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from safe_pruner_node.demonstrations.dataset import open_dataset
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import load_checkpoint
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.training.samples import (
    EpisodeRows,
    chunk_targets,
    kept_rows,
    norm_stats,
    normalised_actions,
)
from safe_pruner_node.training.training_set import load_training_set


@given(length=st.integers(1, 20), horizon=st.integers(1, 8), stride=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_chunk_is_what_follows_and_the_last_action_is_held(length, horizon, stride):
    actions = np.arange(100, dtype=np.float32)[:, None]
    episode = EpisodeRows(first=30, length=length, task="")
    rows = kept_rows(episode, stride, 0)
    chunks = chunk_targets(actions, [rows], [episode], horizon)
    for row, chunk in zip(rows, chunks, strict=True):
        wanted = [min(row + k, 30 + length - 1) for k in range(horizon)]
        np.testing.assert_array_equal(chunk[:, 0], wanted)


@pytest.fixture(scope="module")
def small(small_checkpoint):
    return load_checkpoint(small_checkpoint)


def load(dataset, robot, small, **changed):
    options = {"stats": None, "stride": 2, "validation_share": 0.25, "workers": 1} | changed
    tokenizer = PromptTokenizer(small.tokenizer_path, small.config.max_prompt_tokens)
    quiet = Console(quiet=True)
    return load_training_set((dataset,), robot, small.config, tokenizer, console=quiet, **options)


def test_the_policys_numbers_come_back_as_the_robots(dataset, robot, small):
    """What a perfect policy would answer becomes exactly the recorded commands again."""
    found = load(dataset, robot, small)
    recorded = open_dataset(dataset)
    for sample, row, end in ((0, 0, 24), (17, 24 + 11, 24 + 31), (26, 24 + 29, 24 + 31)):
        wanted = [min(row + k, end - 1) for k in range(small.config.horizon)]
        actions = found.stats.unnormalize_actions(found.samples.actions[sample].astype(np.float64))
        again = robot.layout.to_robot_actions(actions, recorded.state[row].astype(np.float64))
        np.testing.assert_allclose(again, recorded.action[wanted], atol=2e-3)


def test_every_sample_has_its_own_frame_and_its_own_episode(dataset, robot, small):
    found = load(dataset, robot, small)
    shades = found.frames.gather(torch.arange(len(found.samples.rows)))[0]
    mean = shades.float().mean((1, 2, 3)).numpy()
    place = 0
    for number, length in enumerate((24, 31, 24, 40)):
        kept = np.arange(number % 2, length, 2)
        np.testing.assert_allclose(mean[place : place + len(kept)], 40 + 4 * kept, atol=3)
        place += len(kept)
    assert place == len(mean)


def test_episodes_are_held_out_whole(dataset, robot, small):
    found = load(dataset, robot, small)
    sizes = [12, 15, 12, 20]
    assert found.held_out.tolist() == [False] * sum(sizes[:3]) + [True] * sizes[3]
    assert not load(dataset, robot, small, validation_share=0.0).held_out.any()


def test_quantiles_map_to_one_and_still_joints_stay_finite():
    states = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 0.01, 0.0]
    stats = norm_stats(states, states[:, None])
    normalised = normalised_actions(states[:, None], stats, 5)
    assert normalised.shape == (500, 1, 5)
    inside = np.abs(normalised[:, 0, :3]) <= 1.0 + 1e-3
    assert (inside.mean(0) > 0.97).all()
    assert np.isfinite(normalised).all()
    assert not normalised[..., 3:].any()


def test_another_rate_than_the_robot_files_is_one_line(dataset, robot, small):
    policy = dataclasses.replace(robot.policy, action_rate_hz=30.0)
    other = dataclasses.replace(robot, policy=policy)
    with pytest.raises(ConfigError, match="fps: found 15, expected 30"):
        load(dataset, other, small)


def test_two_data_sets_are_one_after_the_other(dataset, robot, small):
    one = load(dataset, robot, small)
    tokenizer = PromptTokenizer(small.tokenizer_path, small.config.max_prompt_tokens)
    both = load_training_set(
        (dataset, dataset), robot, small.config, tokenizer, stats=one.stats, stride=2,
        validation_share=0.0, workers=2, console=Console(quiet=True),
    )  # fmt: skip
    count = len(one.samples.rows)
    np.testing.assert_array_equal(both.samples.actions[:count], one.samples.actions)
    np.testing.assert_array_equal(both.samples.actions[count:], one.samples.actions)
    rows = torch.arange(count)
    frames, again = both.frames.gather(rows), both.frames.gather(rows + count)
    for first, second in zip(frames, again, strict=True):
        assert torch.equal(first, second)
