"""How does one layer make a token over some of its tokens only? Those in the window, and those that weighed most lately.

Sparse window attention (ALISA, arXiv 2403.17312, algorithm 1), per KV head. All tokens that left the window stay on the host; a step
attends to a share of them, of which the device keeps some rows:

    query ─► window and new token ───────────┐
      ├────► chosen rows on the device ──────┼─► what each of them weighed ─► sums
      └────► chosen rows on the host ────────┴─► combine ─► output

Which rows are on the host is known before the step: they come in pieces through two buffers, one while the other is attended to, and
the last piece of a layer is followed by the first one of the next.

The choice is made where it can change: when tokens have left the window. Until then nothing does, since the sums of tokens that are
attended to never fall behind those that are not: all fade alike, and only what is attended to is added to. So between two evictions
a step costs what it attends to, and at an eviction the rows that are newly chosen are copied, each once. What a prompt's tokens
weigh is what its last queries give them.

On a CPU the references compute the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from offload.graph import by_host
from offload.kernels import reference
from offload.kernels.chosen import MOST_PLACED, attend_chosen, fetch_rows, place, weigh
from offload.kernels.combine import Partials, combine, empty_partials
from offload.kernels.reference import Part
from offload.kernels.window import attend_window
from offload.scheduler.window import SparseWindow, learned
from offload.scheduler.window import splits as splits_of
from offload.tiers.path import Published, StepMemory, StepPath
from offload.tiers.rows import RowShape
from offload.tiers.search import Found

_WEIGHED_TOGETHER = (
    2**21
)  # weights that a prompt's last queries give, of some tokens at a time: 8 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseSettings:
    """Which tokens are attended to.

    Attributes:
        window: The share of all tokens, and what the window has of it.
        most: Tokens per KV head that are chosen beside it, at most.
        near: Of these, rows that the device keeps.
        staged: Of the others, rows that come together, while those before them are attended to.
        decay: What a step multiplies sums of weights with.
    """

    window: SparseWindow
    most: int
    near: int
    staged: int
    decay: float

    def __post_init__(self) -> None:
        """Checks the numbers."""
        assert 0 <= self.near <= self.most
        assert self.staged or self.near == self.most, "rows on the host come in pieces"

    @property
    def far(self) -> int:
        """Chosen tokens that are read on the host."""
        return self.most - self.near

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Where each piece of them begins, and how many it has."""
        starts = range(self.near, self.most, max(1, self.staged))
        return [(first, min(self.staged, self.most - first)) for first in starts]


@dataclass(slots=True)
class _Learned:
    """Queries of a prompt's last tokens.

    Attributes:
        queries: [B, H_q, m, D].
        lse: float32 [B, H_q, m], of their attention over all tokens.
        stop: Position behind the last of them.
        scale: Factor on the dot products.
        softcap: As in `offload.kernels.attend`.
    """

    queries: Tensor
    lse: Tensor
    stop: int
    scale: float
    softcap: float | None


