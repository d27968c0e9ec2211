"""Which tokens are attended to exactly? The k best per KV head, by the vote of its query heads.

A token's vote is the largest of its softmaxed scores over the group. The k best tokens lie in the k blocks with
the best block votes, since each of those holds a token with at least that vote; so only k blocks of scores are
looked into. Nothing is sorted: the k-th largest vote is found a few bits at a time, by counting how many votes
reach each of several thresholds.

Votes are compared in steps of 1/256 of their logarithm, down to 16 below the best (a ten-millionth of it): twelve
bits. The scores that they come from are ten times as uncertain. Of equal votes the lower token wins, whatever the
timing.

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
from offload.kernels.unpack import INTERPRETED, exp

# The k-th best block's vote is a bound: no token below it is among the best. If no more than so many times k tokens reach
# it, which is the rule, only those are looked at again.
NEAR = 4


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        tokens: int32 [B, H_kv, k], ascending; -1 in slots that no token was left for, at the end.
        blocks: int32 [B, H_kv, k]: scratch of the kernel.
        near: int32 [B, H_kv, 2, NEAR * k]: scratch of the kernel.
        lse: float32 [B, H_q]: log-sum-exp of all scores, selected ones included.
    """

    tokens: Tensor
    blocks: Tensor
    near: Tensor
    lse: Tensor


def empty_selection(
    batch: int, heads: int, kv_heads: int, k: int, device: torch.device
) -> Selection:
    """Room for k tokens per KV head; k is a power of two."""
    return Selection(
        torch.empty((batch, kv_heads, k), dtype=torch.int32, device=device),
        torch.empty((batch, kv_heads, k), dtype=torch.int32, device=device),
        torch.empty((batch, kv_heads, 2, NEAR * k), dtype=torch.int32, device=device),
        torch.empty((batch, heads), device=device),
    )


# Bits of the threshold that one pass finds. On an H100 64 of 131,072 tokens of 8 KV heads take 15.0 us with 2 bits and
# 8 warps, 16.8 us with 16; with 1, 3 and 4 bits 17.2, 16.9 and 18.9 us.
DIGIT, WARPS = 2, 8


