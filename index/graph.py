"""Which keys matter, when a search walks along links that were drawn by what earlier queries had in common?

A key is linked to keys that the same queries like: first a graph between queries and their best keys, exactly, then the
queries are left out. RetrievalAttention (arXiv 2409.10516), and the graph that it takes: Chen et al., RoarGraph (arXiv
2408.08933). What is done differently, with what a trial on six heads of SmolLM2 at 7,800 tokens says of the best 100:

- Every key of a query's list is a pivot, not its best one alone, and what several queries propose for a pivot is merged,
  where RoarGraph's code keeps the last. With 100 keys in view 95 % are found with 9.3 % of the keys scored and 16 links,
  against 87 % with 8.6 % and 32 links where only the best is one.
- Proposals are pruned by distance, not by inner product, which is no metric: 87 % against 86 %.
- A key is scored only when two opened ones point at it. Links say for nothing part of what a score would: over all heads
  95 % take scores of 9.9 % of the keys instead of 10.3 (`benchmarks/index.json`). Three votes gain nothing over two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.errors import ConfigError, InputError
from offload.index import file, scan
from offload.index.base import Floats, Found, Ids, Nearest, Vectors, checked_keys, checked_search
from offload.index.growing import Growing, OverRows

_HUBS = 32  # keys where a search begins; of 4, 8, 16 and 32 the most find most of Qwen2.5-Coder at equal work
_LISTS = 4  # lists of one key that are merged: keys that all queries like are in thousands; 32 find no more
_TEACHERS = 8192  # queries that are learned from, at most; of a quarter of them no less is found
_TURNED = 64  # links to a key that are weighed against its own
_NEAR = 64  # keys in view while one is linked that no list has
_PROPOSED = 32  # keys that are proposed to such a one where its best ones are known exactly
_EAGER = 10  # keys that are opened before votes count: until then the walk is on its way, and few keys have any
_LIKING = 4  # lists whose keys are proposed to one that is added
_KEPT = 1024  # teachers that are kept for it: what they take, and an addition, do not grow with the keys
_ROUNDS = 1 << 24  # searches until the marks of visited keys are wiped
_SCORED = 255  # where another key has the count of its votes
_HALF_SCALE = np.float32(2.0**112)  # see `offload.index.scan`


class Graph(OverRows):
    """Links between keys, made from what queries like; a best-first walk over them.

    Rows are stored as they come. Keys of `add` are linked to those that are liked by the teachers that like them
    most, of which some are kept; every key can be reached from the first start, then too.
    """

    backend: ClassVar[str] = "graph"

    def __init__(
        self,
        *,
        links: int = 16,
        reach: int = 64,
        teachers: int | None = None,
        breadth: int = 200,
        votes: int = 2,
        follow: bool = False,
        seed: int = 0,
        nearest: Nearest | None = None,
    ) -> None:
        """An index without keys.

        Args:
            links: Of a key, drawn by queries. Half as many more lead to keys that no query likes, or that `add` brought.
                More find more and score more.
            reach: Best keys of a query that are linked among each other. More build longer.
            teachers: Queries that are learned from, at random where there are more; None for a quarter of the keys, at
                least 1,024 and at most 8,192. More build longer.
            breadth: Keys that are kept in view in a search; never fewer than are asked for. More find more: for 95 % of the
                best 100 at 8K SmolLM2 takes 250, Qwen2.5-Coder-0.5B 400.
            votes: Opened keys that point at a key before it is scored. More score less, and take a larger breadth.
            follow: A search begins also at what the last one of as many queries found. Consecutive steps of decoding
                have much in common; results then depend on what was searched before.
            seed: Of the choice of teachers.
            nearest: Finds the best keys of queries; None for `nearest` of this module. Where it is given, it is fast: keys that
                no query likes are linked to their exactly best ones then, instead of what a walk finds. Better, too.

        Raises:
            ConfigError: A number is too small, or there are more votes than can be counted.
        """
        numbers = {"links": links, "reach": reach, "teachers": teachers, "breadth": breadth, "votes": votes}  # fmt: skip
        for key, value in numbers.items():
            if value is not None and value < (2 if key in ("links", "reach") else 1):
                raise ConfigError("that is too few", key=key, asked=value)
        if votes >= _SCORED:
            raise ConfigError("that is more than are counted", key="votes", asked=votes)
        self.links = links
        self.reach = reach
        self.teachers = teachers
        self.breadth = breadth
        self.votes = votes
        self.follow = follow
        self.seed = seed
        self._nearest = nearest
        self._rows: Growing | None = None
        self._links: Growing  # int32 [N, room]
        self._counts: Growing  # int32 [N]: links of each
        self._marks: Growing  # uint32 [N]: the search that met a key last, and its votes
        self._taught: Floats  # [T, D]: teachers that are kept
        self._bars: Floats  # [T]: what the last of each one's list scored
        self._lists: NDArray[np.int32]  # [T, reach]
        self._starts: Ids = np.empty(0, np.int64)
        self._mean: Floats = np.empty(0, np.float32)
        self._begin()

    def _begin(self) -> None:
        """What searches work with."""
        self._round = 0
        self._last: Ids = np.empty((0, 0), np.int64)
        self._view = (np.empty(0, np.float32), np.empty(0, np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of rows, links and marks."""
        if self._rows is None:
            return 0
        parts = (self._rows, self._links, self._counts, self._marks)
        kept = self._taught.nbytes + self._bars.nbytes + self._lists.nbytes
        return kept + sum(int(part.rows.nbytes) for part in parts)

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`. Learns from queries; best from those of the last tokens, which are most like those to come.

        Without queries the keys themselves stand for them, less their mean. That is weaker where queries are of another
        distribution: see `benchmarks/index.json`.
        """
        keys = checked_keys(keys, None)
        values = keys.astype(np.float32)
        values -= values.mean(axis=0)
        taught = values
        if queries is not None:
            queries = checked_keys(queries, keys.shape[1], what="queries")
            taught = queries
        most = self.teachers or min(_TEACHERS, max(1024, len(keys) // 4))
        if len(taught) > most:
            chosen = np.random.default_rng(self.seed).choice(len(taught), most, replace=False)
            taught = taught[np.sort(chosen)]
        find = self._nearest or nearest
        self.build_from(keys, taught, find(values, taught, min(self.reach, len(keys))))

    def build_from(self, keys: Vectors, queries: Vectors, lists: Ids) -> None:
        """`build`, where the best keys of queries are known already, as from a GPU.

        Args:
            keys: [N, D].
            queries: [M, D].
            lists: int64 [M, n], n <= N: of each query its best keys, best first.

        Raises:
            InputError: See `Index`; or a list names a key that is not there.
        """
        keys = checked_keys(keys, None)
        queries = checked_keys(queries, keys.shape[1], what="queries")
        if (
            lists.ndim != 2
            or 0 in lists.shape
            or lists.dtype != np.int64
            or len(lists) != len(queries)
        ):
            raise InputError("The lists are no int64 [M, n]", asked=len(queries), there=lists.shape, change="Pass the best keys of each query.")  # fmt: skip
        if lists.min() < 0 or lists.max() >= len(keys):
            raise InputError("A list names a key that is not there", asked=int(lists.max()), there=len(keys), change="Make lists from these keys.")  # fmt: skip
        count, room = len(keys), self.links + self.links // 2
        values = keys.astype(np.float32)
        mean = values.mean(axis=0)
        values -= mean
        links, counts = np.zeros((count, room), np.int32), np.zeros(count, np.int32)
        starts = _first(values, lists)
        _project(values, np.ascontiguousarray(lists), links, counts, self.links)
        alone = np.flatnonzero(counts == 0)
        if self._nearest is not None and len(alone):
            # The best one of a key is itself, as a rule.
            found = self._nearest(values, values[alone], min(_PROPOSED + 1, count))
            _lead(values, links, counts, self.links, alone, found)
        marks = np.zeros(count, np.uint32)
        _connect(_raw(values), values, links, counts, self.links, starts, marks)
        marks[:] = 0
        some = np.linspace(0, len(lists) - 1, min(_KEPT, len(lists))).astype(np.int64)
        self._taught = queries[some].astype(np.float32)
        self._lists = lists[some].astype(np.int32)
        self._bars = (self._taught * values[self._lists[:, -1]]).sum(axis=1)
        self._rows, self._links, self._counts = Growing(keys), Growing(links), Growing(counts)
        self._marks, self._starts, self._mean = Growing(marks), starts, mean
        self._begin()

    def add(self, keys: Vectors) -> None:
        """See `Index`. Keys are stored in the dtype of the first ones."""
        if self._rows is None:
            self.build(keys)
            return
        keys = checked_keys(keys, self.dimension)
        before, n = len(self), len(keys)
        self._rows.append(keys)
        self._links.append(np.zeros((n, self._links.rows.shape[1]), np.int32))
        self._counts.append(np.zeros(n, np.int32))
        self._marks.append(np.zeros(n, np.uint32))
        base = self._rounds(n)
        _extend(
            _raw(self._rows.rows), keys.astype(np.float32) - self._mean, self._links.rows, self._counts.rows,
            self.links, self._taught, self._bars, self._lists, self._marks.rows, base, before,
        )  # fmt: skip

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`. Each query walks by itself, so what two of them read counts twice."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        assert self._rows is not None
        groups, rows = len(queries), self._rows.rows
        ids, scores = np.empty((groups, k), np.int64), np.empty((groups, k), np.float32)
        width = max(self.breadth, k)
        if self._view[0].size < width:
            self._view = (np.empty(width, np.float32), np.empty(width, np.int64))
        view = (self._view[0][:width], self._view[1][:width])
        last = self._last if self.follow and len(self._last) == groups else ids[:, :0]
        scored, opened = _search(
            _raw(rows), self._links.rows, self._counts.rows, self._starts, last, queries, self.votes,
            self._marks.rows, self._rounds(groups), *view, ids, scores,
        )  # fmt: skip
        if self.follow:
            self._last = ids.copy()
        touched = scored * int(rows.strides[0]) + opened * (int(self._links.rows.strides[0]) + 4)
        return Found(ids, scores, scored / (groups * count), touched)

    def repair(self, queries: Vectors) -> int:
        """Links what walks of queries miss: a key of their best, at which none of the better ones points, to the nearest of these.

        After NGFix (arXiv 2510.22316), instead of building anew when queries have become others. A walk with twice the breadth and one
        vote says which keys are the best. More is found then and more is scored: a smaller breadth suffices, at the same share of keys
        (`benchmarks/index.json`).

        Args:
            queries: [M, D], of the newest.

        Returns:
            Links that were added; fewer than are missing where keys have no room.

        Raises:
            InputError: See `Index`; or there are no keys.
        """
        if self._rows is None:
            raise InputError("There are no keys to link", asked=len(queries), there=0, change="Build the index first.")  # fmt: skip
        queries = checked_keys(queries, self.dimension, what="queries").astype(np.float32)
        if not self._links.rows.flags.writeable:  # they are mapped from a file
            self._links, self._counts = Growing(self._links.rows), Growing(self._counts.rows)
        width = max(2 * self.breadth, self.reach)
        return int(_mend(
            _raw(self._rows.rows), self._links.rows, self._counts.rows, self._starts, queries, min(self.reach, len(self)),
            self._marks.rows, self._rounds(len(queries)), np.empty(width, np.float32), np.empty(width, np.int64),
        ))  # fmt: skip

    def save(self, path: Path) -> None:
        """See `Index`. What `follow` begins at is not kept."""
        metadata = {
            "links": self.links,
            "reach": self.reach,
            "teachers": self.teachers,
            "breadth": self.breadth,
            "votes": self.votes,
            "follow": self.follow,
            "seed": self.seed,
        }
        arrays: dict[str, NDArray[Any]] = {}
        if self._rows is not None:
            arrays = {
                "rows": self._rows.rows,
                "links": self._links.rows,
                "counts": self._counts.rows,
            }
            arrays |= {"starts": self._starts, "mean": self._mean}
            arrays |= {"taught": self._taught, "bars": self._bars, "lists": self._lists}
        file.write(path, self.backend, metadata, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. Rows and links stay in the file, mapped, until keys are added; then they are copied."""
        _, metadata, arrays = file.read(path, cls.backend)
        self = cls(**metadata)
        if arrays:
            self._rows, self._links, self._counts = (
                Growing.around(arrays[name]) for name in ("rows", "links", "counts")
            )
            self._marks = Growing(np.zeros(len(self), np.uint32))
            self._starts, self._mean = np.array(arrays["starts"]), np.array(arrays["mean"])
            self._taught, self._bars = np.array(arrays["taught"]), np.array(arrays["bars"])
            self._lists = np.array(arrays["lists"])
        return self

    def _rounds(self, n: int) -> int:
        """The first of n numbers by which searches tell their marks from older ones."""
        if self._round + n + 1 >= _ROUNDS:
            self._marks.rows[:] = 0
            self._round = 0
        first = self._round + 1
        self._round += n
        return first


def nearest(keys: Floats, queries: Vectors, n: int) -> Ids:
    """The exactly best n keys of each query, best first.

    Args:
        keys: float32 [N, D].
        queries: float16 or float32 [M, D].
        n: At most N.

    Returns:
        int64 [M, n].
    """
    found, counts = np.empty((len(queries), n), np.int64), np.empty(2048, np.int32)
    for a in range(0, len(queries), 256):
        scores = queries[a : a + 256].astype(np.float32) @ keys.T
        for i, row in enumerate(scores, a):
            scan.best(row, found[i], counts)
            found[i] = found[i][np.argsort(-row[found[i]], kind="stable")]
    return found


def _raw(rows: Vectors) -> NDArray[np.uint16]:
    """Rows as Numba takes them, which has no float16: [N, D] of halves, [N, 2 D] of floats."""
    return rows.view(np.uint16)


def _first(values: Floats, lists: Ids) -> Ids:
    """Where searches begin: the key nearest to the mean, and hubs that have most lists between them.

    Each is among the best ten of most lists that none before it is among: queries of several kinds like different keys,
    and a walk does not find from one kind's keys to another's.
    """
    heads = lists[:, :10]
    starts = [int(np.argmin((values * values).sum(axis=1)))]
    while len(starts) <= _HUBS and len(heads):
        hub = int(np.bincount(heads.ravel()).argmax())
        starts.append(hub)
        heads = heads[~(heads == hub).any(axis=1)]
    return np.array(list(dict.fromkeys(starts)), np.int64)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _score(raw: Any, i: int, query: Any, row: Any) -> Any:
    """Inner product with row i of `_raw`; row: float32 [D], to work with."""
    total = np.float32(0)
    if raw.shape[1] == query.shape[0]:
        bits = row.view(np.uint32)
        for c in range(query.shape[0]):
            half = np.uint32(raw[i, c])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            bits[c] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        for c in range(query.shape[0]):
            total += row[c] * _HALF_SCALE * query[c]
    else:
        values = raw[i].view(np.float32)
        for c in range(query.shape[0]):
            total += values[c] * query[c]
    return total


@njit(nogil=True, cache=True)
def _read(raw: Any, i: int, row: Any) -> None:
    """Row i of `_raw` as float32 [D]."""
    if raw.shape[1] == row.shape[0]:
        bits = row.view(np.uint32)
        for c in range(row.shape[0]):
            half = np.uint32(raw[i, c])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            bits[c] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        for c in range(row.shape[0]):
            row[c] *= _HALF_SCALE
    else:
        row[:] = raw[i].view(np.float32)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _apart(a: Any, b: Any) -> Any:
    """Squared distance."""
    total = np.float32(0)
    for c in range(a.shape[0]):
        total += (a[c] - b[c]) * (a[c] - b[c])
    return total


@njit(nogil=True, cache=True)
def _put(scores: Any, ids: Any, n: int, score: Any, i: int) -> Any:
    """Puts a key in its place in a view of n, best first; returns the place and how many there are then."""
    size = scores.shape[0]
    if n == size and score <= scores[n - 1]:
        return size, n
    j = min(n, size - 1)
    while j > 0 and scores[j - 1] < score:
        scores[j], ids[j] = scores[j - 1], ids[j - 1]
        j -= 1
    scores[j], ids[j] = score, i
    return j, min(n + 1, size)


@njit(nogil=True, cache=True)
def _walk(
    raw: Any, links: Any, counts: Any, starts: Any, more: Any, query: Any, k: int, votes: int,
    marks: Any, base: int, scores: Any, ids: Any, row: Any,
) -> Any:  # fmt: skip
    """Opens the best keys in view until all are; keys that enough of them point at come into view by their score.

    Args:
        raw: Of `_raw`.
        links: int32 [N, room].
        counts: int32 [N].
        starts: int64 [s]: where it begins.
        more: int64 [t]: the same.
        query: float32 [D].
        k: Keys that have to be found, at most as many as can be reached.
        votes: See `Graph`.
        marks: uint32 [N]: below `base` where this walk has not been; else `base` and the votes of a key.
        base: The number of this walk, times 256.
        scores: float32 [view]: written, best first.
        ids: int64 [view]: written. -1 - i means that key i was opened; all are, in the end.
        row: float32 [D], to work with.

    Returns:
        How many are in view, were scored, and were opened.
    """
    n, scored, opened, at = 0, 0, 0, 0
    for s in range(starts.shape[0] + more.shape[0]):
        i = int(starts[s] if s < starts.shape[0] else more[s - starts.shape[0]])
        if marks[i] == base + _SCORED:
            continue
        marks[i] = base + _SCORED
        scored += 1
        _, n = _put(scores, ids, n, _score(raw, i, query, row), i)
    all_count = False
    while True:
        while at < n and ids[at] < 0:
            at += 1
        if at == n:
            if n >= k:
                return n, scored, opened
            # Keys that were met lack votes. None has left the view: all are opened again, and count whatever they have.
            all_count = True
            for j in range(n):
                ids[j] = -1 - ids[j]
            at = 0
        v = ids[at]
        ids[at] = -1 - v
        need = 1 if all_count or opened < _EAGER else votes
        opened += 1
        for j in range(counts[v]):
            i = int(links[v, j])
            met = max(int(marks[i]), base)
            if met == base + _SCORED:
                continue
            if met + 1 < base + min(need, _SCORED):
                marks[i] = met + 1
                continue
            marks[i] = base + _SCORED
            scored += 1
            place, n = _put(scores, ids, n, _score(raw, i, query, row), i)
            at = min(at, place)


@njit(nogil=True, cache=True)
def _search(
    raw: Any, links: Any, counts: Any, starts: Any, last: Any, queries: Any, votes: int,
    marks: Any, number: int, view_scores: Any, view_ids: Any, ids: Any, scores: Any,
) -> Any:  # fmt: skip
    """The walks of a group; ids, scores [G, k] are written. Returns how many keys were scored, and opened."""
    groups, k = ids.shape
    row = np.empty(queries.shape[1], np.float32)
    scored, opened = 0, 0
    for g in range(groups):
        _, s, o = _walk(
            raw, links, counts, starts, last[g], queries[g], k, votes,
            marks, (number + g) << 8, view_scores, view_ids, row,
        )  # fmt: skip
        scored += s
        opened += o
        for j in range(k):
            ids[g, j] = -1 - view_ids[j] if view_ids[j] < 0 else view_ids[j]
            scores[g, j] = view_scores[j]
    return scored, opened


@njit(nogil=True, cache=True)
def _prune(values: Any, pivot: int, candidates: Any, most: int, out: Any) -> int:
    """Links of a pivot: near candidates, each unless one that is taken is nearer to it than the pivot; then the others.

    RoarGraph's rule, with distances.

    Args:
        values: float32 [n, D].
        pivot: Its row.
        candidates: int64 [m]: rows.
        most: Links.
        out: int64 [at least most]: written.

    Returns:
        How many.
    """
    m = candidates.shape[0]
    far = np.empty(m, np.float32)
    for c in range(m):
        far[c] = _apart(values[candidates[c]], values[pivot])
    order = np.argsort(far, kind="mergesort")
    n = 0
    behind, left = np.empty(m, np.int64), 0
    for c in order:
        if n == most:
            break
        taken = True
        for j in range(n):
            if _apart(values[candidates[c]], values[out[j]]) < far[c]:
                taken = False
                break
        if taken:
            out[n] = candidates[c]
            n += 1
        else:
            behind[left] = candidates[c]
            left += 1
    for c in range(min(left, most - n)):
        out[n] = behind[c]
        n += 1
    return n


@njit(nogil=True, cache=True)
def _has(links: Any, counts: Any, v: int, i: int) -> bool:
    for j in range(counts[v]):  # noqa: SIM110  # Numba knows no generators here
        if links[v, j] == i:
            return True
    return False


@njit(nogil=True, cache=True)
def _where(lists: Any, counts: Any, count: int) -> Any:
    """In which lists each key is.

    Args:
        lists: int32 or int64 [M, n]: keys.
        counts: int32 [M]: of each list.
        count: Keys that there are.

    Returns:
        int64 [count + 1] and [all]: those with key i, in order, are all[ends[i] : ends[i + 1]].
    """
    ends = np.zeros(count + 1, np.int64)
    for a in range(lists.shape[0]):
        for b in range(counts[a]):
            ends[lists[a, b] + 1] += 1
    for i in range(count):
        ends[i + 1] += ends[i]
    at, where = ends[:-1].copy(), np.empty(ends[count], np.int64)
    for a in range(lists.shape[0]):
        for b in range(counts[a]):
            i = lists[a, b]
            where[at[i]] = a
            at[i] += 1
    return ends, where


@njit(nogil=True, cache=True)
def _turn(values: Any, links: Any, counts: Any, most: int, mark: Any) -> None:
    """Links every key to those that are linked to it; of too many, those are taken that `_prune` says.

    All at once. One by one, as the graph that this is taken from does it, prunes a key as often as one is linked to it, and finds
    no more.

    Args:
        values: float32 [N, D].
        links: int32 [N, at least most].
        counts: int32 [N].
        most: Links of a key.
        mark: int64 [N], to work with.
    """
    count = values.shape[0]
    ends, sources = _where(links, counts, count)
    mark[:] = -1
    some, out = np.empty(most + _TURNED, np.int64), np.empty(most, np.int64)
    for i in range(count):
        total = 0
        for j in range(counts[i]):
            some[total] = links[i, j]
            mark[some[total]] = i
            total += 1
        held = ends[i + 1] - ends[i]
        used = min(held, _TURNED)
        for x in range(used):
            o = sources[ends[i] + x * held // used]
            if mark[o] != i:
                mark[o] = i
                some[total] = o
                total += 1
        n = total
        if total > most:
            n = _prune(values, i, some[:total], most, out)
            some[:n] = out[:n]
        counts[i] = n
        for j in range(n):
            links[i, j] = some[j]


@njit(nogil=True, cache=True)
def _lead(values: Any, links: Any, counts: Any, most: int, alone: Any, found: Any) -> None:
    """Links keys without links to some of their best ones, and these to them as far as they have room.

    Args:
        values: float32 [N, D].
        links: int32 [N, room].
        counts: int32 [N].
        most: Links of a key.
        alone: int64 [n]: the keys.
        found: int64 [n, m]: the best ones of each, itself among them perhaps.
    """
    out = np.empty(most, np.int64)
    for x in range(alone.shape[0]):
        i = alone[x]
        counts[i] = _prune(values, i, found[x][found[x] != i], most, out)
        for j in range(counts[i]):
            links[i, j] = out[j]
    for i in alone:
        _back_into_room(links, counts, i)


@njit(nogil=True, cache=True)
def _back_into_room(links: Any, counts: Any, i: int) -> None:
    """Links to key i from those that it is linked to, as far as they have room."""
    for j in range(counts[i]):
        v = links[i, j]
        if counts[v] < links.shape[1] and not _has(links, counts, v, i):
            links[v, counts[v]] = i
            counts[v] += 1


@njit(nogil=True, cache=True)
def _project(values: Any, lists: Any, links: Any, counts: Any, most: int) -> None:
    """Links keys that stand in the same lists: what all lists of a key propose is merged, then pruned.

    Args:
        values: float32 [N, D].
        lists: int64 [M, n].
        links: int32 [N, at least most]: written.
        counts: int32 [N]: written.
        most: Links of a key.
    """
    count, (m, n) = values.shape[0], lists.shape
    ends, where = _where(lists, np.full(m, n, np.int32), count)
    mark, some, out = np.full(count, -1, np.int64), np.empty(_LISTS * n, np.int64), np.empty(most, np.int64)  # fmt: skip
    for i in range(count):
        held = ends[i + 1] - ends[i]
        used, total = min(held, _LISTS), 0
        mark[i] = i
        for x in range(used):
            a = where[ends[i] + x * held // used]
            for b in range(n):
                o = lists[a, b]
                if mark[o] != i:
                    mark[o] = i
                    some[total] = o
                    total += 1
        counts[i] = _prune(values, i, some[:total], most, out)
        for j in range(counts[i]):
            links[i, j] = out[j]
    _turn(values, links, counts, most, mark)


@njit(nogil=True, cache=True)
def _hang(links: Any, counts: Any, u: int, candidates: Any) -> None:
    """A link to u from one of some keys that can be reached; all that could be reached still can.

    Where none has room, the last link of the first is led over u.
    """
    for c in candidates:
        if _has(links, counts, c, u):
            return
    room = links.shape[1]
    for c in candidates:
        if counts[c] < room:
            links[c, counts[c]] = u
            counts[c] += 1
            return
    v = candidates[0]
    w = links[v, room - 1]
    links[v, room - 1] = u
    if not _has(links, counts, u, w):
        counts[u] = min(counts[u] + 1, room)
        links[u, counts[u] - 1] = w


@njit(nogil=True, cache=True)
def _connect(
    raw: Any, values: Any, links: Any, counts: Any, most: int, starts: Any, marks: Any
) -> None:
    """Links keys without links to what a walk finds for them; then sees to it that the first start leads to all keys.

    What RoarGraph does for all keys is done for those that no query likes, of which later ones want some (with 2,000
    teachers of Qwen2.5-Coder at 8,192 tokens 5 % of the best 100). Links to them take the room that is left; they take
    no place of those that queries drew.

    Args:
        raw: Of `_raw`, of values.
        values: float32 [N, D], less their mean.
        links: int32 [N, room].
        counts: int32 [N].
        most: Links of a key.
        starts: int64 [s].
        marks: uint32 [N], zeros.
    """
    count = values.shape[0]
    row, out = np.empty(values.shape[1], np.float32), np.empty(most, np.int64)
    scores, ids = np.empty(_NEAR, np.float32), np.empty(_NEAR, np.int64)
    none = np.empty(0, np.int64)
    number = 0
    for i in range(count):
        if counts[i] == 0:
            number += 1
            n, _, _ = _walk(raw, links, counts, starts, none, values[i], 1, 1, marks, number << 8, scores, ids, row)  # fmt: skip
            found = -1 - ids[:n]
            found = found[found != i]
            counts[i] = _prune(values, i, found, most, out)
            for j in range(counts[i]):
                links[i, j] = out[j]
            _back_into_room(links, counts, i)
    reached, queue = np.zeros(count, np.bool_), np.empty(count, np.int64)
    queue[0] = starts[0]
    reached[starts[0]] = True
    head, tail, next_ = 0, 1, 0
    while tail < count:
        while head < tail:
            v = queue[head]
            head += 1
            for j in range(counts[v]):
                i = links[v, j]
                if not reached[i]:
                    reached[i] = True
                    queue[tail] = i
                    tail += 1
        while next_ < count and reached[next_]:
            next_ += 1
        if next_ == count:
            return
        number += 1
        n, _, _ = _walk(raw, links, counts, starts[:1], none, values[next_], 1, 1, marks, number << 8, scores, ids, row)  # fmt: skip
        _hang(links, counts, next_, -1 - ids[:n])
        reached[next_] = True
        queue[tail] = next_
        tail += 1


@njit(nogil=True, cache=True)
def _mend(
    raw: Any, links: Any, counts: Any, starts: Any, queries: Any, n: int, marks: Any, number: int, view_scores: Any, view_ids: Any,
) -> int:  # fmt: skip
    """See `Graph.repair`; returns how many links were added.

    Args:
        raw: Of `_raw`.
        links: int32 [N, room].
        counts: int32 [N].
        starts: int64 [s].
        queries: float32 [M, D].
        n: Best keys of each, at most N and as many as views have room for.
        marks: uint32 [N].
        number: By which the first walk's marks are told.
        view_scores: float32 [view], to work with.
        view_ids: int64 [view], to work with.
    """
    size, room, added = queries.shape[1], links.shape[1], 0
    none, row, near = np.empty(0, np.int64), np.empty(size, np.float32), np.empty((n, size), np.float32)  # fmt: skip
    rank, best = np.full(raw.shape[0], -1, np.int32), np.empty(n, np.int64)
    pointed = np.empty(n, np.bool_)
    for q in range(queries.shape[0]):
        there, _, _ = _walk(raw, links, counts, starts, none, queries[q], n, 1, marks, (number + q) << 8, view_scores, view_ids, row)  # fmt: skip
        there = min(there, n)
        for b in range(there):
            best[b] = -1 - view_ids[b]
            rank[best[b]] = b
            _read(raw, best[b], near[b])
            pointed[b] = b == 0
        for b in range(there):
            if not pointed[b]:
                nearest_, least = -1, np.float32(np.inf)
                for c in range(b):
                    if counts[best[c]] < room:
                        far = _apart(near[c], near[b])
                        if far < least:
                            nearest_, least = c, far
                if nearest_ >= 0:
                    v = best[nearest_]
                    links[v, counts[v]] = best[b]
                    counts[v] += 1
                    added += 1
            v = best[b]
            for j in range(counts[v]):
                at = rank[links[v, j]]
                if at > b:
                    pointed[at] = True
        for b in range(there):
            rank[best[b]] = -1
    return added


@njit(nogil=True, cache=True)
def _extend(
    raw: Any, values: Any, links: Any, counts: Any, most: int, taught: Any, bars: Any, lists: Any,
    marks: Any, number: int, before: int,
) -> None:  # fmt: skip
    """Links further keys, one by one, to the lists that they would have been in, or nearly.

    Args:
        raw: Of `_raw`, the new ones included.
        values: float32 [n, D]: the new ones, less the mean of the first.
        links: int32 [N, room].
        counts: int32 [N], zero for the new ones.
        most: Links of a key.
        taught: float32 [T, D]: queries.
        bars: float32 [T]: what the last of each list scored.
        lists: int32 [T, m]: keys that they like. One that would have been in takes the place of one of the lesser half.
        marks: uint32 [N].
        number: By which the first key's marks are told.
        before: Keys that were there.
    """
    size, (t, m) = values.shape[1], lists.shape
    used = min(_LIKING, t)
    near, found = np.empty((used * m + 1, size), np.float32), np.empty(used * m, np.int64)
    margins, out, which = np.empty(t, np.float32), np.empty(most, np.int64), np.arange(used * m)
    room = links.shape[1]
    for x in range(values.shape[0]):
        u, base = before + x, (number + x) << 8
        for a in range(t):
            margins[a] = _product(taught[a], values[x]) - bars[a]
        n = 0
        for _ in range(used):
            a = int(np.argmax(margins))
            for b in range(m):
                i = lists[a, b]
                if marks[i] < base:
                    marks[i] = base
                    _read(raw, i, near[n])
                    found[n] = i
                    n += 1
            if margins[a] > 0:
                lists[a, m - 1 - u % ((m + 1) // 2)] = u
            margins[a] = -np.inf
        _read(raw, u, near[used * m])
        taken = _prune(near, used * m, which[:n], most, out)
        counts[u] = taken
        for j in range(taken):
            links[u, j] = found[out[j]]
        _hang(links, counts, u, found[out[:taken]])
        for j in range(taken):
            v = links[u, j]
            if _has(links, counts, v, u):
                continue
            if counts[v] < room:
                links[v, counts[v]] = u
                counts[v] += 1
            elif counts[u] < room and room > most:
                # The new key takes the place of another, which it leads to.
                at = most + u % (room - most)
                w = links[v, at]
                if not _has(links, counts, u, w):
                    links[u, counts[u]] = w
                    counts[u] += 1
                links[v, at] = u


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _product(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total
