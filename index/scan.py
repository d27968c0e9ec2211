"""What do all keys score, from a few bits each, and which are best?

A block is `BLOCK` keys. A channel of it is coded from its smallest to its largest value. Four channels lie side by side: of a
row of bytes 4 j + p is of channel p of the four, of keys j and j + BLOCK / 2 with 4-bit codes, of j and three more,
BLOCK / 4 apart, with 2 bits. So one instruction weighs the four of 8 or 16 keys (`offload.index.lanes`). Per channel, because keys have outlier channels (a bias, and what
the position embedding leaves of it); see Liu et al., KIVI (arXiv 2402.02750), section 3.

The scan counts in whole numbers: a query times the block's steps is rounded to 127 steps each way. Where all channels weigh
alike that adds a few hundredths to what 4-bit codes are off, and more where one outweighs the others. Everything here is single-threaded and lets go of the interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.index import lanes
from offload.index.base import Floats, Ids, Vectors
from offload.index.lanes import TOGETHER, add_block

# Keys of SmolLM2 at 7.8K, recall of the best 100, four (two) times over-fetched: at 4 bits 1.0 (0.9999, 0.9999, 0.9998) with
# blocks of 64, 128 and 256, at 2 bits 0.986, 0.973 and 0.960; the steps take 1, 1/2 and 1/4 bit a value. A scan of blocks of
# 64 takes twice as long as one of 128: too few bytes for whole vector registers.
BLOCK, CHANNELS = lanes.BLOCK, lanes.CHANNELS
SUB = 32  # keys of which the best is noted: where few are good, most keys are not looked at again
_STEPS = 127
ROUNDS = np.float32(1.5 * 2**23)
# Of uniform quantisers of a normal variable, in standard deviations: Max, Quantizing for minimum distortion (1960), table II.
_NORMAL_STEPS = {2: np.float32(0.9957), 4: np.float32(0.3352)}
_AT_ONCE = 64  # blocks that are coded at once, which bounds the copy in float32

# A float16 whose bits are put where a float32 has its own is the same number, less by this: the biases of both exponents.
_HALF_SCALE = np.float32(2.0**112)


def encode(
    rows: Vectors, bits: int, *, clipped: bool = False
) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes of whole blocks.

    Args:
        rows: [n * BLOCK, D], float16 or float32.
        bits: 4 or 2.
        clipped: Steps are those of least mean square error for normal values, about the mean of the channel, and what
            lies outside is cut. Worse for the largest keys, better for all others.

    Returns:
        codes: uint8 [n, channels / 4, 4 * BLOCK * bits / 8], where channels is D, padded to a multiple of `CHANNELS`.
        lows: float32 [n, D], what code 0 stands for: the smallest value of each channel, unless they are clipped.
        steps: float32 [n, D], between codes; zero where all values are the same.
    """
    n, rest = divmod(rows.shape[0], BLOCK)
    assert not rest
    dimension, top = rows.shape[1], (1 << bits) - 1
    padded = dimension + -dimension % CHANNELS
    codes = np.zeros((n, padded, BLOCK * bits // 8), dtype=np.uint8)
    lows, steps = np.empty((n, dimension), np.float32), np.empty((n, dimension), np.float32)
    for a in range(0, n, _AT_ONCE):
        b = min(a + _AT_ONCE, n)
        values = rows[a * BLOCK : b * BLOCK].reshape(-1, BLOCK, dimension).astype(np.float32)
        if clipped:
            step = _NORMAL_STEPS[bits] * values.std(axis=1)
            low = values.mean(axis=1) - np.float32(0.5 * top) * step
        else:
            low = values.min(axis=1)
            # Halves first: the distance of the largest floats is no float.
            step = (values.max(axis=1) / top - low / top).astype(np.float32)
        scale = np.where(step > 0, step, np.float32(1))
        code = np.rint((values - low[:, None]) / scale[:, None]).clip(0, top).astype(np.uint8)
        parts = code.reshape(b - a, 8 // bits, BLOCK * bits // 8, dimension)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, :, None, None]
        packed = np.bitwise_or.reduce(parts << shifts, axis=1)
        codes[a:b, :dimension] = packed.transpose(0, 2, 1)
        lows[a:b], steps[a:b] = low, step
    return _side_by_side(codes), lows, steps


def _side_by_side(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [n, channels, m] with four channels in one row: [n, channels / 4, 4 m]."""
    n, channels, m = codes.shape
    rows = codes.reshape(n, channels // CHANNELS, CHANNELS, m).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(rows).reshape(n, channels // CHANNELS, CHANNELS * m)


def decode(codes: NDArray[np.uint8], lows: Floats, steps: Floats, bits: int) -> Floats:
    """What codes stand for, float32 [n * BLOCK, D]; see `encode`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    n, rows, length = codes.shape
    side_by_side = codes.reshape(n, rows, length // CHANNELS, CHANNELS).transpose(0, 1, 3, 2)
    channels = side_by_side.reshape(n, CHANNELS * rows, -1)
    parts = (channels[:, : lows.shape[1], None, :] >> shifts) & ((1 << bits) - 1)
    values = parts.reshape(*lows.shape, BLOCK) * steps[..., None] + lows[..., None]
    return np.ascontiguousarray(values.transpose(0, 2, 1).reshape(-1, lows.shape[1]))


def scan(
    codes: NDArray[np.uint8],
    lows: Floats,
    steps: Floats,
    queries: Floats,
    bits: int,
    scores: Floats,
) -> None:
    """Scores of all coded keys.

    Args:
        codes: Of `encode`.
        lows: Of `encode`.
        steps: Of `encode`.
        queries: float32 [G, D].
        bits: 4 or 2.
        scores: float32 [G, at least n * BLOCK]: written.
    """
    _scan(codes, lows, steps, queries, scores, bits, TOGETHER[bits])


def rescore(rows: Vectors, ids: Ids, query: Floats, scores: Floats) -> None:
    """Exact scores of some keys.

    Args:
        rows: float16 or float32 [N, D].
        ids: int64 [n].
        query: float32 [D].
        scores: float32 [n]: written.
    """
    if rows.dtype == np.float16:
        _rescore16(rows.view(np.uint16), ids, query, scores)
    else:
        _rescore32(rows, ids, query, scores)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nnan", "nsz"})
def _weigh(lows: Any, steps: Any, block: int, queries: Any, g: int, n: int, weights: Any, units: Any, offsets: Any) -> None:  # fmt: skip
    """Up to four queries from g on in the steps of a block: writes their weights as `offload.index.lanes.add_block` reads them.

    Also what a weight of one stands for, and what the scores of all keys have in common.
    """
    # Of floats without their sign the larger has the larger bits, and the maximum of whole numbers is one instruction.
    plain = np.int32(0x7FFFFFFF)
    # Without signs: that an index counts from the end need not be considered, which would be done channel by channel.
    row, channels, first = np.uint64(block), np.uint64(lows.shape[1]), np.uint64(g)
    for t in range(0, n - n % 4, 4):
        one, two, three, four = first, first + np.uint64(1), first + np.uint64(2), first + np.uint64(3)  # fmt: skip
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        i, j, k, m = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
        for x in range(channels):
            low, step = lows[row, x], steps[row, x]
            a += queries[one, x] * low
            b += queries[two, x] * low
            c += queries[three, x] * low
            d += queries[four, x] * low
            i = max(i, np.float32(queries[one, x] * step).view(np.int32) & plain)
            j = max(j, np.float32(queries[two, x] * step).view(np.int32) & plain)
            k = max(k, np.float32(queries[three, x] * step).view(np.int32) & plain)
            m = max(m, np.float32(queries[four, x] * step).view(np.int32) & plain)
        offsets[t], offsets[t + 1], offsets[t + 2], offsets[t + 3] = a, b, c, d
        units[t], units[t + 1] = np.int32(i).view(np.float32), np.int32(j).view(np.float32)
        units[t + 2], units[t + 3] = np.int32(k).view(np.float32), np.int32(m).view(np.float32)
    for t in range(n - n % 4, n):
        one = first + np.uint64(t)
        a, i = np.float32(0), np.int32(0)
        for x in range(channels):
            a += queries[one, x] * lows[row, x]
            i = max(i, np.float32(queries[one, x] * steps[row, x]).view(np.int32) & plain)
        offsets[t], units[t] = a, np.int32(i).view(np.float32)
    for t in range(n):
        unit = units[t] / np.float32(_STEPS)
        inverse = np.float32(1) / unit if unit > 0 else np.float32(0)
        units[t] = unit
        at, one = np.uint64(t), first + np.uint64(t)
        # A sum with this has the rounded number in its last bits, negative ones as their complement.
        for x in range(channels):
            weights[at, x] = np.float32(queries[one, x] * steps[row, x] * inverse + ROUNDS).view(np.int32)  # fmt: skip


@njit(nogil=True, cache=True)
def _write(
    total: Any, t: int, unit: Any, offset: Any, scores: Any, g: int, block: int, tops: Any
) -> None:
    """Scores of a block from their sums, and the best of each `SUB`: the best sum has the best score, rounding keeps their order."""
    # Without signs: that an index counts from the end need not be considered, which would be done key by key.
    first = np.uint64(block) * np.uint64(BLOCK)
    for j in range(np.uint64(BLOCK)):
        scores[g, first + j] = offset + unit * np.float32(total[t, j])
    # A loop of a length that is not known is vectorised; this one would be unrolled instead.
    length = np.uint64(total.shape[1] // (BLOCK // SUB))
    for s in range(np.uint64(BLOCK // SUB)):
        most = np.int32(-(2**31))
        for j in range(length):
            most = max(most, total[t, s * length + j])
        tops[g, np.uint64(block) * np.uint64(BLOCK // SUB) + s] = offset + unit * np.float32(most)


@njit(nogil=True, cache=True)
def scan_blocks(
    codes: Any, lows: Any, steps: Any, bits: int, first: int, stop: int, queries: Any, weights: Any, total: Any, scores: Any, tops: Any
) -> None:  # fmt: skip
    """Scores of coded keys, with memory that is given: parts of arrays are counted, which takes longer than a block.

    Args:
        codes: Of `encode`.
        lows: Of `encode`.
        steps: Of `encode`.
        bits: 4 or 2.
        first: Blocks before it are left out.
        stop: As those from it on.
        queries: float32 [G, D].
        weights: int8 [T, channels] with T of `offload.index.lanes.TOGETHER`, zero behind D: worked with.
        total: int32 [T, BLOCK]: worked with.
        scores: float32 [G, N]: written.
        tops: float32 [G, N / SUB]: written, the best of each `SUB` keys.
    """
    groups, tile = queries.shape[0], weights.shape[0]
    units, offsets = np.empty(4, np.float32), np.empty(4, np.float32)
    for block in range(first, stop):
        for g in range(0, groups, tile):
            n = min(tile, groups - g)
            _weigh(lows, steps, block, queries, g, n, weights, units, offsets)
            for t in range(n):
                for j in range(BLOCK):
                    total[t, j] = 0
            add_block(codes, block, weights, total, n, bits)
            for t in range(n):
                unit, offset = units[t], offsets[t]
                _write(total, t, unit, offset, scores, g + t, block, tops)


@njit(nogil=True, cache=True)
def _scan(
    codes: Any, lows: Any, steps: Any, queries: Any, scores: Any, bits: int, tile: int
) -> None:
    channels = CHANNELS * codes.shape[1]
    weights, total = np.zeros((tile, channels), np.int8), np.zeros((tile, BLOCK), np.int32)
    tops = np.empty((queries.shape[0], scores.shape[1] // SUB), np.float32)
    scan_blocks(codes, lows, steps, bits, 0, codes.shape[0], queries, weights, total, scores, tops)


@njit(nogil=True, cache=True)
def _border(bits: Any, n: int, counts: Any) -> Any:
    """Of the n largest floats, by their bits: the place in order of the least, and how many of those that are like it are among them."""
    sign, every = np.uint32(0x80000000), np.uint32(0xFFFFFFFF)
    left = n
    prefix, mask = np.uint32(0), np.uint32(0)
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        counts[:] = 0
        low = np.uint32((1 << width) - 1)
        for i in range(bits.shape[0]):
            key = bits[i] ^ (every if bits[i] & sign else sign)
            if key & mask == prefix:
                counts[(key >> np.uint32(shift)) & low] += 1
        bin_ = (1 << width) - 1
        while counts[bin_] < left:
            left -= counts[bin_]
            bin_ -= 1
        prefix |= np.uint32(bin_) << np.uint32(shift)
        mask |= low << np.uint32(shift)
    return prefix, left


@njit(nogil=True, cache=True)
def least_of(scores: Any, n: int, counts: Any) -> Any:
    """The least of the n largest scores; arguments as of `best`."""
    prefix, _ = _border(scores.view(np.uint32), n, counts)
    sign = np.uint32(0x80000000)
    return np.uint32(prefix ^ (sign if prefix & sign else np.uint32(0xFFFFFFFF))).view(np.float32)


@njit(nogil=True, cache=True)
def best(scores: Any, ids: Any, counts: Any) -> None:
    """The largest of some scores, by their bits: no sort, and exactly as many as asked.

    Args:
        scores: float32 [N], contiguous, no NaN.
        ids: int64 [n], n <= N: written, ascending. Of equal scores the first are taken.
        counts: int32 [2,048], to work with.
    """
    bits = scores.view(np.uint32)
    sign, every = np.uint32(0x80000000), np.uint32(0xFFFFFFFF)
    prefix, left = _border(bits, ids.shape[0], counts)
    at = 0
    for i in range(bits.shape[0]):
        key = bits[i] ^ (every if bits[i] & sign else sign)
        if key > prefix or (key == prefix and left > 0):
            left -= key == prefix
            ids[at] = i
            at += 1


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _rescore32(rows: Any, ids: Any, query: Any, scores: Any) -> None:
    for i in range(ids.shape[0]):
        row = rows[ids[i]]
        total = np.float32(0)
        for c in range(query.shape[0]):
            total += row[c] * query[c]
        scores[i] = total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _rescore16(rows: Any, ids: Any, query: Any, scores: Any) -> None:
    # Numba has no float16 on a CPU. A table of all of them takes three times as long.
    bits = np.empty(query.shape[0], np.uint32)
    values = bits.view(np.float32)
    for i in range(ids.shape[0]):
        row = rows[ids[i]]
        for c in range(query.shape[0]):
            half = np.uint32(row[c])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            bits[c] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        total = np.float32(0)
        for c in range(query.shape[0]):
            total += values[c] * _HALF_SCALE * query[c]
        scores[i] = total


@njit(nogil=True, cache=True)
def ranked(ids: Any, scores: Any, best_ids: Any, best_scores: Any) -> None:
    """The best of some scored keys, best first; of equal scores the smaller id.

    Args:
        ids: int64 [n], ascending.
        scores: float32 [n].
        best_ids: int64 [k], k <= n: written.
        best_scores: float32 [k]: written.
    """
    order = np.argsort(-scores, kind="mergesort")
    for i in range(best_ids.shape[0]):
        best_ids[i] = ids[order[i]]
        best_scores[i] = scores[order[i]]
