"""What do the backends that FAISS holds have in common? Its one thread, the keys' mean, and how it lies in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from offload.index.base import Floats, Vectors

faiss: Any = _faiss  # its stubs leave out most of what is used here


@contextmanager
def single_thread() -> Iterator[None]:
    """FAISS works in the calling thread alone. Heads are searched side by side, so threads within one would queue."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class OnFaiss:
    """An index of FAISS over keys from which their mean may have been taken.

    Rows are float32.
    """

    def __init__(self, *, centred: bool) -> None:
        """An index without keys.

        Args:
            centred: The mean of the keys of `build` is taken off all of them: it moves all scores of a query alike.
        """
        self.centred = centred
        self._index: Any = None
        self._mean: Floats = np.empty(0, dtype=np.float32)

    def __len__(self) -> int:
        return int(self._index.ntotal) if self._index is not None else 0

    @property
    def dimension(self) -> int | None:
        """D. None as long as there is no key."""
        return int(self._index.d) if self._index is not None else None

    def _first_rows(self, keys: Vectors) -> Floats:
        """Those of `build`, float32, with their mean taken off where that is wanted; it is kept."""
        values = keys.astype(np.float32)
        self._mean = np.zeros(keys.shape[1], dtype=np.float32)
        if self.centred:
            self._mean = values.mean(axis=0)
        return values - self._mean

    def _further_rows(self, keys: Vectors) -> Floats:
        """Those of `add`, likewise."""
        return keys.astype(np.float32) - self._mean

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """For a file; none without keys."""
        if self._index is None:
            return {}
        return {"faiss": faiss.serialize_index(self._index), "mean": self._mean}

    def _take(self, arrays: Mapping[str, Any]) -> None:
        """The opposite of `_arrays`; FAISS keeps a copy."""
        if arrays:
            self._index = faiss.deserialize_index(np.array(arrays["faiss"]))
            self._mean = np.array(arrays["mean"])
