"""How do keys get their positions? By a rotation of pairs of channels, where they lie.

Channel i is paired with channel i + R/2 of the R that are rotated, as in Llama and most models after it; further ones
stay. What comes out is within a rounding or two of what torch makes of the same keys.
The reference is `offload.kernels.reference.rotate`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a program, of one head


@triton.jit
def _rotate_kernel(
    k_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    n_tokens,
    n_heads,
    stride_kb: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_ab: tl.int64,
    stride_at: tl.int64,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_head = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = i_t < n_tokens
    i_d = tl.arange(0, BLOCK_D)
    m_cell = m_t[:, None] & (i_d < HALF)[None, :]
    b_position = tl.load(position_ptr + i_t, mask=m_t, other=0)
    o_a = i_batch * stride_ab + b_position[:, None] * stride_at + i_d[None, :]
    o_k = i_batch * stride_kb + i_t[:, None] * stride_kt + i_head * stride_kh + i_d[None, :]
    b_first = tl.load(k_ptr + o_k, mask=m_cell, other=0.0)
    b_second = tl.load(k_ptr + o_k + HALF, mask=m_cell, other=0.0)
    dtype = b_first.dtype
    b_cos = tl.load(cos_ptr + o_a, mask=m_cell, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + o_a, mask=m_cell, other=0.0).to(tl.float32)
    b_one = b_first.to(tl.float32)
    b_two = b_second.to(tl.float32)
    b_kept = (b_one * b_cos).to(dtype).to(tl.float32)
    b_turned = (b_two * b_sin).to(dtype).to(tl.float32)
    tl.store(k_ptr + o_k, (b_kept - b_turned).to(dtype), mask=m_cell)
    # The angles of the second half need not be those of the first.
    b_cos = tl.load(cos_ptr + o_a + HALF, mask=m_cell, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + o_a + HALF, mask=m_cell, other=0.0).to(tl.float32)
    b_kept = (b_two * b_cos).to(dtype).to(tl.float32)
    b_turned = (b_one * b_sin).to(dtype).to(tl.float32)
    tl.store(k_ptr + o_k + HALF, (b_kept + b_turned).to(dtype), mask=m_cell)


def rotate_(keys: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotates keys where they lie.

    Args:
        keys: [B, T, H, D], of any float dtype, channels side by side. Written.
        cos: [B or 1, N, R] of the same dtype, R even and at most D: by position.
        sin: Likewise.
        positions: int64 [T], below N.
    """
    batch, tokens, heads, _ = keys.shape
    half = cos.shape[-1] // 2
    assert keys.stride(-1) == cos.stride(-1) == 1
    assert cos.stride() == sin.stride()
    grid = (triton.cdiv(tokens, TOKENS), heads, batch)
    _rotate_kernel[grid](
        keys, cos, sin, positions, tokens, heads,
        keys.stride(0), keys.stride(1), keys.stride(2), 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        HALF=half, BLOCK_T=TOKENS, BLOCK_D=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
