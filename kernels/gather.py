"""How are selected tokens attended to exactly? From their rows in pinned host memory, read by the kernel itself.

Zero-copy: the kernel's loads go over PCIe, so no host code, no page cache and no staging is needed; 64 rows of 512
bytes a KV head are 8.4 MB a step for an 8B model.

The references are `gather` and `attend` of `offload.kernels.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import Part, padded
from offload.kernels.scan import INTERPRETED


def attend_rows(
    query: Tensor, pool: Tensor, table: Tensor, tokens: Tensor, *, key_dim: int, scale: float
) -> Part:
    """Attends to selected tokens of each KV head.

    Args:
        query: [B, H_q, D], last stride 1, on the device.
        pool: [pages, P, H_kv, D + D_v] in the dtype of `query`: host pages, pinned (any tensor on a CPU).
        table: int32 [B, columns] on the query's device: the page of each block of P tokens.
        tokens: int32 [B, H_kv, k], -1 for none; k a power of two of at least 16.
        key_dim: D.
        scale: Factor on the dot products.

    Returns:
        `out` float32 [B, H_q, 1, D_v], `lse` [B, H_q, 1]; zeros and -inf where nothing was selected.

    Raises:
        ValueError: k is not a power of two of at least 16.
    """
    batch, heads, _ = query.shape
    page, kv_heads, width = pool.shape[1:]
    k = tokens.shape[-1]
    if k < 16 or k & (k - 1):
        raise ValueError(f"k must be a power of two of at least 16, got {k}")
    value_dim, groups = width - key_dim, heads // kv_heads
    out = torch.empty((batch, heads, 1, value_dim), device=query.device)
    lse = torch.empty((batch, heads, 1), device=query.device)
    _rows_kernel[(batch * kv_heads,)](
        query, pool, table, tokens, out, lse, kv_heads, table.shape[1], scale,
        query.stride(0), query.stride(1), *pool.stride()[:3],
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=key_dim, DV=value_dim,
        D_P=padded(key_dim), DV_P=padded(value_dim), K=k, PAGE=page, PLAIN=INTERPRETED,
    )  # fmt: skip
    return Part(out, lse)


@triton.jit
def _rows_kernel(
    q_ptr,
    base_ptr,
    table_ptr,
    ids_ptr,
    o_ptr,
    lse_ptr,
    kv_heads,
    columns,
    sm_scale,
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
    K: tl.constexpr,
    PAGE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Attention over K rows of pinned host memory, read by the kernel itself (zero-copy)."""
    i_row = tl.program_id(0).to(tl.int64)
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    i_k = tl.arange(0, K)
    i_d = tl.arange(0, D_P)
    i_v = tl.arange(0, DV_P)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    ids = tl.load(ids_ptr + i_row * K + i_k)
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
    if PLAIN:
        score = tl.dot(q.to(tl.float32), tl.trans(key.to(tl.float32))) * sm_scale
    else:
        score = tl.dot(q, tl.trans(key)) * sm_scale
    score = tl.where(m_k[None, :], score, float("-inf"))
    top = tl.max(score, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(score - top[:, None])
    total = tl.sum(weights, axis=1)
    if PLAIN:  # noqa: SIM108 - Triton compiles both sides of an expression
        out = tl.dot(weights, value.to(tl.float32))
    else:
        out = tl.dot(weights.to(value.dtype), value)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    o_head = i_row * G + i_g
    tl.store(
        o_ptr + o_head[:, None] * DV + i_v[None, :], out, mask=m_g[:, None] & (i_v < DV)[None, :]
    )
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + o_head, lse, mask=m_g)
