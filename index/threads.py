"""How is FAISS kept to one thread without a change to what the caller has set?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss


@contextmanager
def single_thread() -> Iterator[None]:
    """FAISS works in the calling thread alone. Heads are searched side by side, so threads within one would queue."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
