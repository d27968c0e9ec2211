"""How are parts of attention joined while they arrive one after the other? By a running merge in float32.

One Triton program reads a part and the running sum once and writes the sum back; without Triton's device the
same two formulas run in torch. The reference is `offload.kernels.reference.merge`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import Part


@triton.jit
def _merge_kernel(
    a_ptr,
    a_lse_ptr,
    b_ptr,
    b_lse_ptr,
    o_ptr,
    o_lse_ptr,
    n_rows,
    n_heads,
    n_queries,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_aq: tl.int64,
    stride_bb: tl.int64,
    stride_bh: tl.int64,
    stride_bq: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_oq: tl.int64,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A row is one (batch, query, head), heads fastest: the memory order of an attention output.
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = i_row < n_rows
    i_head = i_row % n_heads
    i_query = (i_row // n_heads) % n_queries
    i_batch = i_row // n_heads // n_queries
    o_lse = (i_batch * n_heads + i_head) * n_queries + i_query  # lse is [B, H_q, Q], contiguous
    b_a_lse = tl.load(a_lse_ptr + o_lse, mask=m_row, other=float("-inf"))
    b_b_lse = tl.load(b_lse_ptr + o_lse, mask=m_row, other=float("-inf"))
    b_max = tl.maximum(b_a_lse, b_b_lse)
    b_safe = tl.where(
        b_max == float("-inf"), 0.0, b_max
    )  # two empty parts: exp(-inf - 0) = 0, not NaN
    b_a_weight = tl.exp(b_a_lse - b_safe)
    b_b_weight = tl.exp(b_b_lse - b_safe)
    b_sum = b_a_weight + b_b_weight
    b_norm = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    b_a_weight *= b_norm
    b_b_weight *= b_norm
    i_d = tl.arange(0, BLOCK_D)
    m_cell = m_row[:, None] & (i_d < D)[None, :]
    o_a = i_batch * stride_ab + i_head * stride_ah + i_query * stride_aq
    o_b = i_batch * stride_bb + i_head * stride_bh + i_query * stride_bq
    o_o = i_batch * stride_ob + i_head * stride_oh + i_query * stride_oq
    b_a = tl.load(a_ptr + o_a[:, None] + i_d[None, :], mask=m_cell, other=0.0).to(tl.float32)
    b_b = tl.load(b_ptr + o_b[:, None] + i_d[None, :], mask=m_cell, other=0.0).to(tl.float32)
    # An empty part's output may be anything, NaN too; 0 * NaN would spread it.
    b_a = tl.where((b_a_weight > 0)[:, None], b_a * b_a_weight[:, None], 0.0)
    b_b = tl.where((b_b_weight > 0)[:, None], b_b * b_b_weight[:, None], 0.0)
    tl.store(o_ptr + o_o[:, None] + i_d[None, :], b_a + b_b, mask=m_cell)
    b_lse = tl.where(b_sum > 0, b_safe + tl.log(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
    tl.store(o_lse_ptr + o_lse, b_lse, mask=m_row)


def merge_two_triton(a: Part, b: Part, out: Tensor, lse: Tensor) -> None:
    """Writes the merge of two parts.

    Args:
        a: A part; `lse` contiguous, last stride of `out` 1.
        b: Another part of the same shapes.
        out: [B, H_q, Q, D_v]; may be `a.out`.
        lse: [B, H_q, Q], float32, contiguous; may be `a.lse`.
    """
    batch, n_heads, n_queries, head_size = out.shape
    n_rows = batch * n_heads * n_queries
    block_d = triton.next_power_of_2(head_size)
    block_rows = max(1, 4096 // block_d)  # 32 rows of 128: one decode step is one program
    grid = (triton.cdiv(n_rows, block_rows),)
    # Triton asks for the current device.
    other = out.is_cuda and out.device.index != torch.cuda.current_device()
    with torch.cuda.device(out.device) if other else nullcontext():
        _merge_kernel[grid](
            a.out, a.lse, b.out, b.lse, out, lse, n_rows, n_heads, n_queries,
            *a.out.stride()[:3], *b.out.stride()[:3], *out.stride()[:3],
            D=head_size, BLOCK_ROWS=block_rows, BLOCK_D=block_d,
        )  # fmt: skip


def merge_two_torch(a: Part, b: Part, out: Tensor, lse: Tensor) -> None:
    """The same in torch, where Triton has no device."""
    joint = torch.logaddexp(a.lse, b.lse)
    safe = joint.masked_fill(joint.isneginf(), 0.0)
    total: Tensor | None = None
    for part in (a, b):
        weight = torch.exp(part.lse - safe).unsqueeze(-1)
        weighted = torch.where(weight > 0, part.out.float() * weight, 0.0)
        total = weighted if total is None else total + weighted
    assert total is not None
    out.copy_(total)
    lse.copy_(joint)


class RunningMerge:
    """Attention over a growing set of keys: parts are added as they are computed.

    The sum is float32 whatever the dtype of the parts, so that many parts (a long context arrives in dozens)
    do not add rounding. Only one buffer of [B, H_q, Q, D_v] float32 is allocated, at the second part; none where the caller has one.
    """

    def __init__(self, into: Part | None = None) -> None:
        """With no part.

        Args:
            into: Where the sum shall be: `out` [B, H_q, Q, D_v], last stride 1, and `lse` [B, H_q, Q], contiguous, both float32.
        """
        self._sum: Part | None = None
        self._owned = False
        self._into = into

    def add(self, part: Part) -> None:
        """Adds attention over keys that no earlier part has seen.

        Args:
            part: Same shapes and device as the earlier ones. Not kept after the call, except the first.

        Raises:
            ValueError: The lse is not float32, or the shapes differ.
        """
        if part.lse.dtype != torch.float32:
            raise ValueError(f"lse must be float32, got {part.lse.dtype}")
        if self._sum is None:
            self._sum = Part(part.out, part.lse.contiguous())
            if self._into is not None:
                self._into.out.copy_(part.out)
                self._into.lse.copy_(part.lse)
                self._sum, self._owned = self._into, True
            return
        if part.out.shape != self._sum.out.shape or part.lse.shape != self._sum.lse.shape:
            raise ValueError(
                f"parts of shapes {self._sum.out.shape} and {part.out.shape} cannot be merged"
            )
        a, b = self._sum, Part(part.out, part.lse.contiguous())
        if self._owned:
            out, lse = a.out, a.lse
        else:
            batch, n_heads, n_queries, head_size = a.out.shape
            # [B, Q, H_q, D] in memory: what the model's output projection reads.
            out = a.out.new_empty(
                (batch, n_queries, n_heads, head_size), dtype=torch.float32
            ).transpose(1, 2)
            lse = torch.empty_like(a.lse)
        run = merge_two_triton if out.device.type == "cuda" else merge_two_torch
        run(a, b, out, lse)
        self._sum, self._owned = Part(out, lse), True

    def result(self, dtype: torch.dtype) -> Part:
        """The merge of all parts so far.

        Args:
            dtype: Of the returned `out`.

        Returns:
            `out` as [B, H_q, Q, D_v]; [B, Q, H_q, D_v] in memory where more than one part was merged. Where the
            caller said where the sum shall be it may be that memory itself.

        Raises:
            ValueError: No part was added.
        """
        if self._sum is None:
            raise ValueError("merge needs at least one part")
        return Part(self._sum.out.to(dtype), self._sum.lse)
