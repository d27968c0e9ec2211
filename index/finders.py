"""What finds the best keys of one KV head, where the cache keeps the rows? One finder for each sequence and head.

`PagedFlat` and `PagedClusters` read rows in the pages, `Measured` is one of these; `Copied` stands for every other backend, which
has a copy of the keys.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from offload.index import backend
from offload.index.base import Floats, Ids, Index, Nearest
from offload.index.crew import CLUSTERS, FLAT
from offload.index.grouped import (
    SEGMENT,
    SIZE,
    Groups,
    attend_grouped,
    clusters_of,
    group,
    room,
)
from offload.index.lanes import BLOCK
from offload.index.paged import (
    FLOAT32,
    Coded,
    Rows,
    Scratch,
    attend_best,
    attend_some,
    encode_blocks,
    gathered,
    score_chosen,
)
from offload.index.scan import best

_BITS = 4
_OVERFETCH = {
    "flat": 4,
    "clusters": 8,
}  # keys that are scored exactly for each one that is attended to
_TRIED = 2, 4, 8, 16  # of these, with clusters, what finds enough is looked for
_ENOUGH = 8  # keys for each that is found, from which on it is measured
_GROWN = 4  # times as many keys, from which on it is measured again


class Finder(ABC):
    """Finds keys of one head of one sequence, and attends to them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The backend that searches."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of host memory beside the pages, for the tokens that are there."""

    @abstractmethod
    def candidates(self, groups: int, k: int) -> int:
        """Keys that a search scores exactly, at most: what a scratch has to have room for.

        Args:
            groups: Query heads.
            k: Keys that are attended to.
        """

    @abstractmethod
    def scored(self, capacity: int, groups: int, k: int) -> int:
        """Scores that a search keeps at the same time, at most, of so many keys: likewise."""

    @abstractmethod
    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """Takes in the keys up to `count` that are new.

        Args:
            rows: Of all of them.
            count: Keys.
            scratch: To work with.
            learned: float32 [n, D], queries to learn from.
        """

    def choose(self, rows: Rows, first: int, count: int, samples: Floats) -> bool:
        """Makes up its mind how it searches, where that is open; returns whether it did.

        Args:
            rows: Of `count` keys, all taken in.
            first: Keys before it are padding.
            count: Keys.
            samples: float32 [G, S, D], the queries of S searches like those to come.
        """
        return False

    @abstractmethod
    def truncate(self, tokens: int) -> None:
        """Forgets the keys from `tokens` on."""

    @abstractmethod
    def copy(self) -> Finder:
        """Another one that has the same keys and grows by itself."""

    @property
    def compiled(self) -> bool:
        """Whether its searches are tasks of `offload.index.crew`; else `attend` is called."""
        return False

    def describe(self, task: np.void) -> None:
        """Writes what a task of `offload.index.crew` has to know of it. Only where it is `compiled`.

        Args:
            task: A `TASK`, with all that is asked.
        """
        raise NotImplementedError("its searches are no tasks")

    @abstractmethod
    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """Finds keys and attends to them; arguments as of `offload.index.paged.attend_best`. `ids` are in no order."""


def finder(
    name: str, capacity: int, key_dim: int, *, tokens: int = 64, recall: float = 0.95, nearest: Nearest | None = None
) -> Finder:  # fmt: skip
    """A finder without keys.

    Args:
        name: One of `offload.index.BACKENDS`, or `auto`.
        capacity: Keys that there may be.
        key_dim: D.
        tokens: That a search finds. What the next one is about, of `auto`.
        recall: Share of the best so many keys that have to be found.
        nearest: What a `graph` is built with.
    """
    if name == "auto":
        return Measured(capacity, key_dim, tokens, recall)
    if name == "flat":
        return PagedFlat(capacity, key_dim)
    if name == "clusters":
        return PagedClusters(capacity, key_dim)
    return Copied(name, nearest)