def select(scratch: ScanScratch, n_blocks: Tensor, selection: Selection) -> None:
    """Selects tokens, and takes them out of the scores: they are no part of the tail.

    Args:
        scratch: Of `scan`; selected tokens get a score of -inf. `top` and `total` stay those of all tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        selection: Written.

    Raises:
        ValueError: k is not a power of two.
    """
    batch, kv_heads, k = selection.tokens.shape
    capacity, groups = scratch.top.shape[2:]
    if k & (k - 1):
        raise ValueError(f"k must be a power of two, got {k}")
    blocks = triton.next_power_of_2(capacity)
    _select_kernel[(batch * kv_heads,)](
        *scratch, n_blocks, *selection, kv_heads, capacity,
        G=groups, G_P=triton.next_power_of_2(groups), K=k, N_NEAR=NEAR * k, BLOCK=BLOCK,
        BLOCKS=blocks, DIGIT=DIGIT, PLAIN=INTERPRETED, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _threshold(keys, K: tl.constexpr, DIGIT: tl.constexpr):
    """The largest number of 12 bits that at least K keys reach: the K-th largest key, or 0 if there are fewer."""
    limit = tl.zeros((), dtype=tl.int32)
    i_trial = tl.arange(0, 2**DIGIT)
    shift = tl.full((), 12 - DIGIT, dtype=tl.int32)
    for _ in range(12 // DIGIT):
        trials = limit + (i_trial << shift)
        reached = tl.sum((keys[:, None] >= trials[None, :]).to(tl.int32), axis=0) >= K
        # Fewer and fewer keys reach higher trials, so how many are reached says which is the last one.
        limit += tl.maximum(tl.sum(reached.to(tl.int32), axis=0) - 1, 0) << shift
        shift -= DIGIT
    return limit


@triton.jit
def _steps(votes, peak):
    """Votes as numbers of 12 bits; 0 for a vote of -inf alone."""
    steps = tl.minimum(tl.maximum((votes - peak) * 256.0 + 4094.0, 0.0), 4094.0).to(tl.int32)
    return tl.where(votes > float("-inf"), steps + 1, 0)


@triton.jit
def _best(keys, K: tl.constexpr, DIGIT: tl.constexpr):
    """Which K of the keys are the best, of equal ones the first; how many of them come before each; the least of them.

    Keys of 0 are never among them.
    """
    limit = _threshold(keys, K, DIGIT)
    above = (keys > limit).to(tl.int32)
    tied = ((keys > 0) & (keys == limit)).to(tl.int32)
    room = K - tl.sum(above)
    before = tl.cumsum(above + (tied << 16), axis=0)  # two counts in one pass; each is below 2^15
    n_above, n_tied = (before & 0xFFFF) - above, (before >> 16) - tied
    chosen = (above + tied * (n_tied < room).to(tl.int32)) > 0
    return chosen, n_above + tl.minimum(n_tied, room), limit


@triton.jit
def _select_kernel(
    scores_ptr,
    top_ptr,
    total_ptr,
    n_blocks_ptr,
    tokens_ptr,
    blocks_ptr,
    near_ptr,
    lse_ptr,
    kv_heads,
    capacity_blocks,
    G: tl.constexpr,
    G_P: tl.constexpr,
    K: tl.constexpr,
    N_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIGIT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_b = tl.arange(0, BLOCKS)
    i_g = tl.arange(0, G_P)
    m_b = i_b < n_blocks
    m_stat = m_b[:, None] & (i_g < G)[None, :]
    o_stat = (i_row * capacity_blocks + i_b)[:, None] * G + i_g[None, :]
    top = tl.load(top_ptr + o_stat, mask=m_stat, other=float("-inf"))
    total = tl.load(total_ptr + o_stat, mask=m_stat, other=0.0)
    peak = tl.max(top, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(total * exp(top - safe[None, :], PLAIN), axis=0)
    lse = tl.where(mass > 0, safe + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    tl.store(lse_ptr + i_row * G + i_g, lse, mask=i_g < G)
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    vote = tl.max(top - shift[None, :], axis=1)
    best_vote = tl.max(vote, axis=0)
    best_vote = tl.where(best_vote == float("-inf"), 0.0, best_vote)
    best, rank, bound = _best(_steps(vote, best_vote), K, DIGIT)
    i_k = tl.arange(0, K)
    tl.store(blocks_ptr + i_row * K + i_k, tl.full((K,), -1, dtype=tl.int32))
    tl.debug_barrier()
    tl.store(blocks_ptr + i_row * K + rank, i_b, mask=best)
    tl.debug_barrier()
    # Only these blocks can hold one of the K best tokens.
    i_c = tl.arange(0, K * BLOCK)
    block = tl.load(blocks_ptr + i_row * K + i_c // BLOCK)
    token = block * BLOCK + i_c % BLOCK
    o_score = (i_row * capacity_blocks * BLOCK + token)[:, None] * G + i_g[None, :]
    m_score = (block >= 0)[:, None] & (i_g < G)[None, :]
    score = tl.load(scores_ptr + o_score, mask=m_score, other=float("-inf"))
    votes = tl.max(score - shift[None, :], axis=1)
    keys = _steps(votes, best_vote)
    tl.store(tokens_ptr + i_row * K + i_k, tl.full((K,), -1, dtype=tl.int32))
    near = (keys >= tl.maximum(bound, 1)).to(tl.int32)
    n_near = tl.sum(near)
    if n_near <= N_NEAR:
        o_near = i_row * 2 * N_NEAR
        place = tl.cumsum(near, axis=0) - 1
        tl.store(near_ptr + o_near + place, token, mask=near != 0)
        tl.store(near_ptr + o_near + N_NEAR + place, keys, mask=near != 0)
        tl.debug_barrier()
        i_n = tl.arange(0, N_NEAR)
        near_keys = tl.load(near_ptr + o_near + N_NEAR + i_n, mask=i_n < n_near, other=0)
        near_tokens = tl.load(near_ptr + o_near + i_n, mask=i_n < n_near, other=0)
        chosen_near, rank_near, _least = _best(near_keys, K, DIGIT)
        tl.store(tokens_ptr + i_row * K + rank_near, near_tokens, mask=chosen_near)
    else:
        tl.debug_barrier()
        chosen_of_all, rank_of_all, _least = _best(keys, K, DIGIT)
        tl.store(tokens_ptr + i_row * K + rank_of_all, token, mask=chosen_of_all)
    tl.debug_barrier()
    taken = tl.load(tokens_ptr + i_row * K + i_k)
    o_taken = (i_row * capacity_blocks * BLOCK + taken)[:, None] * G + i_g[None, :]
    gone = tl.full((K, G_P), float("-inf"), dtype=tl.float32)
    tl.store(scores_ptr + o_taken, gone, mask=(taken >= 0)[:, None] & (i_g < G)[None, :])
