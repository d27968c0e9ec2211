"""How do keys and values become few bits? Min-max codes: keys per channel over 64 tokens, values per token.

Keys are coded per channel in blocks of `BLOCK` tokens, because their outliers sit in channels (a bias of the key
projection, RoPE) and stay there; values per token in groups of `GROUP` channels. Keys are never rotated: that
spreads the outliers of models with a key bias over all channels.

A line, offset and slope, takes a code to its value. Both are rounded to 16 bits *before* the codes are chosen, so
that no value is further than half a step from its code, and to the nearest, so that none is always off to one side.

Codes are packed in bytes by *planes* along the axis that a product sums over, channels of keys, tokens of values: at
4 bits byte u holds entry u in its low and entry u + L/2 in its high nibble; at 2 bits it holds entries u + L/4 * j at
bits 2j; 3 bits are a 2-bit plane and a 1-bit plane. A kernel then unpacks a tile of bytes into tiles that lie far
apart, each contiguous: no shuffle. Head sizes that are not a power of two are padded to one.

The references are `quantize_keys` and `quantize_values` of `offload.kernels.reference`, which return what these
write in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.reference import BLOCK, GROUP, KEYS, PLANES, VALUES, Codes, Kind, padded


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
        keys: Whether the codes are of keys or of values.
        device: Where.

    Returns:
        Uninitialised codes.
    """
    width, blocks = padded(head_size), n_tokens // BLOCK
    rows, length = (BLOCK, width) if keys else (width, BLOCK)
    planes = tuple(
        torch.empty(
            (batch, kv_heads, blocks, rows, length * plane // 8), dtype=torch.uint8, device=device
        )
        for plane in PLANES[bits]
    )
    shape = (width // 4, 2, 4) if keys else (width // GROUP, BLOCK // 4, 2, 4)
    dtype = KEYS.dtype if keys else VALUES.dtype
    return Codes(planes, torch.empty((batch, kv_heads, blocks, *shape), dtype=dtype, device=device))


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
    _launch(_quantize_keys_kernel, keys, codes, first_block, bits, KEYS)


def quantize_values(values: Tensor, codes: Codes, first_block: Tensor, *, bits: int) -> None:
    """Writes the codes of whole blocks of values; arguments as `quantize_keys`, D_v for D."""
    _launch(_quantize_values_kernel, values, codes, first_block, bits, VALUES, GROUP=GROUP)


def _launch(
    kernel: Any,
    rows: Tensor,
    codes: Codes,
    first_block: Tensor,
    bits: int,
    kind: Kind,
    **constants: int,
) -> None:
    batch, n_tokens, heads, head_size = rows.shape
    if n_tokens % BLOCK or rows.stride(-1) != 1:
        raise ValueError(
            f"whole blocks of {BLOCK} tokens with last stride 1 are quantized, got {tuple(rows.shape)} "
            f"with strides {rows.stride()}"
        )
    shift = 0
    for index, (plane, plane_bits) in enumerate(zip(codes.planes, PLANES[bits], strict=True)):
        kernel[(batch * heads, n_tokens // BLOCK)](
            rows, plane, codes.meta, first_block, heads, codes.n_blocks, *rows.stride()[:3],
            D=head_size, D_P=padded(head_size), BITS=bits, PLANE=plane_bits, SHIFT=shift,
            BLOCK=BLOCK, BASE=kind.base, UNIT=kind.unit(bits), WRITE_META=index == 0, **constants,
        )  # fmt: skip
        shift += plane_bits


@triton.jit
def _rounded(x, BF16: tl.constexpr):
    """float32 rounded to the nearest bfloat16 or float16, still as float32."""
    if BF16:  # by hand: Triton's interpreter would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - without it Triton compiles both branches
        return x.to(tl.float16).to(tl.float32)


@triton.jit
def _line(low, high, LEVELS: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Offset and slope of a range as 16-bit numbers in float32; see the reference."""
    EPS: tl.constexpr = 0.0078125 if BF16 else 0.0009765625  # from 1 to the next number
    wide = tl.maximum(EPS * tl.abs(low) - 0.25 * ((high - low) * (1.0 / LEVELS)), 0.0)
    slope = _rounded((high - low + wide) * (1.0 / (LEVELS * UNIT)), BF16)
    return _rounded(low - 0.5 * wide - BASE * slope, BF16), slope


@triton.jit
def _code(x, offset, slope, LEVELS: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr):
    scale = slope * UNIT
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    code = tl.floor((x - (offset + BASE * slope)) * inverse + 0.5)
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
    BASE: tl.constexpr,
    UNIT: tl.constexpr,
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
        offset, slope = _line(tl.min(x, axis=0), tl.max(x, axis=0), LEVELS, BASE, UNIT, False)
        code = _code(x, offset[None, :], slope[None, :], LEVELS, BASE, UNIT)
        packed |= ((code >> SHIFT) & (2**PLANE - 1)) << (PLANE * j)
        if WRITE_META:
            o_meta = o_block * 2 * D_P + i_c // 4 * 8 + i_c % 4
            tl.store(meta_ptr + o_meta, offset.to(tl.float16))
            tl.store(meta_ptr + o_meta + 4, slope.to(tl.float16))
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
    BASE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    WRITE_META: tl.constexpr,
):
    LEVELS: tl.constexpr = 2**BITS - 1
    RUNS: tl.constexpr = 8 // PLANE
    RUN: tl.constexpr = BLOCK // RUNS
    GROUPS: tl.constexpr = D_P // GROUP
    i_row = tl.program_id(0).to(tl.int64)  # sequence and KV head
    i_block = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // n_heads, i_row % n_heads
    o_block = i_row * capacity_blocks + tl.load(first_block_ptr).to(tl.int64) + i_block
    i_u = tl.arange(0, RUN)
    i_c = tl.arange(0, D_P)
    i_g = tl.arange(0, GROUPS)
    x_ptr += i_batch * stride_xb + (i_block * BLOCK) * stride_xt + i_head * stride_xh
    meta_ptr += o_block * 2 * GROUPS * BLOCK
    packed = tl.zeros((RUN, D_P), dtype=tl.int32)
    for j in tl.static_range(RUNS):
        o_x = (j * RUN + i_u)[:, None] * stride_xt + i_c[None, :]
        x = tl.load(x_ptr + o_x, mask=(i_c < D)[None, :], other=0.0).to(tl.float32)
        groups = tl.reshape(x, (RUN, GROUPS, GROUP))
        low, high = tl.min(groups, axis=2), tl.max(groups, axis=2)
        offset, slope = _line(low, high, LEVELS, BASE, UNIT, True)
        code = _code(groups, offset[:, :, None], slope[:, :, None], LEVELS, BASE, UNIT)
        code = tl.reshape(code, (RUN, D_P))
        packed |= ((code >> SHIFT) & (2**PLANE - 1)) << (PLANE * j)
        if WRITE_META:
            i_t = j * RUN + i_u
            o_meta = i_g[None, :] * 2 * BLOCK + (i_t // 4 * 8 + i_t % 4)[:, None]
            tl.store(meta_ptr + o_meta, offset.to(tl.bfloat16))
            tl.store(meta_ptr + o_meta + 4, slope.to(tl.bfloat16))
    o_out = (o_block * D_P + i_c[:, None]) * RUN + i_u[None, :]
    tl.store(plane_ptr + o_out, tl.trans(packed).to(tl.uint8))
