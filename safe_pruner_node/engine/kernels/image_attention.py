"""Attention inside each image, straight from the packed projection, by tensor descriptors.

A head's channels that no power of two fits are cut in two: 72 are 64 + 16. What the second block
reads of its neighbour is met by zeros of the queries, and not stored.

Source: Dao et al., "FlashAttention-2" (2023).

Shapes: C images, P tokens of one image, N = C * P, D width, h heads, d channels per head.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
"""Queries per program, keys per step, warps, and steps whose loads are under way at once."""


def image_attention(
    qkv: Tensor,
    tokens: int,
    heads: int,
    *,
    dependent: bool = False,
    rows: int = ROWS,
    keys: int = KEYS,
    warps: int = WARPS,
    stages: int = STAGES,
) -> Tensor:
    """Softmax attention of the tokens of an image among each other.

    Args:
        qkv: Queries, keys and values, contiguous, [N, 3D]; d is a multiple of 8.
        tokens: P.
        heads: h.
        dependent: Programmatic dependent launch.
        rows: See the module's constants, like the ones that follow.
        keys: ...
        warps: ...
        stages: ...

    Returns:
        [N, D].
    """
    n, packed = qkv.shape
    width = packed // 3
    dim = width // heads
    out = qkv.new_empty(n, width)  # [N, D]
    major = max(16, 1 << (dim.bit_length() - 1))
    minor = max(16, triton.next_power_of_2(dim - major)) if dim > major else 0
    _image_attention[(triton.cdiv(tokens, rows), heads, n // tokens)](
        qkv,
        TensorDescriptor.from_tensor(qkv, [keys, major]),
        TensorDescriptor.from_tensor(qkv, [keys, max(minor, 16)]),
        out,
        TOKENS=tokens,
        WIDTH=width,
        DIM=dim,
        MAJOR=major,
        MINOR=minor,
        SCALE=1 / (math.log(2.0) * math.sqrt(dim)),
        ROWS=rows,
        KEYS=keys,
        PDL=dependent,
        num_warps=warps,
        num_stages=stages,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out


@triton.jit
def _image_attention(
    qkv,  # [N, 3D]
    wide,  # descriptor of the same
    narrow,  # descriptor of the same
    out,  # [N, D]
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    MAJOR: tl.constexpr,
    MINOR: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of queries, head, image)."""
    first = tl.program_id(2) * TOKENS
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * DIM
    inside = (token < TOKENS)[:, None]
    channel = tl.arange(0, MAJOR)[None]
    rest = MAJOR + tl.arange(0, MINOR if MINOR > 0 else 16)[None]
    key = tl.arange(0, KEYS)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    source = qkv + (first + token)[:, None] * (3 * WIDTH) + at
    q = tl.load(source + channel, inside & (channel < DIM), 0.0)  # [ROWS, MAJOR]
    if MINOR:
        q_rest = tl.load(source + rest, inside & (rest < DIM), 0.0)  # [ROWS, MINOR]
        total_rest = tl.zeros((ROWS, MINOR), tl.float32)
    total = tl.zeros((ROWS, MAJOR), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, TOKENS, KEYS):
        row = first + start
        k = wide.load([row, WIDTH + at])  # [KEYS, MAJOR]
        score = tl.dot(q, k.T, input_precision="ieee")  # [ROWS, KEYS]
        if MINOR:
            k_rest = narrow.load([row, WIDTH + at + MAJOR])  # [KEYS, MINOR]
            score = tl.dot(q_rest, k_rest.T, score, input_precision="ieee")
        score *= SCALE
        if TOKENS % KEYS:
            score = tl.where((start + key < TOKENS)[None], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        probability = tl.exp2(score - above[:, None])
        shrink = tl.exp2(largest - above)
        largest = above
        weight = weight * shrink + tl.sum(probability, 1)
        v = wide.load([row, 2 * WIDTH + at])  # [KEYS, MAJOR]
        part = probability.to(v.dtype)  # [ROWS, KEYS]
        total = tl.dot(part, v, total * shrink[:, None], input_precision="ieee")
        if MINOR:
            v_rest = narrow.load([row, 2 * WIDTH + at + MAJOR])  # [KEYS, MINOR]
            total_rest = tl.dot(part, v_rest, total_rest * shrink[:, None], input_precision="ieee")
    share = 1.0 / weight[:, None]
    target = out + (first + token)[:, None] * WIDTH + at
    dtype = out.dtype.element_ty
    tl.store(target + channel, (total * share).to(dtype), inside & (channel < DIM))
    if MINOR:
        tl.store(target + rest, (total_rest * share).to(dtype), inside & (rest < DIM))
