"""How does a query attend to its best keys where the cache keeps them? Rows in host pages, one KV head at a time, in Numba.

An index that is searched while a model generates needs no copy of the keys: it has codes, and rows are read from the
pages. What is found is attended to in the same call, since the rows' values lie beside their keys, so that only the
result and the numbers of the tokens go back. Accumulation is in float32, whatever the rows are.

A page holds rows [P, H_kv, D + D_v]; token t of a sequence lies in page `table[t // P]` at place t % P. Everything here
is single-threaded and lets go of the interpreter's lock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from offload.index.base import Floats, Ids
from offload.index.lanes import BLOCK, CHANNELS, TOGETHER
from offload.index.scan import ROUNDS, SUB, best, least_of, scan_blocks

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # what the rows of a pool are

_AHEAD = 8  # rows that are on their way from memory while one is read
_HALF_SCALE = np.float32(2.0**112)  # see `offload.index.scan`


class Rows(NamedTuple):
    """The rows of one KV head of one sequence.

    Attributes:
        pool: uint16 or float32 [pages, P, H_kv, D + D_v].
        kind: `BFLOAT16` or `FLOAT16` of a pool of uint16, else `FLOAT32`.
        table: int64 [blocks], the page of each block.
        head: Which KV head.
        key_dim: D.
    """

    pool: NDArray[Any]
    kind: int
    table: Ids
    head: int
    key_dim: int


class Coded(NamedTuple):
    """Codes of the first keys of one KV head, as of `offload.index.scan.encode`.

    Attributes:
        codes: uint8 [n, channels / 4, 4 * BLOCK * bits / 8].
        lows: float32 [n, D].
        steps: float32 [n, D].
        bits: 4 or 2.
    """

    codes: NDArray[np.uint8]
    lows: Floats
    steps: Floats
    bits: int

    @classmethod
    def of(cls, blocks: int, key_dim: int, bits: int) -> Coded:
        """Room for the codes of so many blocks; nothing is written to it."""
        codes = np.empty((blocks, -(-key_dim // CHANNELS), BLOCK * bits // 2), np.uint8)
        lows, steps = (np.empty((blocks, key_dim), np.float32) for _ in range(2))
        return cls(codes, lows, steps, bits)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Codes, lows and steps."""
        return self.codes, self.lows, self.steps

    def of_first(self, blocks: int) -> Coded:
        """Those of the first blocks."""
        return Coded(self.codes[:blocks], self.lows[:blocks], self.steps[:blocks], self.bits)


