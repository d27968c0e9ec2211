"""What does each query head think of every low-bit key? Scores without a dequantized copy.

The scale of a channel goes into the query and the zero into a constant, so a block's scores are one product of
the scaled query with bare integer codes. A code becomes a float16 by bit operations alone: 0x6400 | code is the
float16 1024 + code. (Integer-to-float conversions of 268 million codes a layer would take longer than reading
them does.)

The reference is `offload.kernels.reference.scan`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK, PLANES, Codes, padded
from offload.kernels.window import capped

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter knows no assembly


BLOCKS_PER_PROGRAM, WARPS, STAGES = 8, 4, 3


class ScanScratch(NamedTuple):
    """Memory that one scan writes and the next ones use again; a layer's is free when its step is over.

    Attributes:
        scores: float32 [B, H_q, N].
        top: float32 [B, H_q, N / BLOCK], the best score of each block.
        total: float32 [B, H_q, N / BLOCK], the sum of exp(score - top) over the block.
    """

    scores: Tensor
    top: Tensor
    total: Tensor


def scan_scratch(batch: int, heads: int, n_tokens: int, device: torch.device) -> ScanScratch:
    """Scratch for N tokens, a multiple of BLOCK."""
    blocks = n_tokens // BLOCK
    return ScanScratch(
        torch.empty((batch, heads, n_tokens), device=device),
        torch.empty((batch, heads, blocks), device=device),
        torch.empty((batch, heads, blocks), device=device),
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
        query: [B, H_q, D], last stride 1.
        keys: Codes of up to N tokens.
        n_blocks: int32 [B] on the device: blocks that are valid; what lies behind is not touched.
        scratch: Written.
        bits: Of the codes.
        scale: Factor on the dot products.
        padding: int32 [B] on the device: so many first tokens are padding and get -inf; None for none.
        softcap: Scores become softcap * tanh(scores / softcap).
    """
    batch, heads, head_size = query.shape
    kv_heads, capacity = keys.planes[0].shape[1], keys.planes[0].shape[2] // BLOCK
    groups = heads // kv_heads
    planes = PLANES[bits]
    grid = (triton.cdiv(capacity, BLOCKS_PER_PROGRAM), batch * kv_heads)
    _scan_kernel[grid](
        query, keys.planes[0], keys.planes[-1], keys.meta, n_blocks,
        n_blocks if padding is None else padding, *scratch,
        kv_heads, capacity, scale, 1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        G=groups, G_P=max(16, triton.next_power_of_2(groups)), D=head_size, D_P=padded(head_size),
        BLOCK=BLOCK, PLANE0=planes[0], PLANE1=planes[1] if len(planes) > 1 else 0,
        BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM, PADDED=padding is not None, CAPPED=softcap is not None,
        PLAIN=INTERPRETED, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@triton.constexpr_function
def _unpacking_asm(plane, shift):
    """Four bytes of codes to the four float16 values of the codes at bit `shift`."""
    mask = {4: "0x0F0F0F0F", 2: "0x03030303", 1: "0x01010101"}[int(plane)]
    move = "mov.b32 t, $2;" if int(shift) == 0 else f"shr.u32 t, $2, {int(shift)};"
    return (
        "{ .reg .b32 t, m; " + move + f" and.b32 t, t, {mask}; mov.b32 m, 0x64006400;"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }"
    )


