"""Which keys matter, when whole pages of consecutive keys are scored that may hold them, by a digest of each?

A box of the least and the greatest value of each channel bounds from above what any key of a page scores: Tang et al., Quest
(arXiv 2406.10774), section 3.2. The mean of a page's keys is what Lu et al., MoBA (arXiv 2502.13189), rank it by. Pages of 16
are looked at only inside the best blocks of 64, whose digests are read first, as in Yang et al., LServe (arXiv 2502.14866),
section 3.5.
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

PAGE, BLOCK = 16, 64
DIGESTS = ("box", "mean")


class Pages(OverRows):
    """Digests of pages of 16 keys and of blocks of four pages; the keys of the best pages are scored exactly.

    Keys of the last block that is not full have no digests and are all scored.
    """

    backend: ClassVar[str] = "pages"

    def __init__(self, *, digest: str = "box", overfetch: int = 16, breadth: int = 4) -> None:
        """An index without keys.

        Args:
            digest: `box` for the bound of a box, `mean` for the score of the mean key, which takes half the bytes.
            overfetch: Keys of pages that are scored for each one that is asked for, at least. More find more.
            breadth: Keys of blocks whose pages are looked at, for each that is scored, at least. More find more.

        Raises:
            ConfigError: Another digest, or a number below 1.
        """
        if digest not in DIGESTS:
            raise ConfigError("there is no digest of this name", key="digest", asked=digest, there=DIGESTS)  # fmt: skip
        for key, value in {"overfetch": overfetch, "breadth": breadth}.items():
            if value < 1:
                raise ConfigError("at least 1 is needed", key=key, asked=value)
        self.digest = digest
        self.overfetch = overfetch
        self.breadth = breadth
        self._rows: Growing | None = None
        self._blocks: Growing  # float32 [n, 2 or 1, D]: least and greatest, or mean
        self._pages: Growing  # float32 [n, 4, 2 or 1, D]

    @property
    def nbytes(self) -> int:
        """Bytes of rows and digests."""
        if self._rows is None:
            return 0
        return sum(int(part.rows.nbytes) for part in (self._rows, self._blocks, self._pages))

    def build(self, keys: Vectors, queries: Vectors | None = None) -> None:
        """See `Index`; queries teach it nothing."""
        keys = checked_keys(keys, None)
        if queries is not None:
            checked_keys(queries, keys.shape[1], what="queries")
        self._rows = Growing(keys)
        blocks, pages = self._digests(keys[: len(keys) // BLOCK * BLOCK])
        self._blocks, self._pages = Growing(blocks), Growing(pages)

    def add(self, keys: Vectors) -> None:
        """See `Index`. Keys are stored in the dtype of the first ones; exactly what `build` of all would hold."""
        if self._rows is None:
            self.build(keys)
            return
        self._rows.append(checked_keys(keys, self.dimension))
        first, last = self._blocks.count, self._rows.count // BLOCK
        if last > first:
            blocks, pages = self._digests(self._rows.rows[first * BLOCK : last * BLOCK])
            self._blocks.append(blocks)
            self._pages.append(pages)

    def search(self, queries: Vectors, k: int) -> Found:
        """See `Index`. Each query reads its own pages, so what two of them share counts twice."""
        count = len(self)
        queries = checked_search(queries, k, count=count, dimension=self.dimension)
        assert self._rows is not None
        rows, groups = self._rows.rows, len(queries)
        blocks, pages = self._blocks.rows, self._pages.rows
        whole = len(blocks) * BLOCK
        need = min(whole, self.overfetch * k)
        looked, taken = min(-(-need * self.breadth // BLOCK), len(blocks)), -(-need // PAGE)
        ids, scores = np.empty((groups, k), np.int64), np.empty((groups, k), np.float32)
        first = _bounds(blocks, queries)
        rest = np.arange(whole, count)
        within = np.arange(PAGE)
        for g in range(groups):
            at = _largest(first[g], looked)
            page = (4 * at[:, None] + np.arange(4)).ravel()
            bounds = _bounds(pages[at].reshape(-1, *pages.shape[2:]), queries[g : g + 1])[0]
            page = np.sort(page[_largest(bounds, taken)])
            candidates = np.concatenate([(page[:, None] * PAGE + within).ravel(), rest])
            exact = np.empty(len(candidates), np.float32)
            scan.rescore(rows, candidates, queries[g], exact)
            scan.ranked(candidates, exact, ids[g], scores[g])
        scored = taken * PAGE + len(rest)
        digests = blocks.nbytes + groups * looked * (pages.strides[0] if len(pages) else 0)
        touched = int(digests) + groups * scored * int(rows.strides[0])
        return Found(ids, scores, scored / count, touched)

    def save(self, path: Path) -> None:
        """See `Index`."""
        metadata = {
            "digest": self.digest, "overfetch": self.overfetch, "breadth": self.breadth,
            "page": PAGE, "block": BLOCK,
        }  # fmt: skip
        arrays: dict[str, NDArray[Any]] = {}
        if self._rows is not None:
            arrays = {
                "rows": self._rows.rows,
                "blocks": self._blocks.rows,
                "pages": self._pages.rows,
            }
        file.write(path, self.backend, metadata, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Index`. Rows and digests stay in the file, mapped, until keys are added; then they are copied."""
        _, metadata, arrays = file.read(path, cls.backend)
        sizes = metadata.pop("page"), metadata.pop("block")
        if sizes != (PAGE, BLOCK):
            raise ConfigError(
                f"{path.name} has pages of another size",
                asked=sizes,
                there=(PAGE, BLOCK),
                change="Build the index again.",
            )
        self = cls(**metadata)
        if arrays:
            self._rows, self._blocks, self._pages = (
                Growing.around(arrays[name]) for name in ("rows", "blocks", "pages")
            )
        return self

    def _digests(self, keys: Vectors) -> tuple[Floats, Floats]:
        """Of whole blocks: theirs, [n, 2 or 1, D], and their pages', [n, 4, 2 or 1, D]."""
        parts = keys.reshape(-1, BLOCK // PAGE, PAGE, keys.shape[1])
        if self.digest == "mean":
            pages = parts.mean(axis=2, dtype=np.float32)[:, :, None]
            return pages.mean(axis=1), pages
        least, greatest = parts.min(axis=2), parts.max(axis=2)
        blocks = np.stack([least.min(axis=1), greatest.max(axis=1)], axis=1)
        return blocks.astype(np.float32), np.stack([least, greatest], axis=2).astype(np.float32)


def _bounds(digests: Floats, queries: Floats) -> Floats:
    """What each digest says of its keys' scores.

    Args:
        digests: float32 [n, 2 or 1, D].
        queries: float32 [G, D].

    Returns:
        float32 [G, n]. Of boxes: no key inside scores more.
    """
    if digests.shape[1] == 1:
        return queries @ digests[:, 0].T
    found: Floats = np.minimum(queries, 0) @ digests[:, 0].T
    found += np.maximum(queries, 0) @ digests[:, 1].T
    return found


def _largest(values: Floats, n: int) -> Ids:
    """Where the n largest are, ascending."""
    if n >= len(values):
        return np.arange(len(values))
    return np.sort(np.argpartition(-values, n - 1)[:n]) if n else np.empty(0, np.int64)
