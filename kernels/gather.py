"""How are selected tokens attended to exactly? From their rows in pinned host memory, read by the kernel itself.

Zero-copy: the kernel's loads go over PCIe, so no host code and no staging is needed; 64 rows of 512 bytes a KV head
are 8.4 MB a step for an 8B model.

Most tokens that a step selects were selected a few steps ago, so a `RowCache` keeps their rows on the device: token t
in slot t mod the number of slots, the next such token in its place. A row that is there is read from there, one that
is not comes from the host and stays. Both hold the same bits, so what comes out does not depend on the cache.

No two programs of a launch meet in a slot: of the selected tokens that belong there only the first may write, and only
if the slot's own token is not selected. So what is read is never being written, and no lock is needed.

The references are `gather` and `attend` of `offload.kernels.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import padded
from offload.kernels.window import capped

WARPS = 4
TILE = 16
"""Rows that one program reads: few, so that many programs have reads of the host under way."""

OTHERS = 256
"""Selected tokens that a program compares its own with at once."""


class RowCache(NamedTuple):
    """Rows of tokens that were selected lately, on the device.

    Its slots are places for rows; those of `Partials` are places for parts of the attention.

    Attributes:
        rows: [B, H_kv, slots, D + D_v] in the dtype of the pool; slots a power of two.
        tokens: int32 [B, H_kv, slots], the token of each, -1 for none. Fill with -1 to forget them all.
        fetched: int64 [1]: rows that came from the host, added up.
    """

    rows: Tensor
    tokens: Tensor
    fetched: Tensor


def empty_row_cache(
    batch: int, kv_heads: int, slots: int, width: int, dtype: torch.dtype, device: torch.device
) -> RowCache:
    """Room for rows.

    Args:
        batch: Sequences.
        kv_heads: KV heads.
        slots: Per KV head, a power of two.
        width: D + D_v.
        dtype: Of the rows.
        device: Where.

    Raises:
        ValueError: slots is not a power of two.
    """
    if slots < 1 or slots & (slots - 1):
        raise ValueError(f"slots must be a power of two, got {slots:,}")
    return RowCache(
        torch.zeros((batch, kv_heads, slots, width), dtype=dtype, device=device),
        torch.full((batch, kv_heads, slots), -1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def row_slots(k: int) -> int:
    """Slots of partials that k tokens per KV head take."""
    return k // TILE


def attend_rows(
    query: Tensor,
    pool: Tensor,
    table: Tensor,
    tokens: Tensor,
    partials: Partials,
    *,
    first_slot: int,
    key_dim: int,
    scale: float,
    softcap: float | None = None,
    cache: RowCache | None = None,
) -> None:
    """Attends to selected tokens of each KV head.

    Args:
        query: [B, H_q, D], last stride 1, on the device.
        pool: [pages, P, H_kv, D + D_v] in the dtype of `query`: host pages, pinned (any tensor on a CPU).
        table: int32 [B, columns] on the query's device: the page of each block of P tokens.
        tokens: int32 [B, H_kv, k], none twice, -1 for none; k a multiple of TILE.
        partials: `row_slots(k)` slots are written.
        first_slot: The first of them.
        key_dim: D.
        scale: Factor on the dot products.
        softcap: Logits become softcap * tanh(logits / softcap).
        cache: Rows that are on the device; others join them.

    Raises:
        ValueError: k is not a multiple of TILE.
    """
    batch, heads, _ = query.shape
    page, kv_heads, width = pool.shape[1:]
    k = tokens.shape[-1]
    if k % TILE:
        raise ValueError(f"k must be a multiple of {TILE}, got {k}")
    value_dim, groups = width - key_dim, heads // kv_heads
    # Without a cache the kernel is given tensors that it does not touch.
    cached = RowCache(query, tokens, tokens) if cache is None else cache
    _rows_kernel[(row_slots(k), batch * kv_heads)](
        query, pool, table, tokens, *partials, *cached, kv_heads, table.stride(0), k,
        partials.lse.shape[2], first_slot, scale, 1.0 if softcap is None else softcap,
        query.stride(0), query.stride(1), *pool.stride()[:3],
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=key_dim, DV=value_dim,
        D_P=padded(key_dim), DV_P=padded(value_dim), TILE=TILE, PAGE=page, CAPPED=softcap is not None,
        CACHED=0 if cache is None else cache.tokens.shape[2], OTHERS=min(OTHERS, triton.next_power_of_2(k)),
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    q_ptr,
    base_ptr,
    table_ptr,
    ids_ptr,
    out_ptr,
    lse_ptr,
    near_ptr,
    near_ids_ptr,
    fetched_ptr,
    kv_heads,
    columns,
    n_ids,
    slots,
    first_slot,
    sm_scale,
    softcap,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_page: tl.int64,
    stride_token: tl.int64,
    stride_head: tl.int64,
    G: tl.constexpr,
    G_P: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    DV_P: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    CACHED: tl.constexpr,
    OTHERS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    i_k = i_tile * TILE + tl.arange(0, TILE)
    i_d = tl.arange(0, D_P)
    i_v = tl.arange(0, DV_P)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    ids = tl.load(ids_ptr + i_row * n_ids + i_k)
    m_k = ids >= 0
    page = tl.load(table_ptr + i_batch * columns + ids // PAGE, mask=m_k, other=0).to(tl.int64)
    o_row = page * stride_page + (ids % PAGE).to(tl.int64) * stride_token + i_kv * stride_head
    m_d, m_v = (i_d < D)[None, :], (i_v < DV)[None, :]
    m_far, m_stays, held = m_k, m_k, ids
    i_slot = i_row * CACHED
    if CACHED > 0:
        i_slot += ids % CACHED
        held = tl.load(near_ids_ptr + i_slot, mask=m_k, other=-1)
        m_far = m_k & (held != ids)
        taken = tl.zeros((TILE,), dtype=tl.int32)  # whether the slot is another token's
        for first in range(0, n_ids, OTHERS):
            i_other = first + tl.arange(0, OTHERS)
            other = tl.load(ids_ptr + i_row * n_ids + i_other, mask=i_other < n_ids, other=-1)
            meets = (other % CACHED)[None, :] == (ids % CACHED)[:, None]
            meets &= (other >= 0)[None, :]
            ahead = (other[None, :] < ids[:, None]) | (other[None, :] == held[:, None])
            taken = tl.maximum(taken, tl.max((meets & ahead).to(tl.int32), axis=1))
        m_stays = m_far & (taken == 0)
    p_row = base_ptr + o_row
    p_near = near_ptr + i_slot * (D + DV)
    if CACHED > 0:
        p_row = tl.where(held == ids, p_near, p_row)
    key = tl.load(p_row[:, None] + i_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
    value = tl.load(p_row[:, None] + D + i_v[None, :], mask=m_k[:, None] & m_v, other=0.0)
    if CACHED > 0:
        tl.debug_barrier()  # every warp has read the slots' tokens before the first one writes them
        tl.store(p_near[:, None] + i_d[None, :], key, mask=m_stays[:, None] & m_d)
        tl.store(p_near[:, None] + D + i_v[None, :], value, mask=m_stays[:, None] & m_v)
        tl.store(near_ids_ptr + i_slot, ids, mask=m_stays)
        tl.atomic_add(fetched_ptr, tl.sum(m_far.to(tl.int64), axis=0), sem="relaxed")
    q = tl.load(
        q_ptr + i_batch * stride_qb + (i_kv * G + i_g)[:, None] * stride_qh + i_d[None, :],
        mask=m_g[:, None] & (i_d < D)[None, :],
        other=0.0,
    )
    score = tl.dot(q, tl.trans(key), input_precision="ieee") * sm_scale
    if CAPPED:
        score = capped(score, softcap)
    score = tl.where(m_k[None, :], score, float("-inf"))
    top = tl.max(score, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(score - top[:, None])
    total = tl.sum(weights, axis=1)
    out = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    o_out = (i_row * G + i_g) * slots + first_slot + i_tile
    tl.store(
        out_ptr + o_out[:, None] * DV + i_v[None, :], out, mask=m_g[:, None] & (i_v < DV)[None, :]
    )
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + o_out, lse, mask=m_g)
