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

import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.index import token_bytes
from offload.index.base import Floats, Ids, Nearest
from offload.index.crew import TASK, Crew, search_rows, spaces_of, staged
from offload.index.finders import finder
from offload.index.lanes import BLOCK
from offload.index.paged import BFLOAT16, FLOAT16, FLOAT32, Rows, Scratch
from offload.index.workers import Workers
from offload.tiers.pinned import HostBudget
from offload.tiers.rows import RowShape

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
AT_ONCE = 8192  # tokens that are indexed together while a prompt is read: fewer, and threads mostly begin and end
BACKGROUND = "offload-index"
SAMPLES = 4  # tokens of a chunk whose queries a choice is made by
SAMPLED_EVERY = 8  # how far they lie apart, the last one at the end
LEARNED = 1024  # queries of a KV head that an index learns from, where it does: of the last chunk with as many


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How the host searches.

    Attributes:
        index: A backend of `offload.index`, or `auto`. `flat` and `clusters` read rows in the pages, and `auto` is one of these; the
            others have a copy of the keys.
        tokens: Per KV head that are attended to.
        recall: Share of the best so many that `auto` has to find.
    """

    index: str
    tokens: int
    recall: float = 0.95


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
        self.crew = Crew(threads)
        self.background = ThreadPoolExecutor(1, BACKGROUND)
        self._lock = threading.Lock()
        self._scratch: dict[tuple[int, ...], list[Scratch | None]] = {}

    def scratch(self, worker: int, *sizes: int) -> Scratch:
        """What a thread works with, made when it first asks.

        Args:
            worker: Which thread, or a number below that of threads: several may ask for the same.
            *sizes: Arguments of `Scratch.of`.
        """
        with self._lock:
            there = self._scratch.get(sizes)
            if there is None:
                for other in [*self._scratch]:
                    if (other[0], *other[2:]) == (sizes[0], *sizes[2:]):
                        del self._scratch[other]  # of another number of tokens
                there = self._scratch[sizes] = [None] * self.workers.threads
            made = there[worker]
            if made is None:
                made = there[worker] = Scratch.of(*sizes)
        return made

    def close(self) -> None:
        """Ends the threads, once what they have begun is over."""
        # Not by itself, where the garbage collector calls this within it.
        own = threading.current_thread().name.startswith(BACKGROUND)
        self.background.shutdown(wait=not own)
        self.workers.close()
        self.crew.close()
        self._scratch.clear()

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
        self, shape: RowShape, settings: SearchSettings, shared: Searchers, *, batch: int, blocks: int, page: int,
        host: HostBudget, nearest: Nearest | None = None,
    ) -> None:  # fmt: skip
        """An index without tokens.

        Args:
            shape: Of the rows.
            settings: How it searches.
            shared: With the other layers.
            batch: Sequences.
            blocks: Pages of each sequence that there may be.
            page: Tokens of a page.
            host: What the index is charged to.
            nearest: What a `graph` is built with.
        """
        self.shape = shape
        self.settings = settings
        self.tokens = self._begun = 0
        self.searches = 0
        self.seconds = 0.0
        self._shared = shared
        self._page = page
        self._capacity = blocks * page
        self._pages: Ids = np.zeros((batch, 0), np.int64)
        self._first = [0] * batch  # tokens before it are padding
        self._building: Future[None] | None = None
        self._abandoned = False
        self._host = host
        self._charged = 0
        self._asked: _Asked | None = None
        self._learned: Floats | None = None  # [B, H_kv, n, D], the newest queries of the prompt
        self._samples: Tensor | None = None  # [B, H_q, S, D], some of them, where they choose
        self._choose_at = 0  # tokens from which on they do
        self._finders = [
            [
                finder(
                    settings.index,
                    self._capacity,
                    shape.key_dim,
                    tokens=settings.tokens,
                    recall=settings.recall,
                    nearest=nearest,
                )
                for _ in range(shape.kv_heads)
            ]
            for _ in range(batch)
        ]

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
        return sum(finder.nbytes for heads in self._finders for finder in heads)

    def reset_stats(self) -> None:
        """Begins to count anew."""
        self.searches, self.seconds = 0, 0.0

    def truncate(self, columns: int) -> None:
        """Forgets pages from column `columns` on: others may come in their place."""
        self.settle(quietly=True)  # what was not indexed is when a step is next published
        self._asked = None
        tokens = columns * self._page
        if tokens < self.tokens:
            self.tokens = tokens
            self._choose_at = min(self._choose_at, 2 * tokens)
        self._begun = self.tokens
        # Where indexing failed, some heads may have more than all have.
        for heads in self._finders:
            for one in heads:
                one.truncate(tokens)

    def select_sequences(self, rows: Ids) -> None:
        """Makes sequence i the former sequence rows[i]. Sequences share what they have until one of them grows."""
        self.settle(quietly=True)
        self._asked = None
        if self._learned is not None:
            self._learned = self._learned[rows]
        if self._samples is not None:
            self._samples = self._samples[torch.from_numpy(rows).to(self._samples.device)]
        self._first = [self._first[row] for row in rows]
        self._finders = [self._finders[row] for row in rows.tolist()]
        # A copy may be without keys: the next `extend` asks every finder.
        self.tokens = self._begun = 0

    def learn(self, queries: Tensor) -> None:
        """Keeps some of a chunk's queries. Where the index learns from them this waits for the device; where they choose it, not.

        Args:
            queries: [B, H_q, Q, D].
        """
        if self.settings.index == "auto" and queries.shape[2] >= SAMPLES * SAMPLED_EVERY:
            # A copy of a few, which nobody waits for.
            self._samples = queries.detach()[:, :, SAMPLED_EVERY - 1 - SAMPLES * SAMPLED_EVERY :: SAMPLED_EVERY].clone()  # fmt: skip
        batch, heads, count, dim = queries.shape
        groups = heads // self.shape.kv_heads
        wanted = -(-LEARNED // groups)
        if not self.learns or (self._learned is not None and count < wanted):
            return
        some = (
            queries.detach()[:, :, -wanted:]
            .float()
            .cpu()
            .reshape(batch, self.shape.kv_heads, -1, dim)
        )
        self._learned = some.numpy()

    def extend_later(self, pool: Tensor, pages: Ids, first: list[int], written: torch.cuda.Event | None) -> None:  # fmt: skip
        """Begins to index what `extend` would, once it is written and there is enough of it. Nothing for an index that learns from queries.

        Args:
            pool: As in `extend`, as the next two.
            pages: Likewise.
            first: Likewise.
            written: The event behind the last copy to a host page.
        """
        if self.learns:
            return
        self._charge(pages)
        count = self._count(pages)
        if count < self._begun + AT_ONCE:
            return
        self.settle()
        self._begun = count

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
        self._charge(pages)
        self._extend(pool, pages, first)
        self._begun = self.tokens
        self._choose(pool)

    def _choose(self, pool: Tensor) -> None:
        """Has every finder choose how it searches, by what was kept of the prompt's queries."""
        samples = self._samples
        if samples is None or self.tokens < self._choose_at:
            return
        heads, rows, groups = self.shape.kv_heads, self._rows(pool), samples.shape[1] // self.shape.kv_heads  # fmt: skip
        queries = samples.float().cpu().unflatten(1, (heads, groups)).numpy()

        def choose(i: int, worker: int) -> None:
            row, head = divmod(i, heads)
            of_row = min(self._first[row], self.tokens)
            self._finders[row][head].choose(rows(row, head), of_row, self.tokens, queries[row, head])  # fmt: skip

        self._asked = None
        self._shared.workers.run(choose, len(self._finders) * heads)
        self._choose_at = 2 * self.tokens

    @property
    def chosen(self) -> Counter[str]:
        """What the finders of heads search with, and how many do."""
        return Counter(one.name for of_row in self._finders for one in of_row)

    def _count(self, pages: Ids) -> int:
        """Tokens of a sequence in these pages that there is room for."""
        return min(int(pages.shape[1]) * self._page, self._capacity)

    def _charge(self, pages: Ids) -> None:
        """Takes what an index of these pages needs from the host's budget.

        Raises:
            BudgetError: There is not as much.
        """
        tokens = self._count(pages) * pages.shape[0]
        each = self.shape.kv_heads * token_bytes(self.settings.index, self.shape.key_dim)
        more = tokens * each - self._charged
        if more > 0:
            self._host.require(more)
            self._host.held += more
            self._charged += more

    def abandon(self) -> Future[None] | None:
        """Ends the index, without waiting. Returns what is still being done with the pages, or None.

        The garbage collector may call this anywhere, within the thread that indexes too.
        """
        self._abandoned = True
        self._host.held -= self._charged
        self._charged = 0
        building = self._building
        return None if building is None or building.done() else building

    def _extend(self, pool: Tensor, pages: Ids, first: list[int]) -> None:
        self._pages, self._first, self._asked = pages, first, None
        count = self._count(pages)
        if count <= self.tokens:
            return
        for i, of_row in enumerate(self._finders):
            if any(of_row is other for other in self._finders[:i]):
                self._finders[i] = [one.copy() for one in of_row]
        heads, rows = self.shape.kv_heads, self._rows(pool)
        dims = self.shape.key_dim, self.shape.value_dim

        def take_in(i: int, worker: int) -> None:
            if self._abandoned:
                return
            row, head = divmod(i, heads)
            learned = None if self._learned is None else self._learned[row, head]
            scratch = self._shared.scratch(worker, 1, BLOCK * dims[0], *dims, 1)
            self._finders[row][head].extend(rows(row, head), count, scratch, learned)

        self._shared.workers.run(take_in, pages.shape[0] * heads)
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
        if self._finders[0][0].compiled:
            if query.dtype != torch.float32 or not (query.is_contiguous() and pool.is_contiguous()):
                raise ValueError("a search reads contiguous float32 queries, and contiguous pages")
            key = (query.data_ptr(), pool.data_ptr(), found.all.data_ptr(), scale, softcap)
            if self._asked is None or self._asked.key != key:
                self._asked = self._ask(query, pool, found, key)
            self._shared.crew.run(self._asked.batches, self._asked.spaces)
        else:
            self._attend_each(query, pool, found, scale, softcap or 0.0)
        self.searches += 1
        self.seconds += time.perf_counter() - began

    def _sizes(self, groups: int) -> tuple[int, ...]:
        """Of a scratch for a search, as `Scratch.of` takes them."""
        one, k = self._finders[0][0], self.settings.tokens
        dims = self.shape.key_dim, self.shape.value_dim
        return groups, one.scored(self._capacity, groups, k), *dims, one.candidates(groups, k)

    def _ask(self, query: Tensor, pool: Tensor, found: Found, key: tuple[Any, ...]) -> _Asked:
        """The tasks of a search: the same for every token until the index grows."""
        batch, n_queries, dim = query.shape
        heads, k, shared = self.shape.kv_heads, self.settings.tokens, self._shared
        groups, threads = n_queries // heads, shared.crew.threads
        rows = self._rows(pool)
        scratches = [shared.scratch(n, *self._sizes(groups)) for n in range(threads)]
        tasks = np.zeros(batch * heads, TASK)
        for i, task in enumerate(tasks):
            row, head = divmod(i, heads)
            search_rows(task, rows(row, head))
            task["groups"] = groups
            task["first"], task["count"] = min(self._first[row], self.tokens), self.tokens
            task["query_at"] = query.data_ptr() + 4 * i * groups * dim
            task["ids_at"], task["k"] = found.tokens.data_ptr() + 4 * i * k, k
            task["out_at"] = found.out.data_ptr() + 4 * i * groups * self.shape.value_dim
            task["lse_at"] = found.lse.data_ptr() + 4 * i * groups
            task["scale"], task["softcap"] = key[3], key[4] or 0.0
            self._finders[row][head].describe(task)
        # Heads that are fewer than half of the threads are shared out among them.
        parts = threads // len(tasks)
        batches = staged(tasks, parts) if parts > 1 else [tasks]
        return _Asked(key, batches, spaces_of(scratches), (rows, scratches))

    def _attend_each(
        self, query: Tensor, pool: Tensor, found: Found, scale: float, softcap: float
    ) -> None:
        """What `attend` does, for finders that are not compiled."""
        heads = self.shape.kv_heads
        batch, n_queries = query.shape[:2]
        groups = n_queries // heads
        queries: Floats = (query.detach() * scale).view(batch, heads, groups, -1).numpy()
        out = found.out.view(batch, heads, groups, -1).numpy()
        lse = found.lse.view(batch, heads, groups).numpy()
        ids = found.tokens.numpy()
        rows, sizes = self._rows(pool), self._sizes(groups)

        def attend(i: int, worker: int) -> None:
            row, head = divmod(i, heads)
            chosen = ids[row, head]
            self._finders[row][head].attend(
                rows(row, head), min(self._first[row], self.tokens), self.tokens, queries[row, head], softcap,
                self._shared.scratch(worker, *sizes), chosen, out[row, head], lse[row, head],
            )  # fmt: skip
            chosen[chosen < 0] = max(0, int(chosen[0]))

        self._shared.workers.run(attend, batch * heads)

    def _rows(self, pool: Tensor) -> _Rows:
        kind = KINDS[self.shape.dtype]
        array = (pool if kind == FLOAT32 else pool.view(torch.int16)).numpy()
        if kind != FLOAT32:
            array = array.view(np.uint16)
        return _Rows(array, kind, self._pages, self.shape.key_dim)


class _Asked(NamedTuple):
    """A search, as tasks of the crew.

    Attributes:
        key: Of what it was made; another one is another search.
        batches: `TASK` [n], one after the other.
        spaces: Of the scratches.
        kept: What the addresses belong to.
    """

    key: tuple[Any, ...]
    batches: list[NDArray[Any]]
    spaces: NDArray[Any]
    kept: tuple[Any, ...]


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
