"""What do all the other tokens add? The softmax-weighted mean of the low-bit values.

The weights are those of the scan's scores, from which the selected tokens were taken out by masking. A block whose
weights together are below a stated share in every query head of the group is not read: with share / blocks as the
limit of each, all skipped blocks together stay below the share of all weights, selected tokens' included.

It comes in two launches. `tail` goes over all blocks that hold no selected token and need not wait until it is known
which ones are selected; `tail_of_blocks` goes over those that do.

Channels are the rows of the product and query heads its columns, as in `offload.kernels.scan`. Weights and values meet
in bfloat16: it reaches down to 1e-38, so a selected token of nearly all the mass costs the others no precision.

The reference is `offload.kernels.reference.tail`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import BLOCK, GROUP, Codes
from offload.kernels.scan import ScanScratch, blocks_per_program
from offload.kernels.select import Selection
from offload.kernels.unpack import INTERPRETED, decoded, exp

SELECTED_PER_SPLIT, WARPS, STAGES = 2, 1, 2
REGISTERS = {2: 112, 3: None, 4: 112}
"""Of a thread, by bits: so few that all programs of a usual tail find room at once."""


def tail_slots(n_tokens: int, heads: int) -> int:
    """Slots that `tail` of N tokens takes; `heads` are KV heads of all sequences."""
    blocks = n_tokens // BLOCK
    return -(-blocks // blocks_per_program(blocks, heads))


def block_slots(k: int) -> int:
    """Slots that `tail_of_blocks` of k blocks takes."""
    return -(-k // SELECTED_PER_SPLIT)


def tail(
    scores: ScanScratch,
    selection: Selection,
    values: Codes,
    n_blocks: Tensor,
    partials: Partials,
    skipped: Tensor,
    *,
    first_slot: int,
    bits: int,
    head_size: int,
    share: float,
) -> None:
    """Attends to all blocks that `select_blocks` has not marked.

    Args:
        scores: Of `scan`.
        selection: Of `select_blocks`; only its `lse` is read.
        values: Codes of up to N tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        partials: `tail_slots(N, B * H_kv)` slots are written.
        skipped: float32 [B, H_q, as many], written: weights of blocks that were not read, as shares of all
            weights.
        first_slot: The first slot.
        bits: Of the codes.
        head_size: D_v.
        share: Blocks whose weights together may be left out, at most, as a share of all weights.
    """
    each = blocks_per_program(values.n_blocks, values.meta.shape[0] * values.meta.shape[1])
    _launch(
        scores, selection, values, n_blocks, partials, skipped, skipped.shape[2], 0,
        each, first_slot, bits, head_size, share,
    )  # fmt: skip


def tail_of_blocks(
    scores: ScanScratch,
    selection: Selection,
    values: Codes,
    partials: Partials,
    *,
    first_slot: int,
    bits: int,
    head_size: int,
) -> None:
    """Attends to what is not selected of the blocks that hold selected tokens.

    Args:
        scores: Of `scan`, after `select_tokens` took the selected ones out.
        selection: Of `select_blocks`.
        values: As in `tail`.
        partials: `block_slots(k)` slots are written.
        first_slot: The first slot.
        bits: Of the codes.
        head_size: D_v.
    """
    k = selection.blocks.shape[2]
    _launch(
        scores, selection, values, selection.blocks, partials, partials.lse, block_slots(k), k,
        SELECTED_PER_SPLIT, first_slot, bits, head_size, 0.0,
    )  # fmt: skip


def _launch(
    scores: ScanScratch,
    selection: Selection,
    values: Codes,
    n_blocks: Tensor,
    partials: Partials,
    skipped: Tensor,
    splits: int,
    k: int,
    blocks_per_split: int,
    first_slot: int,
    bits: int,
    head_size: int,
    share: float,
) -> None:
    batch, kv_heads = values.meta.shape[:2]
    groups = scores.top.shape[3]
    width = values.meta.shape[3] * GROUP
    _tail_kernel[(splits, batch * kv_heads)](
        *scores, selection.lse, n_blocks, selection.blocks, values.planes[0], values.planes[-1],
        values.meta, *partials, skipped,
        kv_heads, values.n_blocks, partials.lse.shape[2], first_slot, share,
        G=groups, G_P=max(8, triton.next_power_of_2(groups)), DV=head_size, D_P=width, BLOCK=BLOCK,
        GROUP=GROUP, BITS=bits, BLOCKS_PER_PROGRAM=blocks_per_split, K=k, PLAIN=INTERPRETED,
        num_warps=WARPS, num_stages=STAGES, maxnreg=None if k and bits < 4 else REGISTERS[bits],
    )  # fmt: skip


@triton.jit
def _weights(scores_ptr, o_score, m_score, peak, PLAIN: tl.constexpr):
    score = tl.load(scores_ptr + o_score, mask=m_score, other=float("-inf"))
    return exp(score.to(tl.float32) + peak, PLAIN)


@triton.jit
def _add_run(
    acc, weights, low, high, meta_ptr, o_meta, read, BITS: tl.constexpr, J: tl.constexpr, RUN: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    value = decoded(low, high, meta_ptr, o_meta, read, BITS, J, RUN, True, PLAIN)
    if not PLAIN:
        weights = weights.to(tl.bfloat16)
    return tl.dot(value, weights, acc, input_precision="ieee")


@triton.jit
def _add_group(
    acc, w0, w1, w2, w3, low_ptr, high_ptr, meta_ptr, after, read, I: tl.constexpr, D_P: tl.constexpr,
    BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Adds the I-th group of channels of one block or of several: a column's is `after` blocks behind the first."""
    GROUPS: tl.constexpr = D_P // GROUP
    i_c = I * GROUP + tl.arange(0, GROUP)
    i_u = tl.arange(0, after.shape[0])
    i_r = i_u % RUN
    m_low = (i_c >= 0)[:, None] & read[None, :]
    o_low = i_c[:, None] * RUN + (after * D_P * RUN + i_r)[None, :]
    low = tl.load(low_ptr + o_low, mask=m_low, other=0)
    high = low
    if BITS == 3:
        o_high = i_c[:, None] * (RUN // 2) + (after * D_P * (RUN // 2) + i_u % (RUN // 2))[None, :]
        high = tl.load(high_ptr + o_high, mask=m_low, other=0)
    PAIRS: tl.constexpr = RUN * (2 if BITS == 4 else 4)  # a block's tokens
    o_meta = (after * GROUPS + I) * PAIRS + i_r
    acc = _add_run(acc, w0, low, high, meta_ptr, o_meta, read, BITS, 0, RUN, PLAIN)
    acc = _add_run(acc, w1, low, high, meta_ptr, o_meta, read, BITS, 1, RUN, PLAIN)
    if BITS < 4:
        acc = _add_run(acc, w2, low, high, meta_ptr, o_meta, read, BITS, 2, RUN, PLAIN)
        acc = _add_run(acc, w3, low, high, meta_ptr, o_meta, read, BITS, 3, RUN, PLAIN)
    return acc


@triton.jit
def _store_group(out_ptr, o_out, acc, m_g, I: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr):
    i_c = I * GROUP + tl.arange(0, GROUP)
    tl.store(out_ptr + o_out[None, :] + i_c[:, None], acc, mask=(i_c < DV)[:, None] & m_g[None, :])


@triton.jit
def _tail_kernel(
    scores_ptr,
    top_ptr,
    total_ptr,
    lse_ptr,
    n_blocks_ptr,
    blocks_ptr,
    low_ptr,
    high_ptr,
    meta_ptr,
    out_ptr,
    out_lse_ptr,
    skipped_ptr,
    kv_heads,
    capacity_blocks,
    slots,
    first_slot,
    share,
    G: tl.constexpr,
    G_P: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    K: tl.constexpr,  # so many listed blocks, or 0 for all that are not marked
    PLAIN: tl.constexpr,
):
    RUNS: tl.constexpr = 2 if BITS == 4 else 4
    RUN: tl.constexpr = BLOCK // RUNS
    # Blocks side by side: the tensor cores take 32 columns without shuffling them.
    SPAN: tl.constexpr = 32 // RUN
    GROUPS: tl.constexpr = D_P // GROUP
    i_split = tl.program_id(0)
    n_splits = tl.num_programs(0)
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    n_blocks = K
    if K == 0:
        n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_u = tl.arange(0, SPAN * RUN)
    i_r = i_u % RUN
    o_head = i_row * G + i_g
    lse = tl.load(lse_ptr + o_head, mask=m_g, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc0 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc1 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc2 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc3 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc4 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc5 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc6 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    acc7 = tl.zeros((GROUP, G_P), dtype=tl.float32)
    weights = tl.zeros((SPAN * RUN, G_P), dtype=tl.float32)
    skipped = tl.zeros((G_P,), dtype=tl.float32)
    least = share / tl.maximum(n_blocks, 1)
    first = i_split * BLOCKS_PER_PROGRAM
    end = tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)
    for i_block in range(first, end, SPAN):
        block = i_block
        after = i_u // RUN
        there = i_block + after < end
        if K > 0:
            block = tl.load(blocks_ptr + i_row * K + i_block)
            there = there & (block >= 0)
            block = tl.maximum(block, 0)
            if SPAN > 1:
                listed = tl.load(blocks_ptr + i_row * K + i_block + after, mask=there, other=-1)
                there = listed >= 0
                after = tl.max_constancy(tl.where(there, listed - block, 0), [RUN])
        o_block = i_row * capacity_blocks + block
        # Blocks side by side are read together. Loads that are masked off fetch nothing, and without a branch they
        # are issued blocks ahead.
        read = i_u >= 0
        if SPAN == 1:
            peak = tl.load(top_ptr + o_block * G + i_g, mask=m_g, other=float("-inf")) - lse
            if K == 0:
                total = tl.load(total_ptr + o_block * G + i_g, mask=m_g, other=0.0)
                mass = total * exp(peak, PLAIN)
                marked = tl.min(total, axis=0) < 0.0
                heavy = ((tl.max(mass, axis=0) >= least) & (marked == 0)).to(tl.int32)
                skipped += tl.where((heavy != 0) | marked, 0.0, mass)
                read = read & (heavy != 0)
                there = there & (heavy != 0)
            peak = peak[None, :]
        else:
            o_stat = (o_block + after)[:, None] * G + i_g[None, :]
            m_stat = there[:, None] & m_g[None, :]
            peak = tl.load(top_ptr + o_stat, mask=m_stat, other=float("-inf")) - lse[None, :]
            if K == 0:
                total = tl.load(total_ptr + o_stat, mask=m_stat, other=0.0)
                mass = total * exp(peak, PLAIN)
                marked = tl.min(total, axis=1) < 0.0
                mass = tl.where(marked[:, None], 0.0, mass)
                heavy = (tl.max(tl.max(mass, axis=1), axis=0) >= least).to(tl.int32)
                once = (i_r == 0) & (heavy == 0)
                skipped += tl.sum(tl.where(once[:, None], mass, 0.0), axis=0)
                read = (i_block + after < end) & (heavy != 0)
                there = there & (heavy != 0) & (marked == 0)
        low = low_ptr + o_block * D_P * RUN
        high = high_ptr
        if BITS == 3:
            high = high_ptr + o_block * D_P * (RUN // 2)
        meta = meta_ptr + o_block * GROUPS * 2 * BLOCK
        o_score = (o_block * BLOCK + after * BLOCK + i_r)[:, None] * G + i_g[None, :]
        m_score = there[:, None] & m_g[None, :]
        w0 = _weights(scores_ptr, o_score, m_score, peak, PLAIN)
        w1 = _weights(scores_ptr, o_score + 1 * RUN * G, m_score, peak, PLAIN)
        weights += w0 + w1
        w2, w3 = w0, w1
        if RUNS > 2:
            w2 = _weights(scores_ptr, o_score + 2 * RUN * G, m_score, peak, PLAIN)
            w3 = _weights(scores_ptr, o_score + 3 * RUN * G, m_score, peak, PLAIN)
            weights += w2 + w3
        acc0 = _add_group(acc0, w0, w1, w2, w3, low, high, meta, after, read, 0, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
        acc1 = _add_group(acc1, w0, w1, w2, w3, low, high, meta, after, read, 1, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
        if GROUPS > 2:
            acc2 = _add_group(acc2, w0, w1, w2, w3, low, high, meta, after, read, 2, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
            acc3 = _add_group(acc3, w0, w1, w2, w3, low, high, meta, after, read, 3, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
        if GROUPS > 4:
            acc4 = _add_group(acc4, w0, w1, w2, w3, low, high, meta, after, read, 4, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
            acc5 = _add_group(acc5, w0, w1, w2, w3, low, high, meta, after, read, 5, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
            acc6 = _add_group(acc6, w0, w1, w2, w3, low, high, meta, after, read, 6, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
            acc7 = _add_group(acc7, w0, w1, w2, w3, low, high, meta, after, read, 7, D_P, BITS, RUN, GROUP, PLAIN)  # fmt: skip
    total = tl.sum(weights, axis=0)
    full = total > 0.0
    inverse = tl.where(full, 1.0 / tl.where(full, total, 1.0), 0.0)[None, :]
    slot = o_head * slots + first_slot + i_split
    _store_group(out_ptr, slot * DV, acc0 * inverse, m_g, 0, GROUP, DV)
    _store_group(out_ptr, slot * DV, acc1 * inverse, m_g, 1, GROUP, DV)
    if GROUPS > 2:
        _store_group(out_ptr, slot * DV, acc2 * inverse, m_g, 2, GROUP, DV)
        _store_group(out_ptr, slot * DV, acc3 * inverse, m_g, 3, GROUP, DV)
    if GROUPS > 4:
        _store_group(out_ptr, slot * DV, acc4 * inverse, m_g, 4, GROUP, DV)
        _store_group(out_ptr, slot * DV, acc5 * inverse, m_g, 5, GROUP, DV)
        _store_group(out_ptr, slot * DV, acc6 * inverse, m_g, 6, GROUP, DV)
        _store_group(out_ptr, slot * DV, acc7 * inverse, m_g, 7, GROUP, DV)
    out_lse = tl.where(full, lse + tl.log(tl.where(full, total, 1.0)), float("-inf"))
    tl.store(out_lse_ptr + slot, out_lse, mask=m_g)
    if K == 0:
        tl.store(skipped_ptr + o_head * n_splits + i_split, skipped, mask=m_g)
