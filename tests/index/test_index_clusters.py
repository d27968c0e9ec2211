"""What only clusters promise, beside the contract of all indexes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from brute import brute, check, recall
from real import heads

from offload.index.base import Vectors
from offload.index.clusters import Clusters
from offload.index.kmeans import clustered, means


def near(count: int = 2000, size: int = 32) -> tuple[Vectors, Vectors]:
    """Keys in bunches of 16 that come in no order, with a mean, and queries that like one bunch each."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((count // 16 + 1, size)) * 3
    keys = centres[random.permutation(count) // 16] + 0.1 * random.standard_normal((count, size))
    keys += np.where(np.arange(size) % 8 == 3, 12, 0)
    return keys.astype(np.float16), centres[:6].astype(np.float32)


def sound(index: Clusters) -> None:
    """Each key is in one row; clusters lie side by side, and their centroids are means of their rows."""
    order, starts, sizes = (part.rows for part in (index._order, index._starts, index._sizes))
    assert sorted(order.tolist()) == list(range(len(index)))
    assert starts.tolist() == (np.cumsum(sizes) - sizes).tolist()
    assert (sizes > 0).all()
    assert sizes.sum() == index._clustered
    assert len(index) - index._clustered < index.segment
    assert index._rows is not None
    rows = index._rows.rows.astype(np.float32)
    for start, size, centroid in zip(starts, sizes, index._centroids.rows, strict=True):
        np.testing.assert_allclose(centroid, rows[start : start + size].mean(axis=0), atol=1e-4)


def test_k_means_finds_what_lies_apart() -> None:
    random = np.random.default_rng(0)
    of = random.integers(0, 5, 300)
    rows = (of[:, None] * 100 + random.standard_normal((300, 4))).astype(np.float32)
    labels = clustered(rows, 40, iterations=20, seed=0)
    # Every cluster is within one bunch, and they are numbered without gaps.
    assert set(labels.tolist()) == set(range(labels.max() + 1))
    for label in range(labels.max() + 1):
        assert len(set(of[labels == label].tolist())) == 1
    found = means(rows, labels, labels.max() + 2)
    np.testing.assert_allclose(found[0], rows[labels == 0].mean(axis=0), rtol=1e-5)
    assert not found[-1].any()


def test_more_moves_of_centroids_bring_keys_nearer_to_them() -> None:
    rows = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
    spreads = []
    for iterations in (1, 3, 10):
        labels = clustered(rows, 32, iterations=iterations, seed=0)
        spreads.append(float(((rows - means(rows, labels, 32)[labels]) ** 2).sum()))
    assert spreads[0] > spreads[1] > spreads[2]


def test_large_keys_are_clustered_as_small_ones() -> None:
    rows = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
    labels = clustered(rows, 32, iterations=5, seed=0)
    large = clustered(rows * np.float32(2.0**90), 32, iterations=5, seed=0)
    assert np.mean(labels == large) > 0.99


def test_queries_find_near_keys_among_few() -> None:
    keys, queries = near()
    index = Clusters(segment=2000, overfetch=4)
    index.build(keys)
    sound(index)
    found, scores = index.search(queries, 16), brute(keys, queries)
    check(found, scores, 16)
    assert recall(found, scores) >= 0.95
    assert found.scanned < 0.08


def test_every_key_stays_one_however_it_came() -> None:
    keys, queries = near()
    index = Clusters(segment=100)
    for a, b in itertools.pairwise((0, 40, 99, 100, 101, 350, 1200, 1201, 1999, 2000)):
        index.add(keys[a:b])
        sound(index)
        check(index.search(queries, 10), brute(keys[:b], queries), min(b, 10))
    built = Clusters(segment=100)
    built.build(keys[:1250])
    sound(built)
    # What is built is in clusters to the last key.
    assert built._clustered == 1250


def test_all_that_is_read_is_counted() -> None:
    keys, queries = near()
    index = Clusters(segment=500, overfetch=3)
    index.build(keys)
    index.add(keys[:77])
    found = index.search(queries[:1], 20)
    scored = round(found.scanned * 2077)
    assert 60 + 77 <= scored < 60 + 77 + index._sizes.rows.max()
    clusters = len(index._sizes.rows)
    assert found.touched_bytes == scored * 64 + clusters * (32 * 4 + 8) + 20 * 4


def test_queries_that_share_read_once() -> None:
    keys, queries = near()
    shared, alone = Clusters(segment=500, shared=True), Clusters(segment=500)
    shared.build(keys)
    alone.build(keys)
    found, want = shared.search(queries[:1], 20), alone.search(queries[:1], 20)
    # One query by itself shares with nobody: shares order as scores do.
    np.testing.assert_array_equal(found.ids, want.ids)
    assert (found.scanned, found.touched_bytes) == (want.scanned, want.touched_bytes)
    together, apart = shared.search(queries, 20), alone.search(queries, 20)
    check(together, brute(keys, queries), 20)
    assert together.touched_bytes < 0.5 * apart.touched_bytes
    # Each likes one bunch of 16 keys, and all six are read.
    shared = Clusters(segment=2000, overfetch=16, shared=True)
    shared.build(keys)
    assert recall(shared.search(queries, 10), brute(keys, queries)) >= 0.95


@pytest.mark.parametrize(("shared", "bar"), [(False, 0.85), (True, 0.75)])
def test_keys_of_a_real_model_are_found(shared: bool, bar: float) -> None:
    recalls, shares = [], []
    for head in heads():
        index = Clusters(segment=320, overfetch=8, shared=shared)
        index.build(head.keys)
        sound(index)
        for queries in head.steps:
            found, scores = index.search(queries, 30), brute(head.keys, queries)
            check(found, scores, 30)
            recalls.append(recall(found, scores))
            shares.append(found.scanned)
    assert np.mean(recalls) >= bar
    assert np.mean(shares) < 0.25
