"""Saliency at the pruning layer: which rows of it vote, and on which keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safe_pruner_node.pruning.padding import valid_keys
from safe_pruner_node.pruning.saliency import visual_saliency


@dataclass(frozen=True)
class Vote:
    """How the early saliency is taken; the same for every query of a kind.

    Attributes:
        query_rows: As in `PrunerSettings`.
        over: As in `visual_saliency`.
        n_visual: Visual tokens, N_vis.
        text_slots: Keys of the text and its padding, behind the visual ones.
    """

    query_rows: str
    over: str
    n_visual: int
    text_slots: int


def early_saliency(vote: Vote, query: Tensor, keys: Tensor, n_text: Tensor | None) -> Tensor:
    """Saliency of the visual tokens at layer ls-1 (Eq. 1 and 2).

    Args:
        vote: How.
        query: Rows of text or action tokens, as `vote` says, after RoPE, [1, h, R, d].
        keys: Keys after RoPE, [1, g, M, d].
        n_text: How many of the text slots are text, [] int64; None: all are.

    Returns:
        Mean over heads and voting rows, fp32, [N_vis].
    """
    rows, n_rows, valid = query[0], None, None  # [h, R, d]
    if vote.query_rows == "last_text":
        rows = rows[:, -1:] if n_text is None else rows.index_select(1, n_text[None] - 1)
    elif vote.query_rows == "text":
        n_rows = n_text
    if n_text is not None:
        valid = valid_keys(keys.shape[2], vote.n_visual, vote.text_slots, n_text)
    return visual_saliency(rows, keys[0], vote.n_visual, vote.over, n_rows=n_rows, valid=valid)
