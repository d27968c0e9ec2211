"""How are rows put behind others without copying those that are there each time?"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Growing:
    """An array that grows along its first axis: room is doubled when it is full, so a row costs O(1) amortised.

    Room that nothing was written to takes addresses and no memory: the system gives pages when they are written.

    Attributes:
        count: Rows in use.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        """Starts with a copy of rows, and with room for as many more.

        Args:
            rows: [n, ...].
        """
        self._all = np.empty((2 * rows.shape[0], *rows.shape[1:]), dtype=rows.dtype)
        self.count = rows.shape[0]
        self._all[: self.count] = rows

    @classmethod
    def around(cls, rows: NDArray[Any]) -> Self:
        """Starts with rows that are not copied before others are put behind them; they may be read-only.

        Args:
            rows: [n, ...].
        """
        self = cls(rows[:0])
        self._all, self.count = rows, rows.shape[0]
        return self

    @property
    def rows(self) -> NDArray[Any]:
        """Those in use, [count, ...]; a view that is stale after `append`."""
        return self._all[: self.count]

    def append(self, rows: NDArray[Any]) -> None:
        """Puts rows behind the others, converted to their dtype.

        Args:
            rows: [n, ...].
        """
        count = self.count + rows.shape[0]
        if count > self._all.shape[0]:
            grown = np.empty((2 * count, *self._all.shape[1:]), dtype=self._all.dtype)
            grown[: self.count] = self.rows
            self._all = grown
        self._all[self.count : count] = rows
        self.count = count


class OverRows:
    """What an index that keeps its rows says of them: `Index`'s length and dimension."""

    _rows: Growing | None

    def __len__(self) -> int:
        return self._rows.count if self._rows else 0

    @property
    def dimension(self) -> int | None:
        """D. None as long as there is no key."""
        return int(self._rows.rows.shape[1]) if self._rows else None
