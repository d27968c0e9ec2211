"""Which keys matter, when only the lists are scanned whose centroid the query likes best?

FAISS, `IndexIVFFlat`: Sivic and Zisserman, Video Google (ICCV 2003). What an index made from keys alone costs where
queries are of another distribution: RetrievalAttention (arXiv 2409.10516), section 2.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from offload.errors import ConfigError, InputError
from offload.index import file
from offload.index.base import Floats, Found, Ids, Vectors, checked_keys, checked_search
from offload.index.on_faiss import OnFaiss, faiss, single_thread


class IVF(OnFaiss):
    """k-means over the keys; a query scans the lists of the `probes` centroids of largest inner product.

    Rows are float32. Centroids are those of `build`: keys that `add` brings are put into its lists.
    """

    backend: ClassVar[str] = "ivf"

    def __init__(
        self,
        *,
        lists: int | None = None,
        probes: int = 16,
        iterations: int = 10,
        centred: bool = True,
        seed: int = 0,
    ) -> None:
        """An index without keys.

        Args:
            lists: Centroids; None for the square root of the number of keys. More of them are searched longer and hold
                fewer keys each.
            probes: Lists that a query scans at least; more where these hold fewer keys than it asks for. More find more.
            iterations: Of k-means.
            centred: The mean of the keys of `build` is taken off all of them: it moves the scores of a query alike, and
                keys of one head have much in common, by which k-means would be blinded.
            seed: Of k-means.

        Raises:
            ConfigError: A number below 1.
        """
        numbers = {"lists": lists, "probes": probes, "iterations": iterations}
        for key, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError("at least 1 is needed", key=key, asked=value)
        self.lists = lists
        self.probes = probes
        self.iterations = iterations
        super().__init__(centred=centred)
        self.seed = seed
        self._sizes: Ids = np.empty(0, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of rows, ids and centroids."""
        if self._index is None:
            return 0
        return len(self) * (4 * int(self._index.d) + 8) + 4 * int(self._index.d * self._index.nlist)

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`; queries teach it nothing.

        Raises:
            InputError: There are fewer keys than `lists`, too.
        """
        keys = checked_keys(keys, None)
        count, dimension = keys.shape
        if queries is not None:
            checked_keys(queries, dimension, what="queries")
        lists = self.lists if self.lists is not None else round(count**0.5)
        if lists > count:
            raise InputError(
                "There are more lists than keys to build them from",
                asked=lists,
                there=count,
                change="Leave `lists` out, or build from more keys.",
            )
        values = self._first_rows(keys)
        quantizer = faiss.IndexFlatIP(dimension)
        index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = self.seed
        index.cp.niter = self.iterations
        index.cp.min_points_per_centroid = 1  # or FAISS writes a warning to stderr
        with single_thread():
            index.train(values)
        self._index = index
        self._sizes = np.zeros(lists, dtype=np.int64)
        self._put(values)

    def add(self, keys: Vectors) -> None:
        """See `Index`."""
        if self._index is None:
            self.build(keys)
            return
        self._put(self._further_rows(checked_keys(keys, self.dimension)))

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`. Each query reads its own lists, so what two of them share counts twice."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        index = self._index
        with single_thread():
            probes = min(self.probes, index.nlist)
            liked, order = index.quantizer.search(queries, probes)
            if self._sizes[order].sum(axis=1).min() < k:
                liked, order = index.quantizer.search(queries, index.nlist)
                held = self._sizes[order].cumsum(axis=1)
                # The last list of each query: its `probes`-th, or the first with which there are enough.
                last = np.maximum((held >= k).argmax(axis=1), probes - 1)
                order = np.where(np.arange(index.nlist) <= last[:, None], order, -1)
            index.nprobe = order.shape[1]
            scores, ids = index.search_preassigned(queries, k, order, liked)
        scanned = int(np.where(order >= 0, self._sizes[order], 0).sum())
        scores += (queries @ self._mean)[:, None]
        dimension = queries.shape[1]
        centroids = index.nlist * 4 * dimension
        touched = scanned * (4 * dimension + 8) + queries.shape[0] * centroids
        return Found(ids, scores, scanned / (queries.shape[0] * count), touched)

    def save(self, path: Path) -> None:
        """See `Index`."""
        metadata = {
            "lists": self.lists,
            "probes": self.probes,
            "iterations": self.iterations,
            "centred": self.centred,
            "seed": self.seed,
        }
        file.write(path, self.backend, metadata, self._arrays())

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. FAISS keeps a copy of what is in the file."""
        _, metadata, arrays = file.read(path, cls.backend)
        self = cls(**metadata)
        self._take(arrays)
        if arrays:
            lists = self._index.invlists
            self._sizes = np.array([lists.list_size(i) for i in range(self._index.nlist)])
        return self

    def _put(self, values: Floats) -> None:
        """Puts centred float32 rows into lists, and counts them."""
        index = self._index
        with single_thread():
            _, lists = index.quantizer.search(values, 1)
            lists = np.ascontiguousarray(lists[:, 0])
            index.add_core(len(values), faiss.swig_ptr(values), None, faiss.swig_ptr(lists))
        self._sizes += np.bincount(lists, minlength=index.nlist)
