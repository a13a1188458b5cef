"""From the votes of blocks of rows to the early saliency and the fused scores (paper, Eq. 4, 5).

Shapes: N visual tokens, P blocks of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

TOKENS = 32
"""Per program: a line of 128 bytes of each block's votes."""


@triton.jit
def token_scores_kernel(
    votes,  # fp32, [P, N]
    n_text,  # [] int64, rows of each head that voted; read if PADDED
    pi,  # int64, [N], index into the reference; read if LAYERS
    deep,  # fp32, [LAYERS, N], the reference's
    early,  # out fp32, [N]
    scores,  # out fp32, [N]; `early` itself without LAYERS
    n_tokens,  # N
    n_voters,  # rows of all heads that voted; if PADDED heads
    deep_layer,  # stride
    early_weight,  # 1 - lambda
    forecast_weight,  # lambda
    PADDED: tl.constexpr,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program m: TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < n_tokens
    part = tl.arange(0, BLOCK_PARTS)
    # Before the wait: the kernel that votes comes first, and waits for whoever wrote these.
    n_rows = n_voters
    if PADDED:
        n_rows = n_voters * tl.load(n_text).to(tl.int32)
    forecast = tl.zeros((TOKENS,), tl.float32)
    if LAYERS > 0:
        source = tl.load(pi + token, inside, 0)
        for layer in tl.static_range(LAYERS):
            forecast += tl.load(deep + layer * deep_layer + source, inside, 0.0)
        forecast = forecast / LAYERS
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    at = votes + part[:, None] * n_tokens + token[None]
    vote = tl.load(at, (part < PARTS)[:, None] & inside[None], 0.0)  # [P, TOKENS]
    mean = tl.sum(vote, 0) / n_rows
    tl.store(early + token, mean, inside)
    if LAYERS > 0:
        score = early_weight * mean + forecast_weight * forecast
        tl.store(scores + token, score, inside)
