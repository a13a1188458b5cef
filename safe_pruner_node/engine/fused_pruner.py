"""The pruner's arithmetic of a step in few kernels: `correspond` in two, `judge` in four.

What the kernels are not for is left to the plain functions; shapes and settings decide that, so
one kind of call always goes the same way.

Shapes: N_vis visual tokens, D width, h query heads, g key heads, R query rows, M keys, d head_dim,
K visual tokens kept.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from safe_pruner_node.engine.kernels import early_votes, token_match, token_rank, token_scores
from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.tiles import LEAST
from safe_pruner_node.pruning import judgement, matching
from safe_pruner_node.pruning.early import Vote
from safe_pruner_node.pruning.judgement import Judgement
from safe_pruner_node.pruning.selection import Selection


def correspond(cameras: tuple[int, ...] | None, z: Tensor, reference: Tensor) -> Tensor:
    """Nearest token of the keyframe for every token; see `matching.correspond`.

    Args:
        cameras: Tokens of each camera; None matches over all tokens.
        z: Projector outputs, [N_vis, D].
        reference: Those of the keyframe, [N_vis, D].

    Returns:
        Index into the reference for every token, [N_vis] int64.
    """
    n, width = z.shape
    groups = (n,) if cameras is None else cameras
    alike = len(set(groups)) == 1 and z.dtype == reference.dtype
    if not (alike and z.is_contiguous() and reference.is_contiguous()):
        return matching.correspond(cameras, z, reference)
    camera, options = groups[0], dependent(z.device)
    parts = triton.cdiv(camera, token_match.REFERENCES)
    value = z.new_empty(parts, n, dtype=torch.float32)  # [P, N_vis]
    nearest = z.new_empty(parts, n, dtype=torch.int32)  # [P, N_vis]
    pi = z.new_empty(n, dtype=torch.int64)
    token_match.token_match_kernel[(triton.cdiv(camera, token_match.ROWS), parts, len(groups))](
        z,
        reference,
        value,
        nearest,
        n,
        CAMERA=camera,
        DIM=width,
        ROWS=token_match.ROWS,
        REFERENCES=token_match.REFERENCES,
        DEPTH=_depth(token_match.DEPTH_BYTES, z),
        num_stages=token_match.STAGES,
        num_warps=token_match.WARPS,
        **options,
    )
    token_match.join_match_kernel[(triton.cdiv(n, token_match.JOINED),)](
        value, nearest, pi, n, PARTS=parts, ROWS=token_match.JOINED, num_warps=2, **options
    )
    return pi


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
    """Early saliency, kappa, fused scores and the tokens to keep; see `judgement.judge`.

    Args:
        vote: How the early saliency is taken.
        selection: How many tokens are kept, and how many of each camera at least.
        lambda_: Weight of the forecast (Eq. 5).
        query: [1, h, R, d].
        keys: [1, g, M, d].
        n_text: How many of the text slots are text, [] int64; None: all are.
        pi: Index into the reference for every token, [N_vis] int64.
        reference_early: The keyframe's early saliency, [N_vis].
        reference_deep: The keyframe's deep saliency, [n_deep, N_vis]; None forecasts nothing.
    """
    if not _fits(vote, selection, query, keys):
        return judgement.judge(
            vote, selection, lambda_, query, keys, n_text, pi, reference_early, reference_deep
        )
    votes = _votes(vote, query[0], keys[0], n_text)  # [P, N_vis]
    voters = query.shape[1] * (1 if vote.query_rows == "last_text" else query.shape[2])
    padded = vote.query_rows == "text" and n_text is not None
    early, scores = _scores(
        votes,
        query.shape[1] if padded else voters,
        n_text if padded else None,
        pi,
        reference_deep,
        lambda_,
    )  # [N_vis] each
    keep, kappa = _choose(selection, scores, early, pi, reference_early)  # [K], []
    return Judgement(early, kappa, keep)


def _fits(vote: Vote, selection: Selection, query: Tensor, keys: Tensor) -> bool:
    """Whether the kernels are for such calls."""
    return (
        len(set(selection.tokens)) == 1
        and _counted(vote, keys[0]) <= early_votes.MOST_KEYS
        and query.dtype == keys.dtype
        and query.stride(-1) == keys.stride(-1) == 1
    )


def _counted(vote: Vote, keys: Tensor) -> int:
    """Keys [g, M, d] that the softmax runs over, padding among them."""
    return vote.n_visual if vote.over == "visual" else keys.shape[1]


def _votes(vote: Vote, query: Tensor, keys: Tensor, n_text: Tensor | None) -> Tensor:
    """Sums of the shares over blocks of rows of query [h, R, d], fp32, [P, N_vis]."""
    heads, rows, dim = query.shape
    kv_heads, counted = len(keys), _counted(vote, keys)
    last = vote.query_rows == "last_text"
    voting = 1 if last else rows
    n_rows = heads // kv_heads * voting
    blocks = triton.cdiv(n_rows, early_votes.ROWS)
    votes = query.new_empty(kv_heads * blocks, vote.n_visual, dtype=torch.float32)
    early_votes.early_votes_kernel[(blocks, kv_heads)](
        query,
        keys,
        query if n_text is None else n_text,
        votes,
        n_rows,
        counted,
        vote.n_visual,
        vote.text_slots,
        rows - 1,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        math.log2(math.e) / math.sqrt(dim),
        SHARED=heads // kv_heads,
        VOTING=voting,
        LAST_OF_TEXT=last and n_text is not None,
        SILENT=vote.query_rows == "text" and n_text is not None,
        PADDED=vote.over == "all" and n_text is not None,
        DIM=dim,
        ROWS=early_votes.ROWS,
        KEYS=max(LEAST, triton.next_power_of_2(counted)),
        DEPTH=_depth(early_votes.DEPTH_BYTES, query),
        num_stages=early_votes.STAGES,
        num_warps=early_votes.WARPS,
        **dependent(query.device),
    )
    return votes


def _scores(
    votes: Tensor,
    voters: int,
    n_text: Tensor | None,
    pi: Tensor,
    deep: Tensor | None,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """Early saliency and scores, fp32, [N_vis] each.

    Args:
        votes: As `_votes` gives them, [P, N_vis].
        voters: Rows that voted, or with `n_text` heads of so many rows.
        n_text: [] int64.
        pi: [N_vis] int64.
        deep: [n_deep, N_vis]; None: the scores are the early saliency.
        lambda_: Weight of the forecast.
    """
    parts, n = votes.shape
    early = votes.new_empty(n)
    scores = early if deep is None else torch.empty_like(early)
    token_scores.token_scores_kernel[(triton.cdiv(n, token_scores.TOKENS),)](
        votes,
        pi if n_text is None else n_text,
        pi,
        early if deep is None else deep,
        early,
        scores,
        n,
        voters,
        0 if deep is None else deep.stride(0),
        1.0 - lambda_,
        lambda_,
        PADDED=n_text is not None,
        LAYERS=0 if deep is None else len(deep),
        PARTS=parts,
        BLOCK_PARTS=triton.next_power_of_2(parts),
        TOKENS=token_scores.TOKENS,
        num_warps=4,
        **dependent(votes.device),
    )
    return early, scores


def _choose(
    selection: Selection, scores: Tensor, early: Tensor, pi: Tensor, reference_early: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens that go on, [K] int64, and kappa, fp32, []; of [N_vis] each."""
    cameras, camera, n = len(selection.tokens), selection.tokens[0], len(scores)
    kept = scores.new_empty(n, dtype=torch.int8)  # [N_vis]
    keep, kappa = pi.new_empty(selection.k), scores.new_empty(())
    block, options = triton.next_power_of_2(n), dependent(scores.device)
    token_rank.token_rank_kernel[(triton.cdiv(n, token_rank.TOKENS) + 1,)](
        scores,
        early,
        pi,
        reference_early,
        kept,
        kappa,
        n,
        selection.floor,
        selection.k - cameras * min(selection.floor, camera),
        CAMERAS=cameras,
        CAMERA=camera,
        BLOCK_CAMERA=triton.next_power_of_2(camera),
        BLOCK_ALL=block,
        TOKENS=token_rank.TOKENS,
        num_warps=4,
        **options,
    )
    token_rank.compact_kernel[(1,)](kept, keep, n, BLOCK_ALL=block, num_warps=4, **options)
    return keep, kappa


def _depth(n_bytes: int, like: Tensor) -> int:
    """Elements of a row per turn of a product's loop, no more than a row has."""
    whole: int = triton.next_power_of_2(like.shape[-1])
    return max(LEAST, min(n_bytes // like.element_size(), whole))
