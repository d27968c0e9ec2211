"""What only the graph promises, beside the contract of all indexes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brute import brute, check, recall
from real import heads

from offload.errors import InputError
from offload.index import graph
from offload.index.base import Floats, Ids, Vectors
from offload.index.graph import Graph, nearest


def apart(count: int = 3000, size: int = 32, seed: int = 0) -> tuple[Vectors, Vectors, Vectors]:
    """Keys, queries to learn from, and others of their kind, far from the keys.

    Queries lie in an eighth of the dimensions that keys have, off their mean; keys have a mean of their own.
    """
    random = np.random.default_rng(seed)
    keys = random.standard_normal((count, size)) * np.linspace(2, 0.5, size)
    keys += np.where(np.arange(size) % 8 == 3, 12, 0)
    basis = random.standard_normal((size // 8, size))
    queries = random.standard_normal((1040, size // 8)) @ basis + 1.5 * basis[0] - 2
    floats = queries.astype(np.float32)
    return keys.astype(np.float16), floats[40:], floats[:40]


def reached(index: Graph) -> int:
    """Keys that the first start leads to."""
    links, counts = index._links.rows, index._counts.rows
    seen, left = {int(index._starts[0])}, [int(index._starts[0])]
    while left:
        v = left.pop()
        fresh = set(links[v, : counts[v]].tolist()) - seen
        seen |= fresh
        left += fresh
    return len(seen)


def sound(index: Graph) -> None:
    """Links are of keys that are there, none to itself, none twice, and lead everywhere."""
    links, counts = index._links.rows, index._counts.rows
    assert counts.max() <= links.shape[1]
    for i, (row, n) in enumerate(zip(links.tolist(), counts.tolist(), strict=True)):
        assert len({*row[:n]} - {i}) == n
        assert all(0 <= j < len(index) for j in row[:n])
    assert reached(index) == len(index)


def test_queries_unlike_keys_find_most_with_few_scores_where_such_queries_taught() -> None:
    keys, taught, queries = apart()
    scores = brute(keys, queries)
    index, of_keys = Graph(breadth=150), Graph(breadth=150)
    index.build(keys, taught)
    of_keys.build(keys)
    found, less = index.search(queries, 50), of_keys.search(queries, 50)
    check(found, scores, 50)
    assert recall(found, scores) >= 0.95
    assert recall(found, scores) > recall(less, scores)
    assert found.scanned < 0.3


def test_keys_of_a_real_model_are_found_by_queries_that_it_has_not_seen() -> None:
    recalls, shares = [], []
    for head in heads():
        index = Graph(breadth=100)
        index.build(head.keys, head.late)
        sound(index)
        for queries in head.steps:
            found = index.search(queries, 30)
            recalls.append(recall(found, brute(head.keys, queries)))
            shares.append(found.scanned)
    assert np.mean(recalls) >= 0.95
    assert np.mean(shares) < 0.35


def test_all_keys_can_be_reached() -> None:
    keys, taught, _ = apart()
    same = keys.copy()
    same[::2] = same[0]
    # Hubs of one list of three keys, whose rows are full, and all others behind them.
    for rows, lists in ((keys, None), (same, None), (keys, np.array([[5, 6, 7]]))):
        index = Graph(links=4)
        if lists is None:
            index.build(rows, taught)
        else:
            index.build_from(rows, taught[:1], lists)
        sound(index)
        index.add(rows[:500])
        index.add(np.repeat(rows[:1], 300, axis=0))
        sound(index)


def test_what_lists_of_one_pivot_propose_is_merged() -> None:
    keys, taught, _ = apart(200)
    index = Graph(links=8)
    index.build_from(keys, taught[:3], np.array([[0, 1, 2], [0, 3, 4], [5, 0, 6]]))
    assert {1, 2, 3, 4, 5, 6} <= set(index._links.rows[0, : index._counts.rows[0]].tolist())


def test_lists_that_are_known_already_make_the_same_index() -> None:
    keys, taught, queries = apart(500)
    values = keys.astype(np.float32)
    lists = nearest(values - values.mean(axis=0), taught, 100)
    want = np.argsort(-brute(keys, taught), axis=1, kind="stable")[:, :100]
    assert np.mean(lists == want) > 0.99
    built, given = Graph(), Graph()
    built.build(keys, taught)
    given.build_from(keys, taught, lists)
    np.testing.assert_array_equal(built.search(queries, 20).ids, given.search(queries, 20).ids)


@pytest.mark.parametrize(
    "lists",
    [
        np.array([[0, 500]]),
        np.array([[-1, 0]]),
        np.array([0, 1]),
        np.zeros((0, 5), np.int64),
        np.array([[0, 1]], np.int32),
        np.array([[0, 1], [2, 3]]),
    ],
    ids=["beyond", "negative", "one axis", "none", "of 32 bits", "of more queries"],
)
def test_lists_that_fit_no_keys_are_refused_and_change_nothing(lists: Ids) -> None:
    keys, taught, queries = apart(500)
    index = Graph()
    index.build(keys, taught)
    before = index.search(queries, 5).ids.tolist()
    with pytest.raises(InputError):
        index.build_from(keys, taught[:1], lists)
    assert index.search(queries, 5).ids.tolist() == before


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_fewer_keys_than_links_are_all_linked(count: int) -> None:
    keys, taught, queries = apart(count)
    index = Graph(links=32)
    index.build(keys, taught)
    sound(index)
    assert index._counts.rows.max() == count - 1
    check(index.search(queries, count), brute(keys, queries), count)


def test_a_key_that_was_added_is_found_by_queries_unlike_it() -> None:
    keys, taught, queries = apart()
    scores = brute(keys, queries)
    grown = Graph(breadth=200)
    grown.build(keys[:2500], taught)
    for i in range(2500, 2600):
        grown.add(keys[i : i + 1])
    grown.add(keys[2600:])
    sound(grown)
    found = grown.search(queries, 50)
    check(found, scores, 50)
    assert recall(found, scores) >= 0.85
    late = [set(row[row >= 2500]) for row in np.argsort(-scores, axis=1)[:, :50]]
    there = [len(a & set(b)) for a, b in zip(late, found.ids.tolist(), strict=True)]
    assert sum(there) >= 0.75 * sum(map(len, late))


def test_a_search_that_follows_begins_at_what_the_last_one_found() -> None:
    keys, taught, queries = apart()
    near = queries + 0.05 * np.roll(queries, 1, axis=1)
    follows, plain = Graph(breadth=60, follow=True), Graph(breadth=60)
    for index in (follows, plain):
        index.build(keys, taught)
    # The first has nothing to follow, nor has one of another number of queries.
    np.testing.assert_array_equal(follows.search(queries, 50).ids, plain.search(queries, 50).ids)
    np.testing.assert_array_equal(follows.search(near[:3], 50).ids, plain.search(near[:3], 50).ids)
    follows.search(queries, 50)
    scores = brute(keys, near)
    found = follows.search(near, 50)
    check(found, scores, 50)
    assert recall(found, scores) > recall(plain.search(near, 50), scores)
    follows.build(keys[:100])
    check(follows.search(near, 50), brute(keys[:100], near), 50)


def test_votes_score_fewer_keys_and_more_breadth_finds_more() -> None:
    keys, taught, queries = apart()
    scores = brute(keys, queries)
    index = Graph()
    index.build(keys, taught)
    shares, recalls = [], []
    for votes, breadth in ((3, 60), (2, 60), (1, 60), (1, 200)):
        index.votes, index.breadth = votes, breadth
        found = index.search(queries, 50)
        shares.append(found.scanned)
        recalls.append(recall(found, scores))
        # Each scored row was read, and each row of links that was opened.
        assert found.touched_bytes > found.scanned * 40 * len(keys) * 64
    assert shares == sorted(shares)
    assert recalls == sorted(recalls)


def test_marks_are_wiped_before_their_numbers_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, taught, queries = apart(600)
    index = Graph()
    index.build(keys, taught)
    want = index.search(queries, 20)
    monkeypatch.setattr(graph, "_ROUNDS", 130)
    for _ in range(8):
        found = index.search(queries, 20)
        assert index._round < 130
        np.testing.assert_array_equal(found.ids, want.ids)
        assert found.scanned == want.scanned


def test_another_seed_learns_from_others() -> None:
    keys, taught, _ = apart(600)
    links = []
    for seed in (0, 0, 1):
        index = Graph(teachers=100, seed=seed)
        index.build(keys, taught)
        links.append(index._links.rows.copy())
    np.testing.assert_array_equal(links[0], links[1])
    assert (links[0] != links[2]).any()


def test_keys_that_no_query_likes_are_linked_to_their_best_where_these_are_known() -> None:
    keys, taught, queries = apart()
    asked: list[tuple[int, int]] = []

    def find(keys: Floats, queries: Vectors, n: int) -> Ids:
        asked.append((len(queries), n))
        return nearest(keys, queries, n)

    walked, known = Graph(teachers=100, reach=20), Graph(teachers=100, reach=20, nearest=find)
    walked.build(keys, taught)
    known.build(keys, taught)
    sound(known)
    values = keys.astype(np.float32)
    values -= values.mean(axis=0)
    liked = np.unique(
        nearest(
            values, taught[np.sort(np.random.default_rng(0).choice(1000, 100, replace=False))], 20
        )
    )
    alone = np.setdiff1d(np.arange(len(keys)), liked)
    assert asked == [(100, 20), (len(alone), graph._PROPOSED + 1)]
    best = nearest(values, values[alone], graph._PROPOSED + 1)
    for i, proposed in zip(alone, best, strict=True):
        own = known._links.rows[i, : min(known.links, known._counts.rows[i])]
        # Links that others drew to it lie behind its own; only what keeps all reachable may have taken the last place.
        assert np.isin(own[: known.links // 2], proposed).all()
    scores = brute(keys, queries)
    assert (
        recall(known.search(queries, 50), scores)
        >= recall(walked.search(queries, 50), scores) - 0.02
    )


def test_links_are_turned_and_none_has_too_many() -> None:
    keys, taught, _ = apart(800)
    index = Graph(links=6)
    index.build(keys, taught)
    links, counts = index._links.rows, index._counts.rows
    assert counts.max() <= 9
    sets = [set(row[:n].tolist()) for row, n in zip(links, counts, strict=True)]
    assert all(len(one) == n and i not in one for i, (one, n) in enumerate(zip(sets, counts, strict=True)))  # fmt: skip
    both = [i in sets[j] for i, one in enumerate(sets) for j in one]
    assert np.mean(both) > 0.4  # as many as have room


def test_repair_finds_more_for_queries_of_another_kind_and_keeps_what_was_there(
    tmp_path: Path,
) -> None:
    keys, taught, _ = apart()
    random = np.random.default_rng(5)
    others = random.standard_normal((240, 32)).astype(np.float32) @ random.standard_normal(
        (32, 32)
    ).astype(np.float32)
    index = Graph(breadth=60, votes=1)
    index.build(keys, taught)
    scores = brute(keys, others[200:])
    before = recall(index.search(others[200:], 50), scores)
    index.save(tmp_path / "graph")
    loaded = Graph.load(tmp_path / "graph")  # whose links are mapped, and must not be written to
    links = index._links.rows.copy()
    for one in (index, loaded):
        added = one.repair(others[:200])
        assert added > 0
        assert added == int(one._counts.rows.sum()) - int(
            Graph.load(tmp_path / "graph")._counts.rows.sum()
        )
        assert one.repair(others[:200]) < added / 4  # what was missing is there
        sound(one)
        assert recall(one.search(others[200:], 50), scores) > before
    np.testing.assert_array_equal(index._links.rows, loaded._links.rows)
    old = Graph.load(tmp_path / "graph")
    for i, n in enumerate(old._counts.rows):
        assert (index._links.rows[i, :n] == links[i, :n]).all()


def test_repair_needs_keys_and_queries_that_fit() -> None:
    with pytest.raises(InputError, match="no keys"):
        Graph().repair(np.zeros((1, 8), np.float32))
    keys, taught, _ = apart(300)
    index = Graph()
    index.build(keys, taught)
    with pytest.raises(InputError):
        index.repair(np.zeros((1, 8), np.float32))
    with pytest.raises(InputError):
        index.repair(np.full((1, 32), np.nan, np.float32))
