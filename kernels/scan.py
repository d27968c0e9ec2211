"""What does each query head think of every low-bit key? Scores without a dequantized copy in memory.

Tokens are the rows of the product and query heads its columns: eight columns are the least that the tensor cores
take, and a group rarely has more heads. One warp works on a block: it waits for nobody.

The reference is `offload.kernels.reference.scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK, Codes, padded
from offload.kernels.unpack import INTERPRETED, decoded, exp
from offload.kernels.window import capped

WARPS, STAGES = 1, 2
REGISTERS = 112
"""Of a thread, of the tail of four bits too: so many that kernels beside them find room on a card full of them."""


def blocks_per_program(blocks: int, heads: int) -> int:
    """So many blocks a warp works on, one after another; also of the tail.

    On an H100, where 2,048 warps find room at once, 131,072 tokens of 8 KV heads take least with 8, 32,768 with 4.

    Args:
        blocks: That there is room for.
        heads: KV heads of all sequences.
    """
    if blocks * heads <= 4096:
        return 4
    return min(32, max(8, 1 << (blocks * heads // 2048).bit_length() - 1))


class ScanScratch(NamedTuple):
    """Memory that one scan writes and the next ones use again; a layer's is free when its step is over.

    Attributes:
        scores: float16 [B, H_kv, N, G], less the best of the block: what weighs most is stored most precisely.
        top: float32 [B, H_kv, N / BLOCK, G], the best score of each block.
        total: float32 [B, H_kv, N / BLOCK, G], the sum of exp(score - top) over the block; negative once
            `offload.kernels.select` has marked the block.
    """

    scores: Tensor
    top: Tensor
    total: Tensor


def scan_scratch(
    batch: int, kv_heads: int, groups: int, n_tokens: int, device: torch.device
) -> ScanScratch:
    """Scratch for N tokens, a multiple of BLOCK."""
    blocks = n_tokens // BLOCK
    return ScanScratch(
        torch.empty((batch, kv_heads, n_tokens, groups), dtype=torch.float16, device=device),
        torch.empty((batch, kv_heads, blocks, groups), device=device),
        torch.empty((batch, kv_heads, blocks, groups), device=device),
    )


def scan(
    query: Tensor,
    keys: Codes,
    n_blocks: Tensor,
    scratch: ScanScratch,
    *,
    bits: int,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Scores every query head against the first blocks of low-bit keys.

    Args:
        query: [B, H_q, D], last stride 1. Rounded to float16 after scaling.
        keys: Codes of up to N tokens.
        n_blocks: int32 [B] on the device: blocks that are valid; what lies behind is not touched.
        scratch: Written.
        bits: Of the codes.
        scale: Factor on the dot products.
        padding: int32 [B] on the device: so many first tokens are padding and get -inf; None for none.
        softcap: Scores become softcap * tanh(scores / softcap).
    """
    batch, heads, head_size = query.shape
    kv_heads, capacity = keys.meta.shape[1], keys.n_blocks
    groups, width = heads // kv_heads, padded(head_size)
    each = blocks_per_program(capacity, batch * kv_heads)
    grid = (triton.cdiv(capacity, each), batch * kv_heads)
    _scan_kernel[grid](
        query, keys.planes[0], keys.planes[-1], keys.meta, n_blocks,
        n_blocks if padding is None else padding, *scratch,
        kv_heads, capacity, scale, 1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        G=groups, G_P=max(8, triton.next_power_of_2(groups)), D=head_size, D_P=width,
        BLOCK=BLOCK, BITS=bits, BLOCKS_PER_PROGRAM=each, PADDED=padding is not None,
        CAPPED=softcap is not None, PLAIN=INTERPRETED,
        num_warps=WARPS if width <= 128 else 2 * WARPS, num_stages=STAGES, maxnreg=REGISTERS,
    )  # fmt: skip


