"""The exactly best keys of many queries on a card, within a few bytes of it: what a `graph` is drawn from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from offload.index.base import Floats, Ids, Vectors

_RUN = 32  # keys that are a run, of which the best one is looked at first; they lie evenly over all keys


class CardNearest:
    """An `offload.index.graph.Nearest` by matrix products on a device, in float32.

    Keys are there in pieces of a quarter of the bytes. An eighth is for queries and for what is found, nine sixteenths are for scores of
    some queries with a piece. One thread does it all, whoever asks: cuBLAS keeps a workspace for each that calls it.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """Takes no memory yet.

        Args:
            device: Where.
            nbytes: That a search takes there at most, if it has room for a row of scores and for what is found.
        """
        self._device = device
        self._values = max(1, nbytes // 4)
        self._thread = ThreadPoolExecutor(1, "offload-nearest")

    def __call__(self, keys: Floats, queries: Vectors, n: int) -> Ids:
        """See `offload.index.graph.nearest`. Of keys that score alike, any may be first."""
        return self._thread.submit(self._find, keys, queries, n).result()

    def _find(self, keys: Floats, queries: Vectors, n: int) -> Ids:
        best = np.empty((len(queries), n), np.int64)
        # Each piece has as many keys as are asked for.
        pieces = max(1, min(-(-keys.size * 4 // self._values), len(keys) // max(1, n)))
        cuts = np.linspace(0, len(keys), pieces + 1).astype(np.int64)
        scores = np.empty((len(queries), n), np.float32) if pieces > 1 else None
        with torch.inference_mode():
            for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                self._look(keys[first:last], first, queries, best, scores)
        return best

    def _look(self, keys: Floats, first: int, queries: Vectors, best: Ids, scores: Floats | None) -> None:  # fmt: skip
        """Puts the best of a piece among the best of those before it; first: its first key."""
        (count, size), n = keys.shape, best.shape[1]
        # Of a query: itself, and what is found, numbers and scores, six times where pieces are put together.
        most = max(1, self._values // 8 // (size + 18 * n))
        # Of a query: scores, the best of each run, and those of the best runs three times.
        rows = max(1, min(most, self._values * 9 // 16 // (count * (_RUN + 1) // _RUN + 3 * _RUN * n)))  # fmt: skip
        there = torch.from_numpy(keys).to(self._device)
        # One for all: between others that come and go, the allocator finds no room for it again.
        held = torch.empty((rows, count), device=self._device)
        for a in range(0, len(queries), most):
            some = torch.from_numpy(queries[a : a + most].astype(np.float32)).to(self._device)
            found = [
                _best(torch.mm(part, there.T, out=held[: len(part)]), n)
                for part in some.split(rows)
            ]
            values, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
            del found
            ids += first
            if scores is not None:
                if first:
                    values, ids = self._merged(values, ids, scores[a : a + most], best[a : a + most], n)  # fmt: skip
                scores[a : a + most] = values.cpu().numpy()
            best[a : a + most] = ids.cpu().numpy()

    def _merged(self, values: Tensor, ids: Tensor, scores: Floats, best: Ids, n: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The best n of those found and those of the pieces before."""
        values = torch.cat([torch.from_numpy(scores).to(self._device), values], dim=1)
        ids = torch.cat([torch.from_numpy(best).to(self._device), ids], dim=1)
        found = torch.topk(values, n)
        return found.values, ids.gather(1, found.indices)


def _best(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`, which reads all scores several times; here they are read once, and few of them again.

    The best n are in the n runs whose own best are best.

    Args:
        scores: float32 [rows, keys].
        n: At most as many as there are keys.

    Returns:
        float32 [rows, n], best first, and int64 [rows, n]: which they are.
    """
    rows, keys = scores.shape
    runs = keys // _RUN
    if runs < 2 * n:  # most of them would be read again
        found = torch.topk(scores, n)
        return found.values, found.indices
    whole = scores[:, : runs * _RUN].unflatten(1, (_RUN, runs))
    chosen = torch.topk(whole.amax(dim=1), n, sorted=False).indices
    some = whole.gather(2, chosen[:, None, :].expand(rows, _RUN, n)).flatten(1)
    found = torch.topk(torch.cat([some, scores[:, runs * _RUN :]], dim=1), n)
    # Where they were: in a run that was chosen, or behind all runs.
    of_run = found.indices // n * runs + chosen.gather(1, found.indices % n)
    behind = found.indices - n * _RUN + runs * _RUN
    return found.values, torch.where(found.indices < n * _RUN, of_run, behind)
