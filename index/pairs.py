"""How are codes of few bits times a query summed, many keys at a time? With the processor's own instruction for it.

Codes of two channels lie side by side: `vpmaddubsw` multiplies 32 of them with 8-bit weights and adds the products of each
pair, 16 keys in one step, which a compiler does not find by itself. Where a processor has no AVX2 the same sums are
made by plain loops. Both are whole numbers, so they agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic
from numba.np.arrayobj import make_array

BLOCK = 128  # keys whose codes lie together
# Queries that share what is unpacked: as many as sums find registers.
TOGETHER = {4: 4, 2: 2}
# Pairs of channels whose products fit 16 bits: 2 * 127 * 15 * 8 and 2 * 127 * 3 * 32 are below 32,768.
_RUN = {4: 8, 2: 32}

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _SHORTS, _INTS = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16), ir.VectorType(_I32, 16)

_EIGHT = ir.VectorType(_I32, 8)
_NONE = ir.Constant(_EIGHT, ir.Undefined)


def _has_avx2() -> bool:
    """Whether code that is compiled now may use AVX2: the processor has it, and nobody asked for another one."""
    asked = getattr(config, "CPU_NAME", None)  # by NUMBA_CPU_NAME
    return not asked and bool(llvm.get_host_cpu_features().get("avx2"))


HAS_AVX2 = _has_avx2()


def _all_of(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _with_avx2(bits: int, tile: int) -> Any:
    """An intrinsic that adds up one block for some queries; arguments as of `add_block`."""
    parts, row = 8 // bits, BLOCK * bits // 8 * 2
    each, mask = BLOCK // parts, (1 << bits) - 1

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args[0], *signature.args[2:]
        block = values[1]
        arrays = [
            make_array(kind)(context, builder, value)
            for kind, value in zip(kinds, (values[0], *values[2:]), strict=True)
        ]
        codes, weights, total = (array.data for array in arrays)
        _, pairs, length = cgutils.unpack_tuple(builder, arrays[0].shape)
        codes = builder.gep(codes, [builder.mul(block, builder.mul(pairs, length))])
        signature_of_step = ir.FunctionType(_SHORTS, [_BYTES, _BYTES])
        step = cgutils.get_or_insert_function(
            builder.module, signature_of_step, "llvm.x86.avx2.pmadd.ub.sw"
        )
        of_query = builder.bitcast(weights, _I32.as_pointer())

        def constant(value: int) -> Any:
            return ir.Constant(_I64, value)

        def place(base: Any, offset: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())

        sums = [[cgutils.alloca_once(builder, _SHORTS) for _ in range(parts)] for _ in range(tile)]
        runs = builder.udiv(builder.add(pairs, constant(_RUN[bits] - 1)), constant(_RUN[bits]))
        for chunk in range(row // 32):
            with cgutils.for_range(builder, runs) as run:
                first = builder.mul(run.index, constant(_RUN[bits]))
                left = builder.sub(pairs, first)
                is_last = builder.icmp_unsigned("<", left, constant(_RUN[bits]))
                count = builder.select(is_last, left, constant(_RUN[bits]))
                for of_one in sums:
                    for one in of_one:
                        builder.store(_all_of(_SHORTS, 0), one)
                with cgutils.for_range(builder, count) as loop:
                    pair = builder.add(first, loop.index)
                    at = builder.add(builder.mul(pair, constant(row)), constant(32 * chunk))
                    packed = builder.load(place(codes, at, _BYTES), align=1)
                    unpacked = []
                    for part in range(parts):
                        shifted = packed
                        if part:
                            wide = builder.bitcast(packed, _SHORTS)
                            wide = builder.lshr(wide, _all_of(_SHORTS, part * bits))
                            shifted = builder.bitcast(wide, _BYTES)
                        unpacked.append(builder.and_(shifted, _all_of(_BYTES, mask)))
                    for query in range(tile):
                        where = builder.add(builder.mul(pairs, constant(query)), pair)
                        both = builder.load(builder.gep(of_query, [where]), align=1)
                        one = builder.insert_element(_NONE, both, ir.Constant(_I32, 0))
                        all_ = builder.shuffle_vector(one, _NONE, ir.Constant(_EIGHT, [0] * 8))
                        all_ = builder.bitcast(all_, _BYTES)
                        for part in range(parts):
                            products = builder.call(step, [unpacked[part], all_])
                            there = sums[query][part]
                            builder.store(builder.add(builder.load(there), products), there)
                for query in range(tile):
                    for part in range(parts):
                        more = builder.sext(builder.load(sums[query][part]), _INTS)
                        at_sum = constant(query * BLOCK + part * each + chunk * 16)
                        where = place(total, at_sum, _INTS)
                        before = builder.load(where, align=4)
                        builder.store(builder.add(before, more), where, align=4)
        return context.get_dummy_value()

    def typed(typing: Any, codes: Any, block: Any, weights: Any, total: Any) -> Any:
        return types.none(codes, types.int64, weights, total), generate

    return intrinsic(typed)


_add4_by_4, _add4_by_1 = _with_avx2(4, 4), _with_avx2(4, 1)
_add2_by_2, _add2_by_1 = _with_avx2(2, 2), _with_avx2(2, 1)


@njit(nogil=True, cache=True)
def add_plainly(codes: Any, block: int, weights: Any, total: Any, queries: int, bits: int) -> None:
    """What `add_block` does, by loops; for processors without the instruction."""
    parts, mask = 8 // bits, (1 << bits) - 1
    each = BLOCK // parts
    for query in range(queries):
        for pair in range(codes.shape[1]):
            both = weights[query, pair] & 0xFFFF
            first, second = (both & 255 ^ 128) - 128, (both >> 8 ^ 128) - 128  # bytes with a sign
            for part in range(parts):
                for j in range(each):
                    a = (codes[block, pair, 2 * j] >> (part * bits)) & mask
                    b = (codes[block, pair, 2 * j + 1] >> (part * bits)) & mask
                    total[query, part * each + j] += first * a + second * b


if HAS_AVX2:

    @njit(nogil=True, cache=True)
    def add_block(
        codes: Any, block: int, weights: Any, total: Any, queries: int, bits: int
    ) -> None:
        """Adds up the products of one block of codes and some queries.

        Args:
            codes: uint8 [n, pairs, 2 * BLOCK * bits / 8], contiguous: byte 2 j + p of a row holds the codes of channel
                2 row + p, of keys j, j + BLOCK bits / 8, ...
            block: Which of the n.
            weights: int32 [T, pairs], contiguous, with T of `TOGETHER`. The bytes of each are the weights of two channels, from
                -127 to 127, twice: one load then fills a register.
            total: int32 [T, BLOCK], contiguous, added to.
            queries: 1 or T: of how many weights are read and sums made.
            bits: 4 or 2.
        """
        if bits == 4:
            if queries > 1:
                _add4_by_4(codes, block, weights, total)
            else:
                _add4_by_1(codes, block, weights, total)
        elif queries > 1:
            _add2_by_2(codes, block, weights, total)
        else:
            _add2_by_1(codes, block, weights, total)

else:
    add_block = add_plainly