class _Memory:
    """What a step of one kind of layer writes and the next layer's step writes again."""

    @torch.inference_mode(False)
    def __init__(
        self, batch: int, heads: int, shape: RowShape, splits: int, settings: SparseSettings, rows: int, device: torch.device
    ) -> None:  # fmt: skip
        programs, staged = batch * shape.kv_heads, max(1, settings.staged)
        # As if all were near, and as if none was: layers that differ in that share it.
        slots = splits + splits_of(settings.most, programs)
        slots += -(-settings.most // staged) * splits_of(staged, programs)
        self.partials: Partials = empty_partials(batch, heads, slots, shape.value_dim, device)
        self.scores = torch.full((batch, heads, rows + settings.most), -torch.inf, device=device)
        self.fetched: Tensor | None = None  # rows that the host gathers, pinned


class _Staging:
    """Rows of chosen tokens on the host: while some are attended to, the next ones come, at last the next layer's first.

    Attributes:
        rows: Two times the rows of a piece.
        whose: Of which layer a piece is there when its step begins, and of which version of its choice; None for none.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, shape: RowShape, count: int, device: torch.device) -> None:
        size = batch * shape.kv_heads * count * shape.width
        self.rows = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2)]
        self.whose: list[tuple[int, int] | None] = [None, None]


class SparsePath(StepPath):
    """The device path of one layer that attends to some of its tokens.

    Attributes:
        settings: As given.
        pool: [pages, P, H_kv, D + D_v]: host pages that kernels can read, as published; None where there are none.
    """

    _reads_starts = True

    @torch.inference_mode(False)
    def __init__(
        self,
        shape: RowShape,
        settings: SparseSettings,
        memory: StepMemory,
        *,
        batch: int,
        blocks: int,
        slots: int,
        page: int,
        device: torch.device,
    ) -> None:
        """Makes room on the device.

        Args:
            shape: Of the rows.
            settings: Which tokens.
            memory: Scratch, shared with the other layers.
            batch: Sequences.
            blocks: Blocks on the host that there is room for.
            slots: Slots of the window, the tail's too.
            page: Tokens of a slot.
            device: Where.
        """
        super().__init__(
            shape, memory, batch=batch, blocks=blocks, slots=slots, page=page, device=device
        )
        self.settings = settings
        self._blocks = blocks
        self._window_rows = slots * page
        self._learned: _Learned | None = None
        self._places = torch.zeros(2, dtype=torch.int32, device=device)
        self._first = 0
        self._chosen_of = -1  # blocks among which the choice was made; -1: there is none
        self._steps_before = 0  # of those that `steps` does not count any more
        self._settled_at = 0  # steps up to which sums have faded
        self._next: weakref.ref[SparsePath] | None = None
        self._share_left = torch.zeros((), device=device)
        self.pool: Tensor | None = None
        self._version = 0  # of what is published
        self._make(batch)

    def _make(self, batch: int) -> None:
        shape, most = self.shape, self.settings.most
        tokens = self._blocks * self._page + self._window_rows
        like = (batch, shape.kv_heads)
        # By position: tokens keep their sums wherever they go.
        self._sums = torch.zeros((*like, tokens), device=self._device)
        self._ids = torch.full((*like, most), -1, dtype=torch.int32, device=self._device)
        self._ids_on_host: Tensor | None = None
        self._rows = torch.zeros(
            (*like, self.settings.near, shape.width), dtype=shape.dtype, device=self._device
        )

    # What it holds.

    @property
    def blocks(self) -> int:
        """Blocks on the host that there is room for."""
        return self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes on the device of the sums of tokens on the host, and of the page table."""
        return self._table.nbytes + self._sums[:, :, self._window_rows :].nbytes

    @property
    def row_cache_nbytes(self) -> int:
        """Bytes on the device of chosen rows and of their numbers, and the sums of the window."""
        return self._rows.nbytes + self._ids.nbytes + self._sums[:, :, : self._window_rows].nbytes

    @property
    def chosen(self) -> Tensor:
        """int32 [B, H_kv, k]: tokens on the host that steps attend to, those with a row on the device first; -1 for none."""
        return self._ids

    def bad_block(self, blocks: int) -> int | None:
        """None: rows are read as they are."""
        return None

    # What its steps left.

    def reset_stats(self) -> None:
        """Begins to add up anew."""
        self._steps_before += self.steps
        super().reset_stats()

    def masses(self) -> Tensor:
        """Zeros: nothing answers for a token but its row."""
        return torch.zeros(2)

    def left_out(self) -> float:
        """Share of all weights that the last choice left out, of the prompt's last queries."""
        return float(self._share_left)

    def error_estimate(self) -> float:
        """NaN: nothing is known of the values that are left out."""
        return math.nan

    def selected_bytes(self) -> tuple[int, int]:
        """Bytes of chosen rows that a step attends to, and how many of them are read on the host."""
        row = self.shape.width * self.shape.dtype.itemsize
        near = self.settings.near
        chosen, far = (int((ids >= 0).sum()) for ids in (self._ids, self._ids[:, :, near:]))
        return chosen * row, far * row

    # Changes, outside of any graph.

    def append(self, rows: Tensor, first_block: int) -> None:
        """Nothing: what is chosen of them is read on the host."""

    def forget_table(self, columns: int) -> None:
        """Columns may mean other pages, and tokens other rows, than those that were published.

        Args:
            columns: The first ones, which hold what they held.
        """
        super().forget_table(columns)
        self._forget_choice()

    def _forget_choice(self) -> None:
        self._ids.fill_(-1)
        self._chosen_of = -1

    def select_sequences(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""
        same = rows.numel() == self.lengths.numel() - 1
        super().select_sequences(rows)
        sums = self._sums.index_select(0, rows)
        if self._learned is not None:
            said = self._learned
            said.queries, said.lse = (t.index_select(0, rows) for t in (said.queries, said.lse))
        if same:
            self._sums.copy_(sums)
        else:
            self._make(rows.numel())
            self._sums = sums

    @property
    def is_learning(self) -> bool:
        """Whether queries of a prompt are to be asked what its tokens weigh: `weigh_keys` for all, before the next `publish`."""
        return self._learned is not None and self._blocks > 0

    def learn(
        self, query: Tensor, lse: Tensor, stop: int, *, scale: float, softcap: float | None
    ) -> None:
        """Takes note of what a prompt's last queries attended with; see `StepPath.learn`."""
        if not self._blocks:
            return
        self._settle()
        past = stop - query.shape[2]
        self._sums[:, :, past:] = 0.0  # of tokens that were taken back
        self._sums.mul_(self.settings.decay ** query.shape[2])
        said, most = self._learned, learned(query.shape[0])
        last, of_last = query[:, :, -most:].detach(), lse[:, :, -most:]
        if said is not None and said.stop == past and last.shape[2] < most:
            last = torch.cat([said.queries, last], 2)[:, :, -most:]
            of_last = torch.cat([said.lse, of_last], 2)[:, :, -most:]
        self._learned = _Learned(last.clone(), of_last.clone(), stop, scale, softcap)

    def weigh_keys(self, keys: Tensor, positions: Tensor) -> None:
        """Adds what tokens weigh to the queries that were learned; see `StepPath.weigh_keys`."""
        said = self._learned
        assert said is not None
        n_queries = said.queries.shape[2]
        own = torch.arange(said.stop - n_queries, said.stop, device=self._device)
        padding = self._memory.padding
        groups = said.queries.shape[1] // keys.shape[1]
        together = max(self._page, _WEIGHED_TOGETHER // said.lse.numel())
        for at in range(0, keys.shape[2], together):
            some, where = (t[..., at : at + together] for t in (keys.transpose(2, 3), positions))
            queries = said.queries.unflatten(1, (-1, groups)).flatten(2, 3)
            scores = (queries @ some).float().unflatten(2, (groups, -1)).flatten(1, 2) * said.scale
            if said.softcap is not None:
                scores = said.softcap * torch.tanh(scores / said.softcap)
            seen = (where <= own[:, None])[None, None]
            if padding is not None:
                seen = seen & (where >= padding[:, None])[:, None, None]
            found = reference.weights(
                scores.masked_fill(~seen, -torch.inf), said.lse, kv_heads=keys.shape[1]
            )
            self._sums[:, :, where] += found

    def _take_blocks(self, there: Published) -> None:
        if not self._blocks:
            return
        self._settle()
        self._sums[:, :, there.tokens :] = 0.0  # of tokens that were taken back
        self._first = there.first_token
        n_rows = there.tokens - there.blocks * self._page
        self._places.copy_(self._memory.on_device(np.asarray([self._first, n_rows], np.int32)))
        self.pool = there.pool if there.pinned else None
        self._version += 1
        if there.pool is not None and (
            there.blocks != self._chosen_of or self._learned is not None
        ):
            self._choose(there, there.pool)
        self._learned = None

    def _settle(self) -> None:
        """Lets all sums fade by the steps since they were counted last, which kernels have added the more for."""
        now = self._steps_before + self.steps
        if now > self._settled_at:
            self._sums.mul_(self.settings.decay ** (now - self._settled_at))
        self._settled_at = now

    def _choose(self, there: Published, pool: Tensor) -> None:
        """Chooses among the host's tokens anew, and fetches rows that are new on the device."""
        blocks, tokens = there.blocks, there.tokens
        here = slice(self._first, self._first + blocks * self._page)
        sums = self._sums[:, :, here]
        n = sums.shape[-1]
        self._chosen_of = blocks
        near = self.settings.near
        k = min(n, self.settings.most, self.settings.window.chosen(tokens))
        order = sums
        if self._hidden is not None:
            places = torch.arange(n, device=self._device)
            order = sums.masked_fill((places < self._hidden[:, None])[:, None], -1.0)
        best, at = order.topk(k, dim=-1)
        if self._learned is not None:
            everything = self._sums.sum((1, 2))
            left = sums.sum((1, 2)) - best.clamp(min=0.0).sum((1, 2))
            self._share_left = (left / everything.clamp(min=1e-30)).clamp(min=0.0).mean()
        wanted = torch.full_like(self._ids, -1)
        wanted[:, :, :k] = torch.where(best < 0.0, -1, at).int()
        before = self._ids.clone()
        self._ids.copy_(wanted)
        if near:
            if self.has_kernels and near <= MOST_PLACED:
                place(self._ids, before, count=near)
            else:
                self._ids[:, :, :near] = _in_place(before[:, :, :near], wanted[:, :, :near], n)
            self._fetch(before, pool, pinned=there.pinned)
        self._ids_on_host = None

    def _fetch(self, before: Tensor, pool: Tensor, *, pinned: bool) -> None:
        """Copies the rows of tokens that were not chosen before."""
        near = self.settings.near
        if self.has_kernels and pinned:
            fetch_rows(self._rows, pool, self._table, self._ids, first=0, count=near, before=before)
            return
        ids = self._ids[:, :, :near]
        fresh = reference.gather(pool, self._table.cpu(), ids.cpu()).to(self._device)
        changed = ((ids != before[:, :, :near]) & (ids >= 0)).unsqueeze(-1)
        self._rows.copy_(torch.where(changed, fresh, self._rows))

    # One step.

    def _scratch(self, batch: int, heads: int) -> _Memory:
        """What steps write, shared with layers of the same kind."""
        shape, settings = self.shape, self.settings
        kind = ("sparse", heads, shape, self._window_rows, settings.most, settings.staged)
        make = partial(
            _Memory, batch, heads, shape, self._splits, settings, self._window_rows, self._device
        )
        return self._memory.made(kind, (batch, self._splits), make)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Tensor,
        pool: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        gather: Callable[[Tensor, Tensor], None] | None = None,
        search: Callable[[Tensor, Found], None] | None = None,
    ) -> Tensor:
        """Attends with one new token per sequence to window, chosen tokens and itself; see `StepPath.step`."""
        if not self.has_kernels:
            return self._reference_step(query, key, value, window, pool, scale, softcap, sink_logits)  # fmt: skip
        batch, heads = query.shape[:2]
        memory = self._scratch(batch, heads)
        beside, copies = self._memory.beside
        main = torch.cuda.current_stream(self._device)
        near = self.settings.near
        is_far = pool is not None and self.settings.far > 0
        gathered = self._gathered(memory, gather) if is_far and gather is not None else None
        attend = partial(
            attend_chosen, query, ids=self._ids, partials=memory.partials, scores=memory.scores,
            key_dim=self.shape.key_dim, scale=scale, softcap=softcap,
        )  # fmt: skip
        programs, slot = batch * self.shape.kv_heads, self._splits
        beside.wait_stream(main)
        if is_far:
            n_splits = splits_of(self.settings.staged, programs)
            for rows, first, count in self._pieces(batch, gathered, beside, copies):
                with torch.cuda.stream(beside):
                    attend(
                        rows=rows, first=first, count=count, first_slot=slot, splits=n_splits,
                        first_score=self._window_rows + first,
                    )  # fmt: skip
                slot += n_splits
        attend_window(
            query, key, value, window, self.lengths[:1], memory.partials,
            scale=scale, splits=self._splits, softcap=softcap, padding=self._memory.padding, starts=self._starts,
            scores=memory.scores if self._blocks else None,
        )  # fmt: skip
        if pool is not None and near:
            n_splits = splits_of(near, programs)
            attend(
                rows=self._rows, first=0, count=near, first_slot=slot, splits=n_splits, first_score=self._window_rows,
            )  # fmt: skip
            slot += n_splits
        rest = memory.partials.lse[:, :, slot:]
        if rest.numel():  # what another layer, or an earlier step, has left there
            rest.fill_(-torch.inf)
        main.wait_stream(beside)
        if self._blocks:
            weigh(
                memory.partials, memory.scores, self._sums, window_rows=self._window_rows, n_rows=self.lengths[:1],
                starts=self._starts, page=self._page, ids=self._ids, places=self._places,
                decay=self.settings.decay, sink_logits=sink_logits,
            )  # fmt: skip
        out = torch.empty_like(query[..., :1].expand(-1, -1, self.shape.value_dim), memory_format=torch.contiguous_format)  # fmt: skip
        combine(memory.partials, out, sink_logits=sink_logits, counter=self.lengths[:1])
        return out

    def precede(self, path: SparsePath) -> None:
        """Says whose step comes after this one's: rows that it reads on the host then come while this one computes.

        Args:
            path: Of the next layer of the same kind.
        """
        self._next = weakref.ref(path)

    def _pieces(
        self, batch: int, gathered: Tensor | None, beside: torch.cuda.Stream, copies: torch.cuda.Stream
    ) -> Iterator[tuple[Tensor, int, int]]:  # fmt: skip
        """Rows of chosen tokens on the host, [B, H_kv, count, D + D_v] with their first place and count.

        Each is to be attended to on `beside`, which has waited for it, before the next one is asked for: that comes meanwhile.

        Args:
            batch: Sequences.
            gathered: All of them by way of the host, where kernels cannot read its pages.
            beside: Where they are attended to.
            copies: Where they come.
        """
        pieces, near = self.settings.pieces, self.settings.near
        if gathered is not None:
            for first, count in pieces:
                yield gathered[:, :, first - near : first - near + count], first, count
            return
        kind = ("staged", self.shape, self.settings.staged)
        make = partial(_Staging, batch, self.shape, self.settings.staged, self._device)
        staging = self._memory.made(kind, (batch,), make)
        mine = (id(self), self._version)
        at = staging.whose.index(mine) if mine in staging.whose else None
        if at is None:
            at = 0
            self._fetch_piece(staging.rows[at], pieces[0], beside, copies)
        staging.whose = [None, None]
        following = self._next_to_fetch()
        for i, (first, count) in enumerate(pieces):
            beside.wait_stream(copies)
            if i + 1 < len(pieces):
                self._fetch_piece(staging.rows[1 - at], pieces[i + 1], beside, copies)
            elif following is not None:
                rows = staging.rows[1 - at]
                following._fetch_piece(rows, following.settings.pieces[0], beside, copies)
                staging.whose[1 - at] = (id(following), following._version)
            yield self._piece(staging.rows[at], batch, count), first, count
            at = 1 - at

    def _next_to_fetch(self) -> SparsePath | None:
        """The next layer, if its rows go through the same memory."""
        path = None if self._next is None else self._next()
        if path is None or path.pool is None:
            return None
        same = (path.shape, path.settings.staged) == (self.shape, self.settings.staged)
        return path if same and path.settings.far else None

    def _fetch_piece(
        self, memory: Tensor, piece: tuple[int, int], behind: torch.cuda.Stream, copies: torch.cuda.Stream
    ) -> None:  # fmt: skip
        """Lets rows of this layer come, once what is queued on `behind` is done: what was there before is attended to."""
        assert self.pool is not None
        first, count = piece
        copies.wait_stream(behind)
        with torch.cuda.stream(copies):
            rows = self._piece(memory, self._ids.shape[0], count)
            fetch_rows(rows, self.pool, self._table, self._ids, first=first, count=count)

    def _piece(self, memory: Tensor, batch: int, count: int) -> Tensor:
        shape = self.shape
        size = batch * shape.kv_heads * count * shape.width
        return memory[:size].view(batch, shape.kv_heads, count, shape.width)

    def _gathered(self, memory: _Memory, gather: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Rows of chosen tokens by way of the host, for pages that could not be pinned."""
        near = self.settings.near
        far = self._ids[:, :, near:]
        if memory.fetched is None:
            size = (
                self._ids.numel() * self.shape.width
            )  # as if none was near: layers that differ in that share it
            memory.fetched = torch.zeros(size, dtype=self.shape.dtype, pin_memory=True)
        rows = memory.fetched[: far.numel() * self.shape.width].view(*far.shape, self.shape.width)
        # Copies of layers before this one are over once it is this layer's turn: they share the memory.
        done = torch.cuda.Event()

        def fetch() -> None:
            done.record()
            done.synchronize()
            if self._ids_on_host is None:
                self._ids_on_host = self._ids[:, :, near:].cpu()
            gather(self._ids_on_host, rows)

        by_host(fetch)
        return rows

    def _reference_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Tensor,
        pool: Tensor | None,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        n_rows, *_ = self.lengths.tolist()
        dim, rows = self.shape.key_dim, window.flatten(1, 2)
        rows[:, n_rows, :, :dim] = key
        rows[:, n_rows, :, dim:] = value
        self.lengths[0] += 1
        places = self._starts[:, None] + torch.arange(self._page, device=self._device)
        places = places.flatten()[: n_rows + 1]
        seen = torch.ones((query.shape[0], 1, n_rows + 1), dtype=torch.bool, device=self._device)
        if self._memory.padding is not None:
            seen = (places >= self._memory.padding[:, None])[:, None]
        held = rows[:, : n_rows + 1].transpose(1, 2)
        if pool is not None:
            near = self.settings.near
            far = reference.gather(pool, self._table, self._ids[:, :, near:]).to(query.device)
            held = torch.cat([held, self._rows, far], 2)
            chosen = self._ids >= 0
            seen = torch.cat([seen.expand(-1, held.shape[1], -1), chosen], 2)
        mask = seen.expand(-1, held.shape[1], -1).repeat_interleave(query.shape[1] // held.shape[1], 1)  # fmt: skip
        queries = query.unsqueeze(2).float()
        keys, values = held[..., :dim].float(), held[..., dim:].float()
        part: Part = reference.attend(
            queries, keys, values, scale=scale, softcap=softcap, sink_logits=sink_logits, mask=mask.unsqueeze(2)
        )  # fmt: skip
        if self._blocks:
            scores = queries @ keys.repeat_interleave(query.shape[1] // held.shape[1], 1).transpose(2, 3) * scale  # fmt: skip
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~mask.unsqueeze(2), -torch.inf)
            added = reference.weights(scores, part.lse, kv_heads=held.shape[1])
            added = added / self.settings.decay ** (n_rows + 1 - int(self._places[1]))
            of_window, of_chosen = added[..., : n_rows + 1], added[..., n_rows + 1 :]
            self._sums[:, :, places] += of_window
            if pool is not None:
                at = torch.where(self._ids < 0, 0, self._ids.long() + self._first)
                self._sums.scatter_add_(2, at, torch.where(self._ids < 0, 0.0, of_chosen))
        return part.out[:, :, 0].to(query.dtype)


def _in_place(before: Tensor, wanted: Tensor, n: int) -> Tensor:
    """The wanted tokens in such an order that those that were there stay where they are.

    Args:
        before: Integers [B, H_kv, k]: tokens below n, or -1 for none.
        wanted: Likewise, none twice.
        n: Tokens.

    Returns:
        Likewise.
    """

    def among(ids: Tensor, others: Tensor) -> Tensor:
        flags = torch.zeros((*ids.shape[:2], n + 1), dtype=torch.bool, device=ids.device)
        flags.scatter_(2, torch.where(others < 0, n, others).long(), True)
        flags[..., n] = False
        return flags.gather(2, torch.where(ids < 0, n, ids).long())

    stays = among(before, wanted)
    is_new = ~among(wanted, before) & (wanted >= 0)
    # Newcomers first, and places that are free first: the i-th goes to the i-th.
    newcomers = torch.where(is_new, wanted, -1).gather(2, is_new.int().argsort(stable=True, dim=-1, descending=True))  # fmt: skip
    places = stays.int().argsort(stable=True, dim=-1)
    found = before.gather(2, places)
    return torch.empty_like(before).scatter_(
        2, places, torch.where(stays.gather(2, places), found, newcomers)
    )
