"""How are offloaded tokens found, and attended to, on the host? One layer's search and its hand-offs.

Where the device selects (`offload.tiers.replica`), what it keeps of a token decides which tokens are read exactly; a low
rung hides many that matter. Here the query goes to the host, an index over the offloaded keys says which tokens it
attends to most, and the host attends to them where they lie. Only numbers and the result go back:

    query ─► pinned memory ─► search, attend on the host ─► (o, lse), numbers of tokens ─► tail without them ─► combine
      └────► window; scan of what the device keeps ───────────────────────────────────────┘

The device has the rest of the layer meanwhile. Both directions are one copy each. While a prompt is read, tokens are
indexed beside the device's next layers, by a thread of its own; whatever needs the index waits for it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.index import backend
from offload.index.base import Floats, Ids, Index
from offload.index.paged import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Coded,
    Rows,
    Scratch,
    attend_best,
    attend_some,
    encode_blocks,
    gathered,
)
from offload.index.pairs import BLOCK
from offload.index.workers import Workers
from offload.tiers.rows import RowShape

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
OVERFETCH = 4  # keys that are scored exactly for each one that is attended to, by codes
BITS = 4
LEARNED = 1024  # queries of a KV head that an index learns from, where it does: of the last chunk with as many


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How the host searches.

    Attributes:
        index: A backend of `offload.index`. `flat` reads rows in the pages; the others have a copy of the keys.
        tokens: Per KV head that are attended to.
    """

    index: str
    tokens: int


class Found(NamedTuple):
    """What the host found for one step of one layer, in host memory; side by side, so that it is one copy.

    Attributes:
        all: float32 [numbers of all below], the memory of the three.
        out: float32 [B, H_q, D_v]: attention over the tokens that were found.
        lse: float32 [B, H_q], natural logarithm; -inf where there were none.
        tokens: int32 [B, H_kv, k]: which they are; a slot for which there is none repeats the first.
    """

    all: Tensor
    out: Tensor
    lse: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, batch: int, heads: int, shape: RowShape, k: int, *, device: torch.device, pinned: bool) -> Found:  # fmt: skip
        """Room for what is found.

        Args:
            batch: Sequences.
            heads: Query heads.
            shape: Of the rows.
            k: Tokens per KV head.
            device: Where.
            pinned: Whether a device copies from it.
        """
        n_out, n_ids = batch * heads * shape.value_dim, batch * shape.kv_heads * k
        whole = torch.zeros(n_out + batch * heads + n_ids, device=device, pin_memory=pinned)
        out, lse, ids = whole.split([n_out, batch * heads, n_ids])
        return cls(
            whole,
            out.view(batch, heads, shape.value_dim),
            lse.view(batch, heads),
            ids.view(torch.int32).view(batch, shape.kv_heads, k),
        )


class HandOff:
    """The memory of one hand-off each way; layers of one kind use it one after the other.

    Attributes:
        query: float32 [B, H_q, D] in host memory.
        found: Host memory.
        arrived: The same on the device; the host's own where there is no device.
        sent: The event behind the copy of `query`.
    """

    def __init__(
        self, batch: int, heads: int, shape: RowShape, k: int, device: torch.device
    ) -> None:
        on_card = device.type == "cuda"
        host = torch.device("cpu")
        self.query = torch.zeros((batch, heads, shape.key_dim), device=host, pin_memory=on_card)
        self.found = Found.of(batch, heads, shape, k, device=host, pinned=on_card)
        self.arrived = self.found
        self.sent: torch.cuda.Event | None = None
        if on_card:
            self.arrived = Found.of(batch, heads, shape, k, device=device, pinned=False)
            self.sent = torch.cuda.Event()


class Searchers:
    """What the searches of all layers share: threads, and what each of them works with."""

    def __init__(self, threads: int | None) -> None:
        """Starts nothing.

        Args:
            threads: That search at the same time; None: one for each core.
        """
        self.workers = Workers(threads)
        self.background = ThreadPoolExecutor(1, "offload-index")
        self._scratch: dict[tuple[int, ...], list[Scratch | None]] = {}

    def scratch(self, worker: int, *sizes: int) -> Scratch:
        """What a thread works with, made when it first asks.

        Args:
            worker: Which thread.
            *sizes: Arguments of `Scratch.of`.
        """
        if sizes not in self._scratch:
            for other in [other for other in self._scratch if (other[0], *other[2:]) == (sizes[0], *sizes[2:])]:  # fmt: skip
                del self._scratch[other]  # of another number of tokens
            self._scratch[sizes] = [None] * self.workers.threads
        there = self._scratch[sizes]
        made = there[worker]
        if made is None:
            made = there[worker] = Scratch.of(*sizes)
        return made

    def close(self) -> None:
        """Ends the threads, once what they have begun is over."""
        self.background.shutdown()
        self.workers.close()

    @property
    def nbytes(self) -> int:
        """Bytes of what threads work with."""
        made = [s for scratch in self._scratch.values() for s in scratch if s is not None]
        return sum(array.nbytes for scratch in made for array in scratch)


