"""Which tokens are attended to exactly? The k best per KV head, by the vote of its query heads.

A token's vote is the largest of its softmaxed scores over the group. The k best tokens lie in the k blocks with
the best block votes, since each of those holds a token with at least that vote. `select_blocks` finds these, which the
tail then leaves alone; `select_tokens` looks into them, and meanwhile the tail goes over all the others.

Nothing is sorted: the k-th largest vote is found a few bits at a time, by counting how many votes reach each of
several thresholds. Up to 4,096 votes stay in registers; more are read again from memory for every pass, so that
their number alone needs no stack.

Votes are compared in steps of 1/128 of their logarithm, down to -32: twelve bits. The scores that they come from are
several times as uncertain. Of equal votes the lower token wins, whatever the timing.

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

LARGEST_K = 4096


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        tokens: int32 [B, H_kv, k], ascending; -1 in slots that no token was left for, at the end.
        blocks: int32 [B, H_kv, k]: the blocks that hold them, and were looked into; likewise.
        lse: float32 [B, H_q]: log-sum-exp of all scores, selected ones included.
        votes: int32 [B, H_kv, N / BLOCK, to a power of two]: scratch, of blocks.
        seen: int32 [B, H_kv, k * BLOCK]: scratch, of tokens.
    """

    tokens: Tensor
    blocks: Tensor
    lse: Tensor
    votes: Tensor
    seen: Tensor


