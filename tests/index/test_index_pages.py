"""What only pages promise, beside the contract of all indexes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from brute import brute, check, recall
from hypothesis import given
from hypothesis import strategies as st
from real import heads

from offload.errors import ConfigError
from offload.index import file, pages
from offload.index.base import Vectors
from offload.index.pages import BLOCK, PAGE, Pages


def drifting(count: int = 4000, size: int = 32) -> tuple[Vectors, Vectors]:
    """Keys that are like those before them, and queries."""
    random = np.random.default_rng(0)
    keys = np.cumsum(random.standard_normal((count, size)) * 0.3, axis=0)
    keys += random.standard_normal((count, size)) * 0.2
    return keys.astype(np.float16), random.standard_normal((6, size)).astype(np.float32)


@given(data=st.data())
def test_no_key_scores_more_than_the_boxes_around_it(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    keys = (random.standard_normal((3 * BLOCK, 9)) * random.exponential(3, 9)).astype(np.float16)
    queries = random.standard_normal((4, 9)).astype(np.float32)
    index = Pages()
    index.build(keys)
    scores = brute(keys, queries).reshape(4, 3, BLOCK // PAGE, PAGE).max(axis=3)
    blocks = pages._bounds(index._blocks.rows, queries)
    of_pages = pages._bounds(index._pages.rows.reshape(12, 2, 9), queries).reshape(4, 3, 4)
    assert (of_pages >= scores - 1e-3).all()
    assert (blocks[:, :, None] >= of_pages - 1e-3).all()


def test_means_are_of_the_keys() -> None:
    keys, _ = drifting(200)
    index = Pages(digest="mean")
    index.build(keys)
    assert index._blocks.count == 3
    wide = keys.astype(np.float32)
    np.testing.assert_allclose(index._blocks.rows[1, 0], wide[64:128].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(index._pages.rows[1, 2, 0], wide[96:112].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("digest", pages.DIGESTS)
def test_keys_that_are_like_their_neighbours_are_found_among_few(digest: str) -> None:
    keys, queries = drifting()
    index = Pages(digest=digest, overfetch=6)
    index.build(keys)
    found, scores = index.search(queries, 30), brute(keys, queries)
    check(found, scores, 30)
    assert recall(found, scores) >= 0.9
    assert found.scanned < 0.08


@pytest.mark.parametrize("digest", pages.DIGESTS)
def test_any_split_of_the_keys_makes_the_same_index(digest: str) -> None:
    keys, queries = drifting(700)
    whole, grown = Pages(digest=digest), Pages(digest=digest)
    whole.build(keys)
    for a, b in itertools.pairwise((0, 1, 63, 64, 65, 300, 640, 699, 700)):
        grown.add(keys[a:b])
    for name in ("_rows", "_blocks", "_pages"):
        np.testing.assert_array_equal(getattr(grown, name).rows, getattr(whole, name).rows)
    found, want = grown.search(queries, 9), whole.search(queries, 9)
    np.testing.assert_array_equal(found.ids, want.ids)
    assert (found.scanned, found.touched_bytes) == (want.scanned, want.touched_bytes)


@pytest.mark.parametrize(("digest", "rows"), [("box", 2), ("mean", 1)])
def test_all_that_is_read_is_counted(digest: str, rows: int) -> None:
    keys, queries = drifting(1000)
    index = Pages(digest=digest, overfetch=3, breadth=2)
    index.build(keys)
    found = index.search(queries, 10)
    # 30 keys: two pages of them, among the four of one block; and 40 keys that are in no block.
    assert found.scanned == pytest.approx((2 * PAGE + 40) / 1000)
    digests = 15 * rows * 128 + 6 * 4 * rows * 128
    assert found.touched_bytes == digests + 6 * (2 * PAGE + 40) * 64


def test_more_blocks_and_more_pages_find_more() -> None:
    keys, queries = drifting()
    scores = brute(keys, queries)
    index = Pages()
    index.build(keys)
    for name, values in {"overfetch": (1, 4, 16), "breadth": (1, 2, 8)}.items():
        index.overfetch, index.breadth = 2, 1
        recalls = []
        for value in values:
            setattr(index, name, value)
            recalls.append(recall(index.search(queries, 50), scores))
        assert recalls == sorted(recalls)
        assert recalls[-1] > recalls[0]


def test_pages_of_another_size_are_refused(tmp_path: Path) -> None:
    metadata = {"digest": "box", "overfetch": 1, "breadth": 1, "page": 32, "block": 64}
    file.write(tmp_path / "index", "pages", metadata, {})
    with pytest.raises(ConfigError, match="another size") as caught:
        Pages.load(tmp_path / "index")
    assert caught.value.asked == (32, 64)


@pytest.mark.parametrize("digest", pages.DIGESTS)
def test_keys_of_a_real_model_are_found(digest: str) -> None:
    recalls, shares = [], []
    for head in heads():
        index = Pages(digest=digest, overfetch=12)
        index.build(head.keys)
        for queries in head.steps:
            found, scores = index.search(queries, 30), brute(head.keys, queries)
            check(found, scores, 30)
            recalls.append(recall(found, scores))
            shares.append(found.scanned)
    assert np.mean(recalls) >= 0.7
    assert np.mean(shares) < 0.35
