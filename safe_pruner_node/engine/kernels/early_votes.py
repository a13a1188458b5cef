"""How much the voting rows attend to each visual token, summed over blocks of rows.

Every program has so few rows that their logits for all keys stay in its registers: one product,
one softmax, nothing in between is written. The keys are the rows of the product, for a tensor core
has at least 64 of these and few columns.

Shapes: h query heads, g key heads, R rows, V of them vote, d head_dim, M keys of which the softmax
counts n_keys, P = g * ceil(h / g * V / ROWS) blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_pruner_node.engine.kernels.launch import let_next_begin, wait_for_inputs

ROWS = 16
"""Query rows per program: 8 heads of 128 make 64 programs. Each reads all keys once, so fewer rows
would load the L2 more and more rows fewer multiprocessors."""

MOST_KEYS = 1024
"""Keys whose logits fit: 64 registers of each thread."""

DEPTH_BYTES = 64
"""Of a key per turn of the loop: with `MOST_KEYS` three turns fill the shared memory."""

STAGES, WARPS = 3, 8


@triton.jit
def early_votes_kernel(
    query,  # [h, R, d]
    keys,  # [g, M, d]
    n_text,  # [] int64, text rows and keys; read if SILENT, PADDED or LAST_OF_TEXT
    votes,  # out fp32, [P, n_visual]: sum over the block's rows
    n_rows,  # h / g * V: rows of one key head
    n_keys,
    n_visual,
    n_slots,  # keys of the text and its padding, behind the visual ones
    last_row,  # row that votes if V is 1 and not LAST_OF_TEXT
    q_head,
    q_row,
    k_head,
    k_row,
    log2_scale,  # d**-0.5 / ln 2
    SHARED: tl.constexpr,  # h / g
    VOTING: tl.constexpr,  # V
    LAST_OF_TEXT: tl.constexpr,  # the row of the last text token votes, V is 1
    SILENT: tl.constexpr,  # rows of padding do not vote
    PADDED: tl.constexpr,  # keys of padding do not count
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, head): a block of the rows that share a key head."""
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, DEPTH)
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    head = kv_head * SHARED + row // VOTING
    if LAST_OF_TEXT:
        token = tl.zeros((ROWS,), tl.int32) + (tl.load(n_text).to(tl.int32) - 1)
    elif VOTING == 1:
        token = tl.zeros((ROWS,), tl.int32) + last_row
    else:
        token = row % VOTING
    voting = row < n_rows
    if SILENT:
        voting = voting & (token < tl.load(n_text).to(tl.int32))
    counted = key < n_keys
    if PADDED:
        end = n_visual + tl.load(n_text).to(tl.int32)
        counted = counted & ((key < end) | (key >= n_visual + n_slots))
    q_at = query + (head * q_head + token * q_row)[:, None] + channel[None]
    k_at = keys + kv_head * k_head + key[:, None] * k_row + channel[None]
    logits = tl.zeros((KEYS, ROWS), tl.float32)
    for start in range(0, DIM, DEPTH):
        left = (channel < DIM - start)[None]
        q = tl.load(q_at + start, voting[:, None] & left, 0.0)  # [ROWS, DEPTH]
        k = tl.load(k_at + start, counted[:, None] & left, 0.0)  # [KEYS, DEPTH]
        logits = tl.dot(k, q.T, logits, input_precision="ieee")
    logits = tl.where(counted[:, None], logits * log2_scale, float("-inf"))
    share = tl.exp2(logits - tl.max(logits, 0)[None])  # [KEYS, ROWS]
    share = share / tl.sum(share, 0)[None]
    total = tl.sum(tl.where(voting[None], share, 0.0), 1)  # [KEYS]
    part = kv_head * tl.num_programs(0) + tl.program_id(0)
    tl.store(votes + part * n_visual + key, total, key < n_visual)
