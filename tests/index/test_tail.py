"""What is estimated of the tokens that were not selected is what their summaries say, and near what they would have added."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import real
from brute import brute
from hypothesis import given
from hypothesis import strategies as st
from real import heads

from offload.errors import ConfigError, InputError
from offload.index import scan
from offload.index.base import Floats, Ids, Vectors
from offload.index.flat import Flat
from offload.index.part import Part, attend, merge
from offload.index.sample import noised, sampled
from offload.index.tail import Codes, Means

SCALE = 32**-0.5
TAILS = [Means, Codes]


def tokens(count: int = 3000, size: int = 32, seed: int = 0) -> tuple[Vectors, Vectors, Vectors]:
    """Keys, values and queries: near tokens are alike, keys have a mean."""
    random = np.random.default_rng(seed)
    of = np.repeat(random.permutation(count // 10 + 1), 10)[:count]
    centres = random.standard_normal((2, count // 10 + 1, size)) * 1.5
    keys, values = centres[:, of] + 0.7 * random.standard_normal((2, count, size))
    keys += np.where(np.arange(size) % 8 == 3, 12, 0)
    queries = 1.2 * random.standard_normal((5, size)).astype(np.float32)
    return keys.astype(np.float16), values.astype(np.float16), queries


def selected(keys: Vectors, queries: Vectors, k: int) -> tuple[Ids, Floats]:
    scores = brute(keys, queries)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, axis=1)


def whole(keys: Vectors, values: Vectors, queries: Vectors, without: Ids | None = None) -> Part:
    """Attention over all tokens but some, in double precision."""
    logits = SCALE * (queries.astype(np.float64) @ keys.astype(np.float64).T)
    if without is not None:
        np.put_along_axis(logits, without, -np.inf, axis=1)
    most = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - most)
    total = weights.sum(axis=1, keepdims=True)
    output = weights / total @ values.astype(np.float64)
    lse = (most + np.log(total))[:, 0]
    return Part(output.astype(np.float32), lse.astype(np.float32))


def off(ours: Part, want: Part) -> float:
    errors = np.linalg.norm(ours.output - want.output, axis=1)
    return float(np.mean(errors / np.linalg.norm(want.output, axis=1)))


def close(ours: Part, want: Part, tolerance: float = 1e-5) -> None:
    assert ours.output.dtype == ours.lse.dtype == np.float32
    np.testing.assert_allclose(ours.output, want.output, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.lse, want.lse, rtol=0, atol=tolerance)


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_parts_of_any_split_merge_to_the_whole(cuts: list[int]) -> None:
    keys, values, queries = tokens(60)
    scores = brute(keys, queries)
    edges = [0, *sorted(cuts), 60]
    parts = [
        attend(scores[:, a:b], np.broadcast_to(values[a:b], (5, b - a, 32)), SCALE)
        for a, b in itertools.pairwise(edges)
    ]
    close(merge(parts), whole(keys, values, queries))
    close(merge(parts[::-1]), whole(keys, values, queries))


def test_nothing_merged_with_nothing_is_nothing() -> None:
    nothing = attend(np.zeros((2, 0), np.float32), np.zeros((2, 0, 8), np.float32), 1.0)
    assert (merge([nothing, nothing]).lse == -np.inf).all()
    assert not merge([nothing, nothing]).output.any()


@pytest.mark.parametrize("k", [0, 1, 90, 2999])
def test_means_are_those_of_what_was_not_selected(k: int) -> None:
    keys, values, queries = tokens()
    means = Means(keys, values, segment=500)
    ids, scores = selected(keys, queries, k)
    ours = means.estimate(queries, ids, scores, values[ids], SCALE)
    labels = means._groups.numbered()
    assert np.bincount(labels).tolist() == means._groups.sizes.tolist()
    for g in range(5):
        rest = np.setdiff1d(np.arange(len(keys)), ids[g])
        some = np.unique(labels[rest])
        of = [rest[labels[rest] == label] for label in some]
        mean_keys = np.stack([keys[at].astype(np.float64).mean(axis=0) for at in of])
        mean_values = np.stack([values[at].astype(np.float64).mean(axis=0) for at in of])
        logits = SCALE * mean_keys @ queries[g] + np.log([len(at) for at in of])
        weights = np.exp(logits)
        # Means are float16, and so is one of 16 tokens less fifteen of them.
        np.testing.assert_allclose(ours.lse[g], np.log(weights.sum()), atol=0.02)
        want = weights / weights.sum() @ mean_values
        assert np.linalg.norm(ours.output[g] - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("k", [0, 90, 2999])
def test_codes_weigh_tokens_one_by_one(k: int) -> None:
    keys, values, queries = tokens()
    codes = Codes(keys, values, segment=500)
    ids, scores = selected(keys, queries, k)
    ours = codes.estimate(queries, ids, scores, values[ids], SCALE)
    steps = codes._steps.astype(np.float32)
    rows = scan.decode(codes._codes, codes._lows.astype(np.float32), steps, 2)[:3000] + codes._mean
    # The noise is that of codes of normal values, and what is taken off is half its variance.
    spread = np.repeat(steps, scan.BLOCK, axis=0)[:3000] / 0.9957
    logits = SCALE * queries @ rows.T - 0.5 * 0.1188 * SCALE**2 * queries**2 @ spread.T**2
    labels = codes._groups.numbered()
    for g in range(5):
        rest = np.setdiff1d(np.arange(len(keys)), ids[g])
        weights = np.exp(logits[g, rest])
        want = 0
        for label in np.unique(labels[rest]):
            at = labels[rest] == label
            want = want + weights[at].sum() * values[rest[at]].astype(np.float64).mean(axis=0)
        # Queries are rounded to 127 steps in a scan.
        np.testing.assert_allclose(ours.lse[g], np.log(weights.sum()), atol=0.05)
        want = want / weights.sum()
        assert np.linalg.norm(ours.output[g] - want) < 0.05 * np.linalg.norm(want)


def test_the_variance_of_clipped_codes_is_what_is_taken_for_it() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((200 * scan.BLOCK, 8)).astype(np.float32) * 3
    parts = scan.encode(rows, 2, clipped=True)
    clipped = ((scan.decode(*parts, 2) - rows) ** 2).mean()
    assert clipped == pytest.approx(0.1188 * 9, rel=0.05)
    plain = ((scan.decode(*scan.encode(rows, 2), 2) - rows) ** 2).mean()
    assert plain > 1.5 * clipped


@pytest.mark.parametrize("kind", TAILS)
def test_tokens_that_are_all_alike_are_estimated_exactly(kind: Any) -> None:
    random = np.random.default_rng(1)
    keys, values = (np.repeat(random.standard_normal((1, 32)), 700, axis=0).astype(np.float16) for _ in range(2))  # fmt: skip
    queries = random.standard_normal((3, 32)).astype(np.float32)
    ids, scores = selected(keys, queries, 50)
    ours = kind(keys, values).estimate(queries, ids, scores, values[ids], SCALE)
    close(ours, whole(keys, values, queries, ids), 2e-3)


@pytest.mark.parametrize("kind", TAILS)
def test_where_all_are_selected_nothing_is_left(kind: Any) -> None:
    keys, values, queries = tokens(300)
    ids, scores = selected(keys, queries, 300)
    rest = kind(keys, values).estimate(queries, ids, scores, values[ids], SCALE)
    assert (rest.lse == -np.inf).all()
    assert not rest.output.any()
    exact = attend(scores, values[ids], SCALE)
    close(merge([exact, rest]), exact)


@pytest.mark.parametrize(("kind", "most"), [(Means, 0.45), (Codes, 0.3)])
def test_a_tail_is_nearer_than_none(kind: Any, most: float) -> None:
    keys, values, queries = tokens()
    ids, scores = selected(keys, queries, 90)
    want, exact = whole(keys, values, queries), attend(scores, values[ids], SCALE)
    rest = kind(keys, values).estimate(queries, ids, scores, values[ids], SCALE)
    assert off(merge([exact, rest]), want) < most * off(exact, want)
    missing = want.lse - merge([exact, rest]).lse
    assert (np.abs(missing) < most * (want.lse - exact.lse)).all()


@pytest.mark.parametrize("kind", TAILS)
def test_tails_of_a_real_model_are_nearer_than_none(kind: Any) -> None:
    ratios = []
    for head in heads():
        tail = kind(head.keys, head.values)
        for queries in head.steps:
            best, scores = selected(head.keys, queries, 40)
            exact = attend(scores, head.values[best], real.SCALE)
            rest = tail.estimate(queries, best, scores, head.values[best], real.SCALE)
            every = np.broadcast_to(head.values, (len(queries), *head.values.shape))
            want = attend(brute(head.keys, queries), every, real.SCALE)
            ratios.append(off(merge([exact, rest]), want) / off(exact, want))
    assert np.mean(ratios) < 0.4


@pytest.mark.parametrize("count", [1, 2, 15, 127, 128, 129])
@pytest.mark.parametrize("kind", TAILS)
def test_few_tokens_have_summaries_too(kind: Any, count: int) -> None:
    keys, values, queries = tokens(count)
    none, scores = np.empty((5, 0), np.int64), np.empty((5, 0), np.float32)
    ours = kind(keys, values, size=1, segment=128).estimate(
        queries, none, scores, values[none], SCALE
    )
    want = whole(keys, values, queries)
    assert np.abs(ours.lse - want.lse).max() < (0.05 if kind is Means else 2.0)
    if kind is Means:  # each is its own cluster
        close(ours, want, 0.02)


@pytest.mark.parametrize("size", [64, 128])
def test_summaries_take_as_many_bytes_as_is_said(size: int) -> None:
    keys, values, _ = tokens(4096 + 65, size)
    whole = 4 * keys.size
    assert 0.06 < Means(keys, values).nbytes / whole < 1 / 14
    assert 0.09 < Codes(keys, values).nbytes / whole < 0.11


def test_a_sample_is_right_on_average() -> None:
    keys, values, queries = tokens(400)
    want = whole(keys, values, queries)
    masses, sums = [], []
    ones = np.ones((5, 1), np.float32)
    for seed in range(300):
        rows = noised(keys.astype(np.float32), SCALE, seed=seed)
        ids, scores = selected(rows, np.concatenate([queries, ones], axis=1), 40)
        ours = sampled(ids, scores, rows[:, -1], values[ids], SCALE)
        mass = np.exp(ours.lse - want.lse)
        masses.append(mass)
        sums.append(mass[:, None] * ours.output)
    for found, truth in ((masses, np.ones(5)), (sums, want.output)):
        mean, spread = np.mean(found, axis=0), np.std(found, axis=0) / 300**0.5
        assert (np.abs(mean - truth) <= 4.5 * spread + 1e-5).all()
    # Not by being all there is.
    assert np.std(masses) > 0.01


def test_an_index_finds_a_sample_and_all_of_it_is_exact() -> None:
    keys, values, queries = tokens()
    rows = noised(keys, SCALE, seed=3)
    assert rows.dtype == np.float16
    index = Flat()
    index.build(rows)
    asked = np.concatenate([queries, np.ones((5, 1), np.float32)], axis=1)
    want = whole(keys, values, queries)
    errors = []
    for k in (40, 400):
        found = index.search(asked, k)
        ours = sampled(found.ids, found.scores, rows[:, -1], values[found.ids], SCALE)
        errors.append(off(ours, want))
        best, scores = selected(keys, queries, k)
        assert errors[-1] < off(attend(scores, values[best], SCALE), want)
    assert errors[1] < errors[0]
    found = index.search(asked, len(keys))
    ours = sampled(found.ids, found.scores, rows[:, -1], values[found.ids], SCALE)
    close(ours, want, 2e-4)


def test_noise_is_of_the_seed_and_of_the_place() -> None:
    keys, _, _ = tokens(50)
    first = noised(keys, SCALE, seed=1)
    np.testing.assert_array_equal(first, noised(keys, SCALE, seed=1))
    assert (first[:, -1] >= 0).all()
    assert (first[:, -1] != noised(keys, SCALE, seed=2)[:, -1]).any()
    assert (first[:, -1] != noised(keys, SCALE, seed=1, first=50)[:, -1]).any()


def test_a_sample_of_one_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        sampled(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32), np.zeros(9, np.float32), np.zeros((1, 1, 4), np.float32), 1.0)  # fmt: skip
    assert caught.value.asked == 1


@pytest.mark.parametrize("kind", TAILS)
def test_what_cannot_be_summarised_is_refused(kind: Any) -> None:
    keys, values, queries = tokens(300)
    wrong = values.astype(np.float32)
    wrong[17] = np.nan
    for bad in (values[:299], values[:, :31], wrong):
        with pytest.raises(InputError):
            kind(keys, bad)
    with pytest.raises(InputError, match="Row 17"):
        kind(keys, wrong)
    with pytest.raises(InputError, match="float16"):
        kind(keys, np.full((300, 32), 1e5, np.float32))
    for key in ("size", "segment", "iterations"):
        with pytest.raises(ConfigError) as caught:
            kind(keys, values, **{key: 0})
        assert caught.value.key == key
    with pytest.raises(ConfigError) as caught:
        kind(keys, values, segment=2048 + 16)
    assert caught.value.key == "segment"
    tail = kind(keys, values)
    ids, scores = selected(keys, queries, 10)
    calls = [
        (queries, ids, scores[:, :9], values[ids], 1.0),
        (queries, ids[:4], scores, values[ids], 1.0),
        (queries, ids, scores, values[ids][:, :, :31], 1.0),
        (queries, ids + 291, scores, values[ids], 1.0),
        (queries, ids - 300, scores, values[ids], 1.0),
        (queries, ids, scores, values[ids], 0.0),
        (queries[:, :31], ids, scores, values[ids], 1.0),
    ]
    for call in calls:
        with pytest.raises(InputError):
            tail.estimate(*call)
