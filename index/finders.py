"""What finds the best keys of one KV head, where the cache keeps the rows? One finder for each sequence and head.

`PagedFlat` and `PagedClusters` read rows in the pages; `Copied` stands for every other backend, which has a copy of the keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from offload.index import backend
from offload.index.base import Floats
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
)

_BITS = 4
_OVERFETCH = {
    "flat": 4,
    "clusters": 8,
}  # keys that are scored exactly for each one that is attended to


class Finder(ABC):
    """Finds keys of one head of one sequence, and attends to them."""

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


def finder(name: str, capacity: int, key_dim: int) -> Finder:
    """A finder without keys.

    Args:
        name: One of `offload.index.BACKENDS`.
        capacity: Keys that there may be.
        key_dim: D.
    """
    if name == "flat":
        return PagedFlat(capacity, key_dim)
    if name == "clusters":
        return PagedClusters(capacity, key_dim)
    return Copied(name)


class PagedFlat(Finder):
    """All keys by four bits a channel, the best again by their rows."""

    def __init__(self, capacity: int, key_dim: int) -> None:
        self._room = capacity, key_dim
        self._coded = Coded.of(capacity // BLOCK, key_dim, _BITS)
        self._blocks = 0

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        return sum(part[: self._blocks].nbytes for part in self._coded.arrays)

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`."""
        return _OVERFETCH["flat"] * k

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
            _OVERFETCH["flat"] * int(task["k"]), max(0, int(task["count"] - task["first"]))
        )
        _describe(task, self._coded, self._blocks * BLOCK)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        coded = self._coded.of_first(self._blocks)
        attend_best(
            rows, coded, first, count, queries, softcap, _OVERFETCH["flat"], scratch, ids, out, lse
        )  # fmt: skip


class PagedClusters(Finder):
    """The keys of the clusters whose centroids are liked best."""

    def __init__(self, capacity: int, key_dim: int) -> None:
        self._room = capacity, key_dim
        self._groups = Groups.of(capacity, key_dim)
        self._clustered = 0  # tokens

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
        return room(_OVERFETCH["clusters"], k)

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
        task["wanted"] = clusters_of(_OVERFETCH["clusters"], int(task["k"]))
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
            _OVERFETCH["clusters"],
            scratch,
            ids,
            out,
            lse,
        )


def _describe(task: np.void, coded: Coded, tokens: int) -> None:
    for name, array in zip(("codes_at", "lows_at", "steps_at"), coded.arrays, strict=True):
        task[name] = array.ctypes.data
    task["coded"] = tokens


class Copied(Finder):
    """A backend that has a copy of the keys. What it finds for each query is put together."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._index = backend(name)()

    @property
    def nbytes(self) -> int:
        """See `Finder`."""
        return self._index.nbytes

    def candidates(self, groups: int, k: int) -> int:
        """See `Finder`."""
        return groups * k

    def scored(self, capacity: int, groups: int, k: int) -> int:
        """See `Finder`."""
        return groups * k

    def extend(self, rows: Rows, count: int, scratch: Scratch, learned: Floats | None) -> None:
        """See `Finder`."""
        there = len(self._index)
        if count <= there:
            return
        keys = gathered(rows, there, count)
        if rows.kind != FLOAT32:
            keys = keys.astype(np.float16)
        try:
            if there or learned is None:
                self._index.add(keys)
            else:
                self._index.build(keys, learned)
        except BaseException:  # what it holds then is not known
            self._index = backend(self._name)()
            raise

    def truncate(self, tokens: int) -> None:
        """See `Finder`. No backend forgets a part: the next `extend` builds from what is left."""
        if tokens < len(self._index):
            self._index = backend(self._name)()

    def copy(self) -> Copied:
        """See `Finder`: without keys, which the next `extend` brings."""
        return Copied(self._name)

    def attend(
        self, rows: Rows, first: int, count: int, queries: Floats, softcap: float, scratch: Scratch,
        ids: NDArray[np.int32], out: Floats, lse: Floats,
    ) -> None:  # fmt: skip
        """See `Finder`."""
        # Padding is indexed too, and must not take the places of others.
        some = np.unique(self._index.search(queries, min(ids.shape[0] + first, count)).ids)
        attend_some(rows, some[some >= first], queries, softcap, scratch, ids, out, lse)
