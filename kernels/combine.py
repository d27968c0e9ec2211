"""How do the parts of one decode step become one output? Weighted by their log-sum-exps, in one launch.

Every kernel of the step leaves its parts in slots of one `Partials`: window splits, selected rows, tail splits.

The references are `offload.kernels.reference.merge`, and `offload.kernels.noise.squared_error` of what is added up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.noise import Noise

COLUMNS = 32  # of the output, a program: enough programs to read at the rate of the L2 cache
STEP, WARPS = 128, 8  # parts that are read at once


class Partials(NamedTuple):
    """Parts of attention over disjoint sets of keys, one per slot.

    Attributes:
        out: float32 [B, H_q, slots, D_v].
        lse: float32 [B, H_q, slots], natural logarithm; -inf for a slot without keys, whose `out` is not read.
    """

    out: Tensor
    lse: Tensor


def empty_partials(
    batch: int, heads: int, slots: int, value_dim: int, device: torch.device
) -> Partials:
    """Room for the parts of one step; every slot is empty until a kernel writes it.

    Args:
        batch: Sequences.
        heads: Query heads.
        slots: Parts.
        value_dim: D_v.
        device: Where.
    """
    return Partials(
        torch.zeros((batch, heads, slots, value_dim), device=device),
        torch.full((batch, heads, slots), -torch.inf, device=device),
    )


def combine(
    partials: Partials,
    out: Tensor,
    *,
    sink_logits: Tensor | None = None,
    counter: Tensor | None = None,
    stats: Tensor | None = None,
    skipped: Tensor | None = None,
    query: Tensor | None = None,
    noise: Noise | None = None,
    scale: float = 1.0,
    tail_at: int = 0,
) -> None:
    """Merges all slots. The last launch of a step: it may count the step, and what the step left to the tail.

    Args:
        partials: Of all kernels of the step.
        out: Written: [B, H_q, D_v], contiguous, floating. Zeros where every slot is empty.
        sink_logits: [H_q]: one logit per head without a value.
        counter: int32 [1]: grows by one.
        stats: float32 [4]: the tail's share of all weights, the skipped share, the square of the error that is to be
            expected and that of the output's norm, means over B and H_q, are added.
        skipped: float32 [B, H_q, n] with `stats`: skipped shares of the tail's slots.
        query: [B, H_q, D], last stride 1, with `stats`.
        noise: Of the tail, with `stats`.
        scale: Factor on the dot products, with `stats`.
        tail_at: The first slot of the tail.

    Raises:
        ValueError: `stats` without `skipped`, `query` or `noise`.
    """
    if stats is None:
        query, noise = out, Noise(partials.lse, partials.lse)  # not read
    elif query is None or noise is None or skipped is None:
        raise ValueError("stats need skipped shares, the query and the noise of the tail")
    batch, heads, slots, value_dim = partials.out.shape
    parts = triton.cdiv(value_dim, COLUMNS)
    grid = (batch * heads, parts if stats is None else parts + 1)
    n_skipped = 1 if skipped is None else skipped.shape[2]
    lse = partials.lse
    _combine_kernel[grid](
        *partials, out, lse if sink_logits is None else sink_logits, lse if counter is None else counter,
        lse if stats is None else stats, lse if skipped is None else skipped, query, *noise,
        heads, slots, tail_at, n_skipped, heads // noise.keys.shape[1], scale, query.stride(0), query.stride(1),
        D=query.shape[2], D_P=triton.next_power_of_2(noise.keys.shape[2]), DV=value_dim,
        COLUMNS=COLUMNS, PARTS=parts, SLOTS=triton.next_power_of_2(slots),
        STEP=min(STEP, triton.next_power_of_2(slots)), SKIPPED=triton.next_power_of_2(n_skipped),
        SINKS=sink_logits is not None, COUNTS=counter is not None, STATS=stats is not None,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    parts_ptr,
    lse_ptr,
    out_ptr,
    sinks_ptr,
    counter_ptr,
    stats_ptr,
    skipped_ptr,
    q_ptr,
    key_noise_ptr,
    value_noise_ptr,
    heads,
    slots,
    tail_at,
    n_skipped,
    groups,
    sm_scale,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    D: tl.constexpr,
    D_P: tl.constexpr,
    DV: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    SKIPPED: tl.constexpr,
    SINKS: tl.constexpr,
    COUNTS: tl.constexpr,
    STATS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # sequence and query head
    i_s = tl.arange(0, SLOTS)
    lse = tl.load(lse_ptr + i_row * slots + i_s, mask=i_s < slots, other=float("-inf"))
    peak = tl.max(lse, axis=0)
    sink = float("-inf")
    if SINKS:
        sink = tl.load(sinks_ptr + i_row % heads).to(tl.float32)
        peak = tl.maximum(peak, sink)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(lse - safe), axis=0)
    if SINKS:
        total += tl.exp(sink - safe)
    if COUNTS:  # noqa: SIM102 - a constexpr first, or both are compiled
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    if STATS:  # noqa: SIM102
        # A program of its own for each row: those that merge wait for nothing more.
        if tl.program_id(1) == PARTS:
            i_k = tl.arange(0, SKIPPED)
            gone = tl.load(skipped_ptr + i_row * n_skipped + i_k, mask=i_k < n_skipped, other=0.0)
            skipped = tl.sum(gone, axis=0)
            i_d = tl.arange(0, D_P)
            i_kv = i_row // groups  # sequence and KV head
            o_query = i_row // heads * stride_qb + i_row % heads * stride_qh
            q = tl.load(q_ptr + o_query + i_d, mask=i_d < D, other=0.0).to(tl.float32)
            spread = tl.sum(q * q * tl.load(key_noise_ptr + i_kv * D_P + i_d), axis=0)
            spread *= sm_scale * sm_scale
            norm = tl.load(value_noise_ptr + i_kv * 2)
            of_value = tl.load(value_noise_ptr + i_kv * 2 + 1)
            weight = tl.where(i_s >= tail_at, tl.exp(lse - safe), 0.0)
            share = weight / tl.where(total > 0.0, total, 1.0)
            tail, square = tl.sum(share, axis=0), tl.sum(share * share, axis=0)
            off = tail * (1.0 - tail) * (1.0 - tl.exp(-0.5 * spread)) + skipped
            factor = square * (1.0 - tl.exp(-spread)) + off * off
            each = 1.0 / tl.num_programs(0)
            tl.atomic_add(stats_ptr, tail * each, sem="relaxed")
            tl.atomic_add(stats_ptr + 1, skipped * each, sem="relaxed")
            tl.atomic_add(
                stats_ptr + 2, (2.0 * factor * norm + square * of_value) * each, sem="relaxed"
            )
    if tl.program_id(1) < PARTS:
        i_v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        i_j = tl.arange(0, STEP)
        acc = tl.zeros((COLUMNS,), dtype=tl.float32)
        for first in range(0, slots, STEP):
            i_p = first + i_j
            part = tl.load(lse_ptr + i_row * slots + i_p, mask=i_p < slots, other=float("-inf"))
            weight = tl.exp(part - safe)
            m_out = (i_p < slots)[:, None] & (i_v < DV)[None, :]
            o_out = (i_row * slots + i_p)[:, None] * DV + i_v[None, :]
            value = tl.load(parts_ptr + o_out, mask=m_out, other=0.0)
            # A slot of weight 0 may hold anything, NaN too. Its load is not masked off: it would wait for the weight.
            acc += tl.sum(tl.where((weight > 0.0)[:, None], value, 0.0) * weight[:, None], axis=0)
        acc = tl.where(total > 0.0, acc / tl.where(total > 0.0, total, 1.0), 0.0)
        tl.store(out_ptr + i_row * DV + i_v, acc.to(out_ptr.dtype.element_ty), mask=i_v < DV)
        if STATS:
            tl.atomic_add(
                stats_ptr + 3, tl.sum(acc * acc, axis=0) / tl.num_programs(0), sem="relaxed"
            )
