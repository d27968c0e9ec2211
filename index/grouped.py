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
from offload.index.paged import (
    Coded,
    Rows,
    Scratch,
    attend_some,
    encode_values,
    fetch,
    gather,
    largest,
    liked,
    turned,
)
from offload.index.scan import SUB, scan_blocks

SIZE = 16  # keys of a cluster, on average
SEGMENT = 1024  # consecutive tokens that are clustered by themselves
PIECE = 256  # tokens that are clustered by themselves while their segment is not whole: as many wait at most
GROUPED = SIZE * BLOCK  # tokens whose centroids are one block of codes
# Moves of the centroids. Of the 100 keys of SmolLM2 (Qwen2.5-Coder) with the best votes 99.5 % (95.2) are found eight times
# over-fetched, with centroids of ten moves in float32 97.9 % (95.9).
_MOVES = 4
_NUMBERED = SEGMENT // SIZE  # clusters at most that are found together, a power of two


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
            tokens: Of which whole `PIECE` are clustered.
            key_dim: D.
        """
        blocks = blocks_of(tokens)
        return cls(
            Coded.of(blocks, key_dim, 4),
            np.empty(blocks * GROUPED, np.int32),
            np.zeros(blocks * BLOCK + 1, np.int32),
        )

    def of_first(self, tokens: int) -> Groups:
        """Those of the first tokens, a multiple of `PIECE`."""
        blocks = blocks_of(tokens)
        return Groups(
            self.centroids.of_first(blocks),
            self.order[:tokens],
            self.starts[: tokens // SIZE + 1],
        )


def blocks_of(tokens: int) -> int:
    """Blocks of centroids of so many tokens; the last may have some that are of none."""
    return -(-tokens // GROUPED)


def group(rows: Rows, groups: Groups, first: int, count: int) -> int:
    """Clusters tokens from `first` on, in whole segments, and behind these in pieces.

    Args:
        rows: Of `count` keys.
        groups: Written.
        first: How many are clustered, a multiple of `PIECE`. Pieces among them are clustered again where their segment is whole now.
        count: Keys.

    Returns:
        How many are clustered.
    """
    stop = count // PIECE * PIECE
    if stop <= first:
        return first
    values = np.empty((SEGMENT, rows.key_dim), np.float32)
    means = np.empty((BLOCK, rows.key_dim), np.float32)
    labels = np.empty(SEGMENT, np.int32)
    _group(
        *rows, *groups.centroids, groups.order, groups.starts, first, stop, values, means, labels
    )
    return stop


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
        groups: Of the first of them, no more.
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
        scratch.scores, scratch.tops, scratch.peaks, scratch.votes, scratch.ids, scratch.order,
        scratch.weights, scratch.total, scratch.counts,
    )  # fmt: skip
    attend_some(rows, scratch.ids[:n], queries, softcap, scratch, ids, out, lse)


def clusters_of(overfetch: int, tokens: int) -> int:
    """Clusters that are read for so many keys, so many times over."""
    return -(-overfetch * tokens // SIZE)


def room(overfetch: int, tokens: int) -> int:
    """Candidates that a search may have: twice as many as clusters hold on average, and those in none.

    Of these fewer than a segment: so many may be left where others were cut off.
    """
    return 2 * overfetch * tokens + SIZE + SEGMENT


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nnan", "nsz"})
def _nearest(values: Any, flipped: Any, halves: Any, labels: Any, sums: Any) -> int:
    """Writes the nearest of some centroids, flipped [D, clusters], for each row; returns how many rows changed."""
    changed = 0
    # All clusters side by side; without signs, so that no index counts from the end.
    clusters, channels = np.uint64(flipped.shape[1]), np.uint64(flipped.shape[0])
    one, rest = np.uint64(1), np.uint64(flipped.shape[0] % 4)
    bits = sums.view(np.int32)
    for i in range(np.uint64(values.shape[0])):
        for c in range(clusters):
            sums[c] = -halves[c]
        for k in range(np.uint64(0), channels - rest, np.uint64(4)):
            j = k + one
            m = j + one
            n = m + one
            a, b, d, e = values[i, k], values[i, j], values[i, m], values[i, n]
            for c in range(clusters):
                sums[c] += a * flipped[k, c] + b * flipped[j, c] + d * flipped[m, c] + e * flipped[n, c]  # fmt: skip
        for k in range(channels - rest, channels):
            a = values[i, k]
            for c in range(clusters):
                sums[c] += a * flipped[k, c]
        # The number of a cluster takes the place of the last bits: what is as near but for rounding counts as near.
        most = np.int32(-(2**31))
        for c in range(clusters):
            most = max(most, (turned(bits[c]) & np.int32(-_NUMBERED)) | np.int32(_NUMBERED - 1 - np.int32(c)))  # fmt: skip
        at = _NUMBERED - 1 - (most & (_NUMBERED - 1))
        changed += labels[i] != at
        labels[i] = at
    return changed


@njit(nogil=True, cache=True)
def _cluster(
    values: Any, centroids: Any, labels: Any, halves: Any, sizes: Any, flipped: Any, sums: Any
) -> None:
    """k-means of centred rows; centroids [clusters, D] are written, begun at rows that lie evenly apart."""
    n, clusters, channels = values.shape[0], centroids.shape[0], values.shape[1]
    for c in range(clusters):
        centroids[c] = values[c * n // clusters]
    labels[:] = -1
    for move in range(_MOVES + 1):
        for c in range(clusters):
            total = np.float32(0)
            for k in range(channels):
                total += centroids[c, k] * centroids[c, k]
                flipped[k, c] = centroids[c, k]
            halves[c] = np.float32(0.5) * total
        changed = _nearest(values, flipped, halves, labels, sums)
        if changed == 0 and move > 0:
            break
        sizes[:] = 0
        for i in range(n):
            sizes[labels[i]] += 1
        for c in range(clusters):
            if sizes[c] > 0:
                centroids[c] = 0
        for i in range(n):
            label = np.uint64(labels[i])
            for k in range(np.uint64(channels)):
                centroids[label, k] += values[np.uint64(i), k]
        for c in range(clusters):
            if sizes[c] > 0:
                for k in range(channels):
                    centroids[c, k] /= np.float32(sizes[c])


@njit(nogil=True, cache=True)
def _group(
    pool: Any, kind: int, table: Any, head: int, key_dim: int,
    codes: Any, lows: Any, steps: Any, bits: int, order: Any, starts: Any,
    first: int, stop: int, values: Any, means: Any, labels: Any,
) -> None:  # fmt: skip
    halves, sizes = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    sums, room = np.empty(_NUMBERED, np.float32), np.empty(_NUMBERED * key_dim, np.float32)
    mean = np.empty(key_dim, np.float32)
    at = first
    while at < stop:
        begin, n = at, PIECE
        if at // SEGMENT * SEGMENT + SEGMENT <= stop:
            begin, n = at // SEGMENT * SEGMENT, SEGMENT
        some = values[:n]
        gather(pool, kind, table, head, key_dim, begin, some)
        mean[:] = 0
        for i in range(n):
            for k in range(key_dim):
                mean[k] += some[i, k]
        for k in range(key_dim):
            mean[k] /= np.float32(n)
        for i in range(n):
            for k in range(key_dim):
                some[i, k] -= mean[k]
        clusters = n // SIZE
        flipped = room[: clusters * key_dim].reshape(key_dim, clusters)
        _cluster(
            some, means[:clusters], labels[:n], halves[:clusters], sizes[:clusters], flipped, sums
        )
        at = begin
        for c in range(clusters):
            starts[begin // SIZE + c] = at
            at += sizes[c]
            sizes[c] = at - sizes[c]
        for i in range(n):
            order[sizes[labels[i]]] = begin + i
            sizes[labels[i]] += 1
        starts[at // SIZE] = at
    for block in range(first // GROUPED, (stop + GROUPED - 1) // GROUPED):
        for c in range(block * BLOCK, (block + 1) * BLOCK):
            centroid = means[c - block * BLOCK]
            a, b = 0, 0
            if c * SIZE < stop:
                a, b = starts[c], starts[c + 1]
            if a == b:  # of no token: where one of the block is, so that codes get no coarser
                gather(pool, kind, table, head, key_dim, block * GROUPED, values[:1])
                centroid[:] = values[0]
                continue
            centroid[:] = 0
            for i in range(a, b):
                gather(pool, kind, table, head, key_dim, order[i], values[:1])
                for k in range(key_dim):
                    centroid[k] += values[0, k]
            for k in range(key_dim):
                centroid[k] /= np.float32(b - a)
        encode_values(means, codes, lows, steps, bits, block)


@njit(nogil=True, cache=True)
def _left_out(scores: Any, tops: Any, order: Any, starts: Any, first: int, begin: int, clusters: int) -> int:  # fmt: skip
    """Has no query like clusters without tokens, or of padding alone; returns how many others there are from `begin` on."""
    alive = clusters - begin
    padded = begin + SEGMENT // SIZE if first > begin * SIZE else begin
    for c in range(begin, clusters):
        # Tokens of a cluster ascend.
        if starts[c] < starts[c + 1] and (c >= padded or order[starts[c + 1] - 1] >= first):
            continue
        alive -= 1
        sub = c // SUB
        for g in range(scores.shape[0]):
            scores[g, c] = -np.inf
            tops[g, sub] = largest(scores, g, sub * SUB, min(clusters, (sub + 1) * SUB))
    return alive


@njit(nogil=True, cache=True)
def members(
    codes: Any, lows: Any, steps: Any, bits: int, order: Any, starts: Any,
    first: int, count: int, queries: Any, wanted: int, room: int, scanned: bool,
    scores: Any, tops: Any, peaks: Any, votes: Any, ids: Any, chosen: Any,
    weights: Any, total: Any, counts: Any,
) -> int:  # fmt: skip
    """Writes the tokens of the `wanted` clusters with the best votes, and those in none; returns how many there are."""
    clustered = order.shape[0]
    clusters = clustered // SIZE
    alone = max(0, count - max(first, clustered))
    found = 0
    # Segments that are all padding are left out.
    begin = first // SEGMENT * (SEGMENT // SIZE)
    if begin < clusters:
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
                scores,
                tops,
            )
        alive = _left_out(scores, tops, order, starts, first, begin, clusters)
        n = 0
        if alive > 0:
            n = liked(
                scores, tops, peaks, votes, chosen, ids, counts, begin, clusters, clusters, min(wanted, alive)
            )  # fmt: skip
        lines = order.reshape(clustered // SIZE, SIZE)
        for i in range(n):  # they lie anywhere: on their way before the first is read
            fetch(lines, starts[chosen[i]] // SIZE, 0, 2 * SIZE)
        for i in range(n):
            for at in range(starts[chosen[i]], starts[chosen[i] + 1]):
                if order[at] >= first and found < room - alone:
                    ids[found] = order[at]
                    found += 1
    for token in range(max(first, clustered), count):
        if found < room:
            ids[found] = token
            found += 1
    return found
