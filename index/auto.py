"""Which index is the cheapest that finds enough, of keys like these, on this machine?

Measured, not modelled: what pays depends on the length, on how far queries are from the keys, and on the processor's caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from offload.errors import InputError
from offload.index import backend, scan
from offload.index.base import Index, Vectors, checked_keys


class Candidate(NamedTuple):
    """An index that may be chosen.

    Attributes:
        name: What it is called in a choice.
        make: An index without keys.
        setting: Attribute that is set between searches; more of it finds more and takes longer.
        values: Of the setting, ascending.
    """

    name: str
    make: Callable[[], Index]
    setting: str
    values: tuple[int, ...]


class Trial(NamedTuple):
    """A candidate as it was measured.

    Attributes:
        name: Of the candidate.
        setting: Attribute and value.
        recall: Share of the exactly best k that were found, mean over all sample queries.
        search_s: Seconds of a search of one group, median.
        build_s: Seconds of its building.
    """

    name: str
    setting: tuple[str, int]
    recall: float
    search_s: float
    build_s: float


class Choice(NamedTuple):
    """What was chosen, and from what.

    Attributes:
        built: From the keys, with the setting that was enough.
        chosen: Its trial.
        trials: All of them, in the order in which they were made.
        candidate: Of which other heads' indexes are made by `make`.
    """

    built: Index
    chosen: Trial
    trials: tuple[Trial, ...]
    candidate: Candidate

    def make(self) -> Index:
        """Another one without keys, for keys like these."""
        return _with(self.candidate, self.chosen.setting[1], self.candidate.make())


def candidates() -> tuple[Candidate, ...]:
    """Every backend, over settings that were found useful from 4K to 8K keys (`benchmarks/index.json`)."""
    fetches, breadths = (1, 2, 4, 8, 16, 32), (100, 150, 200, 300, 400, 800)
    return (
        Candidate("flat", backend("flat"), "overfetch", fetches),
        Candidate("clusters", backend("clusters"), "overfetch", fetches),
        Candidate("pages", backend("pages"), "overfetch", fetches),
        Candidate("ivf", backend("ivf"), "probes", (4, 8, 16, 32, 64)),
        Candidate("hnsw", backend("hnsw"), "breadth", breadths),
        Candidate("graph", backend("graph"), "breadth", breadths),
    )


def choose(
    keys: Vectors,
    queries: Vectors,
    samples: Vectors,
    *,
    k: int = 100,
    recall: float = 0.95,
    among: Sequence[Candidate] | None = None,
) -> Choice:
    """Builds every candidate, searches with ever larger settings until enough is found, and takes the fastest.

    It costs a building of each: choose by one head of a context, and `Choice.make` the others.

    Args:
        keys: [N, D], float16 or float32: of one head.
        queries: [M, D]: of the prompt, to learn from.
        samples: [S, G, D]: S groups of queries to measure with, of the kind that will be searched with and not among
            `queries`, or what learns from these looks better than it is.
        k: Keys of a search.
        recall: Share of the exactly best k that have to be found, over 0 and at most 1.
        among: Candidates; those of `candidates` if left out.

    Raises:
        InputError: See `offload.index.base.Index`; or no candidate finds enough: the best of them is `there`.
    """
    keys = checked_keys(keys, None)
    if samples.ndim != 3 or not len(samples):
        raise InputError("The samples are no groups [S, G, D]", there=samples.shape, change="Pass at least one group of queries.")  # fmt: skip
    if not 0 < recall <= 1:
        raise InputError("A recall is a share over 0 and at most 1", asked=recall, change="0.95 is usual.")  # fmt: skip
    best = [_best(keys, group, k) for group in samples]
    trials: list[Trial] = []
    chosen: tuple[Trial, Index, Candidate] | None = None
    for candidate in candidates() if among is None else among:
        index = candidate.make()
        began = time.perf_counter()
        index.build(keys, queries)
        build_s = time.perf_counter() - began
        for value in candidate.values:
            _with(candidate, value, index)
            found, search_s = _tried(index, samples, best, k)
            trial = Trial(candidate.name, (candidate.setting, value), found, search_s, build_s)
            trials.append(trial)
            if found >= recall:
                if chosen is None or search_s < chosen[0].search_s:
                    chosen = trial, index, candidate
                break
    if chosen is None:
        most = max(trials, key=lambda trial: trial.recall, default=None)
        raise InputError("No index finds enough", asked=recall, there=most, change="Ask for less, or let `flat` over-fetch more.")  # fmt: skip
    trial, index, candidate = chosen
    return Choice(index, trial, tuple(trials), candidate)


def _with(candidate: Candidate, value: int, index: Index) -> Index:
    """The index with the candidate's setting at a value."""
    assert hasattr(index, candidate.setting)
    setattr(index, candidate.setting, value)
    return index


def _best(keys: Vectors, group: Vectors, k: int) -> list[set[int]]:
    """The exactly best k of each query."""
    group = checked_keys(group, keys.shape[1], what="samples")
    ids, counts = np.empty(min(k, len(keys)), np.int64), np.empty(2048, np.int32)
    found = []
    for scores in group.astype(np.float32) @ keys.astype(np.float32).T:
        scan.best(scores, ids, counts)
        found.append(set(ids.tolist()))
    return found


def _tried(
    index: Index, samples: Vectors, best: list[list[set[int]]], k: int
) -> tuple[float, float]:
    """Recall, and median seconds of a search. The first one compiles and is not timed."""
    index.search(samples[0], k)
    shares, times = [], []
    for group, want in zip(samples, best, strict=True):
        began = time.perf_counter()
        found = index.search(group, k)
        times.append(time.perf_counter() - began)
        pairs = zip(found.ids.tolist(), want, strict=True)
        shares += [len(those.intersection(ids)) / k for ids, those in pairs]
    return statistics.mean(shares), statistics.median(times)
