"""Which clusters of keys does a query like? For keys that lie in host pages, in Numba: centroids by codes, rows where they are.

As `offload.index.clusters`, but without a copy of the keys: a cluster is a list of numbers of tokens, and its centroid four bits a
channel, together 9 bytes a key of 128 channels where all keys' codes are 72. A search reads the centroids and the rows of the
best clusters. Segments and centroids follow Chen et al., RetroInfer (arXiv 2505.02922), section 4.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.index.base import Floats
from offload.index.lanes import BLOCK
from offload.index.paged import Coded, Rows, Scratch, attend_some, encode_values, gather, largest
from offload.index.scan import best, scan_blocks

SIZE = 16  # keys of a cluster, on average
SEGMENT = 1024  # consecutive tokens that are clustered by themselves
GROUPED = SIZE * BLOCK  # tokens whose centroids are one block of codes
# Moves of the centroids. Of the 100 keys of SmolLM2 (Qwen2.5-Coder) with the best votes 99.5 % (95.2) are found eight times
# over-fetched, with centroids of ten moves in float32 97.9 % (95.9).
_MOVES = 4


class Groups(NamedTuple):
    """The clusters of one KV head.

    Attributes:
        centroids: Codes of n blocks of centroids.
        order: int32 [n * GROUPED]: tokens, those of a cluster side by side.
        starts: int32 [n * BLOCK + 1]: where each cluster begins in it.
    """

    centroids: Coded
    order: NDArray[np.int32]
    starts: NDArray[np.int32]

    @classmethod
    def of(cls, tokens: int, key_dim: int) -> Groups:
        """Room for clusters of so many tokens; nothing is written to it.

        Args:
            tokens: Of which whole `GROUPED` are clustered.
            key_dim: D.
        """
        blocks = tokens // GROUPED
        return cls(
            Coded.of(blocks, key_dim, 4),
            np.empty(blocks * GROUPED, np.int32),
            np.zeros(blocks * BLOCK + 1, np.int32),
        )

    def of_first(self, blocks: int) -> Groups:
        """Those of the first blocks of centroids."""
        order, starts = self.order[: blocks * GROUPED], self.starts[: blocks * BLOCK + 1]
        return Groups(self.centroids.of_first(blocks), order, starts)


def group_blocks(rows: Rows, groups: Groups, first: int, stop: int) -> None:
    """Clusters tokens `first * GROUPED` to `stop * GROUPED`.

    Args:
        rows: Of them.
        groups: Written.
        first: The first block of centroids.
        stop: The one behind the last.
    """
    values = np.empty((SEGMENT, rows.key_dim), np.float32)
    means = np.empty((BLOCK, rows.key_dim), np.float32)
    labels = np.empty(SEGMENT, np.int32)
    _group(
        *rows, *groups.centroids, groups.order, groups.starts, first, stop, values, means, labels
    )


def attend_grouped(
    rows: Rows,
    groups: Groups,
    first: int,
    count: int,
    queries: Floats,
    softcap: float,
    overfetch: int,
    scratch: Scratch,
    ids: NDArray[np.int32],
    out: Floats,
    lse: Floats,
) -> None:
    """Attends to the best keys of the clusters whose centroids are liked best; arguments as of `offload.index.paged.attend_best`.

    A cluster's vote is its centroid's logit less the best of that query's. Tokens that are in no cluster yet are all scored.

    Args:
        rows: Of `count` keys.
        groups: Of the first of them.
        first: Keys before it are padding.
        count: Keys.
        queries: float32 [G, D], times attention's scale.
        softcap: As there.
        overfetch: Keys of clusters that are scored exactly, on average, for each one that is attended to.
        scratch: With room for `room` candidates.
        ids: Written, but in no order; -1 behind.
        out: Written.
        lse: Written.
    """
    wanted = clusters_of(overfetch, ids.shape[0])
    n = members(
        *groups.centroids, groups.order, groups.starts, first, count, queries, wanted, scratch.exact.shape[1], False,
        scratch.scores, scratch.tops, scratch.votes, scratch.ids, scratch.order,
        scratch.weights, scratch.total, scratch.products, scratch.counts,
    )  # fmt: skip
    attend_some(rows, scratch.ids[:n], queries, softcap, scratch, ids, out, lse)


def clusters_of(overfetch: int, tokens: int) -> int:
    """Clusters that are read for so many keys, so many times over."""
    return -(-overfetch * tokens // SIZE)


def room(overfetch: int, tokens: int) -> int:
    """Candidates that a search may have: twice as many as clusters hold on average, and those in none."""
    return 2 * overfetch * tokens + SIZE + GROUPED


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nnan", "nsz"})
def _nearest(values: Any, centroids: Any, halves: Any, labels: Any) -> int:
    """Writes the nearest of some centroids for each row; returns how many rows changed."""
    changed = 0
    for i in range(values.shape[0]):
        most, at = np.float32(-np.inf), 0
        for c in range(0, centroids.shape[0], 4):
            a, b, d, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(values.shape[1]):
                value = values[i, k]
                a += value * centroids[c, k]
                b += value * centroids[c + 1, k]
                d += value * centroids[c + 2, k]
                e += value * centroids[c + 3, k]
            for near, j in ((a, 0), (b, 1), (d, 2), (e, 3)):
                near -= halves[c + j]
                if near > most:
                    most, at = near, c + j
        changed += labels[i] != at
        labels[i] = at
    return changed


@njit(nogil=True, cache=True)
def _cluster(values: Any, centroids: Any, labels: Any, halves: Any, sizes: Any) -> None:
    """k-means of centred rows; centroids [clusters, D] are written, begun at rows that lie evenly apart."""
    n, clusters = values.shape[0], centroids.shape[0]
    for c in range(clusters):
        centroids[c] = values[c * n // clusters]
    labels[:] = -1
    for move in range(_MOVES + 1):
        for c in range(clusters):
            total = np.float32(0)
            for k in range(values.shape[1]):
                total += centroids[c, k] * centroids[c, k]
            halves[c] = np.float32(0.5) * total
        changed = _nearest(values, centroids, halves, labels)
        if changed == 0 and move > 0:
            break
        sizes[:] = 0
        for i in range(n):
            sizes[labels[i]] += 1
        for c in range(clusters):
            if sizes[c] > 0:
                centroids[c] = 0
        for i in range(n):
            for k in range(values.shape[1]):
                centroids[labels[i], k] += values[i, k]
        for c in range(clusters):
            if sizes[c] > 0:
                for k in range(values.shape[1]):
                    centroids[c, k] /= np.float32(sizes[c])


@njit(nogil=True, cache=True)
def _group(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    codes: Any, lows: Any, steps: Any, bits: int, order: Any, starts: Any,
    first: int, stop: int, values: Any, means: Any, labels: Any,
) -> None:  # fmt: skip
    clusters = SEGMENT // SIZE
    halves, sizes = np.empty(clusters, np.float32), np.empty(clusters, np.int32)
    mean = np.empty(key_dim, np.float32)
    for block in range(first, stop):
        for part in range(BLOCK // clusters):
            begin = block * GROUPED + part * SEGMENT
            gather(pool, kind, table, head, key_dim, begin, values)
            mean[:] = 0
            for i in range(SEGMENT):
                for k in range(key_dim):
                    mean[k] += values[i, k]
            for k in range(key_dim):
                mean[k] /= np.float32(SEGMENT)
            for i in range(SEGMENT):
                for k in range(key_dim):
                    values[i, k] -= mean[k]
            centroids = means[part * clusters : (part + 1) * clusters]
            _cluster(values, centroids, labels, halves, sizes)
            at = begin
            for c in range(clusters):
                starts[block * BLOCK + part * clusters + c] = at
                at += sizes[c]
                sizes[c] = at - sizes[c]
                for k in range(key_dim):
                    centroids[c, k] += mean[k]
            for i in range(SEGMENT):
                order[sizes[labels[i]]] = begin + i
                sizes[labels[i]] += 1
        starts[(block + 1) * BLOCK] = (block + 1) * GROUPED
        encode_values(means, codes, lows, steps, bits, block)


@njit(nogil=True, cache=True)
def members(
    codes: Any, lows: Any, steps: Any, bits: int, order: Any, starts: Any,
    first: int, count: int, queries: Any, wanted: int, room: int, scanned: bool,
    scores: Any, tops: Any, votes: Any, ids: Any, chosen: Any,
    weights: Any, total: Any, products: Any, counts: Any,
) -> int:  # fmt: skip
    """Writes the tokens of the `wanted` clusters with the best votes, and those in none; returns how many there are."""
    groups, clusters, clustered = queries.shape[0], codes.shape[0] * BLOCK, order.shape[0]
    found = 0
    for token in range(max(first, clustered), count):
        ids[found] = token
        found += 1
    if clusters == 0 or first >= clustered:
        return found
    # Segments that are all padding are left out.
    begin = first // SEGMENT * (SEGMENT // SIZE)
    if not scanned:
        scan_blocks(
            codes,
            lows,
            steps,
            bits,
            begin // BLOCK,
            codes.shape[0],
            queries,
            weights,
            total,
            products,
            scores,
            tops,
        )
    for c in range(clusters):
        votes[c] = -np.inf
    for g in range(groups):
        most = largest(scores, g, begin, clusters)
        for c in range(begin, clusters):
            vote = scores[g, c] - most
            votes[c] = vote if vote > votes[c] else votes[c]
    n = min(wanted, clusters)
    best(votes[:clusters], chosen[:n], counts)
    for i in range(n):
        for at in range(starts[chosen[i]], starts[chosen[i] + 1]):
            if order[at] >= first and found < room:
                ids[found] = order[at]
                found += 1
    return found
