"""How is a draft checked while it goes on? By a pass over the cache as it stood, whose rows are kept beside it.

A pass over drafted tokens needs what the cache held before them and nothing of what has come since. `Shadow` lets a
model see just that: a cache of the same layers that attends to what they held, and keeps the new rows in memory of its
own. Where they turn out right, `commit` puts them where the draft's stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.cache import OffloadCache, Store
from offload.errors import CacheError
from offload.tiers.store import Held, LayerStore


class _Glance:
    """A layer as it stood; a `Store` for a cache layer that attends and holds nothing new."""

    @torch.inference_mode(False)
    def __init__(self, store: LayerStore, rows: int) -> None:
        """Takes memory for the rows of a pass.

        Args:
            store: Whose tokens are attended to.
            rows: Tokens of a pass, at most.
        """
        shape = self._shape = store.shape
        self._store = store
        self._held: Held = store.held(store.length)
        self.length = store.length  # tokens of every sequence that are attended to
        self.busy = False
        self.rows = torch.empty(
            (store.batch, rows, shape.kv_heads, shape.width),
            dtype=shape.dtype,
            device=store.region.device,
        )

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._store.batch

    def look(self, length: int) -> None:
        """From now on the first tokens are seen, and no other.

        Args:
            length: How many.
        """
        self._held, self.length = self._store.held(length), length

    def expect(self, key: Tensor, value: Tensor) -> None:
        """As of `LayerStore`."""
        self._store.expect(key, value)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        visible: Tensor | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """As of `LayerStore`; the new rows are kept here."""
        new = self.rows[:, : key.shape[2]].transpose(1, 2)
        new[..., : self._shape.key_dim].copy_(key.detach())
        new[..., self._shape.key_dim :].copy_(value.detach())
        return self._store.look(
            query, key, value, self._held,
            scale=scale, visible=visible, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip

    def settle(self) -> None:
        """Nothing is under way that anybody else sees."""

    def crop(self, length: int) -> None:
        """Raises CacheError."""
        raise _unchangeable("crop")

    def select(self, rows: Tensor) -> None:
        """Raises CacheError."""
        raise _unchangeable("select")


class Shadow:
    """What a cache held at one time, as a cache that a model can make passes over.

    Attributes:
        cache: For those passes. It gives the model the same keys, and takes nothing in.
    """

    def __init__(self, cache: OffloadCache, rows: int) -> None:
        """Takes memory for the rows of a pass.

        Args:
            cache: In use; every layer of it ours.
            rows: Tokens of a pass, at most.
        """
        assert len(cache.layer_stores) == len(cache.layers)
        self._of = cache
        self._glances = [_Glance(store, rows) for store in cache.layer_stores]
        glances: list[Store] = [*self._glances]
        self.cache = OffloadCache(
            cache.layers,
            range(len(cache.layers)),
            lambda sequences, copies: (None, glances),
            modules=cache.modules,
        )
        self.cache.start(self._glances[0].batch)

    def look(self, length: int) -> None:
        """From now on the first tokens that the cache holds are seen, and no other.

        Args:
            length: How many.
        """
        for glance in self._glances:
            glance.look(length)

    def commit(self, ids: Tensor) -> None:
        """Puts the first rows of the last pass where they belong, over those of a draft or behind what there is.

        Args:
            ids: The tokens [B, n] whose rows they are.
        """
        n = ids.shape[1]
        self._of.put(self._glances[0].length, [glance.rows[:, :n] for glance in self._glances], ids)


def _unchangeable(asked: str) -> CacheError:
    return CacheError(
        "A glance at a cache cannot change it",
        asked=asked,
        there=None,
        change="Change the cache itself.",
    )
