"""Which keys matter, when whole clusters of near keys are scored whose centroid the query likes best?

Chen et al., RetroInfer (arXiv 2505.02922), section 4.2: small clusters, made in segments of the context, ranked for the
query. What their centroids say of all that is not scored is in `offload.index.tail`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from offload.errors import ConfigError
from offload.index import file, scan
from offload.index.base import Floats, Found, Ids, Vectors, checked_keys, checked_search
from offload.index.growing import Growing, OverRows
from offload.index.kmeans import clustered, means

_PARTS = ("rows", "order", "centroids", "starts", "sizes")


class Clusters(OverRows):
    """k-means in segments; the keys of a query's best clusters are scored exactly.

    Rows of a cluster lie side by side. `build` puts all keys into clusters, unless they are fewer than a segment. Those of
    `add` are in none, and are all scored, until they fill a segment, which is then clustered.

    Clusters are ranked by the score of their centroid alone. With the logarithm of the size added, which makes a rank of
    a cluster's weight and not of a key's, the same number of scored keys has 1.5 points less of the best 100 in it, and as
    much of the softmax: SmolLM2 at 7,800 tokens and Qwen2.5-Coder-0.5B at 8,192, over-fetched 1 to 8 times.
    """

    backend: ClassVar[str] = "clusters"

    def __init__(
        self,
        *,
        size: int = 16,
        segment: int = 1024,
        overfetch: int = 8,
        shared: bool = False,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        """An index without keys.

        Args:
            size: Keys of a cluster, on average. Smaller ones find more, and there are more centroids to read.
            segment: Consecutive tokens that are clustered by themselves, at least. Longer ones cost more a token to build,
                and leave more tokens of `add` in no cluster.
            overfetch: Keys of clusters that are scored for each one that is asked for, at least; the last cluster is
                scored whole. More find more.
            shared: All queries of a search score the same clusters, which are read once: those with the largest share of
                the softmax a key for any of them, at the usual scale. What a query finds then depends on its company.
            iterations: Of k-means, at most.
            seed: Of k-means; each segment's is its own.

        Raises:
            ConfigError: A number is too small, or a segment would not fill a cluster.
        """
        numbers = {"size": size, "segment": segment, "overfetch": overfetch, "iterations": iterations}  # fmt: skip
        for key, value in numbers.items():
            if value < 1:
                raise ConfigError("at least 1 is needed", key=key, asked=value)
        if segment < size:
            raise ConfigError("a segment fills a cluster at least", key="segment", asked=segment)
        self.size = size
        self.segment = segment
        self.overfetch = overfetch
        self.shared = shared
        self.iterations = iterations
        self.seed = seed
        self._rows: Growing | None = None  # segments by cluster, then the tokens that are in none
        self._clustered = 0  # rows that are in clusters
        self._order: Growing  # int32 [N]: which key each row is
        self._centroids: Growing  # float32 [C, D]
        self._starts: Growing  # int32 [C]: first row of each
        self._sizes: Growing  # int32 [C]

    @property
    def nbytes(self) -> int:
        """Bytes of rows, ids and centroids."""
        if self._rows is None:
            return 0
        return sum(int(part.rows.nbytes) for part in self._parts())

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`; queries teach it nothing."""
        keys = checked_keys(keys, None)
        dimension = keys.shape[1]
        if queries is not None:
            checked_keys(queries, dimension, what="queries")
        self._rows = Growing(keys)
        self._order = Growing(np.arange(len(keys), dtype=np.int32))
        self._centroids = Growing(np.empty((0, dimension), np.float32))
        self._starts, self._sizes = (Growing(np.empty(0, np.int32)) for _ in range(2))
        self._clustered = 0
        segments = len(keys) // self.segment
        for i in range(segments):
            self._cluster(len(keys) * (i + 1) // segments)

    def add(self, keys: Vectors) -> None:
        """See `Index`. Keys are stored in the dtype of the first ones.

        Every `segment` tokens one addition clusters them, which is its amortised cost for each.
        """
        if self._rows is None:
            self.build(keys)
            return
        keys = checked_keys(keys, self.dimension)
        first = len(self)
        self._rows.append(keys)
        self._order.append(np.arange(first, first + len(keys), dtype=np.int32))
        while len(self) - self._clustered >= self.segment:
            self._cluster(self._clustered + self.segment)

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        assert self._rows is not None
        rows, order, groups = self._rows.rows, self._order.rows, len(queries)
        need = min(self._clustered, self.overfetch * k)
        ids, scores = np.empty((groups, k), np.int64), np.empty((groups, k), np.float32)
        ranks = self._ranks(queries)
        rest = np.arange(self._clustered, count)
        read = 0
        candidates = rest
        for g in range(groups):
            if g == 0 or not self.shared:
                candidates = np.concatenate([self._best(ranks[g], need), rest])
                read += len(candidates)
            exact = np.empty(len(candidates), np.float32)
            scan.rescore(rows, candidates, queries[g], exact)
            scan.ranked(candidates, exact, ids[g], scores[g])
        touched = self._centroids.rows.nbytes + self._starts.rows.nbytes + self._sizes.rows.nbytes
        touched += read * int(rows.strides[0]) + ids.size * int(order.itemsize)
        scored = read if not self.shared else read * groups
        return Found(order[ids].astype(np.int64), scores, scored / (groups * count), touched)

    def save(self, path: Path) -> None:
        """See `Index`."""
        metadata = {
            "size": self.size,
            "segment": self.segment,
            "overfetch": self.overfetch,
            "shared": self.shared,
            "iterations": self.iterations,
            "seed": self.seed,
        }
        arrays: dict[str, NDArray[Any]] = {}
        if self._rows is not None:
            arrays = {name: part.rows for name, part in zip(_PARTS, self._parts(), strict=True)}
        file.write(path, self.backend, metadata, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. Rows stay in the file, mapped, until keys are added; then they are copied."""
        _, metadata, arrays = file.read(path, cls.backend)
        self = cls(**metadata)
        if arrays:
            parts = (Growing.around(arrays[name]) for name in _PARTS)
            self._rows, self._order, self._centroids, self._starts, self._sizes = parts
            self._clustered = int(arrays["sizes"].sum(dtype=np.int64))
        return self

    def _parts(self) -> tuple[Growing, ...]:
        assert self._rows is not None
        return self._rows, self._order, self._centroids, self._starts, self._sizes

    def _cluster(self, stop: int) -> None:
        """Clusters the rows before `stop` that are in no cluster."""
        assert self._rows is not None
        start = self._clustered
        rows, ids = (part.rows[start:stop] for part in (self._rows, self._order))
        labels = clustered(rows, len(rows) // self.size, iterations=self.iterations, seed=self.seed + start)  # fmt: skip
        sizes = np.bincount(labels).astype(np.int32)
        values = rows.astype(np.float32)
        mean = values.mean(axis=0)  # what has none has a more precise mean
        self._centroids.append(means(values - mean, labels, len(sizes)) + mean)
        self._starts.append((start + np.cumsum(sizes) - sizes).astype(np.int32))
        self._sizes.append(sizes)
        order = np.argsort(labels, kind="stable")
        rows[:], ids[:] = rows[order], ids[order]
        self._clustered = stop

    def _ranks(self, queries: Floats) -> Floats:
        """What the clusters are worth to each query, [G, C]; [1, C] of all of them if they share."""
        scores: Floats = queries @ self._centroids.rows.T
        if not self.shared or not scores.size:
            return scores
        scores *= np.float32(queries.shape[1] ** -0.5)
        scores -= scores.max(axis=1, keepdims=True)
        weights = np.exp(scores) @ self._sizes.rows.astype(np.float32)
        best: Floats = np.max(scores - np.log(weights)[:, None], axis=0, keepdims=True)
        return best

    def _best(self, ranks: Floats, need: int) -> Ids:
        """The rows of the best clusters that hold at least so many, ascending."""
        if not need:
            return np.empty(0, np.int64)
        sizes, starts = self._sizes.rows, self._starts.rows
        some = min(len(ranks), 2 * need // self.size + 8)
        while True:
            best = np.argpartition(-ranks, some - 1)[:some]
            best = best[np.argsort(-ranks[best], kind="stable")]
            held = np.cumsum(sizes[best])
            if held[-1] >= need:
                break
            some = min(len(ranks), 4 * some)
        best = np.sort(best[: int(np.searchsorted(held, need)) + 1])
        long = sizes[best].astype(np.int64)
        return np.repeat(starts[best] - np.cumsum(long) + long, long) + np.arange(long.sum())