class HostSearch:
    """The index of one layer's offloaded tokens, and attention over what it finds.

    Attributes:
        settings: As given.
        tokens: Of each sequence that are indexed.
        searches: Made since `reset_stats`.
        seconds: That they took.
    """

    def __init__(
        self, shape: RowShape, settings: SearchSettings, shared: Searchers, *, batch: int, blocks: int, page: int
    ) -> None:  # fmt: skip
        """An index without tokens.

        Args:
            shape: Of the rows.
            settings: How it searches.
            shared: With the other layers.
            batch: Sequences.
            blocks: Pages of each sequence that there may be.
            page: Tokens of a page.
        """
        self.shape = shape
        self.settings = settings
        self.tokens = 0
        self.searches = 0
        self.seconds = 0.0
        self._shared = shared
        self._page = page
        self._capacity = blocks * page
        self._pages: Ids = np.zeros((batch, 0), np.int64)
        self._first = [0] * batch  # tokens before it are padding
        self._coded: list[list[Coded]] = []
        self._indexes: list[list[Index]] = []
        self._n_coded = 0
        self._building: Future[None] | None = None
        self._learned: Floats | None = None  # [B, H_kv, n, D], the newest queries of the prompt
        if settings.index == "flat":
            self._coded = [[self._room() for _ in range(shape.kv_heads)] for _ in range(batch)]
        else:
            self._indexes = [self._new_indexes() for _ in range(batch)]

    def _room(self) -> Coded:
        # Nothing is written here: what takes memory is what is coded.
        blocks, dim = self._capacity // BLOCK, self.shape.key_dim
        return Coded(
            np.empty((blocks, -(-dim // 2), BLOCK * BITS // 4), np.uint8),
            np.empty((blocks, dim), np.float32),
            np.empty((blocks, dim), np.float32),
            BITS,
        )

    def _new_indexes(self) -> list[Index]:
        return [backend(self.settings.index)() for _ in range(self.shape.kv_heads)]

    @property
    def learns(self) -> bool:
        """Whether the index is built from queries, so that it waits for the last ones of a prompt."""
        return self.settings.index == "graph"

    def settle(self, *, quietly: bool = False) -> None:
        """Waits for tokens that are being indexed.

        Args:
            quietly: What went wrong with it does not matter any more; else it is raised here.
        """
        building, self._building = self._building, None
        if building is not None:
            with suppress(BaseException) if quietly else nullcontext():
                building.result()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory beside the pages, for the tokens that are there."""
        if self._indexes:
            return sum(index.nbytes for row in self._indexes for index in row)
        some = self._n_coded
        return sum(part[:some].nbytes for row in self._coded for coded in row for part in coded[:3])

    def reset_stats(self) -> None:
        """Begins to count anew."""
        self.searches, self.seconds = 0, 0.0

    def truncate(self, columns: int) -> None:
        """Forgets pages from column `columns` on: others may come in their place."""
        self.settle()
        tokens = columns * self._page
        if tokens >= self.tokens:
            return
        self.tokens = tokens
        self._n_coded = min(self._n_coded, tokens // BLOCK)
        if self._indexes:  # no backend forgets a part: the next `extend` builds from what is left
            self._indexes = [self._new_indexes() for _ in self._indexes]
            self.tokens = 0

    def select_sequences(self, rows: Ids) -> None:
        """Makes sequence i the former sequence rows[i]."""
        self.settle()
        if self._learned is not None:
            self._learned = self._learned[rows]
        self._first = [self._first[row] for row in rows]
        if self._indexes:
            self._indexes = [self._new_indexes() for _ in rows]
            self.tokens = 0
        else:
            some = self._n_coded
            before, self._coded = self._coded, []
            taken: set[int] = set()
            for row in rows.tolist():
                heads = before[row]
                if row in taken:
                    heads = [self._room() for _ in heads]
                    for new, old in zip(heads, before[row], strict=True):
                        for target, source in zip(new[:3], old[:3], strict=True):
                            target[:some] = source[:some]
                taken.add(row)
                self._coded.append(heads)

    def learn(self, queries: Tensor) -> None:
        """Keeps some of a chunk's queries, where the index learns from them. Waits for the device.

        Args:
            queries: [B, H_q, Q, D].
        """
        batch, heads, count, dim = queries.shape
        groups = heads // self.shape.kv_heads
        wanted = -(-LEARNED // groups)
        if not self.learns or (self._learned is not None and count < wanted):
            return
        some = queries[:, :, -wanted:].float().cpu().reshape(batch, self.shape.kv_heads, -1, dim)
        self._learned = some.numpy()

    def extend_later(self, pool: Tensor, pages: Ids, first: list[int], written: torch.cuda.Event | None) -> None:  # fmt: skip
        """Begins to index what `extend` would, once it is written. Nothing for an index that learns from queries.

        Args:
            pool: As in `extend`, as the next two.
            pages: Likewise.
            first: Likewise.
            written: The event behind the last copy to a host page.
        """
        if self.learns:
            return
        self.settle()

        def later() -> None:
            if written is not None:
                written.synchronize()
            self._extend(pool, pages, first)

        self._building = self._shared.background.submit(later)

    def extend(self, pool: Tensor, pages: Ids, first: list[int]) -> None:
        """Indexes the tokens of pages that are new. They have to be written.

        Args:
            pool: [pages, P, H_kv, D + D_v] in host memory.
            pages: [B, blocks], those of every sequence.
            first: Of each sequence, the first token that is no padding.
        """
        self.settle()
        self._extend(pool, pages, first)

    def _extend(self, pool: Tensor, pages: Ids, first: list[int]) -> None:
        self._pages, self._first = pages, first
        count = min(pages.shape[1] * self._page, self._capacity)
        if count <= self.tokens:
            return
        heads, rows = self.shape.kv_heads, self._rows(pool)
        if self._coded:
            start, stop = self._n_coded, count // BLOCK
            if stop > start:
                # Many small tasks, so that threads end together: a piece is of one head.
                each = max(
                    1,
                    -(
                        -(stop - start)
                        * pages.shape[0]
                        * heads
                        // (8 * self._shared.workers.threads)
                    ),
                )
                cuts = range(start, stop, each)

                def encode(i: int, worker: int) -> None:
                    at, a = divmod(i, len(cuts))
                    row, head = divmod(at, heads)
                    dims = self.shape.key_dim, self.shape.value_dim
                    scratch = self._shared.scratch(worker, 1, BLOCK * dims[0], *dims, 1)
                    b = min(cuts[a] + each, stop)
                    encode_blocks(rows(row, head), self._coded[row][head], cuts[a], b, scratch)

                self._shared.workers.run(encode, pages.shape[0] * heads * len(cuts))
            self._n_coded = stop
        else:

            def add(i: int, _: int) -> None:
                row, head = divmod(i, heads)
                index = self._indexes[row][head]
                keys = gathered(rows(row, head), self.tokens, count)
                if self.shape.dtype != torch.float32:
                    keys = keys.astype(np.float16)
                if len(index) or self._learned is None:
                    index.add(keys)
                else:
                    index.build(keys, self._learned[row, head])

            self._shared.workers.run(add, pages.shape[0] * heads)
        self.tokens = count

    def attend(self, query: Tensor, pool: Tensor, found: Found, *, scale: float, softcap: float | None) -> None:  # fmt: skip
        """Finds the tokens that matter most, and attends to them.

        Args:
            query: float32 [B, H_q, D], in host memory.
            pool: As in `extend`.
            found: Written.
            scale: Factor on the dot products.
            softcap: As in `offload.kernels.attend`.
        """
        self.settle()
        began = time.perf_counter()
        heads, k = self.shape.kv_heads, self.settings.tokens
        batch, n_queries = query.shape[:2]
        groups = n_queries // heads
        queries: Floats = (query * scale).view(batch, heads, groups, -1).numpy()
        out = found.out.view(batch, heads, groups, -1).numpy()
        lse = found.lse.view(batch, heads, groups).numpy()
        ids = found.tokens.numpy()
        rows, dims = self._rows(pool), (self.shape.key_dim, self.shape.value_dim)
        cap, over = softcap or 0.0, max(OVERFETCH, groups)

        def task(i: int, worker: int) -> None:
            row, head = divmod(i, heads)
            scratch = self._shared.scratch(worker, groups, self._capacity, *dims, over * k)
            here = rows(row, head), queries[row, head]
            target = ids[row, head], out[row, head], lse[row, head]
            first = min(self._first[row], self.tokens)
            if self._coded:
                coded = self._coded[row][head].of_first(self._n_coded)
                attend_best(
                    here[0], coded, first, self.tokens, here[1], cap, over, scratch, *target
                )
            else:
                some = self._indexes[row][head].search(here[1], min(k, self.tokens)).ids
                some = np.unique(some)
                attend_some(here[0], some[some >= first], here[1], cap, scratch, *target)
            chosen = ids[row, head]
            chosen[chosen < 0] = max(0, int(chosen[0])) if k else 0

        self._shared.workers.run(task, batch * heads)
        self.searches += 1
        self.seconds += time.perf_counter() - began

    def _rows(self, pool: Tensor) -> _Rows:
        kind = KINDS[self.shape.dtype]
        array = (pool if kind == FLOAT32 else pool.view(torch.int16)).numpy()
        if kind != FLOAT32:
            array = array.view(np.uint16)
        return _Rows(array, kind, self._pages, self.shape.key_dim)


class _Rows:
    """The rows of any KV head of any sequence."""

    def __init__(
        self, pool: NDArray[np.uint16] | Floats, kind: int, pages: Ids, key_dim: int
    ) -> None:
        self._all = pool, kind
        self._pages = pages
        self._key_dim = key_dim

    def __call__(self, row: int, head: int) -> Rows:
        return Rows(*self._all, self._pages[row], head, self._key_dim)
