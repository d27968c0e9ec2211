"""How does a kernel turn a tile of bytes into numbers? With bit operations and one multiply-add for two values.

A code becomes a 16-bit float without a conversion: its bits are set into those of a power of two. 0x6400 | c << 4 is
the float16 1024 + 16 c, 0x4300 | c << 3 the bfloat16 128 + 8 c. (Integer-to-float conversions of 268 million codes a
layer would take longer than reading them does.) The higher a code is set, the smaller the power of two is against it,
and with it the rounding of the offset that takes the power away again: under a thirtieth of a step.

Four codes that lie in four consecutive bytes are decoded at once; so their offsets and slopes are four words, which
need no shuffling. `offload.kernels.quantize` says how codes are packed.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter knows no assembly


@triton.constexpr_function
def _assembly(bits, run, bf16):
    """Four bytes of codes to four values offset + slope * (base + unit * code).

    Operands: $0, $1 the values; then a register each of the low plane and, at 3 bits, of the high plane and of the
    bit of it that each byte's code has; then the words of offsets and slopes.
    """
    bits, run, bf16 = int(bits), int(run), bool(bf16)
    plane = 4 if bits == 4 else 2
    place = (7 if bf16 else 8) - bits  # where the lowest bit of a code goes
    mask = ((2**plane - 1) << place) * 0x01010101
    first = 5 if bits == 3 else 3  # operand of the first word
    shift = place - plane * run
    code = [f"shl.b32 t, $2, {shift};" if shift >= 0 else f"shr.u32 t, $2, {-shift};"]
    code += [f"and.b32 t, t, {mask:#x};"]
    if (
        bits == 3
    ):  # its bit is bit 0 or bit 1 of the pair that this run has; either way it goes above the others
        code += [
            f"shr.u32 h, $3, {2 * run};",
            "and.b32 h, h, $4;",
            f"shl.b32 a, h, {place + 2};",
            f"shl.b32 h, h, {place + 1};",
            "or.b32 h, h, a;",
            f"and.b32 h, h, {(4 << place) * 0x01010101:#x};",
            "or.b32 t, t, h;",
        ]
    kind = "bf16x2" if bf16 else "f16x2"
    code += [
        f"mov.b32 m, {'0x43434343' if bf16 else '0x64646464'};",
        "prmt.b32 $0, t, m, 0x4140;",
        "prmt.b32 $1, t, m, 0x4342;",
        f"fma.rn.{kind} $0, $0, ${first + 2}, ${first};",
        f"fma.rn.{kind} $1, $1, ${first + 3}, ${first + 1};",
    ]
    return "{ .reg .b32 t, m, h, a; " + " ".join(code) + " }"


@triton.jit
def decoded(
    low,
    high,
    meta_ptr,
    o_meta,
    read,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    LENGTH: tl.constexpr,
    BF16: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The values of one run of codes, of one block or of several side by side.

    Args:
        low: [rows, n * LENGTH] bytes of the first plane of n blocks.
        high: [rows, n * LENGTH] bytes of their 1-bit planes, byte u % (LENGTH / 2) at column u; at 3 bits only.
        meta_ptr: Offsets and slopes of the coded axis.
        o_meta: [n * LENGTH]: where those of each column are if this is the first run, counted in pairs.
        read: [n * LENGTH]: false for values of zero, without reading offsets and slopes.
        BITS: Of a code.
        RUN: Which of the codes in each byte.
        LENGTH: Codes of a run.
        BF16: bfloat16 values, not float16.
        PLAIN: Without assembly, in float32.

    Returns:
        [rows, n * LENGTH].
    """
    PLANE: tl.constexpr = 4 if BITS == 4 else 2
    i_half = tl.arange(0, low.shape[1]) % LENGTH // (LENGTH // 2)
    o_meta += RUN * LENGTH
    if PLAIN:
        BASE: tl.constexpr = 128.0 if BF16 else 1024.0
        UNIT: tl.constexpr = 2 ** ((7 if BF16 else 8) - BITS)
        code = (low.to(tl.int32) >> (PLANE * RUN)) & (2**PLANE - 1)
        if BITS == 3:
            code += ((high.to(tl.int32) >> (2 * RUN + i_half)[None, :]) & 1) << 2
        o_offset = o_meta // 4 * 8 + o_meta % 4
        offset = tl.load(meta_ptr + o_offset, mask=read, other=0.0).to(tl.float32)
        slope = tl.load(meta_ptr + o_offset + 4, mask=read, other=0.0).to(tl.float32)
        return offset[None, :] + slope[None, :] * (BASE + UNIT * code.to(tl.float32))
    else:  # noqa: RET505 - without it Triton compiles both branches
        words = tl.load(meta_ptr.to(tl.pointer_type(tl.int32)) + o_meta, mask=read, other=0)
        low, words = tl.broadcast(low, words[None, :])
        if BITS == 3:
            low, bit = tl.broadcast(low, (i_half + 1).to(tl.uint8)[None, :])
            return tl.inline_asm_elementwise(
                _assembly(BITS, RUN, BF16),
                "=r,=r,r,r,r,r,r,r,r",
                args=[low, high, bit, words],
                dtype=tl.bfloat16 if BF16 else tl.float16,
                is_pure=True,
                pack=4,
            )
        else:  # noqa: RET505
            return tl.inline_asm_elementwise(
                _assembly(BITS, RUN, BF16),
                "=r,=r,r,r,r,r,r",
                args=[low, words],
                dtype=tl.bfloat16 if BF16 else tl.float16,
                is_pure=True,
                pack=4,
            )


@triton.jit
def exp(x, PLAIN: tl.constexpr):
    """e to the x with 22 bits; 0 below -87."""
    if PLAIN:
        return tl.exp(x)
    else:  # noqa: RET505 - tl.exp takes four more instructions for results below the normal range
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            args=[x * 1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
