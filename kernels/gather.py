"""How are selected tokens attended to exactly? From their rows in pinned host memory, read by the kernel itself.

Zero-copy: the kernel's loads go over PCIe, so no host code, no page cache and no staging is needed; 64 rows of 512
bytes a KV head are 8.4 MB a step for an 8B model.

The references are `gather` and `attend` of `offload.kernels.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import padded
from offload.kernels.window import capped

WARPS = 4
TILE = 16
"""Rows that one program reads: few, so that many programs have reads of the host under way."""


def row_slots(k: int) -> int:
    """Slots that k tokens per KV head take."""
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
) -> None:
    """Attends to selected tokens of each KV head.

    Args:
        query: [B, H_q, D], last stride 1, on the device.
        pool: [pages, P, H_kv, D + D_v] in the dtype of `query`: host pages, pinned (any tensor on a CPU).
        table: int32 [B, columns] on the query's device: the page of each block of P tokens.
        tokens: int32 [B, H_kv, k], -1 for none; k a multiple of TILE.
        partials: `row_slots(k)` slots are written.
        first_slot: The first of them.
        key_dim: D.
        scale: Factor on the dot products.
        softcap: Logits become softcap * tanh(logits / softcap).

    Raises:
        ValueError: k is not a multiple of TILE.
    """
    batch, heads, _ = query.shape
    page, kv_heads, width = pool.shape[1:]
    k = tokens.shape[-1]
    if k % TILE:
        raise ValueError(f"k must be a multiple of {TILE}, got {k}")
    value_dim, groups = width - key_dim, heads // kv_heads
    _rows_kernel[(row_slots(k), batch * kv_heads)](
        query, pool, table, tokens, *partials, kv_heads, table.stride(0), k,
        partials.lse.shape[2], first_slot, scale, 1.0 if softcap is None else softcap,
        query.stride(0), query.stride(1), *pool.stride()[:3],
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=key_dim, DV=value_dim,
        D_P=padded(key_dim), DV_P=padded(value_dim), TILE=TILE, PAGE=page, CAPPED=softcap is not None, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    q_ptr,
    base_ptr,
    table_ptr,
    ids_ptr,
    out_ptr,
    lse_ptr,
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
    key = tl.load(
        base_ptr + o_row[:, None] + i_d[None, :], mask=m_k[:, None] & (i_d < D)[None, :], other=0.0
    )
    value = tl.load(
        base_ptr + o_row[:, None] + D + i_v[None, :],
        mask=m_k[:, None] & (i_v < DV)[None, :],
        other=0.0,
    )
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
