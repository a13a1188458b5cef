"""The K best tokens with a least number per camera, and kappa, which reads the whole map as well.

A camera's tokens that come before a given one are the first of that camera's own order. So among
`ahead` of them the floor claims the first `floor`, and the others compete with it for what the
floors leave: no second look at who is claimed where.

Shapes: N visual tokens in CAMERAS cameras of CAMERA tokens each, K kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

TOKENS = 16
"""Ranked per program: 48 programs for 768 tokens, each with a comparison of every pair."""

SMALLEST = tl.constexpr(1e-8)
"""Norm that a map has at least, as in `torch.nn.functional.cosine_similarity`."""


@triton.jit
def token_rank_kernel(
    scores,  # fp32, [N]
    early,  # fp32, [N]
    pi,  # int64, [N], index into the reference
    reference_early,  # fp32, [N]
    kept,  # out int8, [N]: 1 for a token that goes on
    kappa,  # out fp32, []
    n_tokens,  # N
    floor,  # least number of each camera
    n_free,  # K less what the floors claim
    CAMERAS: tl.constexpr,
    CAMERA: tl.constexpr,
    BLOCK_CAMERA: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program m: which of TOKENS tokens go on; the last program: kappa."""
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        _kappa(early, pi, reference_early, kappa, n_tokens, BLOCK_ALL, PDL)
    else:
        token = block * TOKENS + tl.arange(0, TOKENS)
        other = tl.arange(0, BLOCK_CAMERA)
        wait_for_inputs(PDL)
        let_next_begin(PDL)
        score = nan_as_infinite(tl.load(scores + token, token < n_tokens, 0.0))[
            :, None
        ]  # [TOKENS, 1]
        claimed = token < 0  # nobody yet
        rivals = tl.zeros((TOKENS,), tl.int32)
        for camera in tl.static_range(CAMERAS):
            index = camera * CAMERA + other
            rival = tl.load(scores + index, other < CAMERA, 0.0)
            rival = nan_as_infinite(rival)[None]  # [1, BLOCK_CAMERA]
            tied = (rival == score) & (index[None] < token[:, None])
            before = ((rival > score) | tied) & (other < CAMERA)[None]
            ahead = tl.sum(before.to(tl.int32), 1)  # [TOKENS]
            claimed = claimed | ((token // CAMERA == camera) & (ahead < floor))
            rivals += tl.maximum(ahead - floor, 0)
        keep = claimed | (rivals < n_free)
        tl.store(kept + token, keep.to(tl.int8), token < n_tokens)


@triton.jit
def nan_as_infinite(score):
    """What a NaN counts as wherever the greatest is looked for."""
    return tl.where(score != score, float("inf"), score)  # noqa: PLR0124 - only a NaN is


@triton.jit
def _kappa(early, pi, reference_early, kappa, n_tokens, BLOCK_ALL: tl.constexpr, PDL: tl.constexpr):
    """Cosine of the early map and its own forecast (Eq. 6); of a NaN it is one."""
    token = tl.arange(0, BLOCK_ALL)
    inside = token < n_tokens
    # Before the wait: the kernels before this one waited for whoever wrote these.
    forecast = tl.load(reference_early + tl.load(pi + token, inside, 0), inside, 0.0)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    seen = tl.load(early + token, inside, 0.0)
    size = tl.maximum(tl.sqrt(tl.sum(seen * seen, 0)), SMALLEST)
    size *= tl.maximum(tl.sqrt(tl.sum(forecast * forecast, 0)), SMALLEST)
    cosine = tl.sum(seen * forecast, 0) / size
    cosine = tl.where(cosine > 1.0, 1.0, cosine)
    tl.store(kappa, tl.where(cosine < -1.0, -1.0, cosine))


@triton.jit
def compact_kernel(
    kept,  # int8, [N]
    keep,  # out int64, [K]: ascending indices of the tokens that go on
    n_tokens,  # N
    BLOCK_ALL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: from marks to indices."""
    token = tl.arange(0, BLOCK_ALL)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    mark = tl.load(kept + token, token < n_tokens, 0).to(tl.int32)
    tl.store(keep + tl.cumsum(mark, 0) - 1, token.to(tl.int64), mark != 0)
