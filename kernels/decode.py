"""How does a kernel turn a tile of bytes into numbers? With bit operations and one multiply-add for two values.

A code becomes a 16-bit float without a conversion: 0x6400 | code is the float16 1024 + code, 0x4300 | code the
bfloat16 128 + code. (Integer-to-float conversions of 268 million codes a layer would take longer than reading them
does.) Four codes that lie in four consecutive bytes are decoded at once.

`offload.kernels.quantize` says how codes are packed.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter knows no assembly


@triton.constexpr_function
def _assembly(bits, run, bf16):
    """Four bytes of codes to four values zero + scale * code.

    Operands: $0, $1 the values; then a register each of the low plane and, at 3 bits, of the high plane and of the
    bit of it that each byte's code has; then two registers of scales and two of zeros.
    """
    bits, run, bf16 = int(bits), int(run), bool(bf16)
    plane = 4 if bits == 4 else 2
    first = 5 if bits == 3 else 3  # operand of the scales
    mask = "0x0F0F0F0F" if bits == 4 else "0x03030303"
    magic, one, minus = (
        ("0x43", "0x3F803F80", "0xC300C300") if bf16 else ("0x64", "0x3C003C00", "0xE400E400")
    )
    kind = "bf16x2" if bf16 else "f16x2"
    code = [
        f"shr.u32 t, $2, {plane * run};" if run else "mov.b32 t, $2;",
        f"and.b32 t, t, {mask};",
    ]
    if (
        bits == 3
    ):  # its bit is bit 0 or bit 1 of the pair that this run has; either way it becomes bit 2
        code += [
            f"shr.u32 h, $3, {2 * run};",
            "and.b32 h, h, $4;",
            "shl.b32 a, h, 2;",
            "shl.b32 h, h, 1;",
            "or.b32 h, h, a;",
            "and.b32 h, h, 0x04040404;",
            "or.b32 t, t, h;",
        ]
    code += [
        f"mov.b32 m, {magic * 1}{magic[2:] * 3};",
        "prmt.b32 $0, t, m, 0x4140;",
        "prmt.b32 $1, t, m, 0x4342;",
        f"mov.b32 m, {one};",
        f"mov.b32 a, {minus};",
        f"fma.rn.{kind} $0, $0, m, a;",  # an exact subtraction, which older cards lack in bfloat16
        f"fma.rn.{kind} $1, $1, m, a;",
        f"fma.rn.{kind} $0, $0, ${first}, ${first + 2};",
        f"fma.rn.{kind} $1, $1, ${first + 1}, ${first + 3};",
    ]
    return "{ .reg .b32 t, m, h, a; " + " ".join(code) + " }"


@triton.jit
def decoded(
    low,
    high,
    scale,
    zero,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    LENGTH: tl.constexpr,
    BF16: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The values of one run of codes.

    Args:
        low: [rows, LENGTH] bytes of the first plane.
        high: [rows, LENGTH] bytes of the 1-bit plane, byte u % (LENGTH / 2) at column u; at 3 bits only.
        scale: [LENGTH], 16 bits.
        zero: [LENGTH], 16 bits.
        BITS: Of a code.
        RUN: Which of the codes in each byte.
        LENGTH: Codes of a run.
        BF16: bfloat16 values, not float16.
        PLAIN: Without assembly, in float32.

    Returns:
        [rows, LENGTH].
    """
    PLANE: tl.constexpr = 4 if BITS == 4 else 2
    i_half = tl.arange(0, LENGTH) // (LENGTH // 2)
    if PLAIN:
        code = (low.to(tl.int32) >> (PLANE * RUN)) & (2**PLANE - 1)
        if BITS == 3:
            code += ((high.to(tl.int32) >> (2 * RUN + i_half)[None, :]) & 1) << 2
        return code.to(tl.float32) * scale.to(tl.float32)[None, :] + zero.to(tl.float32)[None, :]
    else:  # noqa: RET505 - without it Triton compiles both branches
        low, scales = tl.broadcast(low, scale[None, :])
        low, zeros = tl.broadcast(low, zero[None, :])
        if BITS == 3:
            low, bit = tl.broadcast(low, (i_half + 1).to(tl.uint8)[None, :])
            return tl.inline_asm_elementwise(
                _assembly(BITS, RUN, BF16),
                "=r,=r,r,r,r,r,r,r,r",
                args=[low, high, bit, scales, zeros],
                dtype=tl.bfloat16 if BF16 else tl.float16,
                is_pure=True,
                pack=4,
            )
        else:  # noqa: RET505
            return tl.inline_asm_elementwise(
                _assembly(BITS, RUN, BF16),
                "=r,=r,r,r,r,r,r",
                args=[low, scales, zeros],
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
