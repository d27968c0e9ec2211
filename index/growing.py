"""How are rows put behind others without copying those that are there each time?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Growing:
    """An array that grows along its first axis; room is doubled when it is full, so a row costs O(1) amortised.

    Attributes:
        count: Rows in use.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        """Starts from rows, which are taken and not copied; they may be read-only.

        Args:
            rows: [n, ...].
        """
        self._all = rows
        self.count = rows.shape[0]

    @property
    def rows(self) -> NDArray[Any]:
        """Those in use, [count, ...]; a view that is stale after `append`."""
        return self._all[: self.count]

    @property
    def nbytes(self) -> int:
        """Bytes, of the room too."""
        return int(self._all.nbytes)

    def append(self, rows: NDArray[Any]) -> None:
        """Puts rows behind the others, converted to their dtype.

        Args:
            rows: [n, ...].
        """
        count = self.count + rows.shape[0]
        if count > self._all.shape[0]:
            room = (max(count, 2 * self._all.shape[0]), *self._all.shape[1:])
            grown = np.empty(room, dtype=self._all.dtype)
            grown[: self.count] = self.rows
            self._all = grown
        self._all[self.count : count] = rows
        self.count = count
