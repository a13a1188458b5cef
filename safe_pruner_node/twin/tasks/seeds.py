"""Episode seeds: demonstrations and evaluation draw from ranges that cannot meet."""

from __future__ import annotations

from typing import Literal

from safe_pruner_node.errors import ConfigError

Split = Literal["demonstration", "validation", "calibration", "evaluation"]

SPLITS: tuple[Split, ...] = ("demonstration", "validation", "calibration", "evaluation")
"""What an episode is for: training, early stopping, choosing gamma, the reported tables."""

EPISODES_PER_SPLIT = 1_000_000


def episode_seed(split: Split, index: int) -> int:
    """Seed of an episode; different splits never share one, whatever the indices.

    Args:
        split: What the episode is for.
        index: Number of the episode within its split.

    Raises:
        ConfigError: Unknown split, or an index outside of its range.
    """
    if split not in SPLITS:
        raise ConfigError("parameter", "split", split, f"one of {', '.join(SPLITS)}")
    if not 0 <= index < EPISODES_PER_SPLIT:
        raise ConfigError("parameter", "episode", index, f"0 to {EPISODES_PER_SPLIT - 1}")
    return SPLITS.index(split) * EPISODES_PER_SPLIT + index
