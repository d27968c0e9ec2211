"""How does one layer make a token over offloaded keys in microseconds? The device path of a decode step.

The device keeps a low-bit replica of every token on the host. A step scores all of them, selects a few per KV head,
reads those few exactly from pinned host memory, lets the replica speak for the rest, and merges the three with the
window:

    query ─► scan ─► select blocks ─► tail of all other blocks ───────────┐
      │                    └─► select tokens ─► tail of their blocks ─────┤
      │                               └───────► rows from the host ───────┼─► combine ─► output
      └─► window and new token ───────────────────────────────────────────┘

Lengths are read from device memory, so that a captured graph can replay a step. `step` launches kernels and nothing
else: no allocation that a graph does not own, no synchronisation, no Python branch on a tensor. On a CPU the
references compute the same.

Ordering. Of the drawing the first line runs on the current stream, the tail of selected blocks on a third and the rest
on a second one. Each waits for what the arrows say, and the current stream for both before it combines, so that a step
is over when the current stream says so.

A row may be selected only once `lengths` says so, and `publish` writes it after the current stream has waited for the
copy to the host page. Pages and codes of published blocks never change while a step can read them: whatever changes
them (crop, select) runs on the same stream, behind the last step, and publishes anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offload.graph import by_host
from offload.kernels import reference
from offload.kernels.clusters import (
    empty_clusters,
    empty_mean_keys,
    scan_clusters,
    tail_of_clusters,
)
from offload.kernels.combine import Partials, combine, empty_partials
from offload.kernels.gather import RowCache, attend_rows, empty_row_cache, row_slots
from offload.kernels.noise import Noise, empty_noise, key_noise, squared_error, value_noise
from offload.kernels.quantize import empty_codes, quantize_keys, quantize_values
from offload.kernels.reference import BLOCK, Codes, Part, padded
from offload.kernels.scan import ScanScratch, scan, scan_scratch
from offload.kernels.select import Selection, empty_selection, select_blocks, select_tokens
from offload.kernels.tail import block_slots, tail, tail_of_blocks, tail_slots
from offload.kernels.window import attend_window
from offload.tiers.path import Published, StepMemory, StepPath
from offload.tiers.rows import RowShape
from offload.tiers.search import Found, HandOff, HostSearch

AVERAGED_TOGETHER = 256  # blocks whose noise is averaged at once, so that it takes little memory
DECODED_TOGETHER = 16  # of these, whose values are decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class PathSettings:
    """How the device path works.

    Attributes:
        bits: Of the replica's codes; 0 where of keys and values only the means of clusters are kept.
        clustered: Whether that is so of values at least.
        tokens: Attended to exactly per KV head; 0 or a power of two of at least 16.
        cached_rows: Rows per KV head that stay on the device after they were selected; 0 or a power of two.
        skipped_mass: Share of all weights that blocks may have together whose values are not read.
    """

    bits: int
    tokens: int
    skipped_mass: float
    cached_rows: int = 0
    clustered: bool = False


class _Fetched:
    """Rows that the host gathers for a step, and their way there and back.

    Attributes:
        ids: int32 [B, H_kv, k], pinned: the selected tokens, -1 for none.
        rows: [B, H_kv, k, D + D_v], pinned: their rows, as a page of k tokens for each sequence.
        sent: The event behind the copy of `ids`.
        table: int32 [B, 1]: the page of each sequence.
        places: int32 [k]: the tokens of a page.
    """

    def __init__(self, selected: Tensor, shape: RowShape) -> None:
        batch, _, k = selected.shape
        self.ids = torch.empty(selected.shape, dtype=torch.int32, pin_memory=True)
        self.rows = torch.zeros((*selected.shape, shape.width), dtype=shape.dtype, pin_memory=True)
        self.sent = torch.cuda.Event()
        at = torch.arange(max(batch, k), dtype=torch.int32, device=selected.device)
        self.table, self.places = at[:batch, None].contiguous(), at[:k]


class _Memory:
    """What a step of one kind of layer writes and the next layer's step writes again."""

    @torch.inference_mode(False)
    def __init__(
        self, batch: int, heads: int, shape: RowShape, blocks: int, splits: int, tokens: int, device: torch.device
    ) -> None:  # fmt: skip
        groups = heads // shape.kv_heads
        self.splits = splits
        self.rows_at = splits
        self.tail_at = splits + (row_slots(tokens) if blocks else 0)
        n_tail = tail_slots(blocks * BLOCK, batch * shape.kv_heads) if blocks else 0
        self.selected_at = self.tail_at + n_tail
        slots = self.selected_at + (block_slots(tokens) if blocks else 0)
        self.partials: Partials = empty_partials(batch, heads, slots, shape.value_dim, device)
        self.scan: ScanScratch | None = None
        self.selection: Selection | None = None
        self.skipped: Tensor | None = None
        if blocks:
            self.scan = scan_scratch(batch, shape.kv_heads, groups, blocks * BLOCK, device)
            self.selection = empty_selection(
                batch, heads, shape.kv_heads, blocks * BLOCK, max(tokens, 16), device
            )
            self.skipped = torch.zeros((batch, heads, n_tail), device=device)
        self._fetched: _Fetched | None = None
        self._hand_off: HandOff | None = None

    def hand_off(self, batch: int, heads: int, shape: RowShape, tokens: int, device: torch.device) -> HandOff:  # fmt: skip
        """Memory for what goes to the host and back; made when it is first needed."""
        if self._hand_off is None:
            self._hand_off = HandOff(batch, heads, shape, tokens, device)
        return self._hand_off

    def fetched(self, shape: RowShape) -> _Fetched:
        """Room for rows that the host gathers; made when they are first needed."""
        if self._fetched is None:
            assert self.selection is not None
            self._fetched = _Fetched(self.selection.tokens, shape)
        return self._fetched


