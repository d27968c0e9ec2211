"""The best keys of queries by matrix products on a device, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offload.demand import NEAREST_BYTES
from offload.index.graph import nearest
from offload.tiers.nearest import CardNearest


@pytest.mark.parametrize(
    ("count", "n", "nbytes"),
    [(1000, 10, 2**30), (1000, 10, 40_000), (1000, 10, 1), (999, 500, 40_000), (999, 500, 9_000), (7, 7, 1), (1, 1, 1), (1023, 3, 2**30), (2017, 9, 150_000), (64, 1, 2**20)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_same_keys_are_best_whether_all_fit_or_pieces(
    count: int, n: int, nbytes: int, dtype: type[np.floating]
) -> None:
    random = np.random.default_rng(count + n)
    keys = random.integers(-500, 500, (count, 24)).astype(np.float32)  # sums are exact
    queries = random.integers(-500, 500, (37, 24)).astype(dtype)
    found = CardNearest(torch.device("cpu"), nbytes)(keys, queries, n)
    want = nearest(keys, queries, n)
    assert found.dtype == np.int64
    assert all(len(set(row.tolist())) == n for row in found)
    scores = queries.astype(np.float32) @ keys.T
    of_found, of_want = (np.take_along_axis(scores, ids, axis=1) for ids in (found, want))
    np.testing.assert_array_equal(of_found, of_want)  # where two score alike, either may be first


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "asked", "n"), [(200_000, 3000, 65), (131_072, 117_000, 33)])
def test_a_card_finds_them_within_what_is_planned(count: int, asked: int, n: int) -> None:
    random = np.random.default_rng(0)
    keys, queries = (random.standard_normal((m, 128), np.float32) for m in (count, asked))
    find = CardNearest(torch.device("cuda"), NEAREST_BYTES)
    find(keys[:1000], queries[:100], 10)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    found = find(keys, queries, n)
    taken = torch.cuda.max_memory_reserved() - before
    want = nearest(keys, queries[:2000], n)
    # Sums of other order: keys that score alike to the seventh digit change places.
    same = [len(np.intersect1d(a, b)) for a, b in zip(found, want, strict=False)]
    assert np.mean(same) > n - 0.01
    assert taken <= NEAREST_BYTES