class Scratch(NamedTuple):
    """What one search works with; one for each thread.

    Attributes:
        scores: float32 [G, N].
        tops: float32 [G, N / 32].
        peaks: float32 [G].
        votes: float32 [N].
        ids: int64 [N].
        order: int64 [N].
        exact: float32 [G, candidates].
        row: float32 [D or D_v].
        query: float32 [G, D].
        weights: int8 [T, channels], with T of `offload.index.lanes`, zeros behind D.
        total: int32 [T, BLOCK].
        counts: int32 [2,048].
        found: int64 [1].
    """

    scores: Floats
    tops: Floats
    peaks: Floats
    votes: Floats
    ids: Ids
    order: Ids
    exact: Floats
    row: Floats
    query: Floats
    weights: NDArray[np.int8]
    total: NDArray[np.int32]
    counts: NDArray[np.int32]
    found: Ids

    @classmethod
    def of(
        cls, groups: int, tokens: int, key_dim: int, value_dim: int, candidates: int, bits: int = 4
    ) -> Scratch:
        """Room for searches of up to so many keys.

        Args:
            groups: Query heads of a KV head.
            tokens: Keys.
            key_dim: D.
            value_dim: D_v.
            candidates: Keys that are scored exactly.
            bits: Of the codes.
        """
        width, tile = max(key_dim, value_dim), TOGETHER[bits]
        channels = key_dim + -key_dim % CHANNELS
        tokens += -tokens % BLOCK
        return cls(
            scores=np.empty((groups, tokens), np.float32),
            tops=np.empty((groups, tokens // SUB), np.float32),
            peaks=np.empty(groups, np.float32),
            votes=np.empty(tokens, np.float32),
            ids=np.empty(tokens, np.int64),
            order=np.empty(tokens, np.int64),
            exact=np.empty((groups, max(1, candidates)), np.float32),
            row=np.empty(width, np.float32),
            query=np.empty((groups, key_dim), np.float32),
            weights=np.zeros((tile, channels), np.int8),
            total=np.zeros((tile, BLOCK), np.int32),
            counts=np.empty(2048, np.int32),
            found=np.zeros(1, np.int64),
        )


def encode_blocks(rows: Rows, coded: Coded, first: int, stop: int, scratch: Scratch) -> None:
    """Writes the codes of blocks `first` to `stop` of `BLOCK` keys: what `offload.index.scan.encode` makes of them."""
    values = scratch.scores.reshape(-1)
    if values.size < BLOCK * rows.key_dim:
        values = np.empty(BLOCK * rows.key_dim, np.float32)
    block = values[: BLOCK * rows.key_dim].reshape(BLOCK, rows.key_dim)
    _encode(*rows, *coded, first, stop, block)


def attend_best(
    rows: Rows,
    coded: Coded,
    first: int,
    count: int,
    queries: Floats,
    softcap: float,
    overfetch: int,
    scratch: Scratch,
    ids: NDArray[np.int32],
    out: Floats,
    lse: Floats,
) -> None:
    """Attends to the best keys by their codes, exactly.

    A key's vote is the largest of its logits less the best logit of that query: what it weighs beside the best.

    Args:
        rows: Of `count` keys.
        coded: Of the first of them; those behind are scored by their rows.
        first: Keys before it are padding.
        count: Keys.
        queries: float32 [G, D], of the heads that share this KV head, times attention's scale.
        softcap: Logits are c * tanh(logit / c); 0 for as they are.
        overfetch: Keys that are scored exactly, for each one that is attended to.
        scratch: As large.
        ids: int32 [k], written: who was attended to, ascending; -1 behind, where there are fewer keys.
        out: float32 [G, D_v], written: zeros where there is no key.
        lse: float32 [G], written: natural log-sum-exp of the logits; -inf where there is no key.
    """
    n = candidates(
        *rows, *coded, first, count, queries, min(overfetch * ids.shape[0], max(0, count - first)), False,
        scratch.scores, scratch.tops, scratch.peaks, scratch.votes, scratch.ids, scratch.order, scratch.row,
        scratch.weights, scratch.total, scratch.counts,
    )  # fmt: skip
    attend_some(rows, scratch.ids[:n], queries, softcap, scratch, ids, out, lse)


def attend_some(
    rows: Rows,
    some: Ids,
    queries: Floats,
    softcap: float,
    scratch: Scratch,
    ids: NDArray[np.int32],
    out: Floats,
    lse: Floats,
) -> None:
    """Attends to the best of some keys, exactly; see `attend_best`.

    Args:
        rows: Of the keys.
        some: int64 [n], ascending, none twice.
        queries: float32 [G, D].
        softcap: As in `attend_best`.
        scratch: With room for n candidates.
        ids: Written, as the next two.
        out: Likewise.
        lse: Likewise.
    """
    exact, row = scratch.exact, scratch.row
    score_chosen(*rows, some, 0, len(some), queries, softcap, exact, row)
    attend_scored(
        *rows, some, ids, out, lse, exact, scratch.peaks, scratch.votes, scratch.order, row, scratch.counts
    )  # fmt: skip


def gathered(rows: Rows, first: int, stop: int) -> Floats:
    """Keys `first` to `stop` as float32 [n, D], for a backend that keeps its own."""
    out = np.empty((stop - first, rows.key_dim), np.float32)
    gather(*rows, first, out)
    return out


def _widen(row: Any, kind: Any, out: Any) -> None:
    """Numbers of a row as float32; what `overload` puts in its place differs by the type of the row."""
    raise NotImplementedError


@overload(_widen, inline="always")
def _widened(row: Any, kind: Any, out: Any) -> Any:
    if row.dtype == types.float32:

        def copy(row: Any, kind: Any, out: Any) -> None:
            for c in range(row.shape[0]):
                out[c] = row[c]

        return copy

    def widen(row: Any, kind: Any, out: Any) -> None:
        bits = out.view(np.uint32)
        if kind == 0:
            for c in range(row.shape[0]):
                bits[c] = np.uint32(row[c]) << np.uint32(16)
        else:
            for c in range(row.shape[0]):
                half = np.uint32(row[c])
                sign = (half & np.uint32(0x8000)) << np.uint32(16)
                bits[c] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
            for c in range(row.shape[0]):
                out[c] *= _HALF_SCALE

    return widen


@njit(nogil=True, cache=True)
def gather(pool: Any, kind: int, table: Any, head: int, key_dim: int, first: int, out: Any) -> None:
    """Copies keys from `first` on as float32 into `out` [n, D]."""
    page = pool.shape[1]
    for i in range(out.shape[0]):
        token = first + i
        _widen(pool[table[token // page], token % page, head, :key_dim], kind, out[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _code(value: Any, low: Any, step: Any, top: Any) -> Any:
    """How many steps a value is above the low, rounded; half of one to the even number."""
    code = (value - low) / step
    code = top if code > top else code
    # A sum with this has the rounded number in its last bits.
    return np.float32(code + ROUNDS).view(np.int32) & np.int32(15)


@njit(nogil=True, cache=True)
def turned(bits: Any) -> Any:
    """Bits of a float as a whole number in the order of floats, and back again."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(nogil=True, cache=True, error_model="numpy")
def encode_values(values: Any, codes: Any, lows: Any, steps: Any, bits: int, block: int) -> None:
    """Writes the codes of one block.

    Args:
        values: float32 [BLOCK, D].
        codes: As in `Coded`; written at `block`.
        lows: Likewise.
        steps: Likewise.
        bits: 4 or 2.
        block: Which one.
    """
    top = np.float32((1 << bits) - 1)
    each = np.uint64(BLOCK * bits // 8)
    # Channel by channel of one key, many at a time; without signs, so that no index counts from the end.
    at, keys, key_dim = np.uint64(block), np.uint64(values.shape[0]), np.uint64(values.shape[1])
    scale = np.empty(values.shape[1], np.float32)
    # Whole numbers, since a compiler takes extremes of floats one by one.
    numbers, least, most = values.view(np.int32), lows.view(np.int32), scale.view(np.int32)
    for c in range(key_dim):
        least[at, c] = most[c] = turned(numbers[0, c])
    for j in range(keys):
        for c in range(key_dim):
            number = turned(numbers[j, c])
            least[at, c] = min(least[at, c], number)
            most[c] = max(most[c], number)
    for c in range(key_dim):
        least[at, c], most[c] = turned(least[at, c]), turned(most[c])
    for c in range(key_dim):
        step = scale[c] / top - lows[at, c] / top
        steps[at, c] = step
        scale[c] = step if step > 0 else np.float32(1)
    packed = np.zeros(CHANNELS * codes.shape[1], np.uint8)
    fours, words = packed.view(np.uint32), codes.view(np.uint32)
    for j in range(each):
        if bits == 4:
            for c in range(key_dim):
                low, by = lows[at, c], scale[c]
                packed[c] = _code(values[j, c], low, by, top) | _code(values[j + each, c], low, by, top) << np.int32(4)  # fmt: skip
        else:
            k, l, m = j + each, j + each + each, j + each + each + each
            for c in range(key_dim):
                low, by = lows[at, c], scale[c]
                first, second = _code(values[j, c], low, by, top), _code(values[k, c], low, by, top)
                third, fourth = _code(values[l, c], low, by, top), _code(values[m, c], low, by, top)
                packed[c] = first | second << np.int32(2) | third << np.int32(4) | fourth << np.int32(6)  # fmt: skip
        for r in range(np.uint64(fours.shape[0])):
            words[at, r, j] = fours[r]


@njit(nogil=True, cache=True)
def _encode(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    codes: Any, lows: Any, steps: Any, bits: int, first: int, stop: int, values: Any,
) -> None:  # fmt: skip
    for block in range(first, stop):
        gather(pool, kind, table, head, key_dim, block * BLOCK, values)
        encode_values(values, codes, lows, steps, bits, block)


@njit(nogil=True, cache=True)
def largest(values: Any, row: int, first: int, stop: int) -> Any:
    """The largest of values [n, m] in one row, from `first` to `stop`; -inf of none. No NaN.

    Maxima of floats are taken one by one, those of whole numbers many at a time: the bits of floats, where those of negative ones
    are turned round, are in their order.
    """
    bits = values.view(np.int32)
    most = np.int32(-2139095041)  # -inf
    for i in range(np.uint64(first), np.uint64(stop)):
        most = max(most, turned(bits[row, i]))
    return np.int32(turned(most)).view(np.float32)


def _number(bits: Any) -> Any:
    """A number of 16 bits, by its bits, or one of 32 as it is; what `overload` puts in its place differs by the type."""
    raise NotImplementedError


@overload(_number, inline="always")
def _numbered(bits: Any) -> Any:
    if bits == types.float32:

        def same(bits: Any) -> Any:
            return bits

        return same

    def widen(bits: Any) -> Any:
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

    return widen


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dots(rows: Any, at: int, kind: int, first: int, queries: Any, row: Any, logits: Any, to: int) -> None:  # fmt: skip
    """Dot products of a row and all queries, written to logits [G, n] at `to`. Rows are [n, width], the key begins at `first`."""
    groups = queries.shape[0]
    whole = groups - groups % 4
    # Without signs: that an index counts from the end need not be considered, which would be done channel by channel.
    dim, key, start, one = np.uint64(queries.shape[1]), np.uint64(at), np.uint64(first), np.uint64(1)  # fmt: skip
    if kind == 1:  # what takes longest to widen is widened once
        _widen(rows[at, first : first + queries.shape[1]], kind, row)
    for g in range(np.uint64(0), np.uint64(whole), np.uint64(4)):
        a, b, d, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        if kind == 1:
            for c in range(dim):
                value = row[c]
                a += value * queries[g, c]
                b += value * queries[g + one, c]
                d += value * queries[g + one + one, c]
                e += value * queries[g + one + one + one, c]
        else:
            for c in range(dim):
                value = _number(rows[key, start + c])
                a += value * queries[g, c]
                b += value * queries[g + one, c]
                d += value * queries[g + one + one, c]
                e += value * queries[g + one + one + one, c]
        logits[g, to], logits[g + one, to] = a, b
        logits[g + one + one, to], logits[g + one + one + one, to] = d, e
    for g in range(np.uint64(whole), np.uint64(groups)):
        a = np.float32(0)
        if kind == 1:
            for c in range(dim):
                a += row[c] * queries[g, c]
        else:
            for c in range(dim):
                a += _number(rows[key, start + c]) * queries[g, c]
        logits[g, to] = a


@njit(nogil=True, cache=True, fastmath={"contract"})
def _add_row(rows: Any, at: int, kind: int, first: int, weights: Any, of: int, row: Any, out: Any) -> None:  # fmt: skip
    """Adds a row, from `first` on, times weights [G, n] at `of`, to out [G, D_v]."""
    groups = out.shape[0]
    whole = groups - groups % 4
    dim, value, start, one = np.uint64(out.shape[1]), np.uint64(at), np.uint64(first), np.uint64(1)
    if kind == 1:
        _widen(rows[at, first : first + out.shape[1]], kind, row)
    for g in range(np.uint64(0), np.uint64(whole), np.uint64(4)):
        two = g + one
        three = two + one
        four = three + one
        a, b, d, e = weights[g, of], weights[two, of], weights[three, of], weights[four, of]
        for c in range(dim):
            number = row[c] if kind == 1 else _number(rows[value, start + c])
            out[g, c] += a * number
            out[two, c] += b * number
            out[three, c] += d * number
            out[four, c] += e * number
    for g in range(np.uint64(whole), np.uint64(groups)):
        a = weights[g, of]
        for c in range(dim):
            number = row[c] if kind == 1 else _number(rows[value, start + c])
            out[g, c] += a * number


def _fetch_typed(typing: Any, pool: Any, number: Any, first: Any, count: Any) -> Any:
    """Has numbers `first` to `first + count` of row `number` brought to the cache: they are read soon."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = signature.args[0]
        array = make_array(kind)(context, builder, values[0])
        width = cgutils.unpack_tuple(builder, array.shape)[-1]
        start = builder.add(builder.mul(values[1], width), values[2])
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0i8"
        )  # fmt: skip
        per_line = context.get_constant(types.int64, 64 * 8 // kind.dtype.bitwidth)
        lines = builder.udiv(
            builder.add(values[3], builder.sub(per_line, values[3].type(1))), per_line
        )
        with cgutils.for_range(builder, lines) as loop:
            at = builder.add(start, builder.mul(loop.index, per_line))
            place = builder.bitcast(builder.gep(array.data, [at]), pointer)
            builder.call(fetch, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(pool, types.int64, types.int64, types.int64), generate


fetch: Any = intrinsic(_fetch_typed)


@njit(nogil=True, cache=True)
def _vote(scores: Any, first: int, n: int, peaks: Any, votes: Any, at: int) -> None:
    """Writes the votes of keys `first` to `first + n` from `at` on: the best score of each, less that of its query. None above 0.

    Of such floats, with their sign, the larger has the smaller bits: minima of whole numbers are taken many at a time.
    """
    sign = np.int32(-(2**31))
    bits = votes.view(np.int32)
    # Without signs: that an index counts from the end need not be considered, which would be done key by key.
    start, to = np.uint64(first), np.uint64(at)
    groups = scores.shape[0]
    whole = groups - groups % 4
    for g in range(0, whole, 4):
        one, two, three, four = peaks[g], peaks[g + 1], peaks[g + 2], peaks[g + 3]
        for j in range(np.uint64(n)):
            i = start + j
            a = np.float32(scores[g, i] - one).view(np.int32)
            b = np.float32(scores[g + 1, i] - two).view(np.int32)
            c = np.float32(scores[g + 2, i] - three).view(np.int32)
            d = np.float32(scores[g + 3, i] - four).view(np.int32)
            vote = min(min(a | sign, b | sign), min(c | sign, d | sign))
            bits[to + j] = vote if g == 0 else min(bits[to + j], vote)
    for g in range(whole, groups):
        one = peaks[g]
        for j in range(np.uint64(n)):
            vote = np.float32(scores[g, start + j] - one).view(np.int32) | sign
            bits[to + j] = vote if g == 0 else min(bits[to + j], vote)


@njit(nogil=True, cache=True)
def liked(
    scores: Any, tops: Any, peaks: Any, votes: Any, ids: Any, order: Any, counts: Any,
    first: int, count: int, noted: int, wanted: int,
) -> int:  # fmt: skip
    """Writes the numbers of the `wanted` keys with the best votes, ascending; returns how many there are.

    Args:
        scores: float32 [G, N], of keys `first` to `count`.
        tops: float32 [G, N / SUB], the best of each `SUB`, where all of these are below `noted`; lost.
        peaks: float32 [G]: written, the best score of each query.
        votes: As of `Scratch`, as are the next three: worked with.
        ids: Written.
        order: Worked with.
        counts: Likewise.
        first: Keys before it are padding.
        count: Keys, more than `first`.
        noted: See `tops`.
        wanted: More than 0.
    """
    groups, begin, subs = scores.shape[0], first // SUB, (count + SUB - 1) // SUB
    whole = min(noted, count)
    for g in range(groups):
        for s in range(begin, subs):
            if s * SUB < first or (s + 1) * SUB > whole:
                tops[g, s] = largest(scores, g, max(first, s * SUB), min(count, (s + 1) * SUB))
        # Less its best, so that queries can be compared. The sum is not taken: it would cost an exponential a key.
        peaks[g] = largest(tops, g, begin, subs)
    _vote(tops, begin, subs - begin, peaks, votes, begin)
    least = np.float32(-np.inf)
    if subs - begin > wanted:
        least = least_of(votes[begin:subs], wanted, counts)
    # The votes of keys overwrite those of their `SUB`, but for those that are still to come.
    tops[0, begin:subs] = votes[begin:subs]
    found = 0
    for s in range(begin, subs):
        if tops[0, s] < least:
            continue
        start = max(first, s * SUB)
        at, n = found, min(count, (s + 1) * SUB) - start
        _vote(scores, start, n, peaks, votes, at)
        for j in range(n):
            vote = votes[at + j]
            ids[found], votes[found] = start + j, vote
            found += vote >= least
    if found > wanted:
        best(votes[:found], order[:wanted], counts)
        for i in range(wanted):
            ids[i] = ids[order[i]]
        found = wanted
    return found


@njit(nogil=True, cache=True)
def candidates(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    codes: Any, lows: Any, steps: Any, bits: int,
    first: int, count: int, queries: Any, wanted: int, scanned: bool,
    scores: Any, tops: Any, peaks: Any, votes: Any, ids: Any, order: Any, row: Any,
    weights: Any, total: Any, counts: Any,
) -> int:  # fmt: skip
    """Writes the ids of the `wanted` keys with the best votes, ascending; returns how many there are."""
    if wanted == 0:
        return 0
    page, heads = pool.shape[1], pool.shape[2]
    flat = pool.reshape(pool.shape[0] * page * heads, pool.shape[3])
    coded = codes.shape[0] * BLOCK
    if not scanned:
        scan_blocks(
            codes,
            lows,
            steps,
            bits,
            first // BLOCK,
            codes.shape[0],
            queries,
            weights,
            total,
            scores,
            tops,
        )
    for token in range(max(first, coded), count):
        place = (table[token // page] * page + token % page) * heads + head
        _dots(flat, place, kind, 0, queries, row, scores, token)
    return liked(scores, tops, peaks, votes, ids, order, counts, first, count, coded, wanted)


@njit(nogil=True, cache=True)
def score_chosen(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    some: Any, first: int, stop: int, queries: Any, softcap: float, exact: Any, row: Any,
) -> None:  # fmt: skip
    """Writes the logits of keys `first` to `stop` of some; arguments as of `attend_some`, and of `Rows` and `Scratch`."""
    groups, page, heads = queries.shape[0], pool.shape[1], pool.shape[2]
    cap = np.float32(softcap)
    flat = pool.reshape(pool.shape[0] * page * heads, pool.shape[3])
    for i in range(first, stop + _AHEAD):
        if i < stop:  # rows lie anywhere
            token = some[i]
            fetch(pool, (table[token // page] * page + token % page) * heads + head, 0, key_dim)
        if i >= first + _AHEAD:
            token = some[i - _AHEAD]
            place = (table[token // page] * page + token % page) * heads + head
            _dots(flat, place, kind, 0, queries, row, exact, i - _AHEAD)
    if cap > 0:
        for g in range(groups):
            for i in range(first, stop):
                exact[g, i] = cap * np.tanh(exact[g, i] / cap)


@njit(nogil=True, cache=True)
def attend_scored(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    some: Any, chosen: Any, out: Any, lse: Any, exact: Any, peaks: Any, votes: Any, order: Any, row: Any, counts: Any,
) -> None:  # fmt: skip
    """Attends to the best of some keys by the logits of `score_chosen`, which are lost; likewise."""
    groups, page, found, k = out.shape[0], pool.shape[1], some.shape[0], chosen.shape[0]
    heads, value_dim = pool.shape[2], out.shape[1]
    flat = pool.reshape(pool.shape[0] * page * heads, pool.shape[3])
    n = min(found, k)
    if found > k:
        for g in range(groups):
            peaks[g] = largest(exact, g, 0, found)
        _vote(exact, 0, found, peaks, votes, 0)
        best(votes[:found], order[:k], counts)
    else:
        for i in range(n):
            order[i] = i
    for g in range(groups):
        most = np.float32(-np.inf)
        for i in range(n):
            most = max(most, exact[g, order[i]])
        lse[g] = most
        out[g] = 0
        total = np.float32(0)
        for i in range(n):
            weight = np.exp(exact[g, order[i]] - most)
            exact[g, order[i]] = weight
            total += weight
        if n > 0:
            lse[g] = most + np.log(total)
            for i in range(n):
                exact[g, order[i]] /= total
    for i in range(n + _AHEAD):
        if i < n:
            token = some[order[i]]
            place = (table[token // page] * page + token % page) * heads + head
            fetch(pool, place, key_dim, value_dim)
        if i >= _AHEAD:
            at = order[i - _AHEAD]
            token = some[at]
            place = (table[token // page] * page + token % page) * heads + head
            _add_row(flat, place, kind, key_dim, exact, at, row, out)
            chosen[i - _AHEAD] = token
    for i in range(n, k):
        chosen[i] = -1
