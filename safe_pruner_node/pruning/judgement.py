"""SAFE-Pruner's arithmetic of one query (paper, Eq. 4 to 6): pure, so that it can be captured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safe_pruner_node.pruning.early import Vote, early_saliency
from safe_pruner_node.pruning.forecast import deep_forecast, fuse, kappa, transfer
from safe_pruner_node.pruning.selection import Selection, select


@dataclass(frozen=True)
class Judgement:
    """What the early view says against the reference.

    Attributes:
        early: Prefill saliency at layer ls, [N_vis].
        kappa: Eq. 6, [].
        keep: Visual tokens that go on, if nothing speaks for a keyframe, [K] int64.
    """

    early: Tensor
    kappa: Tensor
    keep: Tensor


def judge(
    vote: Vote,
    selection: Selection,
    lambda_: float,
    query: Tensor,
    keys: Tensor,
    n_text: Tensor | None,
    pi: Tensor,
    reference_early: Tensor,
    reference_deep: Tensor | None,
) -> Judgement:
    """Early saliency, kappa, fused scores and the tokens to keep.

    Args:
        vote: How the early saliency is taken.
        selection: How many tokens are kept, and how many of each camera at least.
        lambda_: Weight of the forecast (Eq. 5).
        query: As in `early_saliency`.
        keys: Likewise.
        n_text: Likewise.
        pi: Index into the reference for every token, [N_vis] int64.
        reference_early: The keyframe's early saliency, [N_vis].
        reference_deep: The keyframe's deep saliency, [n_deep, N_vis]; None forecasts nothing.
    """
    early = early_saliency(vote, query, keys, n_text)  # [N_vis]
    scores = early
    if reference_deep is not None:
        scores = fuse(early, deep_forecast(reference_deep, pi), lambda_)
    return Judgement(early, kappa(early, transfer(reference_early, pi)), select(selection, scores))
