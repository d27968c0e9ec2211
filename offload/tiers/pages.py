"""Which host page holds which block of which sequence? A page table of one layer, in plain numbers.

Pages are written once, when their block leaves the device, and never again while a table refers to them. So
beams and returned sequences share the pages of their common past: a reorder moves page numbers, not bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.errors import CacheError


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that lie side by side: `count` pages from `page` on hold the columns from `column` on."""

    page: int
    column: int
    count: int


class PageTable:
    """Maps (sequence, column) to a page; a column is one block of tokens of every sequence.

    Attributes:
        capacity: Pages that may be handed out.
        version: Grows whenever a column may mean other pages than before (not at `append`).
    """

    def __init__(self, batch: int, capacity: int) -> None:
        """An empty table.

        Args:
            batch: Sequences.
            capacity: Pages to hand out at first. Sequence b gets the b-th equal share as long as it lasts,
                so that its pages lie side by side and are copied as one run.
        """
        self.capacity = capacity
        self.version = 0
        self._ids: NDArray[np.int64] = np.empty((batch, 0), dtype=np.int64)
        self._used = np.zeros(capacity, dtype=bool)
        self._share = capacity // batch
        self._shared = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self._ids.shape[0])

    @property
    def columns(self) -> int:
        """Blocks held of every sequence."""
        return int(self._ids.shape[1])

    @property
    def shared_columns(self) -> int:
        """Leading columns whose page is the same for every sequence."""
        return self.columns if self.batch == 1 else self._shared

    @property
    def pages_used(self) -> int:
        """Pages that some column refers to."""
        return int(self._used.sum())

    def missing(self, columns: int) -> int:
        """Pages that `append(columns)` needs beyond the capacity."""
        return max(0, columns * self.batch - (self.capacity - self.pages_used))

    def grow(self, capacity: int) -> None:
        """Raises the capacity."""
        if capacity > self.capacity:
            self._used = np.concatenate(
                [self._used, np.zeros(capacity - self.capacity, dtype=bool)]
            )
            self.capacity = capacity

    def append(self, columns: int) -> NDArray[np.int64]:
        """Takes free pages for the next columns.

        Args:
            columns: How many.

        Returns:
            The new pages, [batch, columns].

        Raises:
            CacheError: Fewer pages are free.
        """
        missing = self.missing(columns)
        if missing:
            raise CacheError(
                "The host pool is full",
                asked=columns * self.batch,
                there=self.capacity - self.pages_used,
                change="Grow it before appending.",
            )
        starts = np.arange(self.batch) * self._share + self.columns
        fresh = starts[:, None] + np.arange(columns)
        if columns <= self._share - self.columns and not self._used[fresh].any():
            self._used[fresh] = True  # nearly always
            self._ids = np.concatenate([self._ids, fresh], axis=1)
            return fresh
        for row in range(self.batch):
            wanted = row * self._share + self.columns + np.arange(columns)
            in_share = wanted < min((row + 1) * self._share, self.capacity)
            if in_share.all() and not self._used[wanted].any():
                fresh[row] = wanted
            else:
                fresh[row] = np.flatnonzero(~self._used)[:columns]
            self._used[fresh[row]] = True
        self._ids = np.concatenate([self._ids, fresh], axis=1)
        return fresh

    def truncate(self, columns: int) -> None:
        """Keeps the first columns; pages that nobody refers to any more are free again."""
        if columns < self.columns:
            self._replace(self._ids[:, :columns])

    def drop(self, columns: int) -> None:
        """Forgets the first columns; those behind them move up, and their pages are free again."""
        if columns > 0:
            self._replace(self._ids[:, columns:])

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes sequence i the former sequence rows[i]; rows may repeat, and their number is the new batch."""
        if rows.size == self.batch and (rows == np.arange(self.batch)).all():
            return
        self._replace(self._ids[rows])

    def _replace(self, ids: NDArray[np.int64]) -> None:
        self._ids = np.ascontiguousarray(ids)
        self._used[:] = False
        self._used[self._ids.ravel()] = True
        self._share = self.capacity // max(1, self.batch)
        differ = (self._ids != self._ids[:1]).any(axis=0)
        self._shared = int(differ.argmax()) if differ.any() else self.columns
        self.version += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The page of each column, [batch, columns]: a view."""
        return self._ids

    def even(self, rows: int, start: int, stop: int, edges: list[int]) -> tuple[int, int] | None:
        """Whether columns [start, stop) of the first sequences are runs of one length that begin equally far apart.

        Args:
            rows: Sequences, two or more.
            start: First column.
            stop: One past the last column.
            edges: Page numbers between which all of it has to lie.

        Returns:
            The first page of the first sequence, and pages from one sequence's first to the next one's; else None.
        """
        ids = self._ids[:rows, start:stop]
        first, apart = int(ids[0, 0]), int(ids[1, 0] - ids[0, 0])
        there = first + apart * np.arange(rows)[:, None] + np.arange(stop - start)
        if apart < stop - start or (ids != there).any():
            return None
        if any(first < edge <= int(ids[-1, -1]) for edge in edges):
            return None
        return first, apart

    def runs(self, row: int, start: int, stop: int, edges: list[int]) -> list[Run]:
        """Columns [start, stop) of one sequence as few runs as possible.

        Args:
            row: The sequence.
            start: First column.
            stop: One past the last column.
            edges: Ascending page numbers that no run may cross (borders of separately pinned memory).

        Returns:
            Runs in the order of their columns.
        """
        ids = self._ids[row, start:stop]
        if ids.size == 0:
            return []
        first, last = int(ids[0]), int(ids[-1])
        side_by_side = last - first == ids.size - 1 and bool((ids[1:] - ids[:-1] == 1).all())
        if side_by_side and not any(first < edge <= last for edge in edges):
            return [Run(page=first, column=start, count=ids.size)]  # nearly always
        cut = np.flatnonzero(np.diff(ids) != 1) + 1
        if edges:
            region = np.searchsorted(np.asarray(edges), ids, side="right")
            cut = np.union1d(cut, np.flatnonzero(np.diff(region)) + 1)
        starts = np.concatenate([[0], cut]).astype(np.int64)
        stops = np.concatenate([cut, [ids.size]]).astype(np.int64)
        return [
            Run(page=int(ids[a]), column=start + int(a), count=int(b - a))
            for a, b in zip(starts, stops, strict=True)
        ]

    def check(self) -> None:
        """Raises CacheError unless exactly the referred pages are marked as used, all within the capacity."""
        referred = set(self._ids.ravel().tolist())
        marked = set(np.flatnonzero(self._used).tolist())
        if referred != marked or any(page >= self.capacity for page in referred):
            raise CacheError(
                "The page table is inconsistent",
                asked=len(referred),
                there=len(marked),
                change=None,
            )
