"""Rows in pages, found by codes and attended to, against float64 over the same rows laid out plainly."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.index import BACKENDS, scan, token_bytes
from offload.index.finders import Finder, Measured, PagedClusters, PagedFlat, finder
from offload.index.grouped import GROUPED, PIECE, SEGMENT, SIZE, Groups, group
from offload.index.paged import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Coded,
    Rows,
    Scratch,
    attend_best,
    attend_some,
    encode_blocks,
    gathered,
)
from offload.index.workers import Workers

Array = NDArray[Any]
PAGE, HEADS = 64, 2


def paged(
    blocks: int, key_dim: int, value_dim: int, kind: int, seed: int = 0
) -> tuple[Rows, Array]:
    """Rows of the second head in pages that lie anywhere, and the same rows in order as float32 [N, D + D_v]."""
    random = np.random.default_rng(seed)
    shape = (blocks + 3, PAGE, HEADS, key_dim + value_dim)
    values = random.standard_normal(shape).astype(np.float32)
    # Some too small for a normal number of 16 bits, and zeros.
    values[:, ::7, :, ::5] *= 1e-6
    values[:, 3] = 0
    if kind == BFLOAT16:
        pool: Array = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (pool.astype(np.uint32) << 16).view(np.float32)
    elif kind == FLOAT16:
        halves = values.astype(np.float16)
        pool, values = halves.view(np.uint16), halves.astype(np.float32)
    else:
        pool = values
    table = random.permutation(blocks + 3)[:blocks].astype(np.int64)
    rows = Rows(pool, kind, table, 1, key_dim)
    return rows, values[table][:, :, 1].reshape(blocks * PAGE, -1)


def coded(rows: Rows, count: int, bits: int, scratch: Scratch) -> Coded:
    blocks = count // scan.BLOCK
    made = Coded.of(blocks, rows.key_dim, bits)
    for array in made.arrays:  # nothing of what was there may be left
        array.view(np.uint8)[:] = 0xA5
    encode_blocks(rows, made, 0, blocks, scratch)
    return made


def attention(
    rows: Array, key_dim: int, ids: Array, queries: Array, cap: float
) -> tuple[Array, Array]:
    """float64 [G, D_v] and [G] over some rows."""
    some = rows[ids].astype(np.float64)
    logits = some[:, :key_dim] @ queries.astype(np.float64).T
    logits = cap * np.tanh(logits / cap) if cap else logits
    most = logits.max(0)
    weights = np.exp(logits - most)
    return (weights / weights.sum(0)).T @ some[:, key_dim:], most + np.log(weights.sum(0))


@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_of_pages_are_those_of_rows_in_order(kind: int, bits: int) -> None:
    rows, plain = paged(9, 50, 32, kind)
    count = len(plain) // scan.BLOCK * scan.BLOCK
    made = coded(rows, count, bits, Scratch.of(1, len(plain), 50, 32, 1, bits))
    for mine, theirs in zip(made, scan.encode(plain[:count, :50], bits), strict=False):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(gathered(rows, 70, 200), plain[70:200, :50])


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.integers(1, 9),
    left=st.integers(0, PAGE - 1),
    kind=st.sampled_from([BFLOAT16, FLOAT16, FLOAT32]),
    dims=st.sampled_from([(16, 16), (50, 32), (64, 128)]),
    groups=st.integers(1, 7),
    k=st.sampled_from([1, 16, 64, 1024]),
    hidden=st.sampled_from([0, 1, 31, 64, 200, 10_000]),
    cap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 5),
)
def test_what_is_found_is_attended_to_exactly(
    blocks: int, left: int, kind: int, dims: tuple[int, int], groups: int, k: int, hidden: int, cap: float, seed: int
) -> None:  # fmt: skip
    rows, plain = paged(blocks, *dims, kind, seed)
    count = len(plain) - left
    first = min(hidden, count)
    scratch = Scratch.of(groups, count, *dims, 8 * k)
    codes = coded(rows, count, 4, scratch)
    queries = np.random.default_rng(seed + 9).standard_normal((groups, dims[0])).astype(np.float32)
    ids = np.full(k, 7, np.int32)
    out, lse = np.full((groups, dims[1]), np.nan, np.float32), np.full(groups, np.nan, np.float32)
    attend_best(rows, codes, first, count, queries, cap, 8, scratch, ids, out, lse)
    found = ids[ids >= 0]
    assert len(found) == min(k, count - first)
    assert (ids[len(found) :] == -1).all()
    assert (np.diff(found) > 0).all()
    assert ((found >= first) & (found < count)).all()
    if not len(found):
        assert (out == 0).all()
        assert np.isneginf(lse).all()
        return
    want, logs = attention(plain, dims[0], found, queries, cap)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(lse, logs, atol=2e-5)
    # Who they are: the best by brute force, but for those that codes of 4 bits confuse beyond eight times as many.
    logits = plain[first:count, : dims[0]] @ queries.T
    logits = cap * np.tanh(logits / cap) if cap else logits
    votes = (logits - logits.max(0)).max(1)
    best = first + np.argsort(-votes, kind="stable")[: len(found)]
    assert len(np.intersect1d(best, found)) >= 0.95 * len(found) - 1
    # Of given candidates, the same, without codes.
    again, logs32, chosen = np.empty_like(out), np.empty_like(lse), np.empty_like(ids)
    attend_some(rows, found.astype(np.int64), queries, cap, scratch, chosen, again, logs32)
    np.testing.assert_array_equal(chosen, ids)
    np.testing.assert_allclose(again, out, atol=1e-6)


def test_votes_go_by_what_a_token_weighs_beside_the_best_of_its_query() -> None:
    """A query of large logits must not have all tokens to itself."""
    rows, plain = paged(4, 32, 32, FLOAT32)
    scratch = Scratch.of(2, len(plain), 32, 32, 64)
    queries = np.random.default_rng(3).standard_normal((2, 32)).astype(np.float32)
    queries[0] *= 0.1  # nearly all tokens weigh alike: its best is no better than many
    queries[1] *= 10
    ids, out, lse = np.empty(16, np.int32), np.empty((2, 32), np.float32), np.empty(2, np.float32)
    attend_best(rows, coded(rows, 256, 4, scratch), 0, 256, queries, 0.0, 4, scratch, ids, out, lse)
    assert int(np.argmax(plain[:, :32] @ queries[1])) in ids
    small = plain[:, :32] @ queries[0]
    assert (small[ids] > np.quantile(small, 0.9)).sum() >= 12


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dimension", [64, 80, 128])
def test_no_index_takes_more_than_is_planned(name: str, dimension: int) -> None:
    rows, plain = paged(64, dimension, 16, BFLOAT16)
    scratch = Scratch.of(1, scan.BLOCK * dimension, dimension, 16, 1)
    found = finder(name, len(plain), dimension)
    found.extend(rows, len(plain), scratch, None)
    assert 0 < found.nbytes <= len(plain) * token_bytes(name, dimension)


# Of keys without any structure clusters know little.
@pytest.mark.parametrize(("name", "least"), [("flat", 60), ("clusters", 20), ("hnsw", 40)])
def test_a_finder_that_grew_was_cut_and_copied_finds_what_a_new_one_does(
    name: str, least: int
) -> None:
    rows, plain = paged(70, 32, 16, FLOAT32)
    scratch = Scratch.of(3, len(plain), 32, 16, 5000)
    queries = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)

    def found(one: Finder, first: int) -> Array:
        ids = np.empty(64, np.int32)
        out, lse = np.empty((3, 16), np.float32), np.empty(3, np.float32)
        one.attend(rows, first, len(plain), queries, 0.0, scratch, ids, out, lse)
        assert ((ids >= first) & (ids < len(plain))).all()
        assert len(np.unique(ids)) == 64
        want, logs = attention(plain, 32, ids, queries, 0.0)
        np.testing.assert_allclose(out, want, atol=2e-5)
        np.testing.assert_allclose(lse, logs, atol=2e-5)
        return np.sort(ids)

    new = finder(name, len(plain), 32)
    new.extend(rows, len(plain), scratch, None)
    other = finder(name, len(plain), 32)
    for count in (700, 4300):
        other.extend(rows, count, scratch, None)
    other.truncate(2000)
    other = other.copy()
    other.extend(rows, len(plain), scratch, None)
    for first in (0, 150):
        np.testing.assert_array_equal(found(new, first), found(other, first))
    logits = plain[:, :32] @ queries.T
    votes = (logits - logits.max(0)).max(1)
    assert len(np.intersect1d(found(new, 0), np.argsort(-votes)[:64])) >= least


@pytest.mark.parametrize("structured", [True, False])
def test_what_finds_enough_and_is_faster_is_chosen(structured: bool) -> None:
    """Keys in heaps are found by a few clusters, keys all over the place are not."""
    random = np.random.default_rng(5)
    n, k, dimension = 8 * GROUPED, 32, 32
    heaps = random.standard_normal((n // 64, dimension)).astype(np.float32) * 6
    keys: Array = random.standard_normal((n, dimension)).astype(np.float32)
    if structured:
        keys = heaps[np.arange(n) // 64] + keys / 4
    pool = np.concatenate([keys, keys], 1).reshape(-1, PAGE, 1, 2 * dimension)
    rows = Rows(pool, FLOAT32, np.arange(len(pool)), 0, dimension)
    samples = random.standard_normal((3, 4, dimension)).astype(np.float32)
    scratch = Scratch.of(1, scan.BLOCK * dimension, dimension, dimension, 1)
    one = finder("auto", n, dimension, tokens=k, recall=0.9)
    assert isinstance(one, Measured)
    one.extend(rows, 8 * k - 1, scratch, None)
    assert not one.choose(rows, 0, 8 * k - 1, samples)  # too few to tell
    one.extend(rows, n, scratch, None)
    assert one.choose(rows, 70, n, samples)
    assert not one.choose(rows, 70, n, samples)  # once, for as many
    by = {(name, over): recall for name, over, recall, _ in one.trials}
    clusters = [recall for (name, _), recall in by.items() if name == "clusters"]
    assert by["flat", 4] >= 0.9
    assert (clusters[-1] >= 0.9) == structured
    assert all(recall < 0.9 for recall in clusters[:-1])
    if not structured:
        assert one.name == "flat"
        assert len(clusters) == 4
    # What it says of a choice is what that finds: the same ids, of copies too, and behind what was cut.
    other = finder(one.name, n, dimension)
    assert isinstance(other, PagedFlat | PagedClusters)
    other.overfetch = one.used.overfetch
    for each in (one, other):
        each.extend(rows, n, scratch, None)
        each.truncate(n - 3000)
        each.extend(rows, n, scratch, None)
    space = Scratch.of(3, one.scored(n, 3, k), dimension, dimension, one.candidates(3, k))
    found = []
    for each in (one, one.copy(), other):
        ids, out = np.empty(k, np.int32), np.empty((3, dimension), np.float32)
        each.attend(rows, 70, n, samples[:, 1].copy(), 0.0, space, ids, out, np.empty(3, np.float32))  # fmt: skip
        found.append(np.sort(ids))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert one.nbytes == other.nbytes


def test_a_choice_is_made_again_where_most_was_cut_off_or_much_came() -> None:
    random = np.random.default_rng(8)
    n, k, dimension = 4 * GROUPED, 16, 16
    keys = random.standard_normal((n, dimension)).astype(np.float32)
    rows = Rows(np.concatenate([keys, keys], 1).reshape(-1, PAGE, 1, 32), FLOAT32, np.arange(n // PAGE), 0, 16)  # fmt: skip
    samples = random.standard_normal((2, 3, dimension)).astype(np.float32)
    scratch = Scratch.of(1, scan.BLOCK * dimension, dimension, dimension, 1)
    one = Measured(n, dimension, k, 0.9)
    chosen = []
    for tokens in (512, 1024, 2048, 8192, 2048, 2047, 8000):
        one.truncate(tokens)
        one.extend(rows, tokens, scratch, None)
        chosen.append(one.choose(rows, 0, tokens, samples))
        one.attend(rows, 0, tokens, samples[:, 0].copy(), 0.0, Scratch.of(2, n, 16, 16, one.candidates(2, k)), np.empty(k, np.int32), np.empty((2, 16), np.float32), np.empty(2, np.float32))  # fmt: skip
    assert chosen == [True, False, True, True, False, True, False]


@pytest.mark.parametrize("name", ["flat", "clusters", "auto"])
def test_what_was_cut_off_is_searched_around_until_more_comes(name: str) -> None:
    rows, plain = paged(40, 32, 16, FLOAT32)
    one = finder(name, len(plain), 32, tokens=8)
    one.extend(rows, len(plain), Scratch.of(1, scan.BLOCK * 32, 32, 16, 1), None)
    queries = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    for tokens in (2400, 1984, 1030, 250, 1):
        one.truncate(tokens)
        for k in (8, 1):
            scratch = Scratch.of(3, one.scored(len(plain), 3, k), 32, 16, one.candidates(3, k))
            ids = np.full(k, -7, np.int32)
            out, lse = np.empty((3, 16), np.float32), np.empty(3, np.float32)
            one.attend(rows, 0, tokens, queries, 0.0, scratch, ids, out, lse)
            found = ids[ids >= 0]
            assert len(np.unique(found)) == min(k, tokens)
            assert (found < tokens).all()
            want, logs = attention(plain, 32, found, queries, 0.0)
            np.testing.assert_allclose(out, want, atol=2e-5)
            np.testing.assert_allclose(lse, logs, atol=2e-5)
            logits = plain[:tokens, :32] @ queries.T
            assert int(np.argmax((logits - logits.max(0)).max(1))) in found or name != "flat"


@pytest.mark.parametrize("name", ["flat", "clusters"])
@pytest.mark.parametrize("first", [0, 250, 896, 1500])
def test_neither_padding_nor_clusters_without_tokens_take_places(name: str, first: int) -> None:
    """Keys of which many are the same, and a query that likes padding, or the first key, best."""
    random = np.random.default_rng(3)
    some = random.standard_normal((40, 32)).astype(np.float32)
    keys = some[random.integers(1, 40, 4 * SEGMENT)]
    keys[: max(1, first)] = 9 * some[0]
    rows = Rows(np.concatenate([keys, keys], 1).reshape(-1, PAGE, 1, 64), FLOAT32, np.arange(len(keys) // PAGE), 0, 32)  # fmt: skip
    one = finder(name, len(keys), 32)
    one.extend(rows, len(keys), Scratch.of(1, scan.BLOCK * 32, 32, 32, 1), None)
    queries = (some[:1] + random.standard_normal((2, 32)) / 9).astype(np.float32)
    for k in (1, 16, 64):
        ids, out = np.full(k, -7, np.int32), np.empty((2, 32), np.float32)
        lse = np.empty(2, np.float32)
        scratch = Scratch.of(2, one.scored(len(keys), 2, k), 32, 32, one.candidates(2, k))
        one.attend(rows, first, len(keys), queries, 0.0, scratch, ids, out, lse)
        assert len(np.unique(ids)) == k
        assert (ids >= first).all()
        logits = keys @ queries.T
        logits[:first] = -np.inf
        votes = (logits - logits.max(0)).max(1)
        best = np.sort(votes)[::-1][:k]
        # What is found is nearly as good as the best.
        assert np.sort(votes[ids])[::-1].mean() >= best.mean() - 0.5


def test_every_token_is_in_one_cluster_near_its_centroid() -> None:
    """Of keys that lie in 40 heaps, a token's centroid is that of its heap."""
    random = np.random.default_rng(0)
    heaps = random.standard_normal((40, 32)).astype(np.float32) * 8
    of = random.integers(0, 40, 2 * GROUPED)
    keys = heaps[of] + random.standard_normal((len(of), 32)).astype(np.float32)
    pool = np.concatenate([keys, keys], 1).reshape(-1, PAGE, 1, 64)
    rows = Rows(pool, FLOAT32, np.arange(len(pool)), 0, 32)
    groups = Groups.of(len(keys), 32)
    assert group(rows, groups, 0, len(keys)) == len(keys)
    np.testing.assert_array_equal(np.sort(groups.order), np.arange(len(keys)))
    assert groups.starts[0] == 0
    assert groups.starts[-1] == len(keys)
    sizes = np.diff(groups.starts)
    assert (sizes >= 0).all()
    segment = np.repeat(np.arange(len(sizes)), sizes) // (SEGMENT // SIZE)
    np.testing.assert_array_equal(
        groups.order // SEGMENT, segment
    )  # a cluster keeps to its segment
    centroids = scan.decode(*groups.centroids)
    off = keys[groups.order] - np.repeat(centroids, sizes, axis=0)
    # Heaps have a variance of 1 a channel, what lies between them 64. Now and then two heaps share a cluster.
    assert float((off * off).mean()) < 8.0


