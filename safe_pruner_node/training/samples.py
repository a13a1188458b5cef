"""What the trainer learns from: a data set's numbers as samples, in the policy's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import FeatureStats, NormStats, normalize_quantile, pad_to_dim
from safe_pruner_node.robot.layout import Layout
from safe_pruner_node.types import FloatArray

MIN_RANGE = 1e-2
"""Least distance of the quantiles: a joint that never moves must not be divided by nothing."""


@dataclass(frozen=True)
class EpisodeRows:
    """One episode's rows of the data set.

    Attributes:
        first: First row.
        length: Rows.
        task: The task in words.
    """

    first: int
    length: int
    task: str


@dataclass(frozen=True)
class Samples:
    """One sample for every kept frame, S samples.

    Attributes:
        rows: Row in the frame store, [S].
        tokens: Prompts with the state, one array of ids per sample.
        actions: Normalised chunks, [S, horizon, action_dim] float32.
        landmarks: Normalised privileged positions, [S, M] float32; None when the set has none.
    """

    rows: NDArray[np.int64]
    tokens: Sequence[NDArray[np.int64]]
    actions: NDArray[np.float32]
    landmarks: NDArray[np.float32] | None


def kept_rows(episode: EpisodeRows, stride: int, offset: int) -> NDArray[np.int64]:
    """Rows of an episode that become samples, [n]."""
    end = episode.first + episode.length
    return np.arange(episode.first + offset, end, stride, dtype=np.int64)


def chunk_rows(rows: NDArray[np.int64], episode: EpisodeRows, horizon: int) -> NDArray[np.int64]:
    """Rows of the actions of each sample's chunk, [n, horizon]; the last one is held."""
    last = episode.first + episode.length - 1
    chosen: NDArray[np.int64] = np.minimum(rows[:, None] + np.arange(horizon), last)
    return chosen


def chunk_targets(
    actions: NDArray[np.float32],
    kept: Sequence[NDArray[np.int64]],
    episodes: Sequence[EpisodeRows],
    horizon: int,
) -> NDArray[np.float32]:
    """Absolute targets of every sample's chunk, robot units, [S, horizon, dof].

    Args:
        actions: Every row's action, [rows, dof].
        kept: Rows that become samples, per episode.
        episodes: The episodes.
        horizon: Actions per chunk.
    """
    index = [chunk_rows(rows, e, horizon) for rows, e in zip(kept, episodes, strict=True)]
    return actions[np.concatenate(index)]


def norm_stats(states: FloatArray, actions: FloatArray) -> NormStats:
    """Quantile statistics as openpi computes them, over samples and chunk positions.

    Args:
        states: Policy units, [S, dof].
        actions: Policy units, [S, horizon, dof].
    """
    return NormStats(_feature(states), _feature(actions.reshape(-1, actions.shape[-1])))


def _feature(values: FloatArray) -> FeatureStats:
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    missing = np.maximum(0.0, MIN_RANGE - (high - low)) / 2
    return FeatureStats(
        mean=values.mean(0), std=values.std(0), q01=low - missing, q99=high + missing
    )


def normalised_actions(
    actions: FloatArray, stats: NormStats, action_dim: int
) -> NDArray[np.float32]:
    """Chunks in policy units to the model's, zero-padded: [S, H, dof] to [S, H, action_dim]."""
    low, high = stats.actions.q01, stats.actions.q99
    assert low is not None  # noqa: S101 - norm_stats makes them
    assert high is not None  # noqa: S101
    return pad_to_dim(normalize_quantile(actions, low, high), action_dim).astype(np.float32)


def prompts(
    tokenizer: PromptTokenizer,
    tasks: Sequence[str],
    states: FloatArray,
    stats: NormStats,
    *,
    state_in_prompt: bool,
) -> list[NDArray[np.int64]]:
    """Token ids of every sample's prompt.

    Args:
        tokenizer: The checkpoint's.
        tasks: Task of each sample.
        states: Policy units, [S, dof].
        stats: Normalisation of the state.
        state_in_prompt: As in the robot file.
    """
    normalised = stats.normalize_state(states)
    return [
        tokenizer.encode(task, state if state_in_prompt else None)
        for task, state in zip(tasks, normalised, strict=True)
    ]


def policy_units(
    layout: Layout, states: FloatArray, targets: NDArray[np.float32]
) -> tuple[FloatArray, FloatArray]:
    """Robot units to the policy's: states [S, dof], targets [S, H, dof] to states, actions."""
    absolute = targets.astype(np.float64)
    return layout.to_policy_state(states), layout.to_policy_actions(absolute, states)
