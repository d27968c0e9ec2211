"""How does a decode step attend to the keys on the device when only the device knows how many there are?

A captured graph replays the same launches for every token, so the number of rows is read from memory. The rows are
split among programs (split-K); the first split takes the new token from registers and appends its row as well: no
other program reads that row in this launch.

The reference is `offload.kernels.reference.attend`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import padded

WARPS, STAGES = 4, 3


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Tensor,
    n_rows: Tensor,
    partials: Partials,
    *,
    scale: float,
    splits: int,
    softcap: float | None = None,
    padding: Tensor | None = None,
    starts: Tensor | None = None,
    scores: Tensor | None = None,
) -> None:
    """Attends with one new token per sequence to the rows of a window and to itself, and appends its row.

    Args:
        query: [B, H_q, D], last stride 1.
        key: [B, H_kv, D], last stride 1: of the new token.
        value: [B, H_kv, D_v], likewise.
        window: [B, slots, P, H_kv, D + D_v], the dtype of `key`, last stride 1; row n_rows is written.
        n_rows: int32 [1] on the device: rows that are valid, all of them first.
        partials: Slots [0, splits) are written.
        scale: Factor on the dot products.
        splits: Programs per KV head; a power of two.
        softcap: Logits become softcap * tanh(logits / softcap).
        padding: int32 [B] on the device: so many first tokens are padding; None for none. The new token is none.
        starts: int32 [slots]: the position of each slot's first token; read only with `padding`.
        scores: float32 [B, H_q, columns], contiguous: written in the first columns, one for each row, the new one's too.
    """
    batch, heads, head_size = query.shape
    page, kv_heads, width = window.shape[2:]
    groups, value_dim = heads // kv_heads, width - head_size
    large = max(padded(head_size), padded(value_dim)) > 128
    _window_kernel[(splits, batch * kv_heads)](
        query, key, value, window, n_rows, *partials,
        n_rows if padding is None else padding, n_rows if starts is None else starts,
        partials.lse if scores is None else scores, 0 if scores is None else scores.shape[2],
        kv_heads, partials.lse.shape[2], scale, 1.0 if softcap is None else softcap,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        window.stride(0), window.stride(2), window.stride(3),
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=head_size, DV=value_dim,
        D_P=padded(head_size), DV_P=padded(value_dim), PAGE=page, TILE=32 if large else 64,
        SPLITS=splits, PADDED=padding is not None, CAPPED=softcap is not None, SCORED=scores is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@triton.jit
def capped(logit, softcap):
    """The softcap; tanh(x) = 1 - 2 / (exp(2x) + 1), which neither end overflows."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))


@triton.jit
def _window_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    window_ptr,
    n_rows_ptr,
    out_ptr,
    lse_ptr,
    padding_ptr,
    starts_ptr,
    scores_ptr,
    n_scores,
    kv_heads,
    slots,
    sm_scale,
    softcap,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_wb: tl.int64,
    stride_wt: tl.int64,
    stride_wh: tl.int64,
    G: tl.constexpr,
    G_P: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    DV_P: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCORED: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    n_rows = tl.load(n_rows_ptr)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_d = tl.arange(0, D_P)
    i_v = tl.arange(0, DV_P)
    i_t = tl.arange(0, TILE)
    o_q = i_batch * stride_qb + (i_kv * G + i_g)[:, None] * stride_qh + i_d[None, :]
    q = tl.load(q_ptr + o_q, mask=m_g[:, None] & (i_d < D)[None, :], other=0.0)
    row_ptr = window_ptr + i_batch * stride_wb + i_kv * stride_wh
    peak = tl.full((G_P,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((G_P,), dtype=tl.float32)
    acc = tl.zeros((G_P, DV_P), dtype=tl.float32)
    o_score = ((i_batch * kv_heads + i_kv) * G + i_g) * n_scores
    if i_split == 0:
        new_k = tl.load(
            k_ptr + i_batch * stride_kb + i_kv * stride_kh + i_d, mask=i_d < D, other=0.0
        )
        new_v = tl.load(
            v_ptr + i_batch * stride_vb + i_kv * stride_vh + i_v, mask=i_v < DV, other=0.0
        )
        new_row = row_ptr + n_rows.to(tl.int64) * stride_wt
        tl.store(new_row + i_d, new_k, mask=i_d < D)
        tl.store(new_row + D + i_v, new_v, mask=i_v < DV)
        peak = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * sm_scale
        if CAPPED:
            peak = capped(peak, softcap)
        if SCORED:
            tl.store(scores_ptr + o_score + n_rows, peak, mask=m_g)
        total += 1.0
        acc += new_v.to(tl.float32)[None, :]
    n_tiles = (n_rows + TILE - 1) // TILE
    per_split = (n_tiles + SPLITS - 1) // SPLITS
    first = i_split * per_split
    hidden = 0
    if PADDED:
        hidden = tl.load(padding_ptr + i_batch)
    for tile in range(first, tl.minimum(first + per_split, n_tiles)):
        i_n = tile * TILE + i_t
        m_n = i_n < n_rows
        o_n = i_n.to(tl.int64) * stride_wt
        k = tl.load(
            row_ptr + o_n[:, None] + i_d[None, :], mask=m_n[:, None] & (i_d < D)[None, :], other=0.0
        )
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * sm_scale
        if CAPPED:
            logit = capped(logit, softcap)
        if PADDED:
            start = tl.load(starts_ptr + i_n // PAGE, mask=m_n, other=0)
            m_n = m_n & (start + i_n % PAGE >= hidden)
        logit = tl.where(m_n[None, :], logit, float("-inf"))
        if SCORED:
            m_score = m_g[:, None] & (i_n < n_rows)[None, :]
            tl.store(scores_ptr + o_score[:, None] + i_n[None, :], logit, mask=m_score)
        higher = tl.maximum(peak, tl.max(logit, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(peak - safe)
        weight = tl.exp(logit - safe[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(
            row_ptr + o_n[:, None] + D + i_v[None, :],
            mask=(i_n < n_rows)[:, None] & (i_v < DV)[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    full = total > 0.0
    o_out = ((i_batch * kv_heads + i_kv) * G + i_g) * slots + i_split
    out = acc / tl.where(full, total, 1.0)[:, None]
    tl.store(
        out_ptr + o_out[:, None] * DV + i_v[None, :], out, mask=m_g[:, None] & (i_v < DV)[None, :]
    )
    lse = tl.where(
        full, tl.where(full, peak, 0.0) + tl.log(tl.where(full, total, 1.0)), float("-inf")
    )
    tl.store(lse_ptr + o_out, lse, mask=m_g)