class PagedFlat(Finder):
    """All keys by four bits a channel, the best again by their rows."""

    def __init__(self, capacity: int, key_dim: int) -> None:
        self._room = capacity, key_dim
        self.overfetch = _OVERFETCH["flat"]
        self._coded = Coded.of(capacity // BLOCK, key_dim, _BITS)
        self._blocks = 0

    @property
    def name(self) -> str:
        """See `Finder`."""
        return "flat"

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        return sum(part[: self._blocks].nbytes for part in self._coded.arrays)

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`."""
        return self.overfetch * k

    def scored(self, capacity: int, groups: int, k: int) -> int:
        """See `Finder`."""
        return capacity

    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """See `Finder`."""
        blocks = count // BLOCK
        encode_blocks(rows, self._coded, self._blocks, blocks, scratch)
        self._blocks = blocks

    def truncate(self, tokens: int) -> None:
        """See `Finder`."""
        self._blocks = min(self._blocks, tokens // BLOCK)

    def copy(self) -> PagedFlat:
        """See `Finder`."""
        other = PagedFlat(*self._room)
        other.overfetch = self.overfetch
        other._blocks = self._blocks
        for target, source in zip(other._coded.arrays, self._coded.arrays, strict=True):
            target[: self._blocks] = source[: self._blocks]
        return other

    @property
    def compiled(self) -> bool:
        """See `Finder`."""
        return True

    def describe(self, task: np.void) -> None:
        """See `Finder`."""
        task["index"] = FLAT
        task["wanted"] = min(
            self.overfetch * int(task["k"]), max(0, int(task["count"] - task["first"]))
        )
        _describe(task, self._coded, self._blocks * BLOCK)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        coded = self._coded.of_first(self._blocks)
        attend_best(
            rows, coded, first, count, queries, softcap, self.overfetch, scratch, ids, out, lse
        )  # fmt: skip


class PagedClusters(Finder):
    """The keys of the clusters whose centroids are liked best."""

    def __init__(self, capacity: int, key_dim: int) -> None:
        self._room = capacity, key_dim
        self.overfetch = _OVERFETCH["clusters"]
        self._groups = Groups.of(capacity, key_dim)
        self._clustered = 0  # tokens

    @property
    def name(self) -> str:
        """See `Finder`."""
        return "clusters"

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        groups = self._groups.of_first(self._clustered)
        return (
            groups.order.nbytes
            + groups.starts.nbytes
            + sum(p.nbytes for p in groups.centroids.arrays)
        )

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`."""
        return room(self.overfetch, k)

    def scored(self, capacity: int, groups: int, k: int) -> int:
        """See `Finder`: centroids, or candidates where these are more."""
        return max(capacity // SIZE, self.candidates(groups, k))

    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """See `Finder`."""
        self._clustered = group(rows, self._groups, self._clustered, count)

    def truncate(self, tokens: int) -> None:
        """See `Finder`."""
        self._clustered = min(self._clustered, tokens // SEGMENT * SEGMENT)

    def copy(self) -> PagedClusters:
        """See `Finder`."""
        other = PagedClusters(*self._room)
        other.overfetch = self.overfetch
        other._clustered = self._clustered
        mine, theirs = (each._groups.of_first(self._clustered) for each in (self, other))
        for target, source in zip(theirs.centroids.arrays, mine.centroids.arrays, strict=True):
            target[:] = source
        theirs.order[:], theirs.starts[:] = mine.order, mine.starts
        return other

    @property
    def compiled(self) -> bool:
        """See `Finder`."""
        return True

    def describe(self, task: np.void) -> None:
        """See `Finder`."""
        groups = self._groups
        task["index"] = CLUSTERS
        task["wanted"] = clusters_of(self.overfetch, int(task["k"]))
        task["order_at"], task["starts_at"] = groups.order.ctypes.data, groups.starts.ctypes.data
        _describe(task, groups.centroids, self._clustered)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        groups = self._groups.of_first(self._clustered)
        attend_grouped(
            rows,
            groups,
            first,
            count,
            queries,
            softcap,
            self.overfetch,
            scratch,
            ids,
            out,
            lse,
        )


class Measured(Finder):
    """`clusters` or `flat`, whichever finds enough of this head's keys and is faster on this machine, as measured; else what finds more.

    Clusters until then. Of keys that have no structure, or of which many are wanted, only reading most clusters would find
    enough. It is measured again once there are `_GROWN` times as many keys, or where most were cut off.

    Attributes:
        used: What searches.
        trials: Of the choice: name, keys that are scored for each wanted one, recall, seconds of a search.
    """

    def __init__(self, capacity: int, key_dim: int, tokens: int, recall: float) -> None:
        self._room = capacity, key_dim, tokens, recall
        self.used: PagedFlat | PagedClusters = PagedClusters(capacity, key_dim)
        self.trials: list[tuple[str, int, float, float]] = []
        self._chosen_at = 0  # keys

    @property
    def name(self) -> str:
        """See `Finder`."""
        return self.used.name

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        return self.used.nbytes

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`: of any choice."""
        return max(room(_TRIED[-1], k), _OVERFETCH["flat"] * k)

    def scored(self, capacity: int, groups: int, k: int) -> int:
        """See `Finder`: likewise."""
        return max(capacity, self.candidates(groups, k))

    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """See `Finder`."""
        self.used.extend(rows, count, scratch, learned)

    def choose(self, rows: Rows, first: int, count: int, samples: Floats) -> bool:
        """See `Finder`. Only where there are `_ENOUGH` keys for each that is found, and `_GROWN` times as many as the last time."""
        capacity, key_dim, tokens, recall = self._room
        if count - first < _ENOUGH * tokens or count < _GROWN * self._chosen_at:
            return False
        groups = samples.shape[0]
        wanted = _liked_most(rows, first, count, samples, tokens)
        width = self.scored(capacity, groups, tokens), key_dim, rows.pool.shape[-1] - key_dim
        scratch = Scratch.of(groups, *width, self.candidates(groups, tokens))
        space = Scratch.of(1, BLOCK * key_dim, *width[1:], 1)
        clusters, flat = PagedClusters(capacity, key_dim), PagedFlat(capacity, key_dim)
        if isinstance(self.used, PagedClusters):
            clusters = self.used.copy()
        for each in (clusters, flat):
            each.extend(rows, count, space, None)
        trials = []
        for one, name, values in ((clusters, "clusters", _TRIED), (flat, "flat", (flat.overfetch,))):  # fmt: skip
            for one.overfetch in values:
                found, seconds = _tried(one, rows, first, count, samples, wanted, scratch)
                trials.append((name, one.overfetch, found, seconds))
                if found >= recall:
                    break
        (_, _, found, seconds), (_, _, by_flat, flat_s) = trials[-2:]
        takes_flat = by_flat > found if min(by_flat, found) < recall else flat_s < seconds
        self.trials, self._chosen_at = trials, count
        self.used = flat if takes_flat else clusters
        return True

    def truncate(self, tokens: int) -> None:
        """See `Finder`."""
        self.used.truncate(tokens)
        if _GROWN * tokens < self._chosen_at:
            self._chosen_at = 0

    def copy(self) -> Measured:
        """See `Finder`."""
        other = Measured(*self._room)
        other.used, other.trials, other._chosen_at = self.used.copy(), list(self.trials), self._chosen_at  # fmt: skip
        return other

    @property
    def compiled(self) -> bool:
        """See `Finder`."""
        return True

    def describe(self, task: np.void) -> None:
        """See `Finder`."""
        self.used.describe(task)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        self.used.attend(rows, first, count, queries, softcap, scratch, ids, out, lse)


def _liked_most(rows: Rows, first: int, count: int, samples: Floats, k: int) -> list[Ids]:
    """The k keys with the best votes (`offload.index.paged`) of each group of queries [G, S, D], exactly."""
    groups, n, dim = samples.shape
    queries = np.ascontiguousarray(samples.reshape(-1, dim))
    scores = np.empty((groups * n, count - first), np.float32)
    some = np.arange(first, count)
    score_chosen(*rows, some, 0, len(some), queries, 0.0, scores, np.empty(dim, np.float32))
    scores -= scores.max(1, keepdims=True)
    votes = np.ascontiguousarray(scores.reshape(groups, n, -1).max(0))
    ids, counts = np.empty((n, k), np.int64), np.empty(2048, np.int32)
    for vote, found in zip(votes, ids, strict=True):
        best(vote, found, counts)
    return [found + first for found in ids]


def _tried(
    one: PagedFlat | PagedClusters, rows: Rows, first: int, count: int, samples: Floats, wanted: list[Ids], scratch: Scratch
) -> tuple[float, float]:  # fmt: skip
    """Recall, mean, and seconds of a search, the least: others may work beside it."""
    ids = np.empty(len(wanted[0]), np.int32)
    out = np.empty((samples.shape[0], rows.pool.shape[-1] - rows.key_dim), np.float32)
    lse = np.empty(samples.shape[0], np.float32)
    shares, times = [], []
    for s, want in enumerate(wanted):
        queries = np.ascontiguousarray(samples[:, s])
        began = time.perf_counter()
        one.attend(rows, first, count, queries, 0.0, scratch, ids, out, lse)
        times.append(time.perf_counter() - began)
        shares.append(len(np.intersect1d(ids, want)) / len(want))
    return float(np.mean(shares)), min(times)


def _describe(task: np.void, coded: Coded, tokens: int) -> None:
    for name, array in zip(("codes_at", "lows_at", "steps_at"), coded.arrays, strict=True):
        task[name] = array.ctypes.data
    task["coded"] = tokens


class Copied(Finder):
    """A backend that has a copy of the keys. What it finds for each query is put together.

    Attributes:
        index: The backend.
    """

    def __init__(self, name: str, nearest: Nearest | None = None) -> None:
        self._name = name
        self._nearest = nearest
        self.index = self._empty()

    def _empty(self) -> Index:
        if self._name == "graph":
            from offload.index.graph import Graph

            return Graph(nearest=self._nearest)
        return backend(self._name)()

    @property
    def name(self) -> str:
        """See `Finder`."""
        return self._name

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        return self.index.nbytes

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`."""
        return groups * k

    def scored(self, capacity: int, groups: int, k: int) -> int:
        """See `Finder`."""
        return groups * k

    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """See `Finder`."""
        there = len(self.index)
        if count <= there:
            return
        keys = gathered(rows, there, count)
        if rows.kind != FLOAT32:
            keys = keys.astype(np.float16)
        try:
            if there or learned is None:
                self.index.add(keys)
            else:
                self.index.build(keys, learned)
        except BaseException:  # what it holds then is not known
            self.index = self._empty()
            raise

    def truncate(self, tokens: int) -> None:
        """See `Finder`. No backend forgets a part: the next `extend` builds from what is left."""
        if tokens < len(self.index):
            self.index = self._empty()

    def copy(self) -> Copied:
        """See `Finder`: without keys, which the next `extend` brings."""
        return Copied(self._name, self._nearest)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        # Padding is indexed too, and must not take the places of others.
        found = self.index.search(queries, min(ids.shape[0] + first, count)).ids
        some = np.unique(np.concatenate([of[of >= first][: ids.shape[0]] for of in found]))
        attend_some(rows, some, queries, softcap, scratch, ids, out, lse)
