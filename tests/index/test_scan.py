"""The scan scores what its codes stand for, and takes exactly the best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from offload.index import lanes, scan
from offload.index.base import Vectors

BITS = [4, 2]


def rows(size: int, blocks: int = 3, scale: float = 1.0) -> Vectors:
    """Rows with outlier channels, [blocks * BLOCK, size]."""
    random = np.random.default_rng(size)
    values = random.standard_normal((blocks * scan.BLOCK, size)) * random.random(size) * 4
    return ((values + random.standard_normal(size) * 20) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 64, 80, 128, 130])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_no_value_is_further_than_half_a_step_from_its_code(
    bits: int, size: int, scale: float
) -> None:
    keys = rows(size, scale=scale)
    codes, lows, steps = scan.encode(keys, bits)
    assert codes.shape == (3, -(-size // 4), scan.BLOCK * bits // 2)
    back = scan.decode(codes, lows, steps, bits)
    allowed = np.repeat(steps, scan.BLOCK, axis=0) * 0.5001 + 2e-6 * np.abs(keys)
    assert (np.abs(back - keys) <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 64, 80, 128, 130])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_scan_scores_what_the_codes_stand_for(bits: int, size: int, groups: int) -> None:
    keys = rows(size)
    queries = np.random.default_rng(0).standard_normal((groups, size)).astype(np.float32)
    codes, lows, steps = scan.encode(keys, bits)
    scores = np.full((groups, keys.shape[0] + 5), np.nan, dtype=np.float32)
    scan.scan(codes, lows, steps, queries, bits, scores)
    assert np.isnan(scores[:, keys.shape[0] :]).all()
    want = queries @ scan.decode(codes, lows, steps, bits).T
    # Each weight is half a unit off at most, and a unit is a 127th of the largest.
    largest = np.abs(queries[:, None] * steps).max(-1)
    allowed = size * ((1 << bits) - 1) * largest / 127 / 2 + 1e-4 * np.abs(want).max()
    assert (np.abs(scores[:, : keys.shape[0]] - want) <= np.repeat(allowed, scan.BLOCK, axis=1)).all()  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_products_do_not_overflow(bits: int) -> None:
    # Every code at its top, every weight at 127: the sums of 16 bits are as large as they get.
    keys = np.ones((scan.BLOCK, 256), dtype=np.float32)
    keys[0] = 0
    codes, lows, steps = scan.encode(keys, bits)
    for sign in (1, -1):
        queries = np.full((1, 256), sign, dtype=np.float32)
        scores = np.empty((1, scan.BLOCK), dtype=np.float32)
        scan.scan(codes, lows, steps, queries, bits, scores)
        np.testing.assert_allclose(scores[0], [0, *[sign * 256] * (scan.BLOCK - 1)], rtol=1e-5)


class EmulatedVnni(lanes._Vnni):
    """The same instructions, but for the one that not every processor has: by plain ones."""

    def add(self, builder: Any, total: Any, codes: Any, weights: Any) -> Any:
        for p in range(4):
            code = builder.and_(
                builder.lshr(codes, lanes._all_of(self.sums, 8 * p)), lanes._all_of(self.sums, 255)
            )
            high = builder.shl(weights, lanes._all_of(self.sums, 24 - 8 * p))
            weight = builder.ashr(high, lanes._all_of(self.sums, 24))
            total = builder.add(total, builder.mul(code, weight))
        return total


def compiled(bits: int, tile: int, kind: Any) -> Any:
    add = lanes.summing(bits, tile, kind)

    @njit
    def run(codes: Any, block: int, weights: Any, total: Any, queries: int, bits: int) -> None:
        add(codes, block, weights, total)

    return run


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 44])
def test_the_processors_instructions_sum_as_plain_loops_do(
    bits: int, together: bool, rows: int
) -> None:
    random = np.random.default_rng(rows)
    queries = lanes.TOGETHER[bits] if together else 1
    codes = random.integers(0, 256, (3, rows, scan.BLOCK * bits // 2)).astype(np.uint8)
    weights = random.integers(-127, 128, (queries, 4 * rows)).astype(np.int8)
    # The largest sums of 16 bits that there can be.
    codes[1, :, : codes.shape[2] // 2], weights[0] = 255, 127
    before = random.integers(-9, 9, (queries, scan.BLOCK)).astype(np.int32)
    shifts = np.arange(0, 8, bits)[:, None]
    unpacked = (codes[1].reshape(rows, 1, -1, 4) >> shifts[..., None]) & ((1 << bits) - 1)
    of_rows = weights.reshape(queries, rows, 4).astype(int)
    want = np.einsum("tcp,cmjp->tmj", of_rows, unpacked.astype(int)).reshape(queries, -1)
    adds = [lanes.add_block, lanes.add_plainly, compiled(bits, queries, EmulatedVnni)]
    if lanes.HAS_AVX2:  # also where there is more
        adds.append(compiled(bits, queries, lanes._Avx2))
    for add in adds:
        total = before.copy()
        add(codes, 1, weights, total, queries, bits)
        np.testing.assert_array_equal(total - before, want)


def test_every_half_has_its_value() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    scores = np.empty(halves.size, dtype=np.float32)
    one = np.ones(1, dtype=np.float32)
    scan.rescore(halves[:, None].copy(), np.arange(halves.size), one, scores)
    assert (scores == halves.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rescoring_is_exact(dtype: type) -> None:
    keys: Vectors = rows(80).astype(dtype)
    ids = np.array([5, 0, 383, 5])
    query = np.random.default_rng(1).standard_normal(80).astype(np.float32)
    scores = np.empty(4, dtype=np.float32)
    scan.rescore(keys, ids, query, scores)
    np.testing.assert_allclose(scores, keys[ids].astype(np.float64) @ query, rtol=1e-5, atol=1e-4)


@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=False),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38]),
        ),
        min_size=1,
        max_size=60,
    ),
    share=st.floats(0, 1),
)
def test_the_best_are_those_of_a_sort(values: list[float], share: float) -> None:
    scores = np.array(values, dtype=np.float32)
    count = max(1, round(share * scores.size))
    ids = np.empty(count, dtype=np.int64)
    scan.best(scores, ids, np.empty(2048, dtype=np.int32))
    assert (np.diff(ids) > 0).all()
    assert sorted(scores[ids].tolist()) == sorted(scores.tolist())[scores.size - count :]
    best_ids, best = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
    scan.ranked(ids, scores[ids], best_ids, best)
    assert sorted(best_ids) == ids.tolist()
    assert best.tolist() == sorted(best.tolist(), reverse=True)
    ties = best[1:] == best[:-1]
    assert (np.diff(best_ids)[ties] > 0).all()
