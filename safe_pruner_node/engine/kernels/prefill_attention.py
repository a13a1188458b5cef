"""Attention of the language model's prefill, where all query heads share one key/value head.

Row n*h + i is query head i of token n, so all heads read the keys once per tile of rows. The GPU's
copy engine brings keys and values: no thread computes addresses. `attention` is for the heads that
this one does not fit.

Source: Dao et al., "FlashAttention-2" (2023).

Shapes: N query tokens, M key tokens, h query heads, R = N * h rows, d head_dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_pruner_node.engine.kernels.attention import Tiles
from safe_pruner_node.engine.kernels.dependent import dependent
from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs
from safe_pruner_node.engine.kernels.tiles import LEAST, MOST_CHANNELS

TILES = Tiles(64, 64, 4, 3)


def fits(keys: Tensor) -> bool:
    """True when the kernel is for keys [1, g, M, d]."""
    _, kv_heads, _, dim = keys.shape
    return kv_heads == 1 and LEAST <= dim <= MOST_CHANNELS and dim & (dim - 1) == 0


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, valid_text: Tensor | None, n_text: int
) -> Tensor:
    """Softmax attention of every query to all keys.

    Args:
        query: Contiguous, [N, h, d].
        keys: Contiguous, [1, 1, M, d].
        values: Contiguous, [1, 1, M, d].
        valid_text: How many of the last `n_text` keys are attended, [] int64, on the device;
            None: all.
        n_text: Keys that may be padding at their end; only with `valid_text`.

    Returns:
        [N, h * d].
    """
    dim = query.shape[2]
    rows, out = query.view(-1, dim), torch.empty_like(query)  # [R, d], [N, h, d]
    n_keys = keys.shape[2]
    row_block, key_block = [TILES.rows, dim], [TILES.keys, dim]
    descriptor = TensorDescriptor.from_tensor
    _prefill_attention[(triton.cdiv(len(rows), TILES.rows),)](
        descriptor(rows, row_block),
        descriptor(keys.view(n_keys, dim), key_block),
        descriptor(values.view(n_keys, dim), key_block),
        descriptor(out.view(-1, dim), row_block),
        query if valid_text is None else valid_text,
        n_keys,
        n_text,
        SCALE=math.log2(math.e) / math.sqrt(dim),  # exp2 is the hardware's exponential
        MASKED=valid_text is not None,
        DIM=dim,
        ROWS=TILES.rows,
        KEYS=TILES.keys,
        num_warps=TILES.warps,
        num_stages=TILES.stages,
        **dependent(query.device),
    )
    return out.flatten(1)


@triton.jit
def _prefill_attention(
    query,  # descriptor of [R, d]
    keys,  # descriptor of [M, d]
    values,  # descriptor of [M, d]
    out,  # descriptor of [R, d]
    valid_text,
    n_keys,
    n_text,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    q = query.load([row, 0])  # [ROWS, d]
    limit = n_keys
    if MASKED:
        limit = n_keys - n_text + tl.load(valid_text).to(tl.int32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, limit, KEYS):
        k = keys.load([start, 0])  # [KEYS, d]
        score = tl.dot(q, k.T, input_precision="ieee")  # [ROWS, KEYS]
        score = tl.where((start + tl.arange(0, KEYS) < limit)[None], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))  # finite: every step has an attended key
        probability = tl.exp2(score * SCALE - (above * SCALE)[:, None])
        shrink = tl.exp2((largest - above) * SCALE)
        largest = above
        weight = weight * shrink + tl.sum(probability, 1)
        v = values.load([start, 0])  # [KEYS, d]; what is not attended is multiplied by 0
        part = probability.to(v.dtype)  # [ROWS, KEYS]
        total = tl.dot(part, v, total * shrink[:, None], input_precision="ieee")
    out.store([row, 0], (total * (1.0 / weight)[:, None]).to(out.dtype))
