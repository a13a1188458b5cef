"""Which steps are to be rehearsed before the first real one: prompt lengths and kinds of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pruning.settings import PrunerSettings

TYPICAL_PROMPT = "pick up the red cube and put it into the box"
"""Stands in for a prompt that nobody has given yet."""


def prompt_lengths(
    tokenizer: PromptTokenizer, prompt: str, state_dim: int | None
) -> tuple[int, int]:
    """Fewest and most tokens of a prompt, whatever the state.

    A number of the state is never cut across its spaces, so the extremes are those of states whose
    numbers are all the same.

    Args:
        tokenizer: The checkpoint's.
        prompt: The task in words.
        state_dim: Numbers of the state in the prompt; None: it is not in there.
    """
    if state_dim is None:
        length = len(tokenizer.encode(prompt, None))
        return length, length
    centres = (2 * np.arange(-1, 256) + 1) / 256 - 1  # one value in each of the bins -1..255
    lengths = [len(tokenizer.encode(prompt, np.full(state_dim, value))) for value in centres]
    return min(lengths), max(lengths)


def prompt_sizes(shortest: int, longest: int, bucket: int | None) -> tuple[int, ...]:
    """Padded sizes of prompts of these lengths, the largest first; without buckets the longest.

    The largest first because what is captured later then fits into memory that is there.
    """
    if bucket is None:
        return (longest,)
    first, last = -(-shortest // bucket), -(-longest // bucket)
    return tuple(bucket * count for count in range(last, first - 1, -1))


def step_kinds(settings: PrunerSettings) -> tuple[str, ...]:
    """What the steps of a new session are, in order, until they repeat."""
    if settings.is_vanilla:
        return ("full step",)
    return ("keyframe", "pruned step") if settings.method == "safe" else ("pruned step",)


def rehearsal(settings: PrunerSettings) -> PrunerSettings:
    """The same method with one keyframe, whatever the scene."""
    return replace(settings, gamma=-1.0, division="adaptive", max_age=None)
