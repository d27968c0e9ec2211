"""How does a step attend to tokens that were chosen before it, and how much did each of them weigh?

Which tokens is decided between steps (`offload.tiers.sparse`), from how much tokens weighed lately. So the kernels that attend leave
each row's score, and `weigh` adds to each token's sum what the softmax of all parts together gave it:

    window, new token ──┐
    chosen, on device ──┼─► parts ─► weigh: sum += decay^-t · Σ over a group's heads of exp(score - log-sum-exp)
    chosen, on host ────┘     └────► combine

Instead of letting all sums fade, step t after they were counted last counts for more. That costs what the step attends to: no
weight of any other token is computed, and no matrix of weights is ever there. Rows of chosen tokens come from pinned host memory by
`fetch_rows`, those that stay on the device once.

The references are `offload.kernels.reference.attend` and `offload.kernels.reference.weights`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import padded
from offload.kernels.window import capped

WARPS = 4
TILE = 16
"""Rows that a program reads at once: few, so that many programs have reads of the host under way."""
FETCHERS = 64
"""Programs that copy rows: as many as keep the link busy."""
COLUMNS = 256
"""Scores that a program of `weigh` adds."""


def attend_chosen(
    query: Tensor,
    rows: Tensor,
    ids: Tensor,
    partials: Partials,
    scores: Tensor,
    *,
    first: int,
    count: int,
    first_slot: int,
    splits: int,
    first_score: int,
    key_dim: int,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Attends to chosen tokens of each KV head.

    Args:
        query: [B, H_q, D], last stride 1, on the device.
        rows: [B, H_kv, count, D + D_v], last stride 1: the tokens' rows.
        ids: int32 [B, H_kv, k], none twice, -1 for none.
        partials: `splits` slots are written.
        scores: float32 [B, H_q, R]: `count` columns are written, -inf where there is no token.
        first: The first of `ids` that is meant.
        count: How many.
        first_slot: Of the partials.
        splits: Programs per KV head.
        first_score: The first column.
        key_dim: D.
        scale: Factor on the dot products.
        softcap: Logits become softcap * tanh(logits / softcap).
    """
    batch, heads, _ = query.shape
    kv_heads, width = ids.shape[1], rows.shape[-1]
    value_dim, groups = width - key_dim, heads // kv_heads
    _chosen_kernel[(splits, batch * kv_heads)](
        query, rows, ids, *partials, scores,
        kv_heads, ids.shape[2], first, count, partials.lse.shape[2], first_slot,
        scores.shape[2], first_score, scale, 1.0 if softcap is None else softcap,
        query.stride(0), query.stride(1), *rows.stride()[:3],
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=key_dim, DV=value_dim,
        D_P=padded(key_dim), DV_P=padded(value_dim), TILE=TILE,
        SPLITS=splits, CAPPED=softcap is not None,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _chosen_kernel(
    q_ptr,
    rows_ptr,
    ids_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,
    kv_heads,
    n_ids,
    first,
    count,
    slots,
    first_slot,
    n_scores,
    first_score,
    sm_scale,
    softcap,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    G: tl.constexpr,
    G_P: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    DV_P: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    i_d = tl.arange(0, D_P)
    i_v = tl.arange(0, DV_P)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    m_d, m_v = (i_d < D)[None, :], (i_v < DV)[None, :]
    q = tl.load(
        q_ptr + i_batch * stride_qb + (i_kv * G + i_g)[:, None] * stride_qh + i_d[None, :],
        mask=m_g[:, None] & m_d,
        other=0.0,
    )
    peak = tl.full((G_P,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((G_P,), dtype=tl.float32)
    acc = tl.zeros((G_P, DV_P), dtype=tl.float32)
    n_tiles = (count + TILE - 1) // TILE
    for tile in range(i_split, n_tiles, SPLITS):
        i_k = tile * TILE + tl.arange(0, TILE)
        ids = tl.load(ids_ptr + i_row * n_ids + first + i_k, mask=i_k < count, other=-1)
        m_k = ids >= 0
        o_row = i_batch * stride_0 + i_kv * stride_1 + i_k.to(tl.int64) * stride_2
        p_row = rows_ptr + o_row
        key = tl.load(p_row[:, None] + i_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
        value = tl.load(p_row[:, None] + D + i_v[None, :], mask=m_k[:, None] & m_v, other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee") * sm_scale
        if CAPPED:
            score = capped(score, softcap)
        score = tl.where(m_k[None, :], score, float("-inf"))
        o_score = (i_row * G + i_g) * n_scores + first_score
        m_score = m_g[:, None] & (i_k < count)[None, :]
        tl.store(scores_ptr + o_score[:, None] + i_k[None, :], score, mask=m_score)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(peak - safe)
        weight = tl.exp(score - safe[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        peak = higher
    full = total > 0.0
    out = acc / tl.where(full, total, 1.0)[:, None]
    o_out = (i_row * G + i_g) * slots + first_slot + i_split
    tl.store(
        out_ptr + o_out[:, None] * DV + i_v[None, :], out, mask=m_g[:, None] & (i_v < DV)[None, :]
    )
    lse = tl.where(
        full, tl.where(full, peak, 0.0) + tl.log(tl.where(full, total, 1.0)), float("-inf")
    )
    tl.store(lse_ptr + o_out, lse, mask=m_g)


def weigh(
    partials: Partials,
    scores: Tensor,
    sums: Tensor,
    *,
    window_rows: int,
    n_rows: Tensor,
    starts: Tensor,
    page: int,
    ids: Tensor,
    places: Tensor,
    decay: float,
    sink_logits: Tensor | None = None,
) -> None:
    """Adds what each token weighed in this step to its sum; before `combine` counts the step.

    Args:
        partials: Of all kernels of the step.
        scores: float32 [B, H_q, window_rows + k]: those of the window's rows, then those of chosen tokens; -inf for none.
        sums: float32 [B, H_kv, tokens], by position; those of tokens that were attended to are changed.
        window_rows: Columns of the window.
        n_rows: int32 [1]: rows of it before this step; one more has a score.
        starts: int32 [slots]: the position of each slot's first token.
        page: Tokens of a slot.
        ids: int32 [B, H_kv, k], -1 for none.
        places: int32 [2]: the position of token 0 of `ids`, and the rows of the window when t was 0.
        decay: Whose power is the factor on what is added.
        sink_logits: [H_q]: one logit per head without a value.
    """
    batch, heads, columns = scores.shape
    kv_heads, slots = ids.shape[1], partials.lse.shape[2]
    groups = heads // kv_heads
    _weigh_kernel[(triton.cdiv(columns, COLUMNS), batch * kv_heads)](
        partials.lse, scores, sums, n_rows, starts, ids, places,
        partials.lse if sink_logits is None else sink_logits,
        kv_heads, slots, columns, window_rows, ids.shape[2], sums.shape[2], -math.log(decay),
        G=groups, G_P=triton.next_power_of_2(groups), SLOTS=triton.next_power_of_2(slots), PAGE=page,
        COLUMNS=COLUMNS, SINKS=sink_logits is not None,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _weigh_kernel(
    lse_ptr,
    scores_ptr,
    sums_ptr,
    n_rows_ptr,
    starts_ptr,
    ids_ptr,
    places_ptr,
    sinks_ptr,
    kv_heads,
    slots,
    columns,
    window_rows,
    n_ids,
    n_sums,
    grows,
    G: tl.constexpr,
    G_P: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
):
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_window = i_c < window_rows
    n_rows = tl.load(n_rows_ptr)
    m_window = in_window & (i_c <= n_rows)
    i_id = i_c - window_rows
    ids = tl.load(ids_ptr + i_row * n_ids + i_id, mask=(i_id >= 0) & (i_c < columns), other=-1)
    start = tl.load(starts_ptr + i_c // PAGE, mask=m_window, other=0)
    at = tl.where(in_window, start + i_c % PAGE, tl.load(places_ptr) + ids)
    m_c = (m_window | (ids >= 0)) & (at < n_sums)
    i_s = tl.arange(0, SLOTS)
    added = tl.zeros((COLUMNS,), dtype=tl.float32)
    for g in tl.static_range(G):
        i_head = i_row * G + g
        lse = tl.load(lse_ptr + i_head * slots + i_s, mask=i_s < slots, other=float("-inf"))
        peak = tl.max(lse, axis=0)
        sink = float("-inf")
        if SINKS:
            sink = tl.load(sinks_ptr + i_head % (kv_heads * G)).to(tl.float32)
            peak = tl.maximum(peak, sink)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp(lse - peak), axis=0)
        if SINKS:
            total += tl.exp(sink - peak)
        score = tl.load(scores_ptr + i_head * columns + i_c, mask=m_c, other=float("-inf"))
        added += tl.exp(score - peak) / tl.where(total > 0.0, total, 1.0)
    added *= tl.exp((n_rows + 1 - tl.load(places_ptr + 1)).to(tl.float32) * grows)
    p_sum = sums_ptr + i_row * n_sums + at
    tl.store(p_sum, tl.load(p_sum, mask=m_c, other=0.0) + added, mask=m_c)


def fetch_rows(
    rows: Tensor,
    pool: Tensor,
    table: Tensor,
    ids: Tensor,
    *,
    first: int,
    count: int,
    before: Tensor | None = None,
) -> None:
    """Copies rows of tokens from host pages. A few programs do it, so that most of a card goes on with other work.

    Args:
        rows: [B, H_kv, count, W], contiguous, on the device; written where there is a token.
        pool: [pages, P, H_kv, W]: host pages, pinned (any tensor on a CPU).
        table: int32 [B, columns]: the page of each block of P tokens.
        ids: int32 [B, H_kv, k], contiguous: tokens, -1 for none.
        first: The first of them that is meant.
        count: How many.
        before: As `ids`: tokens whose rows are there already, in the same places; None where none is.
    """
    batch, kv_heads, k = ids.shape
    width = rows.shape[-1]
    per_row = triton.cdiv(count, TILE)
    n_tiles = batch * kv_heads * per_row
    _fetch_kernel[(min(n_tiles, FETCHERS),)](
        rows, pool, table, ids, ids if before is None else before, kv_heads, table.stride(0), k, first, count,
        per_row, n_tiles, *pool.stride()[:3],
        W=width, W_P=triton.next_power_of_2(width), TILE=TILE, PAGE=pool.shape[1], KNOWN=before is not None,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _fetch_kernel(
    rows_ptr,
    pool_ptr,
    table_ptr,
    ids_ptr,
    before_ptr,
    kv_heads,
    columns,
    n_ids,
    first,
    count,
    per_row,
    n_tiles,
    stride_page: tl.int64,
    stride_token: tl.int64,
    stride_head: tl.int64,
    W: tl.constexpr,
    W_P: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    KNOWN: tl.constexpr,
):
    i_w = tl.arange(0, W_P)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        i_row = (tile // per_row).to(tl.int64)
        i_k = tile % per_row * TILE + tl.arange(0, TILE)
        o_id = i_row * n_ids + first + i_k
        ids = tl.load(ids_ptr + o_id, mask=i_k < count, other=-1)
        m_k = ids >= 0
        if KNOWN:
            m_k = m_k & (ids != tl.load(before_ptr + o_id, mask=i_k < count, other=-1))
        page = tl.load(table_ptr + i_row // kv_heads * columns + ids // PAGE, mask=m_k, other=0)
        o_row = page.to(tl.int64) * stride_page + (ids % PAGE).to(tl.int64) * stride_token
        o_row += i_row % kv_heads * stride_head
        m_w = m_k[:, None] & (i_w < W)[None, :]
        found = tl.load(pool_ptr + o_row[:, None] + i_w[None, :], mask=m_w, other=0.0)
        o_near = (i_row * count + i_k) * W
        tl.store(rows_ptr + o_near[:, None] + i_w[None, :], found, mask=m_w)


MOST_PLACED = 256
"""Places that `place` knows: it compares all with all."""


def place(ids: Tensor, before: Tensor, *, count: int) -> None:
    """Orders tokens so that those that had a place keep it.

    Args:
        ids: int32 [B, H_kv, k], contiguous: the first `count` are ordered anew, none twice, -1 for none.
        before: Likewise: the tokens that were there.
        count: Places, at most `MOST_PLACED`.
    """
    batch, kv_heads, k = ids.shape
    _place_kernel[(batch * kv_heads,)](
        ids, before, k, count, PLACES=triton.next_power_of_2(count), num_warps=WARPS
    )


@triton.jit
def _place_kernel(ids_ptr, before_ptr, n_ids, count, PLACES: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PLACES)
    m = i < count
    old = tl.load(before_ptr + i_row * n_ids + i, mask=m, other=-1)
    new = tl.load(ids_ptr + i_row * n_ids + i, mask=m, other=-1)
    same = ((old[:, None] == new[None, :]) & (old >= 0)[:, None]).to(tl.int32)
    stays = tl.max(same, axis=1) > 0
    comes = (new >= 0) & (tl.max(same, axis=0) == 0)
    free = m & (stays == 0)
    # The i-th that comes goes to the i-th place that is free.
    turn = tl.cumsum(comes.to(tl.int32), axis=0)
    at = tl.cumsum(free.to(tl.int32), axis=0)
    meets = free[:, None] & comes[None, :] & (at[:, None] == turn[None, :])
    found = tl.sum(tl.where(meets, new[None, :] + 1, 0), axis=1) - 1
    tl.store(ids_ptr + i_row * n_ids + i, tl.where(stays, old, found), mask=m)
