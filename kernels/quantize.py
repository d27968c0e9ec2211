"""How do keys and values become few bits? Min-max codes: keys per channel over 64 tokens, values per token.

Keys are coded per channel in blocks of `BLOCK` tokens, because their outliers sit in channels (a bias of the key
projection, RoPE) and stay there; values per token in groups of `GROUP` channels. Keys are never rotated: that
spreads the outliers of models with a key bias over all channels.

Zero and scale are rounded to float16 *before* the codes are chosen, outwards, so that no value is further than
half a step from its code.

Codes are packed in bytes by *planes*: at 4 bits byte u holds channel u in its low and channel u + D_p/2 in its
high nibble; at 2 bits it holds channels u + D_p/4 * j at bits 2j; 3 bits are a 2-bit plane and a 1-bit plane. A
kernel then unpacks a byte into channels that lie far apart, each run of them contiguous: no shuffle. Head sizes
that are not a power of two are padded to one.

The references are `quantize_keys` and `quantize_values` of `offload.kernels.reference`, which return what these
write in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK, GROUP, PLANES, Codes, padded


def empty_codes(
    batch: int,
    kv_heads: int,
    n_tokens: int,
    head_size: int,
    *,
    bits: int,
    keys: bool,
    device: torch.device,
) -> Codes:
    """Room for the codes of a layer's keys or values.

    Args:
        batch: Sequences.
        kv_heads: KV heads.
        n_tokens: Tokens, a multiple of BLOCK.
        head_size: D of keys, D_v of values.
        bits: 4, 3 or 2.
        keys: Whether the codes are of keys (zero and scale per block) or values (per token).
        device: Where.

    Returns:
        Uninitialised codes.
    """
    width = padded(head_size)
    planes = tuple(
        torch.empty(
            (batch, kv_heads, n_tokens, width * plane // 8), dtype=torch.uint8, device=device
        )
        for plane in PLANES[bits]
    )
    shape = (n_tokens // BLOCK, 2, width) if keys else (n_tokens, 2, width // GROUP)
    meta = torch.empty((batch, kv_heads, *shape), dtype=torch.float16, device=device)
    return Codes(planes, meta)


def quantize_keys(keys: Tensor, codes: Codes, first_block: Tensor, *, bits: int) -> None:
    """Writes the codes of whole blocks of keys.

    Args:
        keys: [B, n, H_kv, D], floating, last stride 1; n a multiple of BLOCK.
        codes: Of `empty_codes(keys=True)`; blocks from `first_block` on are written.
        first_block: int32 scalar on the device, so that a captured graph can move it.
        bits: Of the codes.

    Raises:
        ValueError: Not whole blocks, or the last stride is not 1.
    """
    _launch(_quantize_keys_kernel, keys, codes, first_block, bits)


def quantize_values(values: Tensor, codes: Codes, first_block: Tensor, *, bits: int) -> None:
    """Writes the codes of whole blocks of values; arguments as `quantize_keys`, D_v for D."""
    _launch(_quantize_values_kernel, values, codes, first_block, bits, GROUP=GROUP)


def _launch(
    kernel: Any, rows: Tensor, codes: Codes, first_block: Tensor, bits: int, **constants: int
) -> None:
    batch, n_tokens, heads, head_size = rows.shape
    if n_tokens % BLOCK or rows.stride(-1) != 1:
        raise ValueError(
            f"whole blocks of {BLOCK} tokens with last stride 1 are quantized, got {tuple(rows.shape)} "
            f"with strides {rows.stride()}"
        )
    capacity = codes.planes[0].shape[2] // BLOCK
    shift = 0
    for index, (plane, plane_bits) in enumerate(zip(codes.planes, PLANES[bits], strict=True)):
        kernel[(batch * heads, n_tokens // BLOCK)](
            rows, plane, codes.meta, first_block, heads, capacity, *rows.stride()[:3],
            D=head_size, D_P=padded(head_size), BITS=bits, PLANE=plane_bits, SHIFT=shift,
            BLOCK=BLOCK, WRITE_META=index == 0, **constants,
        )  # fmt: skip
        shift += plane_bits


@triton.jit
def _outward(low, high, LEVELS: tl.constexpr):
    """Zero and scale of a range as float16 values in float32, rounded so that the range is covered."""
    zero = (low - tl.abs(low) * 0.0009765625).to(tl.float16).to(tl.float32)
    scale = ((high - zero) * (1.0009765625 / LEVELS)).to(tl.float16).to(tl.float32)
    return zero, scale


@triton.jit
def _code(x, zero, scale, LEVELS: tl.constexpr):
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    code = tl.floor((x - zero) * inverse + 0.5)
    return tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)


@triton.jit
def _quantize_keys_kernel(
    x_ptr,
    plane_ptr,
    meta_ptr,
    first_block_ptr,
    n_heads,
    capacity_blocks,
    stride_xb: tl.int64,
    stride_xt: tl.int64,
    stride_xh: tl.int64,
    D: tl.constexpr,
    D_P: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE_META: tl.constexpr,
):
    LEVELS: tl.constexpr = 2**BITS - 1
    RUNS: tl.constexpr = 8 // PLANE
    RUN: tl.constexpr = D_P // RUNS
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    i_block = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // n_heads, i_row % n_heads
    o_block = i_row * capacity_blocks + tl.load(first_block_ptr).to(tl.int64) + i_block
    i_t = tl.arange(0, BLOCK)
    i_u = tl.arange(0, RUN)
    x_ptr += i_batch * stride_xb + (i_block * BLOCK) * stride_xt + i_head * stride_xh
    packed = tl.zeros((BLOCK, RUN), dtype=tl.int32)
    for j in tl.static_range(RUNS):
        i_c = j * RUN + i_u
        o_x = i_t[:, None] * stride_xt + i_c[None, :]
        x = tl.load(x_ptr + o_x, mask=(i_c < D)[None, :], other=0.0).to(tl.float32)
        zero, scale = _outward(tl.min(x, axis=0), tl.max(x, axis=0), LEVELS)
        code = _code(x, zero[None, :], scale[None, :], LEVELS)
        packed |= ((code >> SHIFT) & (2**PLANE - 1)) << (PLANE * j)
        if WRITE_META:
            tl.store(meta_ptr + o_block * 2 * D_P + i_c, zero.to(tl.float16))
            tl.store(meta_ptr + o_block * 2 * D_P + D_P + i_c, scale.to(tl.float16))
    o_out = o_block * BLOCK * RUN + i_t[:, None] * RUN + i_u[None, :]
    tl.store(plane_ptr + o_out, packed.to(tl.uint8))


@triton.jit
def _quantize_values_kernel(
    x_ptr,
    plane_ptr,
    meta_ptr,
    first_block_ptr,
    n_heads,
    capacity_blocks,
    stride_xb: tl.int64,
    stride_xt: tl.int64,
    stride_xh: tl.int64,
    D: tl.constexpr,
    D_P: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WRITE_META: tl.constexpr,
):
    LEVELS: tl.constexpr = 2**BITS - 1
    RUNS: tl.constexpr = 8 // PLANE
    RUN: tl.constexpr = D_P // RUNS
    GROUPS: tl.constexpr = D_P // GROUP
    # A run holds whole groups or lies within one: the range of a group is taken over its own channels.
    PARTS: tl.constexpr = RUN // GROUP if RUN >= GROUP else 1
    WIDTH: tl.constexpr = GROUP if RUN >= GROUP else RUN
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    i_block = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // n_heads, i_row % n_heads
    o_block = i_row * capacity_blocks + tl.load(first_block_ptr).to(tl.int64) + i_block
    i_t = tl.arange(0, BLOCK)
    i_u = tl.arange(0, RUN)
    o_row = o_block * BLOCK + i_t
    x_ptr += i_batch * stride_xb + (i_block * BLOCK) * stride_xt + i_head * stride_xh
    packed = tl.zeros((BLOCK, RUN), dtype=tl.int32)
    for j in tl.static_range(RUNS):
        i_c = j * RUN + i_u
        o_x = i_t[:, None] * stride_xt + i_c[None, :]
        x = tl.load(x_ptr + o_x, mask=(i_c < D)[None, :], other=0.0).to(tl.float32)
        parts = tl.reshape(x, (BLOCK, PARTS, WIDTH))
        i_g = (j * RUN) // GROUP + tl.arange(0, PARTS)
        if RUN >= GROUP:
            low, high = tl.min(parts, axis=2), tl.max(parts, axis=2)
        else:
            i_m = (j * RUN) // GROUP * GROUP + tl.arange(0, GROUP)
            o_m = i_t[:, None] * stride_xt + i_m[None, :]
            whole = tl.load(x_ptr + o_m, mask=(i_m < D)[None, :], other=0.0).to(tl.float32)
            low, high = tl.min(whole, axis=1)[:, None], tl.max(whole, axis=1)[:, None]
        zero, scale = _outward(low, high, LEVELS)
        code = tl.reshape(_code(parts, zero[:, :, None], scale[:, :, None], LEVELS), (BLOCK, RUN))
        packed |= ((code >> SHIFT) & (2**PLANE - 1)) << (PLANE * j)
        if WRITE_META:
            o_meta = o_row[:, None] * 2 * GROUPS + i_g[None, :]
            tl.store(meta_ptr + o_meta, zero.to(tl.float16))
            tl.store(meta_ptr + o_meta + GROUPS, scale.to(tl.float16))
    tl.store(plane_ptr + o_row[:, None] * RUN + i_u[None, :], packed.to(tl.uint8))