@triton.jit
def unpack(packed, PLANE: tl.constexpr, SHIFT: tl.constexpr, PLAIN: tl.constexpr):
    """The codes at bit SHIFT of each byte, as float16. PLAIN: without assembly."""
    if PLAIN:
        return ((packed.to(tl.int32) >> SHIFT) & (2**PLANE - 1)).to(tl.float16)
    else:  # noqa: RET505 - without it Triton compiles both branches
        return tl.inline_asm_elementwise(
            _unpacking_asm(PLANE, SHIFT),
            "=r,=r,r",
            args=[packed],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _plane_scores(
    acc,
    bias,
    q_ptr,
    plane_ptr,
    meta_ptr,
    i_g,
    m_g,
    stride_qg,
    weight,
    D: tl.constexpr,
    D_P: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_ZERO: tl.constexpr,
    PLAIN: tl.constexpr,
):
    RUNS: tl.constexpr = 8 // PLANE
    RUN: tl.constexpr = D_P // RUNS
    i_t = tl.arange(0, BLOCK)
    i_u = tl.arange(0, RUN)
    packed = tl.load(plane_ptr + i_t[:, None] * RUN + i_u[None, :])
    for j in tl.static_range(RUNS):
        i_c = j * RUN + i_u
        m_q = m_g[:, None] & (i_c < D)[None, :]
        q = tl.load(q_ptr + i_g[:, None] * stride_qg + i_c[None, :], mask=m_q, other=0.0)
        q = q.to(tl.float32)
        scale = tl.load(meta_ptr + D_P + i_c).to(tl.float32)
        if WITH_ZERO:
            zero = tl.load(meta_ptr + i_c).to(tl.float32)
            bias += tl.sum(q * zero[None, :], axis=1)
        code = unpack(packed, PLANE, PLANE * j, PLAIN)  # [BLOCK, RUN]
        scaled = (q * (scale * weight)[None, :]).to(tl.float16)
        if RUN >= 16:
            acc += tl.dot(scaled, tl.trans(code))
        else:  # too narrow for the tensor cores (the 1-bit plane of 64 channels)
            product = scaled.to(tl.float32)[:, None, :] * code.to(tl.float32)[None, :, :]
            acc += tl.sum(product, axis=2)
    return acc, bias


@triton.jit
def _scan_kernel(
    q_ptr,
    plane0_ptr,
    plane1_ptr,
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
    PLANE0: tl.constexpr,
    PLANE1: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    n_blocks = tl.load(n_blocks_ptr + i_batch)
    first = tl.program_id(0) * BLOCKS_PER_PROGRAM
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, BLOCK)
    q_ptr += i_batch * stride_qb + i_kv * G * stride_qh
    o_head = i_row * G + i_g  # query head, counted over all sequences
    R0: tl.constexpr = D_P * PLANE0 // 8
    R1: tl.constexpr = D_P * PLANE1 // 8
    for block in range(first, tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)):
        o_block = i_row * capacity_blocks + block
        meta = meta_ptr + o_block * 2 * D_P
        acc = tl.zeros((G_P, BLOCK), dtype=tl.float32)
        bias = tl.zeros((G_P,), dtype=tl.float32)
        plane0 = plane0_ptr + o_block * BLOCK * R0
        acc, bias = _plane_scores(
            acc, bias, q_ptr, plane0, meta, i_g, m_g, stride_qh, 1.0, D, D_P, PLANE0, BLOCK, True, PLAIN
        )  # fmt: skip
        if PLANE1 > 0:
            plane1 = plane1_ptr + o_block * BLOCK * R1
            acc, bias = _plane_scores(
                acc, bias, q_ptr, plane1, meta, i_g, m_g, stride_qh, 2.0**PLANE0, D, D_P, PLANE1, BLOCK,
                False, PLAIN,
            )  # fmt: skip
        score = (acc + bias[:, None]) * sm_scale
        if CAPPED:
            score = capped(score, softcap)
        if PADDED:
            hidden = block * BLOCK + i_t < tl.load(padding_ptr + i_batch)
            score = tl.where(hidden[None, :], float("-inf"), score)
        o_score = o_head[:, None] * capacity_blocks * BLOCK + block * BLOCK + i_t[None, :]
        tl.store(scores_ptr + o_score, score, mask=m_g[:, None])
        top = tl.max(score, axis=1)
        safe = tl.where(top == float("-inf"), 0.0, top)  # a block of padding alone: sum 0, not NaN
        total = tl.sum(tl.exp(score - safe[:, None]), axis=1)
        tl.store(top_ptr + o_head * capacity_blocks + block, top, mask=m_g)
        tl.store(total_ptr + o_head * capacity_blocks + block, total, mask=m_g)
