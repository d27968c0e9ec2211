"""The index that is chosen finds what was asked for, and none that does is faster."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from brute import brute, check, recall

from offload.errors import InputError
from offload.index import BACKENDS, auto
from offload.index.auto import Candidate, choose
from offload.index.base import Found, Vectors
from offload.index.flat import Flat
from offload.index.ivf import IVF


class Slow(Flat):
    """Finds everything, late."""

    def search(self, queries: Vectors, k: int) -> Found:
        time.sleep(0.02)
        return super().search(queries, k)


FLAT = Candidate("flat", Flat, "overfetch", (1, 4, 16))
SLOW = Candidate("slow", Slow, "overfetch", (4,))
BLIND = Candidate("blind", lambda: IVF(lists=100), "probes", (1,))


def vectors(count: int = 2000) -> tuple[Vectors, Vectors, Vectors]:
    random = np.random.default_rng(0)
    keys = random.standard_normal((count, 32)).astype(np.float16)
    queries = random.standard_normal((600, 32)).astype(np.float32)
    return keys, queries, random.standard_normal((5, 3, 32)).astype(np.float32)


def test_the_fastest_that_finds_enough_is_taken() -> None:
    keys, queries, samples = vectors()
    choice = choose(keys, queries, samples, k=20, recall=0.9, among=[SLOW, BLIND, FLAT])
    assert choice.chosen.name == "flat"
    assert {trial.name: trial.recall >= 0.9 for trial in choice.trials} == {"slow": True, "blind": False, "flat": True}  # fmt: skip
    # The setting is the least that was enough, and the index has it.
    flat = [trial for trial in choice.trials if trial.name == "flat"]
    assert [trial.recall >= 0.9 for trial in flat] == [False] * (len(flat) - 1) + [True]
    assert isinstance(choice.built, Flat)
    assert ("overfetch", choice.built.overfetch) == choice.chosen.setting
    found = choice.built.search(samples[0], 20)
    check(found, brute(keys, samples[0]), 20)
    every = [recall(choice.built.search(group, 20), brute(keys, group)) for group in samples]
    assert np.mean(every) == pytest.approx(choice.chosen.recall)


def test_another_of_the_kind_is_made_without_keys() -> None:
    keys, queries, samples = vectors()
    choice = choose(keys, queries, samples, k=20, recall=0.99, among=[FLAT])
    other = choice.make()
    assert isinstance(other, Flat)
    assert len(other) == 0
    assert ("overfetch", other.overfetch) == choice.chosen.setting


def test_every_backend_is_a_candidate_and_can_be_tried() -> None:
    keys, queries, samples = vectors(500)
    assert {candidate.name for candidate in auto.candidates()} == set(BACKENDS)
    for candidate in auto.candidates():
        choice = choose(keys, queries, samples, k=10, recall=0.5, among=[candidate])
        assert choice.chosen.name == candidate.name
        assert choice.chosen.build_s > 0
        assert choice.chosen.search_s > 0


def test_where_none_finds_enough_it_says_which_came_next() -> None:
    keys, queries, samples = vectors()
    with pytest.raises(InputError, match="No index finds enough") as caught:
        choose(keys, queries, samples, k=20, recall=0.95, among=[BLIND])
    there: Any = caught.value.there
    assert (there.name, caught.value.asked) == ("blind", 0.95)
    assert there.recall < 0.95


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_what_is_no_share_is_refused(share: float) -> None:
    keys, queries, samples = vectors(200)
    with pytest.raises(InputError) as caught:
        choose(keys, queries, samples, k=10, recall=share, among=[FLAT])
    assert caught.value.asked == share


def test_samples_are_groups_and_finite() -> None:
    keys, queries, samples = vectors(200)
    with pytest.raises(InputError, match="groups"):
        choose(keys, queries, samples[0], k=10, among=[FLAT])
    with pytest.raises(InputError, match="groups"):
        choose(keys, queries, samples[:0], k=10, among=[FLAT])
    samples[1, 2, 3] = np.nan
    with pytest.raises(InputError, match="Row 2"):
        choose(keys, queries, samples, k=10, among=[FLAT])
    with pytest.raises(InputError):
        choose(keys, queries, samples[:1], k=201, among=[FLAT])