class DevicePath(StepPath):
    """The device path of one layer: its replica, and a step over it.

    Attributes:
        settings: As given.
        lengths: int32 [1 + B]: rows on the device, then blocks of the replica of each sequence. Kernels read them; a
            step adds one to the first.
        search: Finds tokens on the host; None where the device selects them.
        epoch: Grows whenever an address changes that a captured graph has kept.
        steps: Made since `reset_stats`.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        shape: RowShape,
        settings: PathSettings,
        memory: StepMemory,
        *,
        batch: int,
        blocks: int,
        slots: int,
        page: int,
        device: torch.device,
        search: HostSearch | None = None,
    ) -> None:
        """Makes room on the device.

        Args:
            shape: Of the rows.
            settings: How it works.
            memory: Scratch, shared with the other layers.
            batch: Sequences.
            blocks: Blocks that the replica has room for; 0 where everything stays on the device.
            slots: Slots of the window, the tail's too.
            page: Tokens of a slot.
            device: Where.
            search: Where tokens are found on the host.
        """
        super().__init__(
            shape, memory, batch=batch, blocks=blocks, slots=slots, page=page, device=device
        )
        self.settings = settings
        self.search = search if blocks else None
        self._keys: Codes | None = None
        self._values: Codes | None = None
        self._near: RowCache | None = None
        # Means over heads and sequences, added up over steps: the tail's share of all weights, that of the blocks that
        # were not read, the square of the expected error and that of the output's norm.
        self.stats = torch.zeros(4, device=device)
        self._noise: Noise | None = None  # of the published blocks
        if blocks:
            self._make_codes(batch, blocks)
            self._make_row_cache(batch)

    def _make_codes(self, batch: int, blocks: int) -> None:
        def make(head_size: int, keys: bool) -> Codes:
            return empty_codes(
                batch,
                self.shape.kv_heads,
                blocks * BLOCK,
                head_size,
                bits=self.settings.bits,
                keys=keys,
                device=self._device,
            )

        shape, n_tokens = self.shape, blocks * BLOCK
        if self.settings.bits:
            self._keys = make(shape.key_dim, True)
        else:
            self._keys = empty_mean_keys(
                batch, shape.kv_heads, n_tokens, shape.key_dim, self._device
            )
        if self.settings.clustered:
            self._values = empty_clusters(
                batch, shape.kv_heads, n_tokens, shape.value_dim, self._device
            )
        else:
            self._values = make(shape.value_dim, False)
        self._make_noise(batch)

    def _make_noise(self, batch: int) -> None:
        width = padded(self.shape.key_dim)
        self._noise = empty_noise(batch, self.shape.kv_heads, width, self._device)

    def _make_row_cache(self, batch: int) -> None:
        if self.settings.tokens and self.settings.cached_rows and self.search is None:
            shape = self.shape
            self._near = empty_row_cache(
                batch, shape.kv_heads, self.settings.cached_rows, shape.width, shape.dtype, self._device
            )  # fmt: skip

    def bad_block(self, blocks: int) -> int | None:
        """The first block whose keys or values were not finite, or too large for the replica's scales.

        Args:
            blocks: Blocks on the host.
        """
        finite = [
            codes.meta[:, :, :blocks].isfinite().flatten(3).all(-1).all(1).all(0)
            for codes in (self._keys, self._values)
            if codes is not None and blocks
        ]
        if not finite:
            return None
        bad = ~torch.stack(finite).all(0)
        return int(bad.nonzero()[0]) if bool(bad.any()) else None

    @property
    def blocks(self) -> int:
        """Blocks that the replica has room for."""
        return 0 if self._keys is None else self._keys.n_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the replica on the device, its page table too."""
        codes = [c for c in (self._keys, self._values) if c is not None]
        return sum(t.nbytes for c in codes for t in (*c.planes, c.meta)) + self._table.nbytes

    def reset_stats(self) -> None:
        """Begins to add up anew."""
        super().reset_stats()
        self.stats.zero_()
        if self._near is not None:
            self._near.fetched.zero_()

    def masses(self) -> Tensor:
        """Shares of all weights: that the replica answered for, and that of blocks which were not read; means over steps."""
        return self.stats[:2].cpu() / max(1, self.steps)

    def error_estimate(self) -> float:
        """What the outputs of all steps are expected to be off by, relative to them, in the mean square.

        NaN where only means of clusters are kept, of which nothing says how far a row is from them.
        """
        if self.blocks and self.settings.clustered:
            return math.nan
        error, size = self.stats[2:].tolist()
        return float((error / size) ** 0.5) if size else 0.0

    def selected_bytes(self) -> tuple[int, int]:
        """Bytes of rows that a step attended to exactly, and how many of them came from the host: means."""
        if not self.steps:
            return 0, 0
        row = self.shape.width * self.shape.dtype.itemsize
        batch = self.lengths.numel() - 1
        selected = batch * self.settings.tokens * self.shape.kv_heads * row
        if self.search is not None:
            return selected, 0
        if self._near is None:
            return selected, selected
        return selected, int(self._near.fetched) * row // self.steps

    @property
    def row_cache_nbytes(self) -> int:
        """Bytes of cached rows on the device."""
        return 0 if self._near is None else self._near.rows.nbytes + self._near.tokens.nbytes

    # Changes, outside of any graph.

    def append(self, rows: Tensor, first_block: int) -> None:
        """Writes the replica of whole blocks that leave the window.

        Args:
            rows: [B, n * BLOCK, H_kv, D + D_v] on the device.
            first_block: Where they go. Blocks behind the room that there is are left out.
        """
        n = min(rows.shape[1] // BLOCK, self.blocks - first_block)
        if n <= 0:
            return
        assert self._keys is not None
        assert self._values is not None
        rows = rows[:, : n * BLOCK]
        keys, values = rows[..., : self.shape.key_dim], rows[..., self.shape.key_dim :]
        bits, clustered = self.settings.bits, self.settings.clustered
        made: list[tuple[Codes, Codes]] = []
        if bits and self.has_kernels:
            first = torch.full((), first_block, dtype=torch.int32, device=self._device)
            quantize_keys(keys, self._keys, first, bits=bits)
            if not clustered:
                quantize_values(values, self._values, first, bits=bits)
        elif bits:
            made.append((self._keys, reference.quantize_keys(keys, bits=bits)))
            if not clustered:
                made.append((self._values, reference.quantize_values(values, bits=bits)))
        if not bits:
            mean_keys, mean_values = reference.cluster_tokens(keys, values)
            made += [(self._keys, mean_keys), (self._values, mean_values)]
        elif clustered:
            made.append((self._values, reference.cluster_values(keys, values)))
        for codes, fresh in made:
            for target, new in zip((*codes.planes, codes.meta), (*fresh.planes, fresh.meta), strict=True):  # fmt: skip
                target[:, :, first_block : first_block + n] = new

    def forget_table(self, columns: int) -> None:
        """Columns may mean other pages, and tokens other rows, than those that were published.

        Args:
            columns: The first ones, which hold what they held.
        """
        super().forget_table(columns)
        if self._near is not None:
            self._near.tokens.fill_(-1)

    def select_sequences(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""
        same = rows.numel() == self.lengths.numel() - 1
        super().select_sequences(rows)
        if self._keys is not None and self._values is not None:
            self._keys = _selected(self._keys, rows, in_place=same)
            self._values = _selected(self._values, rows, in_place=same)
        if not same:
            if self._near is not None:
                self._make_row_cache(rows.numel())
            if self._noise is not None:
                self._make_noise(rows.numel())

    def _take_blocks(self, there: Published) -> None:
        """Averages the noise of blocks that are new."""
        if there.blocks:
            self._average_noise(there.blocks)

    def _average_noise(self, blocks: int) -> None:
        """Makes the noise that of `blocks` blocks; that of the first `_known` is in it."""
        assert self._noise is not None
        assert self._keys is not None
        assert self._values is not None
        if self.settings.clustered:
            return
        bits, head_size = self.settings.bits, self.shape.value_dim
        for at in range(self._known, blocks, AVERAGED_TOGETHER):
            n = min(AVERAGED_TOGETHER, blocks - at)
            of_keys = key_noise(_blocks(self._keys, at, n), bits=bits)
            # Some blocks say enough of all, where there are many.
            some = _blocks(self._values, at, n, max(1, n // DECODED_TOGETHER))
            of_values = value_noise(some, bits=bits, head_size=head_size)
            for mean, more in zip(self._noise, (of_keys, of_values), strict=True):
                if at == 0:
                    mean.zero_()
                mean.mul_(at / (at + n)).add_(more.mean(2), alpha=n / (at + n))

    # One step.

    def _scratch(self, batch: int, heads: int, blocks: int) -> _Memory:
        """What steps write, shared with layers of the same kind."""
        shape, tokens = self.shape, self.settings.tokens
        kind = (
            heads, shape.kv_heads, shape.key_dim, shape.value_dim, tokens, self.settings.clustered, blocks > 0,
        )  # fmt: skip
        sizes = (batch, blocks, self._splits)
        make = partial(_Memory, batch, heads, shape, blocks, self._splits, tokens, self._device)
        return self._memory.made(kind, sizes, make)

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
        """Attends with one new token per sequence to all tokens and itself; see `StepPath.step`."""
        if not self.has_kernels:
            return self._reference_step(query, key, value, window, pool, scale, softcap, sink_logits, search)  # fmt: skip
        batch, heads = query.shape[:2]
        blocks = self.blocks if pool is not None else 0
        k, bits = self.settings.tokens, self.settings.bits
        memory = self._scratch(batch, heads, blocks)
        padding = self._memory.padding
        beside, third = self._memory.beside
        main = torch.cuda.current_stream(self._device)
        searches = pool is not None and k > 0 and search is not None
        if searches:
            self._send_query(query, memory)
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            attend_window(
                query, key, value, window, self.lengths[:1], memory.partials,
                scale=scale, splits=self._splits, softcap=softcap, padding=padding, starts=self._starts,
            )  # fmt: skip
        fetches = pool is not None and k > 0 and gather is not None and search is None
        if pool is not None:
            assert self._keys is not None
            assert self._values is not None
            assert memory.scan is not None
            assert memory.selection is not None
            assert memory.skipped is not None
            n_blocks = self.lengths[1:]
            if bits:
                scan(
                    query, self._keys, n_blocks, memory.scan,
                    bits=bits, scale=scale, padding=self._hidden, softcap=softcap,
                )  # fmt: skip
            else:
                scan_clusters(
                    query, self._keys, self._values, n_blocks, memory.scan,
                    scale=scale, padding=self._hidden, softcap=softcap,
                )  # fmt: skip
            if searches:
                assert search is not None
                _log_sum_exp(memory.scan, n_blocks, memory.selection)
                main.wait_stream(beside)
                self._attend_found(query, search, memory)
            elif k:
                select_blocks(memory.scan, n_blocks, memory.selection)
                beside.wait_stream(main)
                with torch.cuda.stream(beside):
                    select_tokens(memory.scan, memory.selection)
                    third.wait_stream(beside)
                    if gather is None:
                        attend_rows(
                            query, pool, self._table, memory.selection.tokens, memory.partials,
                            first_slot=memory.rows_at, key_dim=self.shape.key_dim, scale=scale, softcap=softcap,
                            cache=self._near,
                        )  # fmt: skip
                if fetches:
                    self._send_ids(memory)
                if not self.settings.clustered:
                    with torch.cuda.stream(third):
                        tail_of_blocks(
                            memory.scan, memory.selection, self._values, memory.partials,
                            first_slot=memory.selected_at, bits=bits, head_size=self.shape.value_dim,
                        )  # fmt: skip
            else:
                _log_sum_exp(memory.scan, n_blocks, memory.selection)
            if self.settings.clustered:
                if k and not searches:
                    main.wait_stream(third)  # which waits for the selection
                tail_of_clusters(
                    memory.scan, memory.selection, self._values, n_blocks, memory.partials,
                    first_slot=memory.tail_at, head_size=self.shape.value_dim,
                )  # fmt: skip
            else:
                tail(
                    memory.scan, memory.selection, self._values, n_blocks, memory.partials, memory.skipped,
                    first_slot=memory.tail_at, bits=bits, head_size=self.shape.value_dim,
                    share=self.settings.skipped_mass,
                )  # fmt: skip
            if k and not searches:
                main.wait_stream(third)
            if fetches:
                assert gather is not None
                self._attend_fetched(query, gather, memory, scale, softcap)
        if not fetches and not searches:
            main.wait_stream(beside)
        out = torch.empty_like(query[..., :1].expand(-1, -1, self.shape.value_dim), memory_format=torch.contiguous_format)  # fmt: skip
        combine(
            memory.partials, out,
            sink_logits=sink_logits, counter=self.lengths[:1],
            stats=self.stats if pool is not None else None, skipped=memory.skipped,
            query=query, noise=self._noise, scale=scale, tail_at=memory.tail_at,
        )  # fmt: skip
        return out

    def _send_query(self, query: Tensor, memory: _Memory) -> None:
        """Lets the host begin as soon as it asks."""
        batch, heads = query.shape[:2]
        hands = memory.hand_off(batch, heads, self.shape, self.settings.tokens, self._device)
        hands.query.copy_(query.detach().float(), non_blocking=True)
        assert hands.sent is not None
        by_host(hands.sent.record)

    def _attend_found(
        self, query: Tensor, search: Callable[[Tensor, Found], None], memory: _Memory
    ) -> None:
        """Waits for what the host finds, and takes those tokens out of the scores."""
        batch, heads = query.shape[:2]
        hands = memory.hand_off(batch, heads, self.shape, self.settings.tokens, self._device)

        def find() -> None:
            assert hands.sent is not None
            hands.sent.synchronize()
            search(hands.query, hands.found)

        by_host(find)
        hands.arrived.all.copy_(hands.found.all, non_blocking=True)
        memory.partials.out[:, :, memory.rows_at].copy_(hands.arrived.out)
        memory.partials.lse[:, :, memory.rows_at].copy_(hands.arrived.lse)
        assert memory.scan is not None
        scores = memory.scan.scores
        found = hands.arrived.tokens.long().unsqueeze(-1).expand(-1, -1, -1, scores.shape[-1])
        scores.scatter_(2, found, -torch.inf)

    def _send_ids(self, memory: _Memory) -> None:
        """Lets the host know what was selected, once it asks."""
        assert memory.selection is not None
        main = torch.cuda.current_stream(self._device)
        for stream in self._memory.beside:  # a graph may end here
            main.wait_stream(stream)
        fetched = memory.fetched(self.shape)
        fetched.ids.copy_(memory.selection.tokens, non_blocking=True)
        by_host(fetched.sent.record)
        self._memory.beside[1].wait_stream(main)

    def _attend_fetched(
        self,
        query: Tensor,
        gather: Callable[[Tensor, Tensor], None],
        memory: _Memory,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Selected rows by way of the host, for pages that could not be pinned. The host waits for their ids."""
        assert memory.selection is not None
        fetched = memory.fetched(self.shape)

        def fetch() -> None:
            fetched.sent.synchronize()
            gather(fetched.ids, fetched.rows)

        by_host(fetch)
        tokens = memory.selection.tokens
        if self._near is not None:
            self._near.fetched.add_((tokens >= 0).sum())
        attend_rows(
            query, fetched.rows.transpose(1, 2), fetched.table, torch.where(tokens >= 0, fetched.places, -1),
            memory.partials, first_slot=memory.rows_at, key_dim=self.shape.key_dim, scale=scale, softcap=softcap,
        )  # fmt: skip

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
        search: Callable[[Tensor, Found], None] | None,
    ) -> Tensor:
        n_rows, *n_blocks = self.lengths.tolist()
        rows = window.flatten(1, 2)
        rows[:, n_rows, :, : self.shape.key_dim] = key
        rows[:, n_rows, :, self.shape.key_dim :] = value
        self.lengths[0] += 1
        held = rows[:, : n_rows + 1].transpose(1, 2)
        mask, padding = None, self._memory.padding
        if padding is not None:
            places = self._starts[:, None] + torch.arange(self._page, device=self._device)
            mask = (places.flatten()[: n_rows + 1] >= padding[:, None])[:, None, None]
        queries = query.unsqueeze(2).float()
        dim = self.shape.key_dim
        parts = [
            reference.attend(
                queries, held[..., :dim], held[..., dim:],
                scale=scale, softcap=softcap, sink_logits=sink_logits, mask=mask,
            )
        ]  # fmt: skip
        if pool is not None:
            assert self._keys is not None
            assert self._values is not None
            n, bits = n_blocks[0], self.settings.bits
            if bits:
                scores = reference.scan(
                    query, _first(self._keys, n),
                    bits=bits, scale=scale, padding=self._hidden, softcap=softcap,
                )  # fmt: skip
            else:
                scores = reference.scan_clusters(
                    query, _first(self._keys, n), _first(self._values, n),
                    scale=scale, padding=self._hidden, softcap=softcap,
                )  # fmt: skip
            if search is not None and self.settings.tokens:
                batch, heads = query.shape[:2]
                hands = HandOff(batch, heads, self.shape, self.settings.tokens, torch.device("cpu"))
                search(query.detach().float().cpu().contiguous(), hands.found)
                out, lse, tokens = (part.to(query.device) for part in hands.found[1:])
                parts.append(Part(out.unsqueeze(2), lse.unsqueeze(2)))
            else:
                tokens = reference.select(scores, kv_heads=self.shape.kv_heads, k=self.settings.tokens)  # fmt: skip
                fetched = reference.gather(pool, self._table, tokens).to(query.device)
                if self._near is not None:
                    self._near.fetched.add_((tokens >= 0).sum())
                parts.append(_attend_selected(query, fetched, tokens, dim, scale, softcap))
            codes = _first(self._values, n)
            if self.settings.clustered:
                rest = reference.tail_of_clusters(
                    scores, tokens, codes, head_size=self.shape.value_dim
                )
            else:
                rest = reference.tail(
                    scores, tokens, codes, bits=bits, head_size=self.shape.value_dim
                )
            parts.append(rest)
            self._count(query, scores, tokens, reference.merge(parts), scale)
        return reference.merge(parts).out[:, :, 0].to(query.dtype)

    def _count(
        self, query: Tensor, scores: Tensor, tokens: Tensor, merged: Part, scale: float
    ) -> None:
        """Adds to the sums what `combine` adds; of the tail each block is a part."""
        assert self._noise is not None
        rest = reference.unselected(scores, tokens)
        shares = torch.exp(rest.unflatten(-1, (-1, BLOCK)).logsumexp(-1) - merged.lse)
        self.stats[0] += shares.sum(-1).mean()
        self.stats[2:] += squared_error(
            query, merged.out[:, :, 0], shares, torch.zeros_like(shares[..., 0]), self._noise, scale=scale
        )  # fmt: skip


def _attend_selected(
    query: Tensor, rows: Tensor, tokens: Tensor, key_dim: int, scale: float, softcap: float | None
) -> Part:
    """Attention over rows [B, H_kv, k, D + D_v] of selected tokens; -1 among the tokens for none."""
    if not tokens.shape[-1]:
        shape = (*query.shape[:2], 1)
        empty = query.new_full(shape, -torch.inf, dtype=torch.float32)
        return Part(query.new_zeros((*shape, rows.shape[-1] - key_dim)), empty)
    groups = query.shape[1] // rows.shape[1]
    mask = (tokens >= 0).repeat_interleave(groups, dim=1).unsqueeze(2)
    return reference.attend(
        query.unsqueeze(2).float(), rows[..., :key_dim], rows[..., key_dim:],
        scale=scale, softcap=softcap, mask=mask,
    )  # fmt: skip


def _log_sum_exp(scratch: ScanScratch, n_blocks: Tensor, selection: Selection) -> None:
    """What `select_blocks` would leave in `selection.lse`, where nothing is to be selected."""
    valid = torch.arange(scratch.top.shape[2], device=n_blocks.device) < n_blocks[:, None]
    logs = (scratch.top + scratch.total.log()).masked_fill(~valid[:, None, :, None], -torch.inf)
    selection.lse.copy_(logs.logsumexp(2).flatten(1))


def _first(codes: Codes, blocks: int) -> Codes:
    return _blocks(codes, 0, blocks)


def _blocks(codes: Codes, first: int, n: int, every: int = 1) -> Codes:
    part = slice(first, first + n, every)
    return Codes(tuple(plane[:, :, part] for plane in codes.planes), codes.meta[:, :, part])


def _selected(codes: Codes, rows: Tensor, *, in_place: bool) -> Codes:
    """The codes of sequences `rows`; in place in pieces, so that no second copy of all is needed."""
    if not in_place:
        planes = tuple(plane.index_select(0, rows) for plane in codes.planes)
        return Codes(planes, codes.meta.index_select(0, rows))
    for tensor in (*codes.planes, codes.meta):
        for at in range(0, tensor.shape[2], 64):
            piece = tensor[:, :, at : at + 64]
            piece.copy_(piece.index_select(0, rows))
    return codes
