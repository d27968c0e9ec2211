"""What do all the other tokens add? The softmax-weighted mean of the low-bit values.

The weights are those of the scan's scores, from which the selected tokens were taken out by masking. A block whose
weights together are below a stated share in every query head of the group is not read: with share / blocks as the
limit of each, all skipped blocks together stay below the share of all weights, selected tokens' included.

The reference is `offload.kernels.reference.tail`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK, GROUP, PLANES, Codes, Part
from offload.kernels.scan import INTERPRETED, ScanScratch, unpack
from offload.kernels.select import Selection


class TailScratch(NamedTuple):
    """Partial sums of one tail, for each split of the blocks.

    Attributes:
        out: float32 [planes, B, H_q, splits, D_p].
        total: float32 [B, H_q, splits]: weights added, relative to the tail's log-sum-exp.
        skipped: float32 [B, H_q, splits]: weights of blocks that were not read, relative to that of all scores.
    """

    out: Tensor
    total: Tensor
    skipped: Tensor


BLOCKS_PER_SPLIT = 16


def tail_scratch(
    batch: int, heads: int, n_tokens: int, width: int, bits: int, device: torch.device
) -> TailScratch:
    """Scratch for N tokens and padded head size `width`."""
    splits = triton.cdiv(n_tokens // BLOCK, BLOCKS_PER_SPLIT)
    return TailScratch(
        torch.empty((len(PLANES[bits]), batch, heads, splits, width), device=device),
        torch.empty((batch, heads, splits), device=device),
        torch.empty((batch, heads, splits), device=device),
    )


def tail(
    scores: ScanScratch,
    selection: Selection,
    values: Codes,
    n_blocks: Tensor,
    scratch: TailScratch,
    *,
    bits: int,
    head_size: int,
    share: float,
) -> tuple[Part, Tensor]:
    """Attends to all tokens that are not selected.

    Args:
        scores: Of `scan`, after `select` took the selected ones out.
        selection: Of `select`; its tail_lse is the scale of the weights.
        values: Codes of up to N tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        scratch: Written.
        bits: Of the codes.
        head_size: D_v.
        share: Blocks whose weights together may be left out, at most, as a share of all weights.

    Returns:
        The part: `out` float32 [B, H_q, 1, D_v], `lse` [B, H_q, 1], over the blocks that were read; and the share
        of all weights that was skipped, float32 [B, H_q].
    """
    batch, kv_heads = values.planes[0].shape[:2]
    heads, capacity = scores.top.shape[1], scores.top.shape[2]
    groups = heads // kv_heads
    width = values.meta.shape[-1] * GROUP
    shift = 0
    for index, (plane, plane_bits) in enumerate(zip(values.planes, PLANES[bits], strict=True)):
        run = width * plane_bits // 8
        columns = min(run, GROUP)
        grid = (scratch.total.shape[2], batch * kv_heads, run // columns)
        _tail_kernel[grid](
            *scores, selection.lse, selection.tail_lse, n_blocks, plane, values.meta, scratch.out[index], scratch.total,
            scratch.skipped, kv_heads, capacity, share, float(2**shift),
            G=groups, G_P=max(16, triton.next_power_of_2(groups)), D_P=width, BLOCK=BLOCK, GROUP=GROUP,
            PLANE=plane_bits, COLUMNS=columns, BLOCKS_PER_PROGRAM=BLOCKS_PER_SPLIT,
            WITH_ZERO=index == 0, PLAIN=INTERPRETED,
        )  # fmt: skip
        shift += plane_bits
    out = scratch.out.sum(dim=(0, 3))[..., :head_size]
    total = scratch.total.sum(dim=-1)
    empty = total == 0
    out = torch.where(empty.unsqueeze(-1), 0.0, out / total.masked_fill(empty, 1.0).unsqueeze(-1))
    lse = torch.where(empty, -torch.inf, selection.tail_lse + total.masked_fill(empty, 1.0).log())
    part = Part(out.unsqueeze(2), lse.unsqueeze(2))
    return part, scratch.skipped.sum(dim=-1)


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
def _tail_kernel(
    scores_ptr,
    top_ptr,
    total_ptr,
    lse_ptr,
    tail_lse_ptr,
    n_blocks_ptr,
    plane_ptr,
    meta_ptr,
    o_ptr,
    l_ptr,
    skipped_ptr,
    kv_heads,
    capacity_blocks,
    share,
    factor,
    G: tl.constexpr,
    G_P: tl.constexpr,
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
    GROUPS: tl.constexpr = D_P // GROUP
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(2) * COLUMNS
    n_splits = tl.num_programs(0)
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, BLOCK)
    i_u = first_column + tl.arange(0, COLUMNS)
    o_head = i_row * G + i_g
    lse = tl.load(lse_ptr + o_head, mask=m_g, other=0.0)
    tail_lse = tl.load(tail_lse_ptr + o_head, mask=m_g, other=0.0)
    tail_lse = tl.where(tail_lse == float("-inf"), 0.0, tail_lse)  # everything was selected
    acc0 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc1 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc2 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc3 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc4 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc5 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc6 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    acc7 = tl.zeros((G_P, COLUMNS), dtype=tl.float32)
    l = tl.zeros((G_P,), dtype=tl.float32)
    skipped = tl.zeros((G_P,), dtype=tl.float32)
    least = share / tl.maximum(n_blocks, 1)
    first = i_split * BLOCKS_PER_PROGRAM
    for block in range(first, tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)):
        top = tl.load(top_ptr + o_head * capacity_blocks + block, mask=m_g, other=float("-inf"))
        total = tl.load(total_ptr + o_head * capacity_blocks + block, mask=m_g, other=0.0)
        block_weight = tl.where(m_g, tl.exp(top - tail_lse), 0.0)
        mass = tl.where(m_g, tl.exp(top - lse), 0.0) * total
        if tl.max(mass, axis=0) >= least:
            o_score = o_head[:, None] * capacity_blocks * BLOCK + block * BLOCK + i_t[None, :]
            score = tl.load(scores_ptr + o_score, mask=m_g[:, None], other=float("-inf"))
            weights = tl.where(
                score > float("-inf"),
                tl.exp(score - tl.where(m_g & (top > float("-inf")), top, 0.0)[:, None]),
                0.0,
            )
            l += tl.sum(weights, axis=1) * block_weight
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
    o_out = (o_head * n_splits + i_split) * D_P
    tl.store(o_ptr + o_out[:, None] + (0 * RUN + i_u)[None, :], acc0, mask=m_g[:, None])
    tl.store(o_ptr + o_out[:, None] + (1 * RUN + i_u)[None, :], acc1, mask=m_g[:, None])
    if RUNS > 2:
        tl.store(o_ptr + o_out[:, None] + (2 * RUN + i_u)[None, :], acc2, mask=m_g[:, None])
        tl.store(o_ptr + o_out[:, None] + (3 * RUN + i_u)[None, :], acc3, mask=m_g[:, None])
    if RUNS > 4:
        tl.store(o_ptr + o_out[:, None] + (4 * RUN + i_u)[None, :], acc4, mask=m_g[:, None])
        tl.store(o_ptr + o_out[:, None] + (5 * RUN + i_u)[None, :], acc5, mask=m_g[:, None])
        tl.store(o_ptr + o_out[:, None] + (6 * RUN + i_u)[None, :], acc6, mask=m_g[:, None])
        tl.store(o_ptr + o_out[:, None] + (7 * RUN + i_u)[None, :], acc7, mask=m_g[:, None])
    if WITH_ZERO:
        m_first = m_g & (first_column == 0)
        tl.store(l_ptr + o_head * n_splits + i_split, l, mask=m_first)
        tl.store(skipped_ptr + o_head * n_splits + i_split, skipped, mask=m_first)
