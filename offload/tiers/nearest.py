"""The exactly best keys of many queries on a card, within a few bytes of it: what a `graph` is drawn from."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from offload.index.base import Floats, Ids, Vectors


class CardNearest:
    """An `offload.index.graph.Nearest` by matrix products on a device, in float32.

    Keys are there in pieces of two fifths of the bytes, as are scores of some queries with a piece; the rest is for what the
    best are sorted out with. Threads take turns.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """Takes no memory yet.

        Args:
            device: Where.
            nbytes: That a search takes there at most, if it has room for a row of scores.
        """
        self._device = device
        self._values = max(1, 2 * nbytes // 5 // 4)
        self._turn = threading.Lock()

    def __call__(self, keys: Floats, queries: Vectors, n: int) -> Ids:
        """See `offload.index.graph.nearest`. Of keys that score alike, any may be first."""
        best = np.empty((len(queries), n), np.int64)
        size = keys.shape[1]
        with self._turn, torch.inference_mode():
            # Each piece has as many keys as are asked for.
            pieces = max(1, min(-(-len(keys) * size // self._values), len(keys) // max(1, n)))
            cuts = np.linspace(0, len(keys), pieces + 1).astype(np.int64)
            scores = np.empty((len(queries), n), np.float32) if pieces > 1 else None
            for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                there = torch.from_numpy(keys[first:last]).to(self._device)
                rows = max(1, self._values // (last - first))
                for a in range(0, len(queries), rows):
                    some = torch.from_numpy(queries[a : a + rows].astype(np.float32)).to(self._device)  # fmt: skip
                    found = torch.topk(some @ there.T, n)
                    values, ids = found.values, found.indices + first
                    if scores is not None:
                        if first:
                            values, ids = self._merged(values, ids, scores[a : a + rows], best[a : a + rows], n)  # fmt: skip
                        scores[a : a + rows] = values.cpu().numpy()
                    best[a : a + rows] = ids.cpu().numpy()
        return best

    def _merged(self, values: Tensor, ids: Tensor, scores: Floats, best: Ids, n: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The best n of those found and those of the pieces before."""
        values = torch.cat([torch.from_numpy(scores).to(self._device), values], dim=1)
        ids = torch.cat([torch.from_numpy(best).to(self._device), ids], dim=1)
        found = torch.topk(values, n)
        return found.values, ids.gather(1, found.indices)