def empty_selection(
    batch: int, heads: int, kv_heads: int, n_tokens: int, k: int, device: torch.device
) -> Selection:
    """Room for k of N tokens per KV head.

    Args:
        batch: Sequences.
        heads: Query heads.
        kv_heads: KV heads.
        n_tokens: N, a multiple of BLOCK.
        k: A power of two.
        device: Where.

    Raises:
        ValueError: k is not a power of two, or larger than LARGEST_K.
    """
    if k & (k - 1) or not 0 < k <= LARGEST_K:
        raise ValueError(f"k must be a power of two up to {LARGEST_K:,}, got {k:,}")

    def room(n: int) -> Tensor:
        return torch.empty((batch, kv_heads, n), dtype=torch.int32, device=device)

    lse = torch.empty((batch, heads), device=device)
    blocks = triton.next_power_of_2(n_tokens // BLOCK)
    return Selection(room(k), room(k), lse, room(blocks), room(k * BLOCK))


VOTES, WARPS = 4096, 8  # votes that are looked at together
UNROLLED: tl.constexpr = tl.constexpr(8)  # chunks that stay in registers of twice as many warps


def _chunk(n: int, heads: int) -> int:
    """Of n votes so many at once; each is made from the scores of so many heads."""
    return min(n, VOTES * 4 // max(4, heads))


def _looks_itself(k: int, heads: int) -> bool:
    """Whether one program can make the votes of all tokens that it compares; else many make them beforehand."""
    return _chunk(k * BLOCK, heads) == k * BLOCK


def select_blocks(scratch: ScanScratch, n_blocks: Tensor, selection: Selection) -> None:
    """Finds the blocks that the k best tokens are in, and marks them: their `total` becomes negative.

    Where there are too many for one program, the votes of their tokens are looked up as well.

    Args:
        scratch: Of `scan`.
        n_blocks: int32 [B] on the device: valid blocks.
        selection: `blocks` and `lse` are written, and `seen`.
    """
    batch, kv_heads, k = selection.blocks.shape
    capacity, groups = scratch.top.shape[2:]
    heads, blocks = triton.next_power_of_2(groups), triton.next_power_of_2(capacity)
    _blocks_kernel[(batch * kv_heads,)](
        scratch.top, scratch.total, n_blocks, selection.blocks, selection.lse, selection.votes,
        kv_heads, capacity, G=groups, G_P=heads, K=k, BLOCKS=blocks, CHUNK=_chunk(blocks, heads),
        PLAIN=INTERPRETED, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    if not _looks_itself(k, heads):
        part = min(1024, _chunk(k * BLOCK, heads))
        _votes_kernel[(k * BLOCK // part, batch * kv_heads)](
            scratch.scores, scratch.top, selection.blocks, selection.lse, selection.seen, capacity,
            G=groups, G_P=heads, K=k, BLOCK=BLOCK, PART=part,
        )  # fmt: skip


def select_tokens(scratch: ScanScratch, selection: Selection) -> None:
    """Selects tokens, and takes them out of the scores: they are no part of the tail.

    Args:
        scratch: Of `scan`, after `select_blocks`; selected tokens get a score of -inf.
        selection: `tokens` is written.
    """
    batch, kv_heads, k = selection.blocks.shape
    capacity, groups = scratch.top.shape[2:]
    heads = triton.next_power_of_2(groups)
    alone = _looks_itself(k, heads)
    _tokens_kernel[(batch * kv_heads,)](
        scratch.scores, scratch.top, selection.tokens, selection.blocks, selection.lse, selection.seen, capacity,
        G=groups, G_P=heads, K=k, BLOCK=BLOCK, CHUNK=k * BLOCK if alone else min(k * BLOCK, VOTES) // 2,
        num_warps=WARPS if alone else 2 * WARPS, num_stages=1,
    )  # fmt: skip


@triton.jit
def _steps(votes):
    """Votes as numbers of 12 bits; 0 for a vote of -inf alone."""
    steps = tl.minimum(tl.maximum(votes * 128.0 + 4094.0, 0.0), 4094.0).to(tl.int32)
    return tl.where(votes > float("-inf"), steps + 1, 0)


@triton.jit
def _count(counts, votes, trial, step):
    """Adds three counts of ten bits each: of votes that reach `trial` and one, two and three steps."""
    counts += (votes >= trial + step).to(tl.int32)
    counts += (votes >= trial + 2 * step).to(tl.int32) << 10
    return counts + ((votes >= trial + 3 * step).to(tl.int32) << 20)


@triton.jit
def _keep_best(
    votes, votes_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Writes which K of N votes are the best, in ascending order; of equal ones the first. None of 0 is.

    All votes are given if CHUNK is N; else they are read.
    """
    i_c = tl.arange(0, CHUNK)
    limit = tl.zeros((), dtype=tl.int32)  # the K-th largest vote, or 0 if there are fewer
    n_above = tl.zeros((), dtype=tl.int32)  # votes above it
    step = tl.full((), 1 << 10, dtype=tl.int32)
    for _ in range(6):  # two of twelve bits each
        counts = tl.zeros((CHUNK,), dtype=tl.int32)
        if CHUNK == N:
            counts = _count(counts, votes, limit, step)
        elif N <= UNROLLED * CHUNK:
            for first in tl.static_range(0, N, CHUNK):
                counts = _count(counts, tl.load(votes_ptr + first + i_c), limit, step)
        else:
            for first in range(0, N, CHUNK):
                counts = _count(counts, tl.load(votes_ptr + first + i_c), limit, step)
        # One sum of all three, twenty bits each.
        wide = (counts & 0x3FF).to(tl.int64) + (((counts >> 10) & 0x3FF).to(tl.int64) << 20)
        total = tl.sum(wide + ((counts >> 20).to(tl.int64) << 40), axis=0)
        one = (total & 0xFFFFF).to(tl.int32)
        two = ((total >> 20) & 0xFFFFF).to(tl.int32)
        three = (total >> 40).to(tl.int32)
        # The K-th largest reaches as many trials as enough votes reach. Of the others, the least says how many votes
        # are above it, if none of the next passes comes closer.
        n_enough = tl.where(one >= K, 1, 0) + tl.where(two >= K, 1, 0) + tl.where(three >= K, 1, 0)
        above = tl.where(one >= K, tl.where(two >= K, tl.where(three >= K, 0, three), two), one)
        n_above = tl.maximum(n_above, above)
        limit += n_enough * step
        step = step // 4
    room = K - n_above
    above_before = tl.zeros((), dtype=tl.int32)
    tied_before = tl.zeros((), dtype=tl.int32)
    for first in range(0, N, CHUNK):
        if CHUNK < N:
            votes = tl.load(votes_ptr + first + i_c)
        above = (votes > limit).to(tl.int32)
        tied = ((votes > 0) & (votes == limit)).to(tl.int32)
        before = tl.cumsum(above + (tied << 16), axis=0)  # two counts; each is below 2^15
        i_above = above_before + (before & 0xFFFF) - above
        i_tied = tied_before + (before >> 16) - tied
        best = (above + tied * (i_tied < room).to(tl.int32)) > 0
        tl.store(out_ptr + i_above + tl.minimum(i_tied, room), first + i_c, mask=best)
        if CHUNK < N:
            above_before += tl.sum(above, axis=0)
            tied_before += tl.sum(tied, axis=0)


@triton.jit
def _block_votes(top_ptr, i_b, n_blocks, i_g, shift, G: tl.constexpr):
    m_stat = (i_b < n_blocks)[:, None] & (i_g < G)[None, :]
    o_stat = i_b[:, None] * G + i_g[None, :]
    top = tl.load(top_ptr + o_stat, mask=m_stat, other=float("-inf"))
    return _steps(tl.max(top - shift[None, :], axis=1))


@triton.jit
def _blocks_kernel(
    top_ptr,
    total_ptr,
    n_blocks_ptr,
    blocks_ptr,
    lse_ptr,
    votes_ptr,
    kv_heads,
    capacity_blocks,
    G: tl.constexpr,
    G_P: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_c = tl.arange(0, CHUNK)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    top_ptr += i_row * capacity_blocks * G
    total_ptr += i_row * capacity_blocks * G
    votes_ptr += i_row * BLOCKS
    blocks_ptr += i_row * K
    tl.store(blocks_ptr + tl.arange(0, K), tl.full((K,), -1, dtype=tl.int32))
    peak = tl.full((G_P,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((G_P,), dtype=tl.float32)
    for first in range(0, n_blocks, CHUNK):
        m_stat = (first + i_c < n_blocks)[:, None] & m_g[None, :]
        o_stat = (first + i_c)[:, None] * G + i_g[None, :]
        top = tl.load(top_ptr + o_stat, mask=m_stat, other=float("-inf"))
        total = tl.load(total_ptr + o_stat, mask=m_stat, other=0.0)
        higher = tl.maximum(peak, tl.max(top, axis=0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass *= exp(peak - safe, PLAIN)
        mass += tl.sum(total * exp(top - safe[None, :], PLAIN), axis=0)
        peak = higher
    lse = tl.where(mass > 0, peak + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    tl.store(lse_ptr + i_row * G + i_g, lse, mask=m_g)
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    votes = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, BLOCKS, CHUNK):
        votes = _block_votes(top_ptr, first + i_c, n_blocks, i_g, shift, G)
        if CHUNK < BLOCKS:
            tl.store(votes_ptr + first + i_c, votes)
    tl.debug_barrier()
    _keep_best(votes, votes_ptr, blocks_ptr, BLOCKS, K, CHUNK)
    tl.debug_barrier()
    chosen = tl.load(blocks_ptr + tl.arange(0, K))
    o_mark = chosen[:, None] * G + i_g[None, :]
    m_mark = (chosen >= 0)[:, None] & m_g[None, :]
    marked = tl.load(total_ptr + o_mark, mask=m_mark, other=0.0)
    tl.store(total_ptr + o_mark, -marked, mask=m_mark)


@triton.jit
def _token_votes(scores_ptr, top_ptr, blocks_ptr, i_n, i_g, shift, G: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    block = tl.load(blocks_ptr + i_n // BLOCK)
    m_score = (block >= 0)[:, None] & (i_g < G)[None, :]
    top = tl.load(top_ptr + block[:, None] * G + i_g[None, :], mask=m_score, other=0.0)
    o_score = (block * BLOCK + i_n % BLOCK)[:, None] * G + i_g[None, :]
    score = tl.load(scores_ptr + o_score, mask=m_score, other=float("-inf")).to(tl.float32)
    return _steps(tl.max(score + (top - shift[None, :]), axis=1))


@triton.jit
def _votes_kernel(
    scores_ptr,
    top_ptr,
    blocks_ptr,
    lse_ptr,
    seen_ptr,
    capacity_blocks,
    G: tl.constexpr,
    G_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_g = tl.arange(0, G_P)
    i_n = tl.program_id(0) * PART + tl.arange(0, PART)
    top_ptr += i_row * capacity_blocks * G
    scores_ptr += i_row * capacity_blocks * BLOCK * G
    lse = tl.load(lse_ptr + i_row * G + i_g, mask=i_g < G, other=0.0)
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    votes = _token_votes(scores_ptr, top_ptr, blocks_ptr + i_row * K, i_n, i_g, shift, G, BLOCK)
    tl.store(seen_ptr + i_row * K * BLOCK + i_n, votes)


@triton.jit
def _tokens_kernel(
    scores_ptr,
    top_ptr,
    tokens_ptr,
    blocks_ptr,
    lse_ptr,
    seen_ptr,
    capacity_blocks,
    G: tl.constexpr,
    G_P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    N: tl.constexpr = K * BLOCK
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_k = tl.arange(0, K)
    top_ptr += i_row * capacity_blocks * G
    scores_ptr += i_row * capacity_blocks * BLOCK * G
    blocks_ptr += i_row * K
    tokens_ptr += i_row * K
    seen_ptr += i_row * N
    tl.store(tokens_ptr + i_k, tl.full((K,), -1, dtype=tl.int32))
    votes = tl.zeros((CHUNK,), dtype=tl.int32)
    if CHUNK == N:
        lse = tl.load(lse_ptr + i_row * G + i_g, mask=m_g, other=0.0)
        shift = tl.where(lse == float("-inf"), 0.0, lse)
        votes = _token_votes(scores_ptr, top_ptr, blocks_ptr, tl.arange(0, N), i_g, shift, G, BLOCK)
    tl.debug_barrier()
    _keep_best(votes, seen_ptr, tokens_ptr, N, K, CHUNK)
    tl.debug_barrier()
    # So far they are places in the listed blocks. Selected tokens are taken out of the scores.
    place = tl.load(tokens_ptr + i_k)
    m_k = place >= 0
    block = tl.load(blocks_ptr + place // BLOCK, mask=m_k, other=0)
    token = tl.where(m_k, block * BLOCK + place % BLOCK, -1)
    tl.store(tokens_ptr + i_k, token)
    gone = tl.full((K, G_P), float("-inf"), dtype=tl.float16)
    o_gone = token[:, None] * G + i_g[None, :]
    tl.store(scores_ptr + o_gone, gone, mask=m_k[:, None] & m_g[None, :])