def test_tokens_are_clustered_in_pieces_until_their_segment_is_whole() -> None:
    rows, plain = paged(GROUPED // PAGE + 22, 24, 8, FLOAT32)
    whole, grown = (Groups.of(len(plain), 24) for _ in range(2))
    clustered = group(rows, whole, 0, len(plain))
    assert len(plain) - PIECE < clustered == len(plain) // PIECE * PIECE
    assert clustered % SEGMENT  # what is asked here
    at = 0
    for count in range(0, len(plain) + 1, 96):
        before, at = at, group(rows, grown, at, count)
        assert at == count // PIECE * PIECE
        if at == before:
            continue
        order, starts = grown.order[:at], grown.starts[: at // SIZE + 1]
        np.testing.assert_array_equal(np.sort(order), np.arange(at))
        assert starts[0] == 0
        assert starts[-1] == at
        sizes = np.diff(starts)
        of = np.repeat(np.arange(len(sizes)), sizes)
        # Of whole segments anywhere in them, behind these in the piece.
        borders = np.where(order < at // SEGMENT * SEGMENT, SEGMENT, PIECE)
        np.testing.assert_array_equal(order // borders, of * SIZE // borders)
    assert group(rows, grown, at, len(plain)) == clustered
    np.testing.assert_array_equal(grown.order[:clustered], whole.order[:clustered])
    used = clustered // SIZE
    np.testing.assert_array_equal(grown.starts[: used + 1], whole.starts[: used + 1])
    for ours, theirs in zip(grown.centroids.arrays, whole.centroids.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A centroid is the mean of its tokens, but for four bits.
    sizes = np.diff(whole.starts[: used + 1])
    means = np.add.reduceat(plain[whole.order[:clustered], :24], whole.starts[:used][sizes > 0])
    coded_means = scan.decode(*whole.centroids)[:used][sizes > 0]
    step = np.repeat(whole.centroids.steps, scan.BLOCK, axis=0)[:used][sizes > 0]
    assert (np.abs(coded_means - means / sizes[sizes > 0, None]) <= 0.501 * step + 1e-6).all()


def test_tasks_run_once_each_and_by_different_workers_at_the_same_time() -> None:
    workers = Workers(3)
    counts = np.zeros(200, np.int64)
    busy: set[int] = set()
    lock = threading.Lock()

    def task(i: int, worker: int) -> None:
        with lock:
            assert worker not in busy
            busy.add(worker)
        counts[i] += 1
        with lock:
            busy.remove(worker)

    for n in (0, 1, 2, 200):
        counts[:] = 0
        workers.run(task, n)
        assert counts.sum() == n == counts[:n].sum()
    meeting = threading.Barrier(3, timeout=20)

    def meet(i: int, worker: int) -> None:
        meeting.wait()

    workers.run(meet, 3)  # none of them returns before all have begun
    workers.close()
    ours = [t for t in threading.enumerate() if t.name.startswith("offload-search")]
    for thread in ours:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in ours)
    workers.run(task, 5)
    workers.close()


def test_the_first_error_of_a_task_is_raised_and_the_threads_go_on() -> None:
    workers = Workers(2)

    def fails(i: int, worker: int) -> None:
        if i == 3:
            raise ValueError("no such row") from KeyError(i)

    for _ in range(3):
        with pytest.raises(ValueError, match="no such row") as caught:
            workers.run(fails, 100)
        assert isinstance(caught.value.__cause__, KeyError)
    done: list[int] = []
    workers.run(lambda i, worker: done.append(i), 10)
    assert sorted(done) == list(range(10))
    workers.close()


def test_an_interrupt_ends_a_batch_and_its_helpers_are_waited_for() -> None:
    workers = Workers(3)
    workers.run(lambda i, worker: None, 8)
    meeting = threading.Barrier(3, timeout=20)
    ended: list[int] = []
    interrupts = [1]  # of the helpers, the one that does

    def slow(i: int, worker: int) -> None:
        meeting.wait()
        if worker in interrupts:
            while 0 not in ended:
                time.sleep(0.01)
            time.sleep(0.1)  # whoever called waits for its helpers by now
            os.kill(os.getpid(), signal.SIGINT)
        if worker:
            time.sleep(0.2)
        ended.append(worker)

    # Who began this process may have had it ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run(slow, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == 3
    ended.clear()
    interrupts.clear()
    workers.run(slow, 3)
    assert len(ended) == 3
    workers.close()


def test_a_thread_that_cannot_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(2)

    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="new thread"):
        workers.run(lambda i, worker: None, 4)
    monkeypatch.undo()
    done: list[int] = []
    workers.run(lambda i, worker: done.append(i), 4)
    assert sorted(done) == [0, 1, 2, 3]
    workers.close()
