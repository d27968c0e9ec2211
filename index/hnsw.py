"""Which keys matter, when a search walks from key to key towards those that the query likes best?

FAISS, `IndexHNSWFlat`: Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using Hierarchical
Navigable Small World graphs (arXiv 1603.09320). Its links are made from keys alone; see RetrievalAttention (arXiv
2409.10516), section 2.3, for what that does to queries of another distribution.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from offload.errors import ConfigError
from offload.index import file
from offload.index.base import Found, Vectors, checked_keys, checked_search
from offload.index.on_faiss import OnFaiss, faiss, single_thread

# FAISS counts work in one place for the whole process.
_counting = threading.Lock()


class HNSW(OnFaiss):
    """A layered graph of keys, each linked to near ones; a best-first search over it.

    Rows are float32. `add` walks and links as `build` does, but FAISS makes a lock for every key at each call, so one key
    costs time in proportion to all of them, if little; a few hundred at once are cheaper.
    """

    backend: ClassVar[str] = "hnsw"

    def __init__(
        self,
        *,
        links: int = 32,
        build_breadth: int = 200,
        breadth: int = 256,
        centred: bool = True,
        counted: bool = True,
        seed: int = 0,
    ) -> None:
        """An index without keys.

        Args:
            links: Of a key in each layer, twice as many in the lowest (M). More find more and take memory.
            build_breadth: Keys that are kept in view while a key is linked (efConstruction). More build longer.
            breadth: Keys that are kept in view in a search (efSearch); never fewer than are asked for. More find more.
            centred: The mean of the keys of `build` is taken off all of them, which leaves the order of scores alone.
            counted: The work of a search is counted. FAISS counts for the whole process, so counted searches take turns.
                Without it `scanned` is NaN and `touched_bytes` 0.
            seed: Of the layers that keys are drawn into.

        Raises:
            ConfigError: A number is too small.
        """
        for key, value in (("links", links), ("build_breadth", build_breadth), ("breadth", breadth)):  # fmt: skip
            if value < (2 if key == "links" else 1):
                raise ConfigError("that is too few", key=key, asked=value)
        self.links = links
        self.build_breadth = build_breadth
        self.breadth = breadth
        super().__init__(centred=centred)
        self.counted = counted
        self.seed = seed

    @property
    def nbytes(self) -> int:
        """Bytes of rows and links."""
        if self._index is None:
            return 0
        graph = self._index.hnsw
        links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        return len(self) * 4 * int(self._index.d) + int(links)

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`; queries teach it nothing."""
        keys = checked_keys(keys, None)
        dimension = keys.shape[1]
        if queries is not None:
            checked_keys(queries, dimension, what="queries")
        values = self._first_rows(keys)
        self._index = faiss.IndexHNSWFlat(dimension, self.links, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = self.build_breadth
        self._index.hnsw.rng = faiss.RandomGenerator(self.seed)
        with single_thread():
            self._index.add(values)

    def add(self, keys: Vectors) -> None:
        """See `Index`, and the class for what it costs."""
        if self._index is None:
            self.build(keys)
            return
        keys = checked_keys(keys, self.dimension)
        with single_thread():
            self._index.add(self._further_rows(keys))

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`. A query that reaches fewer than k keys by links is answered by scoring all, and counted so."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        index, groups = self._index, queries.shape[0]
        asked = faiss.SearchParametersHNSW(efSearch=max(self.breadth, k))
        stats = faiss.cvar.hnsw_stats
        with single_thread(), _counting if self.counted else nullcontext():
            stats.reset()
            scores, ids = index.search(queries, k, params=asked)
            scored, hops = int(stats.ndis), int(stats.nhops)
            short = np.flatnonzero((ids < 0).any(axis=1))
            if short.size:
                rows = faiss.rev_swig_ptr(faiss.downcast_index(index.storage).get_xb(), count * index.d)  # fmt: skip
                every = queries[short] @ rows.reshape(count, -1).T
                ids[short] = np.argsort(-every, axis=1, kind="stable")[:, :k]
                scores[short] = np.take_along_axis(every, ids[short], axis=1)
        scored += short.size * count
        scores += (queries @ self._mean)[:, None]
        touched = scored * 4 * queries.shape[1] + hops * 4 * 2 * self.links
        if not self.counted:
            return Found(ids, scores, float("nan"), 0)
        return Found(ids, scores, scored / (groups * count), touched)

    def save(self, path: Path) -> None:
        """See `Index`."""
        metadata = {
            "links": self.links,
            "build_breadth": self.build_breadth,
            "breadth": self.breadth,
            "centred": self.centred,
            "counted": self.counted,
            "seed": self.seed,
        }
        file.write(path, self.backend, metadata, self._arrays())

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. FAISS keeps a copy of what is in the file."""
        _, metadata, arrays = file.read(path, cls.backend)
        self = cls(**metadata)
        self._take(arrays)
        return self
