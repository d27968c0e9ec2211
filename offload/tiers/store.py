"""How does one layer hold its keys and values over two tiers? Sinks and window on the device, the rest on the host.

The sequence, oldest token first:

    | sinks          | host pages ...      | window                    | tail          |
    | whole blocks,  | whole blocks, left  | whole blocks, the newest  | fewer than P  |
    | never leave    | the window in order | that fit the device       | tokens        |

A block is P tokens of every sequence; in memory a token of a KV head is one row, its K and V side by side
(what a zero-copy read of one token wants). Softmax does not care for the order of keys, so a block on the device
lies in whichever slot was free; used slots are a dense prefix, and the tail fills the slot behind them. So all
keys on the device are one contiguous range, one attention call. A full tail becomes a window block where it lies;
only when the window is full its oldest block is copied to a host page, and the tail into the slot of that one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import CacheError
from offload.graph import Repeats, by_host, kept, repeats, scratch
from offload.kernels.attend import attend
from offload.kernels.merge import RunningMerge
from offload.kernels.reference import Part
from offload.scheduler.layout import REBUILT_TOKENS
from offload.tiers.hidden import HiddenForm
from offload.tiers.pages import PageTable, Run
from offload.tiers.path import StepPath
from offload.tiers.pinned import HostRegion, commit_regions
from offload.tiers.rows import RowShape
from offload.tiers.search import Found, HostSearch
from offload.tiers.transfer import Chunk, HostReader, HostWriter, even_pages

# Tokens packed into rows at a time: the usual prefill chunk, so that one piece is all.
_PIECE_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """How a layer's tokens are divided between the tiers.

    Attributes:
        page: Tokens of a block, P.
        sink_blocks: Blocks that stay on the device for ever.
        window_blocks: Further blocks that the device holds.
        host_tokens: Tokens per sequence for which host memory is committed at once; more is committed
            when it is needed.
        batch: The most sequences that buffers are laid out for.
        host_blocks: Blocks that the host holds at most, where the oldest then are dropped and read again; None: no limit.
    """

    page: int
    sink_blocks: int
    window_blocks: int
    host_tokens: int
    batch: int
    host_blocks: int | None = None

    @property
    def device_blocks(self) -> int:
        """Blocks on the device, the tail not counted."""
        return self.sink_blocks + self.window_blocks


@dataclass(frozen=True, slots=True)
class Change:
    """A new phase: the first block left the device, or the first one was dropped.

    Attributes:
        tokens: Of every sequence then, those among them with which the block left; in a prefill those of its chunk.
        at: `time.perf_counter()` then.
    """

    tokens: int
    at: float


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer held at one time. Tokens that come in behind it change nothing of it; evictions and crops do.

    Attributes:
        length: Tokens of every sequence.
        slots: Of the window blocks, oldest first.
        used: Slots that held whole blocks.
        tail_length: Tokens of the tail.
    """

    length: int
    slots: tuple[int, ...]
    used: int
    tail_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _How:
    """Arguments of `attend` that are those of a layer."""

    scale: float
    softcap: float | None
    sink_logits: Tensor | None


@dataclass(frozen=True, slots=True)
class _Again:
    """What a step that is replayed has at one address.

    Attributes:
        total: Of the parts of attention.
        repeats: Where launches that add to it are captured; None where they are not.
    """

    total: Part
    repeats: Repeats | None


