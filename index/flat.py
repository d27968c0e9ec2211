"""Which keys matter, when all of them are scored from a few bits and the best are scored again exactly?

There is nothing to build and nothing that a query can be too far from. Johnson et al., Billion-scale similarity search
with GPUs (arXiv 1702.08734), call the second scoring re-ranking; the codes are ours (`offload.index.scan`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from offload.errors import ConfigError
from offload.index import file, scan
from offload.index.base import Found, Vectors, checked_keys, checked_search
from offload.index.growing import Growing, OverRows


class Flat(OverRows):
    """A scan of all keys by codes, then the exact scores of `overfetch` times as many as are asked for.

    Keys of the last block that is not full have no codes and are scored by their rows.
    """

    backend: ClassVar[str] = "flat"

    def __init__(self, *, bits: int = 4, overfetch: int = 4) -> None:
        """An index without keys.

        Args:
            bits: Of a code, 4 or 2. 2 halves what the scan reads, and finds fewer.
            overfetch: Keys that are scored exactly for each one that is asked for. More find more.

        Raises:
            ConfigError: Another number of bits, or no over-fetch of at least 1.
        """
        if bits not in (2, 4):
            raise ConfigError("codes have 2 or 4 bits", key="bits", asked=bits)
        if overfetch < 1:
            raise ConfigError("at least what is asked for is scored", key="overfetch", asked=overfetch)  # fmt: skip
        self.bits = bits
        self.overfetch = overfetch
        self._rows: Growing | None = None
        self._parts: list[Growing] = []  # codes, lows, steps
        self._scores = np.empty(0, dtype=np.float32)
        self._counts = np.empty(2048, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and codes, and of the scores of a search."""
        rows = int(self._rows.rows.nbytes) if self._rows else 0
        return rows + self.code_bytes + self._scores.nbytes

    @property
    def code_bytes(self) -> int:
        """Bytes that a scan reads: codes, lows and steps."""
        return sum(int(part.rows.nbytes) for part in self._parts)

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`; queries teach it nothing."""
        keys = checked_keys(keys, None)
        if queries is not None:
            checked_keys(queries, keys.shape[1], what="queries")
        self._rows = Growing(keys)
        whole = keys.shape[0] // scan.BLOCK * scan.BLOCK
        self._parts = [Growing(part) for part in scan.encode(keys[:whole], self.bits)]

    def add(self, keys: Vectors) -> None:
        """See `Index`. Keys are stored in the dtype of the first ones; exactly what `build` of all would hold."""
        if self._rows is None:
            self.build(keys)
            return
        self._rows.append(checked_keys(keys, self.dimension))
        coded = self._parts[0].count
        blocks = self._rows.count // scan.BLOCK
        if blocks > coded:
            rows = self._rows.rows[coded * scan.BLOCK : blocks * scan.BLOCK]
            fresh: tuple[NDArray[Any], ...] = scan.encode(rows, self.bits)
            for part, more in zip(self._parts, fresh, strict=True):
                part.append(more)

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        assert self._rows is not None
        rows, groups = self._rows.rows, queries.shape[0]
        if self._scores.size < groups * count:
            # Half as much again: it grows by a token a step.
            self._scores = np.empty(groups * count * 3 // 2, dtype=np.float32)
        scores = self._scores[: groups * count].reshape(groups, count)
        codes, lows, steps = (part.rows for part in self._parts)
        scan.scan(codes, lows, steps, queries, self.bits, scores)
        coded = codes.shape[0] * scan.BLOCK
        tail = np.arange(coded, count)
        some = min(count, self.overfetch * k)
        candidates, exact = np.empty(some, dtype=np.int64), np.empty(some, dtype=np.float32)
        ids = np.empty((groups, k), dtype=np.int64)
        out = np.empty((groups, k), dtype=np.float32)
        for g in range(groups):
            scan.rescore(rows, tail, queries[g], scores[g, coded:])
            scan.best(scores[g], candidates, self._counts)
            scan.rescore(rows, candidates, queries[g], exact)
            scan.ranked(candidates, exact, ids[g], out[g])
        row_bytes = int(rows.strides[0])
        touched = self.code_bytes + (tail.size + groups * some) * row_bytes
        return Found(ids, out, 1.0, touched)

    def save(self, path: Path) -> None:
        """See `Index`."""
        arrays: dict[str, NDArray[Any]] = {}
        if self._rows is not None:
            names = ("codes", "lows", "steps")
            arrays = {name: part.rows for name, part in zip(names, self._parts, strict=True)}
            arrays["rows"] = self._rows.rows
        metadata = {
            "bits": self.bits,
            "overfetch": self.overfetch,
            "block": scan.BLOCK,
            "channels": scan.CHANNELS,
        }
        file.write(path, self.backend, metadata, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. Rows and codes stay in the file, mapped, until keys are added; then they are copied."""
        _, metadata, arrays = file.read(path, cls.backend)
        if metadata["block"] != scan.BLOCK or metadata.get("channels") != scan.CHANNELS:
            raise ConfigError(
                f"{path.name} has codes in blocks of another size",
                asked=metadata["block"],
                there=scan.BLOCK,
                change="Build the index again.",
            )
        self = cls(bits=metadata["bits"], overfetch=metadata["overfetch"])
        if arrays:
            self._rows = Growing.around(arrays["rows"])
            self._parts = [Growing.around(arrays[name]) for name in ("codes", "lows", "steps")]
        return self
