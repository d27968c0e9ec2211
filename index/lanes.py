"""How are codes of few bits times a query summed, many keys at a time? With the processor's own instructions for it.

Codes of four channels lie side by side, as wide as one sum. `vpdpbusd` (AVX-512 VNNI) multiplies 64 of them with 8-bit
weights and adds the products of each four to a sum of 32 bits, 16 keys in one step; `vpmaddubsw` (AVX2) does half of that
in two. A compiler finds neither by itself. On other processors the same sums are made by plain loops. All are whole numbers,
so they agree to the last bit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.extending import intrinsic
from numba.np.arrayobj import make_array

BLOCK = 128  # keys whose codes lie together
CHANNELS = 4  # whose codes lie side by side: channels are padded to a multiple
# Queries that share what is unpacked: as many as sums find registers.
TOGETHER = {4: 4, 2: 2}
# Rows whose products fit 16 bits: 2 * 127 * 15 * 8 and 2 * 127 * 3 * 32 are below 32,768.
_RUN = {4: 8, 2: 32}

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _has(feature: str) -> bool:
    """Whether code that is compiled now may use it: the processor has it, and nobody asked for another one."""
    if getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None) is not None:
        return False
    return "+" + feature in get_host_cpu_features().split(",")


HAS_AVX2, HAS_VNNI = _has("avx2"), _has("avx512vnni")


def _all_of(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


class _Avx2:
    """Sums of 16 bits, two for each key, that are added to those of 32 now and then."""

    width = 32
    sums = ir.VectorType(_I16, 16)

    def __init__(self, bits: int) -> None:
        self.run = _RUN[bits]

    def add(self, builder: Any, total: Any, codes: Any, weights: Any) -> Any:
        """Adds products; codes and weights as vectors of 32 bits."""
        as_bytes = ir.VectorType(_I8, 32)
        step = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.sums, [as_bytes, as_bytes]), "llvm.x86.avx2.pmadd.ub.sw"
        )  # fmt: skip
        values = [builder.bitcast(one, as_bytes) for one in (codes, weights)]
        return builder.add(total, builder.call(step, values))

    def widen(self, builder: Any, total: Any) -> Any:
        """Sums of 32 bits, one for each key."""
        kind = ir.VectorType(_I32, 8)
        step = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [self.sums, self.sums]), "llvm.x86.avx2.pmadd.wd"
        )  # fmt: skip
        return builder.call(step, [total, _all_of(self.sums, 1)])


class _Vnni:
    """Sums of 32 bits."""

    width = 64
    sums = ir.VectorType(_I32, 16)
    run = 1 << 20

    def __init__(self, bits: int) -> None:
        pass

    def add(self, builder: Any, total: Any, codes: Any, weights: Any) -> Any:
        """See `_Avx2`."""
        step = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.sums, [self.sums] * 3), "llvm.x86.avx512.vpdpbusd.512"
        )  # fmt: skip
        return builder.call(step, [total, codes, weights])

    def widen(self, builder: Any, total: Any) -> Any:
        """See `_Avx2`."""
        return total


def summing(bits: int, tile: int, of: type[_Avx2 | _Vnni]) -> Any:
    """An intrinsic that adds up one block for some queries; arguments as of `add_block`."""
    instructions = of(bits)
    parts, row = 8 // bits, BLOCK * bits // 8 * CHANNELS
    each, mask = BLOCK // parts, int("01" * 4, 16) * ((1 << bits) - 1)
    lanes = instructions.width // 4
    ints = ir.VectorType(_I32, lanes)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args[0], *signature.args[2:]
        arrays = [
            make_array(kind)(context, builder, value)
            for kind, value in zip(kinds, (values[0], *values[2:]), strict=True)
        ]
        codes, weights, total = (array.data for array in arrays)
        _, rows, length = cgutils.unpack_tuple(builder, arrays[0].shape)
        size = builder.mul(rows, length)
        codes = builder.gep(codes, [builder.mul(values[1], size)])
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0i8"
        )  # fmt: skip
        of_query = builder.bitcast(weights, _I32.as_pointer())
        none = _all_of(instructions.sums, 0)

        def constant(value: int) -> Any:
            return ir.Constant(_I64, value)

        def place(base: Any, offset: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())

        def everywhere(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(ints, ir.Undefined), value, _I32(0))
            zeros = ir.Constant(ints, [0] * lanes)
            return builder.shuffle_vector(one, ir.Constant(ints, ir.Undefined), zeros)

        sums = [
            [cgutils.alloca_once(builder, instructions.sums) for _ in range(parts)]
            for _ in range(tile)
        ]
        run_rows = constant(instructions.run)
        runs = builder.udiv(builder.add(rows, constant(instructions.run - 1)), run_rows)
        for chunk in range(row // instructions.width):
            with cgutils.for_range(builder, runs) as run:
                first = builder.mul(run.index, run_rows)
                left = builder.sub(rows, first)
                is_last = builder.icmp_unsigned("<", left, run_rows)
                count = builder.select(is_last, left, run_rows)
                for of_one in sums:
                    for one in of_one:
                        builder.store(none, one)
                with cgutils.for_range(builder, count) as loop:
                    at_row = builder.add(first, loop.index)
                    at = builder.add(
                        builder.mul(at_row, constant(row)), constant(instructions.width * chunk)
                    )
                    packed = builder.load(place(codes, at, ints), align=1)
                    # As much of the next block, from its first byte on: rows are read in another order than memory is.
                    step = builder.add(builder.mul(rows, constant(chunk)), at_row)
                    ahead = builder.add(size, builder.mul(step, constant(instructions.width)))
                    builder.call(fetch, [builder.gep(codes, [ahead]), _I32(0), _I32(3), _I32(1)])
                    unpacked = []
                    for part in range(parts):
                        shifted = packed
                        if part:
                            shifted = builder.lshr(packed, _all_of(ints, part * bits))
                        unpacked.append(builder.and_(shifted, _all_of(ints, mask)))
                    for query in range(tile):
                        where = builder.add(builder.mul(rows, constant(query)), at_row)
                        four = builder.load(builder.gep(of_query, [where]), align=1)
                        weight = everywhere(four)
                        for part in range(parts):
                            there = sums[query][part]
                            more = instructions.add(
                                builder, builder.load(there), unpacked[part], weight
                            )
                            builder.store(more, there)
                for query in range(tile):
                    for part in range(parts):
                        more = instructions.widen(builder, builder.load(sums[query][part]))
                        at_sum = constant(query * BLOCK + part * each + chunk * lanes)
                        where = place(total, at_sum, ints)
                        before = builder.load(where, align=4)
                        builder.store(builder.add(before, more), where, align=4)
        return context.get_dummy_value()

    def typed(typing: Any, codes: Any, block: Any, weights: Any, total: Any) -> Any:
        return types.none(codes, types.int64, weights, total), generate

    return intrinsic(typed)


@njit(nogil=True, cache=True)
def add_plainly(codes: Any, block: int, weights: Any, total: Any, queries: int, bits: int) -> None:
    """What `add_block` does, by loops; for processors without the instructions."""
    parts, mask = 8 // bits, (1 << bits) - 1
    each = BLOCK // parts
    for query in range(queries):
        for row in range(codes.shape[1]):
            for part in range(parts):
                for j in range(each):
                    more = 0
                    for p in range(CHANNELS):
                        code = (codes[block, row, CHANNELS * j + p] >> (part * bits)) & mask
                        more += weights[query, CHANNELS * row + p] * code
                    total[query, part * each + j] += more


if HAS_AVX2 or HAS_VNNI:
    _kind: type[_Avx2 | _Vnni] = _Vnni if HAS_VNNI else _Avx2
    _add4_by_4, _add4_by_1 = summing(4, 4, _kind), summing(4, 1, _kind)
    _add2_by_2, _add2_by_1 = summing(2, 2, _kind), summing(2, 1, _kind)

    @njit(nogil=True, cache=True)
    def add_block(
        codes: Any, block: int, weights: Any, total: Any, queries: int, bits: int
    ) -> None:
        """Adds up the products of one block of codes and some queries.

        Args:
            codes: uint8 [n, channels / 4, 4 * BLOCK * bits / 8], contiguous: byte 4 j + p of a row holds the codes of channel
                4 row + p, of keys j, j + BLOCK bits / 8, ...
            block: Which of the n.
            weights: int8 [T, channels], contiguous, with T of `TOGETHER`; from -127 to 127.
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