@triton.jit
def scaled_query(q_ptr, i_g, stride_qg, first, sm_scale, G: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """[RUN, G_P]: channels from `first` on of a group's scaled queries."""
    i_c = first + tl.arange(0, RUN)
    mask = (i_c < D)[:, None] & (i_g < G)[None, :]
    q = tl.load(q_ptr + i_g[None, :] * stride_qg + i_c[:, None], mask=mask, other=0.0)
    q = q.to(tl.float32) * sm_scale
    return q if PLAIN else q.to(tl.float16)


@triton.jit
def _add_scores(
    acc, q, low, high, meta_ptr, BITS: tl.constexpr, J: tl.constexpr, RUN: tl.constexpr, D_P: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    i_u = tl.arange(0, RUN)
    key = decoded(low, high, meta_ptr, i_u, i_u >= 0, BITS, J, RUN, False, PLAIN)
    return tl.dot(key, q, acc, input_precision="ieee")


@triton.jit
def _scan_kernel(
    q_ptr,
    low_ptr,
    high_ptr,
    meta_ptr,
    n_blocks_ptr,
    padding_ptr,
    scores_ptr,
    top_ptr,
    total_ptr,
    kv_heads,
    capacity_blocks,
    sm_scale,
    softcap,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    G: tl.constexpr,
    G_P: tl.constexpr,
    D: tl.constexpr,
    D_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    RUNS: tl.constexpr = 2 if BITS == 4 else 4
    RUN: tl.constexpr = D_P // RUNS
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    n_blocks = tl.load(n_blocks_ptr + i_batch)
    first = tl.program_id(0) * BLOCKS_PER_PROGRAM
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, BLOCK)
    i_u = tl.arange(0, RUN)
    q_ptr += i_batch * stride_qb + i_kv * G * stride_qh
    q0 = scaled_query(q_ptr, i_g, stride_qh, 0 * RUN, sm_scale, G, D, RUN, PLAIN)
    q1 = scaled_query(q_ptr, i_g, stride_qh, 1 * RUN, sm_scale, G, D, RUN, PLAIN)
    q2, q3 = q0, q1
    if RUNS > 2:
        q2 = scaled_query(q_ptr, i_g, stride_qh, 2 * RUN, sm_scale, G, D, RUN, PLAIN)
        q3 = scaled_query(q_ptr, i_g, stride_qh, 3 * RUN, sm_scale, G, D, RUN, PLAIN)
    hidden = 0
    if PADDED:
        hidden = tl.load(padding_ptr + i_batch)
    for block in range(first, tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)):
        o_block = i_row * capacity_blocks + block
        meta = meta_ptr + o_block * 2 * D_P
        low = tl.load(low_ptr + (o_block * BLOCK + i_t)[:, None] * RUN + i_u[None, :])
        high = low
        if BITS == 3:
            o_high = (o_block * BLOCK + i_t)[:, None] * (RUN // 2) + (i_u % (RUN // 2))[None, :]
            high = tl.load(high_ptr + o_high)
        acc = tl.zeros((BLOCK, G_P), dtype=tl.float32)
        acc = _add_scores(acc, q0, low, high, meta, BITS, 0, RUN, D_P, PLAIN)
        acc = _add_scores(acc, q1, low, high, meta, BITS, 1, RUN, D_P, PLAIN)
        if RUNS > 2:
            acc = _add_scores(acc, q2, low, high, meta, BITS, 2, RUN, D_P, PLAIN)
            acc = _add_scores(acc, q3, low, high, meta, BITS, 3, RUN, D_P, PLAIN)
        score = acc
        if CAPPED:
            score = capped(score, softcap)
        if PADDED:
            score = tl.where((block * BLOCK + i_t < hidden)[:, None], float("-inf"), score)
        top = tl.max(score, axis=0)
        # A block of padding alone: sum 0, not NaN.
        score -= tl.where(top == float("-inf"), 0.0, top)[None, :]
        o_score = (o_block * BLOCK + i_t)[:, None] * G + i_g[None, :]
        tl.store(scores_ptr + o_score, score.to(tl.float16), mask=m_g[None, :])
        total = tl.sum(exp(score, PLAIN), axis=0)
        tl.store(top_ptr + o_block * G + i_g, top, mask=m_g)
        tl.store(total_ptr + o_block * G + i_g, total, mask=m_g)
