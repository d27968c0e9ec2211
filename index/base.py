"""What can every index be asked, and what may it be given?

An index holds the keys of one KV head of one layer and is searched by the queries of the heads that share it. Scores
are inner products, neither scaled nor normalised: the order of attention's own logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from offload.errors import InputError

Vectors = NDArray[Any]  # float16 or float32 [n, D]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Found(NamedTuple):
    """The best keys of each query, and the work of finding them.

    Attributes:
        ids: int64 [G, k]: numbers of keys, in the order in which they were given, from zero. No number twice in a row.
        scores: float32 [G, k]: inner products, exact but for the rounding of float32. Best first.
        scanned: Keys that were scored, by their codes or by their rows, as a share of all; mean over the queries.
        touched_bytes: Bytes of keys, codes and links that were read, all queries together; what a scan reads once
            for the whole group counts once.
    """

    ids: Ids
    scores: Floats
    scanned: float
    touched_bytes: int


class Index(Protocol):
    """Finds the keys that a query attends to most.

    One index is used by one thread at a time: a search writes to memory that the index keeps. Different indexes may
    be searched by different threads. What a call returns is the caller's own. What is passed in is copied.

    All backends raise `InputError` for vectors that are not [n, D] of float16 or float32, of another D than those
    that are there, or not finite (the error names the row); for a search of an index without keys, or for more
    keys than there are. Vectors of zeros are vectors like others: all their scores are zero.
    """

    backend: ClassVar[str]

    def __len__(self) -> int:
        """Keys in the index."""
        ...

    @property
    def dimension(self) -> int | None:
        """D. None as long as there is no key."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory of everything that grows with the keys."""
        ...

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """Makes this the index of these keys, and of no others.

        Args:
            keys: [N, D]. Their dtype is the one that rows are stored in, where a backend stores them as they are.
            queries: [M, D], of the kind that will be searched with. A backend that does not learn from queries only
                checks them.
        """
        ...

    def add(self, keys: Vectors) -> None:
        """Puts further keys behind those that are there; their ids go on from `len`.

        Args:
            keys: [n, D]. To an index without keys it is `build`.

        Cost: in proportion to n, amortised, whatever N is (HNSW: times the logarithm of N).
        """
        ...

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best keys of each query.

        Args:
            queries: [G, D], of the query heads that share this index.
            k: At least 1, at most `len`.
        """
        ...

    def save(self, path: Path) -> None:
        """Writes one file, which `load` reads; see `offload.index.file`."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index of a file that `save` wrote: the same ids and scores.

        Raises:
            InputError: The file is damaged, from a newer version, or of another backend.
        """
        ...


class Nearest(Protocol):
    """Finds the exactly best keys of queries: `offload.index.graph.nearest`, or the same on a card."""

    def __call__(self, keys: Floats, queries: Vectors, n: int) -> Ids:
        """Keys by inner product.

        Args:
            keys: float32 [N, D].
            queries: float16 or float32 [M, D].
            n: At most N.

        Returns:
            int64 [M, n]: of each query its best keys, best first.
        """


def checked_keys(keys: Any, dimension: int | None, *, what: str = "keys") -> Vectors:
    """Vectors as a backend may use them.

    Args:
        keys: What was given.
        dimension: D of what is there already; None if nothing is.
        what: What the message calls them.

    Returns:
        The same, contiguous: float16 or float32 [n, D].

    Raises:
        InputError: See `Index`.
    """
    kind = getattr(keys, "dtype", type(keys).__name__)
    if not isinstance(keys, np.ndarray) or kind not in (np.float16, np.float32):
        change = "Pass a NumPy array of one of these dtypes."
        raise InputError(
            f"The {what} are no array of float16 or float32", there=kind, change=change
        )
    if keys.ndim != 2 or 0 in keys.shape:
        raise InputError(
            f"The {what} are no rows [n, D]",
            there=keys.shape,
            change="Pass at least one row of at least one channel.",
        )
    if dimension is not None and keys.shape[1] != dimension:
        raise InputError(
            f"The {what} have another dimension than the index",
            asked=keys.shape[1],
            there=dimension,
            change="Use one index for each size of head.",
        )
    finite = np.isfinite(keys)
    if not finite.all():
        row = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise InputError(
            f"Row {row} of the {what} is not finite",
            asked=row,
            change="NaN or infinity has no place in an order; look at what made this row.",
        )
    return np.ascontiguousarray(keys)


def checked_search(queries: Vectors, k: int, *, count: int, dimension: int | None) -> Floats:
    """The queries of a search as float32 [G, D], contiguous.

    Args:
        queries: What was given.
        k: Keys asked for.
        count: Keys in the index.
        dimension: Their D.

    Raises:
        InputError: See `Index`.
    """
    if not count:
        raise InputError("The index is empty", asked=k, there=0, change="Build it first.")
    if not 1 <= k <= count:
        raise InputError(
            "An index gives at least one key and at most those that it holds",
            asked=k,
            there=count,
            change=f"Ask for 1 to {count}.",
        )
    return checked_keys(queries, dimension, what="queries").astype(np.float32, copy=False)