class LayerStore:
    """One layer's keys and values.

    Attributes:
        shape: Of the rows.
        limits: Of the tiers.
        length: Tokens of every sequence.
        busy: Between `attend`'s start and the end of its eviction.
        damaged: Tokens were being taken in when an exception came: what the layer holds is not known.
        capturing: A graph is being captured: `attend` makes the step's launches and changes nothing else.
        visible: Boolean [B, length + 1] where a replayed step is not to see all tokens; set before it, where tokens are streamed.
        written: The event behind the last copy to a host page.
        left: When the first block left the device; None while all tokens are there.
        dropped: Blocks behind the sinks that are nowhere, and are read again in every pass.
        gone: When the first of them was dropped; None before.
        path: The device path of steps of one token, or None.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        shape: RowShape,
        limits: StoreLimits,
        *,
        batch: int,
        region: HostRegion,
        reader: HostReader,
        writer: HostWriter,
        path: StepPath | None = None,
        hidden: HiddenForm | None = None,
        reread: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Allocates the device part and commits the host part.

        Args:
            shape: Of the rows.
            limits: Of the tiers.
            batch: Sequences.
            region: Host memory for the pages; owned by the caller.
            reader: Brings pages back.
            writer: Takes blocks away.
            path: The device path of steps of one token; None where every token is streamed.
            hidden: How pages hold the inputs of tokens; None where they hold keys and values. Not beside a path.
            reread: Gives keys [B, H_kv, N, D] and values [B, H_kv, N, D_v] of the first N tokens again, once a pass; None
                where none are dropped. Not beside a path.
        """
        self.shape = shape
        self.limits = limits
        self.length = 0
        self.busy = False
        self.damaged = False
        self.capturing = False
        self.visible: Tensor | None = None
        self.written: torch.cuda.Event | None = None
        self.left: Change | None = None
        self.dropped = 0
        self.gone: Change | None = None
        self._reread = reread
        assert path is None or (hidden is None and reread is None), "kernels read rows from pages"
        assert reread is not None or limits.host_blocks is None, "what is dropped has to come again"
        self._hidden = hidden
        self.page_bytes = (
            limits.page * shape.token_bytes
            if hidden is None
            else hidden.page_bytes(shape, limits.page)
        )
        self._region = region
        self._reader = reader
        self._writer = writer
        self.path = path
        self._published = False  # what the path may read is what there is
        device = region.device
        # A token's input lies behind its keys and values, so that blocks move with all they have.
        row = (shape.kv_heads + (0 if hidden is None else hidden.heads(shape)), shape.width)
        # One slot more than blocks: the tail's.
        self._window = torch.empty(
            (batch, limits.device_blocks + 1, limits.page, *row), dtype=shape.dtype, device=device
        )
        self._tail_length = 0
        self._sinks = 0  # blocks in slots [0, sinks)
        # Window blocks, oldest first; with the sinks a dense prefix.
        self._slots: deque[int] = deque()
        pages = self.initial_pages(limits, batch)
        self._table = PageTable(batch, pages)
        # Of the columns that are published.
        self._pages = torch.zeros((batch, 0), dtype=torch.int64)
        self._resident: Tensor | None = None  # a device copy of the first host columns
        self._most_rows = limits.page  # new tokens that have memory beside it
        commit_regions([(region, pages * self.page_bytes)])

    @staticmethod
    def initial_pages(limits: StoreLimits, batch: int) -> int:
        """Host pages that a new store commits."""
        return batch * -(-limits.host_tokens // limits.page)

    # What a reader asks (offload.tiers.transfer.Pages).

    @property
    def version(self) -> int:
        """Grows when a column may mean other pages."""
        return self._table.version

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self._window.shape[0])

    @property
    def columns(self) -> int:
        """Host pages of every sequence."""
        return self._table.columns

    @property
    def shared_columns(self) -> int:
        """Leading columns that all sequences share."""
        return self._table.shared_columns

    @property
    def resident_columns(self) -> int:
        """Leading columns that have a copy on the device and need not be read."""
        return 0 if self._resident is None else int(self._resident.shape[1])

    def runs(self, row: int, start: int, stop: int) -> list[Run]:
        """Contiguous pages of one sequence, none across a border of pinned memory."""
        return self._table.runs(row, start, stop, self._edges)

    def even(self, rows: int, start: int, stop: int) -> tuple[int, int] | None:
        """Where pages of several sequences begin, if equally far apart and between borders of pinned memory."""
        return self._table.even(rows, start, stop, self._edges)

    @property
    def _edges(self) -> list[int]:
        """Pages at which separately pinned memory begins."""
        return [edge // self.page_bytes for edge in self._region.edges]

    def host_view(self, run: Run) -> Tensor:
        """The bytes of a run, uint8."""
        return self._region.view(run.page * self.page_bytes, run.count * self.page_bytes)

    def is_pinned(self, run: Run) -> bool:
        """Whether the run's memory is pinned."""
        return (run.page + run.count) * self.page_bytes <= self._region.pinned

    # Sizes.

    @property
    def host_tokens(self) -> int:
        """Tokens of every sequence that are on the host."""
        return self.columns * self.limits.page

    @property
    def first_host_token(self) -> int:
        """Position of the first token on the host."""
        return (self._sinks + self.dropped) * self.limits.page

    @property
    def region(self) -> HostRegion:
        """The host memory of the pages."""
        return self._region

    @property
    def device_tokens(self) -> int:
        """Tokens of every sequence that are on the device."""
        return self.length - self.host_tokens - self.dropped * self.limits.page

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device for sinks, window, tail, resident pages, replica and cached rows."""
        return self.window_bytes + self.resident_bytes + self.replica_bytes + self.row_cache_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of sinks, window and tail."""
        return self._window.nbytes

    @property
    def replica_bytes(self) -> int:
        """Bytes of the replica of host pages."""
        return 0 if self.path is None else self.path.nbytes

    @property
    def row_cache_bytes(self) -> int:
        """Bytes of the device copy of rows that were selected lately."""
        return 0 if self.path is None else self.path.row_cache_nbytes

    @property
    def column_bytes(self) -> int:
        """Bytes of one sequence's column in the device copy of host pages."""
        return self.limits.page * self.shape.token_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the device copy of host pages."""
        return 0 if self._resident is None else self._resident.nbytes

    # One step.

    def expect(self, key: Tensor, value: Tensor) -> None:
        """Raises CacheError unless these could be the next keys and values.

        Args:
            key: [B, H_kv, Q, D].
            value: [B, H_kv, Q, D_v].
        """
        shape = self.shape
        there = (self.batch, shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype)
        asked = (key.shape[0], key.shape[1], key.shape[3], value.shape[3], key.dtype)
        if asked != there:
            raise CacheError(
                "The cache holds other sequences or another model's heads "
                "(batch, KV heads, head sizes, dtype)",
                asked=asked,
                there=there,
                change="Make a new cache for this batch: runtime.new_cache().",
            )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        visible: Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attends with new tokens to all tokens so far and to themselves, then takes them in.

        Args:
            query: [B, H_q, Q, D] of the new tokens.
            key: [B, H_kv, Q, D] likewise.
            value: [B, H_kv, Q, D_v].
            scale: Factor on the dot products.
            visible: Boolean [B, length + Q], False where a key is padding; None without padding.
            softcap: As in `offload.kernels.attend`.
            sink_logits: [H_q], likewise.

        Returns:
            [B, Q, H_q, D_v], contiguous, in the dtype of `query`.
        """
        key, value = key.detach(), value.detach()  # what is kept must not keep a graph
        how = _How(scale=scale, softcap=softcap, sink_logits=sink_logits)
        if self.capturing:
            if self.path is None:
                return self._attend_by_host(query, key, value, how)
            return self.step(query, key, value, scale=scale, softcap=softcap, sink_logits=sink_logits)  # fmt: skip
        self.busy = True
        alone = query.shape[2] == 1
        if alone and self.path is not None and self.path.can_step(visible, self.columns):
            try:
                self.before_step()
                out = self.step(
                    query, key, value, scale=scale, softcap=softcap, sink_logits=sink_logits
                )
                self.after_step()
            except BaseException:
                self._published = False
                raise
            self.busy = False
            return out
        inputs = None
        if self._hidden is not None:
            inputs, note = self._hidden.source.take()
            note(self.length)
            inputs = inputs.detach()
        return self._attend_and_take_in(query, key, value, inputs, visible, how)

    def _attend_by_host(self, query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
        """`attend` with one new token between two graphs: the host launches it, in every replay anew."""
        shape = (self.batch, 1, query.shape[1], self.shape.value_dim)
        room = partial(scratch, device=query.device)
        out = room("out", shape, query.dtype)
        total = room("sum", shape, torch.float32).transpose(1, 2)
        lse = room("lse", (self.batch, query.shape[1], 1), torch.float32)
        again = _Again(Part(total, lse), repeats())
        now = {"query": query, "key": key, "value": value}
        note: Callable[[int], None] | None = None
        if self._hidden is not None:
            now["inputs"], note = self._hidden.source.take()
        there = kept(**now)

        def attend_now() -> None:
            self.busy = True
            if note is not None:
                note(self.length)
            found = self._attend_and_take_in(
                there["query"], there["key"], there["value"], there.get("inputs"), self.visible, how,
                again,
            )  # fmt: skip
            out.copy_(found)

        by_host(attend_now)
        return out

    def _attend_and_take_in(
        self, query: Tensor, key: Tensor, value: Tensor, inputs: Tensor | None,
        visible: Tensor | None, how: _How, again: _Again | None = None,
    ) -> Tensor:  # fmt: skip
        """`attend` where every token is streamed; inputs: [B, Q, E] where pages hold these."""
        alone, held = query.shape[2] == 1, self.held(self.length)
        if alone:  # its row is where it will stay: one attention call less
            self._write_rows(self._tail, self._tail_length, key, value, inputs)
            held = replace(held, tail_length=held.tail_length + 1)
        new = None if alone else (key, value)
        out = self._attend_to_all(query, new, held, visible, how, again)
        self._take_in(key, value, inputs)
        if self.path is not None and self.path.search is not None and not alone:
            self._index_later(self.path.search, query)
        self.busy = False
        self._reader.prefetch()
        return out

    def held(self, length: int) -> Held:
        """The first tokens that the layer holds, for `look`.

        Args:
            length: How many: all, or those before the ones that came in since `make_way`.
        """
        whole, rest = divmod(length, self.limits.page)
        assert whole >= self._past, "sinks and host pages are held whole"
        slots = tuple(self._slots)[: whole - self._past]
        used = self._sinks + len(slots)
        dense = max(slots, default=self._sinks - 1) < used and (
            not rest or self._slot(whole) == used
        )
        assert dense, "what came in since does not lie behind the tokens before"
        return Held(length, slots, used, rest)

    def look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        held: Held,
        *,
        scale: float,
        visible: Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attends with tokens behind `held`, as `attend` would have then, and takes nothing in.

        Since then tokens may have come in, and none may have left the window. Steps may go on meanwhile, on another
        stream and in another thread, as long as none of them needs more of the window than there is.

        Args:
            query: [B, H_q, Q, D], Q more than one.
            key: [B, H_kv, Q, D].
            value: [B, H_kv, Q, D_v].
            held: Of `held`.
            scale: As of `attend`; likewise the further ones.
            visible: Boolean [B, held.length + Q].
            softcap: Likewise.
            sink_logits: Likewise.

        Returns:
            As `attend`.
        """
        how = _How(scale=scale, softcap=softcap, sink_logits=sink_logits)
        out = self._attend_to_all(query, (key, value), held, visible, how)
        self._reader.prefetch()
        return out

    def _attend_to_all(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor] | None,
        held: Held,
        visible: Tensor | None,
        how: _How,
        again: _Again | None = None,
    ) -> Tensor:
        """Attends to every key exactly, those on the host streamed; result and arguments as of `attend`.

        `new` are the keys and values of the new tokens, None where they are in the tail; `held` says what else there is;
        `again` is for replays of a step, where the query is at one address.
        """
        n_new, page, past = query.shape[2], self.limits.page, held.length
        if n_new > self._most_rows:
            self.drop_resident()  # a prefill: its activations need the memory
        merge = RunningMerge(None if again is None else again.total)
        sinks = how.sink_logits  # of the first part alone
        # What padding hides is another tensor in every step.
        captures = again.repeats if again is not None and visible is None else None

        def add(keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool = False) -> None:
            nonlocal sinks
            part = attend(
                query, keys, values,
                scale=how.scale, causal=causal, mask=mask, softcap=how.softcap, sink_logits=sinks,
            )  # fmt: skip
            merge.add(part)
            sinks = None

        def mask(start: int, stop: int) -> Tensor | None:
            return None if visible is None else visible[:, None, None, start:stop]

        if new is not None:
            add(*new, mask(past, past + n_new), causal=True)
        n_device = held.used * page + held.tail_length
        if n_device:
            rows = self._window.flatten(1, 2)[:, :n_device]
            add(*self._split(rows), self._device_mask(visible, held))
        first_host = self.first_host_token
        if self._reread is not None and self.dropped:
            # The sinks are read again before them, and are on the device.
            sunk = self._sinks * page
            keys, values = (part[:, :, sunk:first_host] for part in self._reread(first_host))
            add(keys, values, mask(sunk, first_host))

        def add_resident(resident: Tensor) -> None:
            rows = resident.flatten(1, 2).expand(self.batch, -1, -1, -1)
            add(*self._split(rows), mask(first_host, first_host + self.resident_columns * page))

        def add_staged(chunk: Chunk, staged: Tensor) -> None:
            if self._hidden is not None:
                for keys, values, positions in self._rebuilt(chunk, staged):
                    seen = None if visible is None else visible[:, None, None, positions]
                    add(keys, values, seen)
                    del keys, values  # or they stay while the next ones are made
                return
            rows = staged.view(self.shape.dtype).view(
                chunk.rows, -1, self.shape.kv_heads, self.shape.width
            )
            keys, values = self._split(rows.expand(self.batch, -1, -1, -1))
            add(keys, values, mask(first_host + chunk.start * page, first_host + chunk.stop * page))

        # The tail comes before: what is captured adds to a sum that is there, and has no sink logits.
        assert captures is None or sinks is None
        if self._resident is not None:
            if captures is None:
                add_resident(self._resident)
            else:
                key = self, self._resident.data_ptr(), self._resident.shape
                captures.run(key, partial(add_resident, self._resident))
        # Host pages come last: their copies need time.
        for chunk, staged in self._reader.read(self):
            if captures is None:
                add_staged(chunk, staged)
            else:
                read = 0 if self._hidden is None else self._hidden.source.addresses
                at = chunk, first_host, staged.data_ptr(), read
                captures.run(at, partial(add_staged, chunk, staged))
        all_of_it = merge.result(query.dtype)
        if new is not None and self.path is not None:
            self.path.learn(
                query, all_of_it.lse, past + n_new, scale=how.scale, softcap=how.softcap
            )
        return all_of_it.out.transpose(1, 2).contiguous()

    def _rebuilt(
        self, chunk: Chunk, staged: Tensor, columns: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys [B, H_kv, T, D], values and positions [T] of a staged chunk up to a column, some pages at a time."""
        assert self._hidden is not None
        page, count = self.limits.page, chunk.stop - chunk.start
        pages = staged.view(chunk.rows, count, self.page_bytes)
        if columns is not None:
            count = min(count, columns - chunk.start)
            pages = pages[:, :count]
        per_piece = max(1, REBUILT_TOKENS // (page * chunk.rows))
        one = (
            0 if chunk.rows < self.batch else None
        )  # columns that are shared are those of any sequence
        for at in range(0, count, per_piece):
            first = self.first_host_token + (chunk.start + at) * page
            piece = pages[:, at : at + per_piece]
            for keys, values, positions in self._hidden.read(piece, self.shape, page, first, one):
                part = [x.expand(self.batch, -1, -1, -1) for x in (keys, values)]
                del keys, values  # whoever gets them is to be the only one who holds them
                yield part.pop(0), part.pop(), positions

    # A step of one token on the device path, in three: what a captured graph replays is the middle one.

    def before_step(self) -> None:
        """Makes room for one more token and lets the device path see all there is; where tokens are streamed, `attend` does.

        Raises:
            BudgetError: No more host memory.
        """
        if self.path is None:
            return
        closes = self._tail_length + 1 == self.limits.page
        if closes and self._used == self.limits.device_blocks:
            self._make_room(self._evicted_together)
        if not (self._published and self.path.is_published):
            self._publish()

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attends with one new token and writes its row; arguments and result as of `attend`.

        Changes nothing that Python knows of: a graph may capture it.
        """
        assert self.path is not None
        out = self.path.step(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            self._window,
            self._pool() if self.columns else None,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            gather=None if self.all_pinned else self._gather,
            search=None
            if self.path.search is None
            else partial(self._search, scale=scale, softcap=softcap),
        )
        return out.unsqueeze(1)

    def _search(self, query: Tensor, found: Found, *, scale: float, softcap: float | None) -> None:
        """Attends on the host to tokens that are found there; see `HostSearch.attend`."""
        assert self.path is not None
        assert self.path.search is not None
        self.path.search.attend(query, self._pool(), found, scale=scale, softcap=softcap)

    def _gather(self, tokens: Tensor, rows: Tensor) -> None:
        """Copies rows of published tokens out of host pages.

        Args:
            tokens: Integers [B, H_kv, k], on the host; any row will do for -1.
            rows: Written: [B, H_kv, k, D + D_v], contiguous, on the host.
        """
        page, heads = self.limits.page, self.shape.kv_heads
        tokens = tokens.clamp(min=0).long()
        pages = self._pages.gather(1, (tokens // page).flatten(1)).view(tokens.shape)
        places = (pages * page + tokens % page) * heads + torch.arange(heads).view(1, -1, 1)
        pool = self._pool().flatten(0, 2)
        torch.index_select(pool, 0, places.flatten(), out=rows.flatten(0, 2))

    def after_step(self) -> None:
        """Counts the token that a step on the device path has written, and moves a full block on."""
        if self.path is None:
            return
        self.path.steps += 1
        self.length += 1
        self._tail_length += 1
        if self._tail_length == self.limits.page:
            self.damaged = True
            self._tail_length = 0
            self._close_tail()
            self._note_phase()
            self.damaged = False
            self._published = False

    def settle(self) -> None:
        """Forgets that a step was under way: an exception may have come anywhere in it."""
        self.busy = False
        self._published = False

    def _publish(self) -> None:
        assert self.path is not None
        if self.path.is_learning:
            self._show_keys(self.path)
        pages = self._column_pages()
        self._pages = torch.from_numpy(pages)
        self.path.publish(
            n_rows=self._used * self.limits.page + self._tail_length,
            blocks=self.columns,
            first_token=self.first_host_token,
            pages=pages,
            starts=self._starts(self.held(self.length)),
            written=self.written,
            pool=self._pool() if self.columns else None,
            pinned=self.all_pinned,
        )
        if self.path.search is not None and self.columns:
            if self.written is not None:
                self.written.synchronize()
            self.path.search.extend(self._pool(), pages, self.path.hidden_tokens())
        self._published = True

    def _show_keys(self, path: StepPath) -> None:
        """Lets a path weigh all keys, those on the host streamed."""
        self.drop_resident()
        held, page = self.held(self.length), self.limits.page
        n_device = held.used * page + held.tail_length
        keys, _ = self._split(self._window.flatten(1, 2)[:, :n_device])
        path.weigh_keys(keys, self._positions(held))
        for chunk, staged in self._reader.read(self):
            rows = staged.view(self.shape.dtype).view(chunk.rows, -1, *self._window.shape[3:])
            keys, _ = self._split(rows.expand(self.batch, -1, -1, -1))
            start, stop = (self.first_host_token + at * page for at in (chunk.start, chunk.stop))
            path.weigh_keys(keys, torch.arange(start, stop, device=keys.device))
        self._reader.prefetch()

    def _column_pages(self) -> NDArray[np.int64]:
        """The page of each column, [B, columns]."""
        return self._table.ids.copy()

    def _index_later(self, search: HostSearch, query: Tensor) -> None:
        """Lets the host index what has left the window, while the device goes on."""
        search.learn(query)
        if self.columns:
            # Which tokens are padding is known when the first step is published.
            no_padding = [0] * self.batch
            search.extend_later(self._pool(), self._column_pages(), no_padding, self.written)

    def _pool(self) -> Tensor:
        """Host pages as [pages, P, H_kv, D + D_v]."""
        size = self._region.committed // self.page_bytes * self.page_bytes
        return (
            self._region.view(0, size)
            .view(self.shape.dtype)
            .view(-1, self.limits.page, self.shape.kv_heads, self.shape.width)
        )

    @property
    def all_pinned(self) -> bool:
        """Whether kernels can read every host page."""
        return self._region.pinned >= self._table.capacity * self.page_bytes

    @property
    def rereads(self) -> bool:
        """Whether tokens may be dropped, and are read again."""
        return self._reread is not None

    @property
    def address(self) -> int:
        """Of the window: a graph that has captured steps is void once this changes."""
        return int(self._window.data_ptr())

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, N, H_kv, D + D_v] as keys [B, H_kv, N, D] and values [B, H_kv, N, D_v], without a copy."""
        heads_first = rows[:, :, : self.shape.kv_heads].transpose(1, 2)
        return heads_first[..., : self.shape.key_dim], heads_first[..., self.shape.key_dim :]

    @property
    def _past(self) -> int:
        """Blocks before those of the window: sinks, those that are dropped, and those on the host."""
        return self._sinks + self.dropped + self.columns

    @property
    def _used(self) -> int:
        """Slots that hold whole blocks."""
        return self._sinks + len(self._slots)

    @property
    def _tail(self) -> Tensor:
        """The slot that is being filled: [B, P, H_kv, W]."""
        return self._window[:, self._used]

    def _device_mask(self, visible: Tensor | None, held: Held) -> Tensor | None:
        """[B, 1, 1, rows] of the keys on the device, in the order in which they lie there."""
        if visible is None:
            return None
        return visible[:, None, None].index_select(-1, self._positions(held))

    def _positions(self, held: Held) -> Tensor:
        """Positions of the tokens on the device, in the order in which they lie there."""
        page, device = self.limits.page, self._window.device
        starts = torch.tensor(self._starts(held), device=device)
        positions = (starts[:, None] + torch.arange(page, device=device)).flatten()
        return positions[: held.used * page + held.tail_length]

    def _starts(self, held: Held) -> list[int]:
        """The position of the first token in each slot in use, the tail's last."""
        first = self._past  # the block after the last one on the host
        block = {slot: slot for slot in range(self._sinks)}
        block |= {slot: first + age for age, slot in enumerate(held.slots)}
        block[held.used] = first + len(held.slots)
        return [block[slot] * self.limits.page for slot in range(held.used + 1)]

    # Taking in and evicting.

    def _take_in(self, key: Tensor, value: Tensor, inputs: Tensor | None) -> None:
        """Appends the new tokens, with their inputs [B, Q, E] where pages hold these, and moves full blocks on.

        Raises:
            BudgetError: No more host memory; nothing has changed then.
        """
        self._published = False
        n_blocks = (self._tail_length + key.shape[2]) // self.limits.page
        free = self.limits.device_blocks - self._used
        if n_blocks > free:
            alone = key.shape[2] == 1  # then the tail is closed as after a step
            self._make_room(self._evicted_together if alone else n_blocks - free)
        self.damaged = True
        self._append(key, value, inputs)
        self.length += key.shape[2]
        self._note_phase()
        self.damaged = False

    def _note_phase(self) -> None:
        """Notes when tokens have left the device, and when some were dropped."""
        if not self.columns and not self.dropped:
            self.left = None
        elif self.left is None:
            self.left = Change(self.length, time.perf_counter())
        if not self.dropped:
            self.gone = None
        elif self.gone is None:
            self.gone = Change(self.length, time.perf_counter())

    def _append(self, key: Tensor, value: Tensor, inputs: Tensor | None) -> None:
        n_new, page = key.shape[2], self.limits.page
        if n_new == 1:
            self._tail_length += 1  # attend has written the row already
            if self._tail_length == page:
                self._tail_length = 0
                self._close_tail()
            return
        total = self._tail_length + n_new
        if total < page:
            self._write_rows(self._tail, self._tail_length, key, value, inputs)
            self._tail_length = total
            return
        # Blocks are formed in pieces, so that a prompt of any length (a stock `generate` feeds it whole)
        # needs a bounded copy.
        per_piece = max(1, _PIECE_TOKENS // page)
        taken = 0
        while self._tail_length + n_new - taken >= page:
            blocks = min(per_piece, (self._tail_length + n_new - taken) // page)
            n_tokens = blocks * page - self._tail_length
            rows = self._window.new_empty((self.batch, blocks * page, *self._window.shape[3:]))
            rows[:, : self._tail_length] = self._tail[:, : self._tail_length]
            piece = slice(taken, taken + n_tokens)
            of_piece = None if inputs is None else inputs[:, piece]
            self._write_rows(
                rows, self._tail_length, key[:, :, piece], value[:, :, piece], of_piece
            )
            self._tail_length = 0
            self._advance(rows.unflatten(1, (blocks, page)))
            taken += n_tokens
        rest = None if inputs is None else inputs[:, taken:]
        self._write_rows(self._tail, 0, key[:, :, taken:], value[:, :, taken:], rest)
        self._tail_length = n_new - taken

    def _write_rows(
        self, rows: Tensor, at: int, key: Tensor, value: Tensor, inputs: Tensor | None = None
    ) -> None:
        keys, values = self._split(rows[:, at : at + key.shape[2]])
        keys.copy_(key)
        values.copy_(value)
        if inputs is not None:
            behind = rows[:, at : at + key.shape[2], self.shape.kv_heads :].flatten(2)
            behind[..., : inputs.shape[-1]].copy_(inputs)

    def _close_tail(self) -> None:
        """Makes the full tail a sink or a window block: where it lies, or in the slot of the oldest one."""
        if self._sinks < self.limits.sink_blocks:
            self._sinks += 1
        elif len(self._slots) < self.limits.window_blocks:
            self._slots.append(self._used)
        else:
            self._evict_oldest()

    @property
    def _evicted_together(self) -> int:
        """Window blocks that leave when the window is full.

        Beside a device path half of them: each time takes some milliseconds of launches, between replays that take ten.
        """
        return 1 if self.path is None else max(1, len(self._slots) // 2)

    def _evict_oldest(self) -> None:
        """Makes room in a full window for the full tail, and closes the holes."""
        tail = self._used
        freed = [self._slots.popleft() for _ in range(self._evicted_together)]
        self._evict(freed, self._window[:, :0])
        kept = [*self._slots, tail]
        top = self._sinks + len(kept)  # the slots below are in use from now on
        holes = sorted(slot for slot in freed if slot < top)
        for at, slot in enumerate(kept):
            if slot >= top:
                kept[at] = holes.pop(0)
                self._window[:, kept[at]] = self._window[:, slot]
        self._slots = deque(kept)

    def make_way(self, tokens: int, keep: int) -> None:
        """Evicts, so that no block need leave the window while further tokens come in.

        Args:
            tokens: That will come, at most.
            keep: The position from which on none may leave.

        Raises:
            BudgetError: No more host memory.
            CacheError: The window is too small for that.
        """
        page = self.limits.page
        needed = (self._tail_length + tokens) // page - (self.limits.device_blocks - self._used)
        if needed <= 0:
            return
        movable = max(0, min(keep // page - self._past, len(self._slots)))
        if needed > movable or self._sinks < self.limits.sink_blocks:
            raise CacheError(
                "The window is too small to go back in it",
                asked=f"{tokens:,} tokens behind {self.length:,}",
                there=f"{self.limits.device_blocks * page:,} tokens, {movable * page:,} of which may leave",
                change=None,
            )
        # Evicting takes some milliseconds of launches: more at a time where they may leave.
        count = max(needed, min(self._evicted_together, movable))
        self._make_room(count)
        self.damaged = True
        self._evict([self._slots.popleft() for _ in range(count)], self._window[:, :0])
        # In the order of their age, so that the tokens before any other are a dense prefix.
        old = [*self._slots, len(self._slots) + count + self._sinks]
        blocks = torch.cat([self._window[:, slot : slot + n] for _, slot, n in _runs(old)], dim=1)
        self._window[:, self._sinks : self._sinks + len(old)] = blocks
        self._slots = deque(range(self._sinks, self._sinks + len(old) - 1))
        self._note_phase()
        self._published = False
        self.damaged = False

    def put(self, first: int, rows: Tensor) -> None:
        """Writes rows of tokens that are in the window, or come next.

        Args:
            first: The position of the first of them; no position up to it is missing.
            rows: [B, n, H_kv, D + D_v].

        Raises:
            BudgetError: No more host memory.
        """
        page, stop = self.limits.page, min(first + rows.shape[1], self.length)
        at = first
        while at < stop:
            block, offset = divmod(at, page)
            n = min(page - offset, stop - at)
            self._window[:, self._slot(block), offset : offset + n] = rows[:, at - first :][:, :n]
            at += n
        more = rows[:, at - first :]
        if more.shape[1]:
            keys, values = self._split(more)
            if more.shape[1] == 1:  # a single one is where it stays before it is taken in
                self._write_rows(self._tail, self._tail_length, keys, values)
            self._take_in(keys, values, None)

    def _slot(self, block: int) -> int:
        """Where a block of the device lies, the tail included."""
        if block < self._sinks:
            return block
        age = block - self._past
        assert age >= 0, "the block is on the host"
        return self._slots[age] if age < len(self._slots) else self._used

    def _advance(self, blocks: Tensor) -> None:
        """Moves full blocks [B, n, P, H_kv, W] to sinks, window and host, oldest first."""
        new_sinks = min(self.limits.sink_blocks - self._sinks, blocks.shape[1])
        if new_sinks:  # then there is neither window nor host page yet
            self._window[:, self._sinks : self._sinks + new_sinks] = blocks[:, :new_sinks]
            self._sinks += new_sinks
            blocks = blocks[:, new_sinks:]
        n_new = blocks.shape[1]
        overflow = max(0, len(self._slots) + n_new - self.limits.window_blocks)
        from_window = min(overflow, len(self._slots))
        freed = [self._slots.popleft() for _ in range(from_window)]
        if overflow:
            self._evict(freed, blocks[:, : overflow - from_window])
        kept = blocks[:, overflow - from_window :]
        if kept.shape[1]:
            top = self._used + len(freed)
            slots = freed + list(range(top, top + kept.shape[1] - len(freed)))
            for at, slot, n in _runs(slots):
                self._window[:, slot : slot + n] = kept[:, at : at + n]
            self._slots.extend(slots)

    def _evict(self, slots: list[int], blocks: Tensor) -> None:
        """Copies window slots, then further blocks, to new host pages; what the host may not hold is dropped."""
        count = len(slots) + blocks.shape[1]
        most = self.limits.host_blocks
        if most is not None and self.columns + count > most:
            older = min(self.columns, self.columns + count - most)
            self._table.drop(older)
            too_many = max(0, count - most)  # never reach the host
            slots, blocks = slots[too_many:], blocks[:, max(0, too_many - len(slots)) :]
            self.dropped += older + too_many
            count -= too_many
        first = self._table.columns
        self._table.append(count)
        per_piece = max(1, self._writer.buffer_bytes // (self.batch * self.page_bytes))
        for at in range(0, count, per_piece):
            n = min(per_piece, count - at)

            def pack(buffer: Tensor, at: int = at, n: int = n) -> None:
                like = (self.batch, n, *self._window.shape[2:])
                if self._hidden is None:
                    target = buffer.view(self.shape.dtype).view(like)
                else:
                    target = self._window.new_empty(like)
                old = min(max(0, len(slots) - at), n)
                for start, slot, length in _runs(slots[at : at + old]):
                    target[:, start : start + length] = self._window[:, slot : slot + length]
                if old < n:
                    new = at + old - len(slots)
                    target[:, old:] = blocks[:, new : new + n - old]
                if self._hidden is not None:
                    pages = buffer.view(self.batch, n, self.page_bytes)
                    self._hidden.pack(pages, target, self.shape)
                if self.path is not None:
                    self.path.append(target.flatten(1, 2), first + at)

            def targets(start: int = first + at, n: int = n) -> list[tuple[int, Tensor]]:
                return [
                    ((row * n + run.column - start) * self.page_bytes, self.host_view(run))
                    for row in range(self.batch)
                    for run in self.runs(row, start, start + n)
                ]

            rows = None
            if self.batch > 1:
                start, stop = first + at, first + at + n
                even = self.even(self.batch, start, stop)
                rows = even_pages(self, even, self.batch, start, stop)
            nbytes = self.batch * n * self.page_bytes
            self.written = self._writer.write(nbytes, pack, targets, rows)

    def _make_room(self, columns: int) -> None:
        most = self.limits.host_blocks
        if most is not None:  # the oldest make room
            columns = min(columns, max(0, most - self.columns))
        missing = self._table.missing(columns)
        if missing:
            # An eighth more than needed, as far as the budget goes: growing a little at every block would pin in
            # small pieces.
            pages = max(missing, self._table.capacity // 8)
            room = self._region.host.room()
            if room is not None:
                pages = max(missing, min(pages, room // (2 * self.page_bytes)))
            pages += self._table.capacity
            pages = min(
                pages, max(self._table.capacity + missing, self._region.reserve // self.page_bytes)
            )
            commit_regions([(self._region, pages * self.page_bytes)])
            self._table.grow(pages)

    # Resident pages.

    @torch.inference_mode(False)
    def keep_resident(self, columns: int, *, rows: int = 0) -> None:
        """Keeps a device copy of the first host columns, so that decoding need not stream them.

        Pages never change, so the copy cannot become wrong; what changes their meaning (crop, select) drops it,
        and so does an `attend` with many new tokens, whose activations need the memory.

        Args:
            columns: At most so many.
            rows: New tokens for which there is memory beside it; a page at least.
        """
        self.drop_resident()
        self._most_rows = max(rows, self.limits.page)
        columns = min(columns, self.columns)
        copies = 1
        if self.shared_columns:
            columns = min(columns, self.shared_columns)
        else:
            copies = self.batch
        if not columns:
            return
        shape = self.shape
        like = (copies, columns, self.limits.page, shape.kv_heads, shape.width)
        resident = torch.empty(like, dtype=shape.dtype, device=self._window.device)
        if self._hidden is None:
            self._reader.load(self, copies, columns, resident)
        else:
            for chunk, staged in self._reader.read(self):
                if chunk.start >= columns or chunk.rows != copies:
                    break
                for keys, values, positions in self._rebuilt(chunk, staged, columns):
                    places = positions - self.first_host_token
                    there = resident.flatten(1, 2)
                    there[:, places, :, : shape.key_dim] = keys[:copies].transpose(1, 2)
                    there[:, places, :, shape.key_dim :] = values[:copies].transpose(1, 2)
                    del keys, values  # or they stay while the next ones are made
        self._resident = resident

    def drop_resident(self) -> None:
        """Gives the memory of the resident columns back."""
        if self._resident is not None:
            self._reader.await_copies()
            self._resident = None

    # Changes of the sequences.

    def croppable(self, length: int) -> int:
        """The most tokens up to `length` that `crop` can keep: a block that was dropped stays whole or goes."""
        block = length // self.limits.page
        gone = self._sinks <= block < self._sinks + self.dropped
        return block * self.limits.page if gone else length

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on.

        Args:
            length: Tokens to keep, at most `self.length`.

        Raises:
            CacheError: The last of them are in a block that was dropped.
        """
        if length >= self.length:
            return
        page = self.limits.page
        if self.croppable(length) < length:
            raise CacheError(
                "The cache cannot go back into tokens that were dropped",
                asked=length,
                there=f"tokens {self._sinks * page:,} to {self.first_host_token:,} are kept nowhere",
                change="Make a new cache, or raise memory.cpu.",
            )
        self._published = False
        if length // page - self._sinks - self.dropped < self.resident_columns:
            self.drop_resident()
        tail_start = self.length - self._tail_length
        if length >= tail_start:
            self._tail_length = length - tail_start
            self.length = length
            return
        # The block that stays in part becomes the tail; newer ones go.
        self.damaged = True
        keep = length // page
        partial = self._block(keep).clone() if length % page else None
        while self._slots and self.length - self._tail_length > length:
            self._drop_newest_slot()
            self.length -= page
        if keep < self._past:
            self._table.truncate(max(0, keep - self._sinks - self.dropped))
            self.dropped = min(self.dropped, max(0, keep - self._sinks))
            if self.path is not None:
                self.path.forget_table(self.columns)
            self._sinks = min(self._sinks, keep)
        self._tail_length, self.length = length % page, length
        if partial is not None:
            self._tail.copy_(partial)
        self._note_phase()
        self.damaged = False

    def _block(self, index: int) -> Tensor:
        """The whole block of tokens [index * P, ...) as [B, P, H_kv, W], from whichever tier; read it at once."""
        if index < self._sinks:
            return self._window[:, index]
        if index < self._past:
            return self._read_column(index - self._sinks - self.dropped)
        return self._window[:, self._slots[index - self._past]]

    def _drop_newest_slot(self) -> None:
        slot = self._slots.pop()
        last = self._used
        if slot != last:  # keep the slots a dense prefix: the last block moves into the hole
            self._window[:, slot] = self._window[:, last]
            self._slots[self._slots.index(last)] = slot

    def _read_column(self, column: int) -> Tensor:
        if self.written is not None:
            self.written.synchronize()
        rows = [self.host_view(self.runs(row, column, column + 1)[0]) for row in range(self.batch)]
        block = torch.stack(rows).to(self._window.device)
        if self._hidden is not None:
            first = self.first_host_token + column * self.limits.page
            pages = block.view(self.batch, 1, self.page_bytes)
            return self._hidden.blocks(pages, self.shape, self.limits.page, first, None)[:, 0]
        return block.view(self.shape.dtype).view(self.batch, *self._window.shape[2:])

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i] (beams, repeats, a subset).

        Host pages are shared, not copied; the device part is copied.

        Args:
            rows: Integer [new batch].
        """
        index = rows.to("cpu", torch.long).numpy()
        if index.size == self.batch and bool((index == np.arange(self.batch)).all()):
            return
        if index.size > self.limits.batch:
            raise CacheError(
                "The cache was laid out for fewer sequences",
                asked=int(index.size),
                there=self.limits.batch,
                change="Make a new cache: runtime.new_cache().",
            )
        self.damaged = True
        self._published = False
        if self._hidden is not None:
            self._hidden.source.select(rows)
        if self.path is not None:
            self.path.select_sequences(rows.to(self._window.device, torch.long))
        if self._resident is not None and self._resident.shape[0] != 1:
            self.drop_resident()  # columns that are held once are the same for every sequence
        self._table.select(index)
        on_device = rows.to(self._window.device, torch.long)
        if index.size == self.batch:
            # Block by block, so that a large window needs no second copy of itself.
            for slot in range(self._used + 1):
                self._window[:, slot] = self._window[:, slot].index_select(0, on_device)
        else:
            self._window = self._window.index_select(0, on_device)
        self.damaged = False

    def check(self) -> None:
        """Raises CacheError unless every token is in exactly one place."""
        self._table.check()
        blocks = self._used
        held = (blocks + self.dropped + self.columns) * self.limits.page + self._tail_length
        dense = sorted(self._slots) == list(range(self._sinks, blocks))
        if held != self.length or not dense or not 0 <= self._tail_length < self.limits.page:
            raise CacheError(
                "The store is inconsistent", asked=self.length, there=held, change=None
            )


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Slots as (position in the list, first slot, count) of consecutive ones.

    Slots are freed in the order in which they were filled, so a run is long. An index tensor instead would be
    copied to the device with a synchronisation in every layer, and the CPU could not launch ahead of the GPU.
    """
    runs: list[tuple[int, int, int]] = []
    for at, slot in enumerate(slots):
        if runs and slot == runs[-1][1] + runs[-1][2]:
            start, first, count = runs[-1]
            runs[-1] = (start, first, count + 1)
        else:
            runs.append((at, slot, 1))
    return runs
