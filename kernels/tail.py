"""What do all the other tokens add? The softmax-weighted mean of the low-bit values.

The weights are those of the scan's scores, from which the selected tokens were taken out by masking. A block whose
weights together are below a stated share in every query head of the group is not read: with share / blocks as the
limit of each, all skipped blocks together stay below the share of all weights, selected tokens' included.

The reference is `offload.kernels.reference.tail`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import BLOCK, GROUP, PLANES, Codes
from offload.kernels.scan import INTERPRETED, ScanScratch, unpack
from offload.kernels.select import Selection

BLOCKS_PER_SPLIT, WARPS, STAGES = 16, 4, 3


def tail_slots(n_tokens: int) -> int:
    """Slots that the tail of N tokens takes."""
    return triton.cdiv(n_tokens // BLOCK, BLOCKS_PER_SPLIT)


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
    """Attends to all tokens that are not selected.

    Args:
        scores: Of `scan`, after `select` took the selected ones out.
        selection: Of `select`.
        values: Codes of up to N tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        partials: `tail_slots(N)` slots are written, in every plane of the bits.
        skipped: float32 [B, H_q, tail_slots(N)], written: weights of blocks that were not read, as shares of all
            weights.
        first_slot: The first slot.
        bits: Of the codes.
        head_size: D_v.
        share: Blocks whose weights together may be left out, at most, as a share of all weights.
    """
    batch, kv_heads = values.planes[0].shape[:2]
    heads, capacity = scores.top.shape[1], scores.top.shape[2]
    groups = heads // kv_heads
    width = values.meta.shape[-1] * GROUP
    shift = 0
    for index, (plane, plane_bits) in enumerate(zip(values.planes, PLANES[bits], strict=True)):
        run = width * plane_bits // 8
        columns = min(run, GROUP)
        # Programs of the same tokens run side by side: each reads a part of every cache line.
        grid = (skipped.shape[2] * (run // columns), batch * kv_heads)
        _tail_kernel[grid](
            *scores, selection.lse, n_blocks, plane, values.meta, partials.out[index], partials.lse, skipped,
            kv_heads, capacity, partials.lse.shape[2], first_slot, share, float(2**shift),
            G=groups, G_P=max(16, triton.next_power_of_2(groups)), DV=head_size, D_P=width, BLOCK=BLOCK,
            GROUP=GROUP, PLANE=plane_bits, COLUMNS=columns, BLOCKS_PER_PROGRAM=BLOCKS_PER_SPLIT,
            WITH_ZERO=index == 0, PLAIN=INTERPRETED, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        shift += plane_bits


@triton.jit
def _add_run(
    acc,
    weights,
    block_weight,
    packed,
    meta_ptr,
    o_meta,
    factor,
    J: tl.constexpr,
    RUN: tl.constexpr,
    FIRST,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WITH_ZERO: tl.constexpr,
    PLAIN: tl.constexpr,
):
    group = (J * RUN + FIRST) // GROUP
    scale = tl.load(meta_ptr + o_meta + GROUPS + group).to(tl.float32) * factor
    code = unpack(packed, PLANE, PLANE * J, PLAIN)
    part = tl.dot((weights * scale[None, :]).to(tl.float16), code)
    if WITH_ZERO:
        zero = tl.load(meta_ptr + o_meta + group).to(tl.float32)
        part += tl.sum(weights * zero[None, :], axis=1)[:, None]
    return acc + part * block_weight[:, None]


@triton.jit
def _store_run(out_ptr, o_out, i_u, first, acc, m_g, DV: tl.constexpr):
    i_c = first + i_u
    tl.store(out_ptr + o_out[:, None] + i_c[None, :], acc, mask=m_g[:, None] & (i_c < DV)[None, :])


@triton.jit
def _tail_kernel(
    scores_ptr,
    top_ptr,
    total_ptr,
    lse_ptr,
    n_blocks_ptr,
    plane_ptr,
    meta_ptr,
    out_ptr,
    out_lse_ptr,
    skipped_ptr,
    kv_heads,
    capacity_blocks,
    slots,
    first_slot,
    share,
    factor,
    G: tl.constexpr,
    G_P: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    WITH_ZERO: tl.constexpr,
    PLAIN: tl.constexpr,
):
    RUNS: tl.constexpr = 8 // PLANE
    RUN: tl.constexpr = D_P // RUNS
    PARTS: tl.constexpr = RUN // COLUMNS
    GROUPS: tl.constexpr = D_P // GROUP
    i_split = tl.program_id(0) // PARTS
    first_column = tl.program_id(0) % PARTS * COLUMNS
    n_splits = tl.num_programs(0) // PARTS
    i_row = tl.program_id(1).to(tl.int64)
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, BLOCK)
    i_u = first_column + tl.arange(0, COLUMNS)
    o_head = i_row * G + i_g
    lse = tl.load(lse_ptr + o_head, mask=m_g, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc0 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc1 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc2 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc3 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc4 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc5 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc6 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc7 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    total = tl.zeros((G_P,), dtype=tl.float32)
    skipped = tl.zeros((G_P,), dtype=tl.float32)
    least = share / tl.maximum(n_blocks, 1)
    first = i_split * BLOCKS_PER_PROGRAM
    for block in range(first, tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)):
        o_stat = o_head * capacity_blocks + block
        mass = tl.load(total_ptr + o_stat, mask=m_g, other=0.0)
        mass *= tl.exp(tl.load(top_ptr + o_stat, mask=m_g, other=float("-inf")) - lse)
        if tl.max(mass, axis=0) >= least:
            o_score = o_head[:, None] * capacity_blocks * BLOCK + block * BLOCK + i_t[None, :]
            score = tl.load(scores_ptr + o_score, mask=m_g[:, None], other=float("-inf"))
            # Weights are taken relative to the best of those that are left, in float16; what that is against all
            # the others, in float32. So a selected token of nearly all the mass costs the others no precision.
            top = tl.max(score, axis=1)
            safe = tl.where(top == float("-inf"), 0.0, top)
            weights = tl.exp(score - safe[:, None])
            block_weight = tl.exp(top - lse)
            total += tl.sum(weights, axis=1) * block_weight
            o_token = (i_row * capacity_blocks + block) * BLOCK + i_t
            packed = tl.load(plane_ptr + o_token[:, None] * RUN + i_u[None, :])
            o_meta = o_token * 2 * GROUPS
            acc0 = _add_run(
                acc0, weights, block_weight, packed, meta_ptr, o_meta, factor, 0,
                RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
            )  # fmt: skip
            acc1 = _add_run(
                acc1, weights, block_weight, packed, meta_ptr, o_meta, factor, 1,
                RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
            )  # fmt: skip
            if RUNS > 2:
                acc2 = _add_run(
                    acc2, weights, block_weight, packed, meta_ptr, o_meta, factor, 2,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
                acc3 = _add_run(
                    acc3, weights, block_weight, packed, meta_ptr, o_meta, factor, 3,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
            if RUNS > 4:
                acc4 = _add_run(
                    acc4, weights, block_weight, packed, meta_ptr, o_meta, factor, 4,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
                acc5 = _add_run(
                    acc5, weights, block_weight, packed, meta_ptr, o_meta, factor, 5,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
                acc6 = _add_run(
                    acc6, weights, block_weight, packed, meta_ptr, o_meta, factor, 6,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
                acc7 = _add_run(
                    acc7, weights, block_weight, packed, meta_ptr, o_meta, factor, 7,
                    RUN, first_column, PLANE, GROUP, GROUPS, WITH_ZERO, PLAIN,
                )  # fmt: skip
        else:
            skipped += mass
    full = total > 0.0
    inverse = tl.where(full, 1.0 / tl.where(full, total, 1.0), 0.0)[:, None]
    o_out = (o_head * slots + first_slot + i_split) * DV
    _store_run(out_ptr, o_out, i_u, 0 * RUN, acc0 * inverse, m_g, DV)
    _store_run(out_ptr, o_out, i_u, 1 * RUN, acc1 * inverse, m_g, DV)
    if RUNS > 2:
        _store_run(out_ptr, o_out, i_u, 2 * RUN, acc2 * inverse, m_g, DV)
        _store_run(out_ptr, o_out, i_u, 3 * RUN, acc3 * inverse, m_g, DV)
    if RUNS > 4:
        _store_run(out_ptr, o_out, i_u, 4 * RUN, acc4 * inverse, m_g, DV)
        _store_run(out_ptr, o_out, i_u, 5 * RUN, acc5 * inverse, m_g, DV)
        _store_run(out_ptr, o_out, i_u, 6 * RUN, acc6 * inverse, m_g, DV)
        _store_run(out_ptr, o_out, i_u, 7 * RUN, acc7 * inverse, m_g, DV)
    if WITH_ZERO:
        m_first = m_g & (first_column == 0)
        out_lse = tl.where(full, lse + tl.log(tl.where(full, total, 1.0)), float("-inf"))
        tl.store(out_lse_ptr + o_head * slots + first_slot + i_split, out_lse, mask=m_first)
        tl.store(skipped_ptr + o_head * n_splits + i_split, skipped, mask=m_first)
