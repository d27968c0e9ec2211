"""Which tokens are attended to exactly? The k best per KV head, by the vote of its query heads.

A token's vote is the largest of its softmaxed scores over the group. The k best tokens lie in the k blocks with
the best block votes, since each of those holds a token with at least that vote; so only k blocks of scores are
looked into. Nothing is sorted: the k-th largest vote is found bit by bit, by counting. Of equal votes the lower
token wins, whatever the timing.

The reference is `offload.kernels.reference.select`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK
from offload.kernels.scan import ScanScratch


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        tokens: int32 [B, H_kv, k], ascending; -1 in slots that no token was left for, at the end.
        blocks: int32 [B, H_kv, k]: scratch of the kernel.
        lse: float32 [B, H_q]: log-sum-exp of all scores, selected ones included.
        tail_lse: float32 [B, H_q]: of those that were not selected. Computed from them, not by subtraction: a
            selected token with nearly all the mass costs the tail no precision.
    """

    tokens: Tensor
    blocks: Tensor
    lse: Tensor
    tail_lse: Tensor


def empty_selection(
    batch: int, heads: int, kv_heads: int, k: int, device: torch.device
) -> Selection:
    """Room for k tokens per KV head; k is a power of two."""
    return Selection(
        torch.empty((batch, kv_heads, k), dtype=torch.int32, device=device),
        torch.empty((batch, kv_heads, k), dtype=torch.int32, device=device),
        torch.empty((batch, heads), device=device),
        torch.empty((batch, heads), device=device),
    )


def select(scratch: ScanScratch, n_blocks: Tensor, selection: Selection) -> None:
    """Selects tokens, and takes them out of the scores: they are no part of the tail.

    Args:
        scratch: Of `scan`; selected tokens get a score of -inf, and their blocks' top and total become those of
            the other tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        selection: Written.

    Raises:
        ValueError: k is not a power of two.
    """
    batch, kv_heads, k = selection.tokens.shape
    if k & (k - 1):
        raise ValueError(f"k must be a power of two, got {k}")
    heads, capacity = scratch.top.shape[1], scratch.top.shape[2]
    _select_kernel[(batch * kv_heads,)](
        *scratch, n_blocks, *selection, kv_heads, capacity,
        G=heads // kv_heads, K=k, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(capacity), num_warps=8,
    )  # fmt: skip


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(keys, K: tl.constexpr):
    """The largest int32 that at least K keys reach: the K-th largest key, or the least int32 if there are fewer."""
    limit = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= K, 0, -2147483648).to(tl.int32)
    for i in range(31):
        trial = limit + (1 << (30 - i))
        limit = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= K, trial, limit)
    return limit


@triton.jit
def _best(votes, valid, K: tl.constexpr):
    """Which K of the votes are the best; of equal ones the first."""
    keys = tl.where(valid, _ordered(votes), -2147483648)
    limit = _threshold(keys, K)
    above = valid & (keys > limit)
    tied = valid & (keys == limit)
    room = K - tl.sum(above.to(tl.int32))
    return above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))


@triton.jit
def _log_sum_exp(top, total):
    """Of blocks with these best scores and sums relative to them; -inf if all are empty."""
    peak = tl.max(top, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    all_ = tl.sum(total * tl.exp(top - safe), axis=0)
    return tl.where(all_ > 0, safe + tl.log(tl.where(all_ > 0, all_, 1.0)), float("-inf"))


@triton.jit
def _select_kernel(
    scores_ptr,
    top_ptr,
    total_ptr,
    n_blocks_ptr,
    tokens_ptr,
    blocks_ptr,
    lse_ptr,
    tail_lse_ptr,
    kv_heads,
    capacity_blocks,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_b = tl.arange(0, BLOCKS)
    m_b = i_b < n_blocks
    vote = tl.full((BLOCKS,), float("-inf"), dtype=tl.float32)
    for g in tl.static_range(G):
        o_stat = (i_row * G + g) * capacity_blocks + i_b
        top = tl.load(top_ptr + o_stat, mask=m_b, other=float("-inf"))
        total = tl.load(total_ptr + o_stat, mask=m_b, other=0.0)
        lse = _log_sum_exp(top, total)
        tl.store(lse_ptr + i_row * G + g, lse)
        vote = tl.maximum(vote, top - tl.where(lse == float("-inf"), 0.0, lse))
    best = _best(vote, m_b, K)
    i_k = tl.arange(0, K)
    tl.store(blocks_ptr + i_row * K + i_k, tl.full((K,), -1, dtype=tl.int32))
    tl.debug_barrier()
    rank = tl.cumsum(best.to(tl.int32), axis=0) - 1
    tl.store(blocks_ptr + i_row * K + rank, i_b, mask=best)
    tl.debug_barrier()
    block = tl.load(blocks_ptr + i_row * K + i_k)
    i_t = tl.arange(0, BLOCK)
    token = block[:, None] * BLOCK + i_t[None, :]
    m_t = (block >= 0)[:, None] & (i_t >= 0)[None, :]
    votes = tl.full((K, BLOCK), float("-inf"), dtype=tl.float32)
    for g in tl.static_range(G):
        lse = tl.load(lse_ptr + i_row * G + g)
        o_score = (i_row * G + g) * capacity_blocks * BLOCK + token
        score = tl.load(scores_ptr + o_score, mask=m_t, other=float("-inf"))
        votes = tl.maximum(votes, score - tl.where(lse == float("-inf"), 0.0, lse))
    flat = tl.reshape(votes, (K * BLOCK,))
    ids = tl.reshape(token, (K * BLOCK,))
    chosen = _best(flat, flat > float("-inf"), K)
    tl.store(tokens_ptr + i_row * K + i_k, tl.full((K,), -1, dtype=tl.int32))
    tl.debug_barrier()
    rank = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(tokens_ptr + i_row * K + rank, ids, mask=chosen)
    gone = tl.full((K * BLOCK,), float("-inf"), dtype=tl.float32)
    kept = m_t & (tl.reshape(chosen.to(tl.int32), (K, BLOCK)) == 0)
    for g in tl.static_range(G):
        o_score = (i_row * G + g) * capacity_blocks * BLOCK
        score = tl.load(scores_ptr + o_score + token, mask=kept, other=float("-inf"))
        tl.store(scores_ptr + o_score + ids, gone, mask=chosen)
        top = tl.max(score, axis=1)  # [K], of each block that may have lost tokens
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp(score - safe[:, None]), axis=1)
        o_stat = (i_row * G + g) * capacity_blocks
        tl.store(top_ptr + o_stat + block, top, mask=block >= 0)
        tl.store(total_ptr + o_stat + block, total, mask=block >= 0)
    tl.debug_barrier()
    for g in tl.static_range(G):
        o_stat = (i_row * G + g) * capacity_blocks + i_b
        top = tl.load(top_ptr + o_stat, mask=m_b, other=float("-inf"))
        total = tl.load(total_ptr + o_stat, mask=m_b, other=0.0)
        tl.store(tail_lse_ptr + i_row * G + g, _log_sum_exp(top, total))
