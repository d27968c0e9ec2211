"""How do KV pages cross PCIe? Streams, staging buffers and events of both directions.

Ordering, stream by stream. The *compute* stream is the caller's current stream; *in* carries host-to-device
copies, *out* device-to-host copies. Passes of mode verified have a compute stream of their own: uses of a staging buffer
are chained by `freed` and `ready` whichever stream they come from, one thread reads at a time, and pages change only
when no pass is under way.

- A staging buffer is written on *in* after *in* waited for `freed`, which compute recorded behind the last
  attention that read the buffer; compute reads it after waiting for `ready`, recorded on *in* behind the copy.
- An eviction buffer is packed on compute after compute waited for `drained`, recorded on *out* behind the
  copies that read it; *out* copies after waiting for `packed`.
- A page is read on *in* after *in* waited for the `written` event of its store, recorded on *out* behind the
  copy that wrote it.
- A page that is not pinned is read by the CPU, which waits for `written` itself.
- A page that became free (crop, reorder) may be written again at once: its last attention on compute waited
  for the copy that read it, and *out* waits for compute (`packed`). A prefetch that is still under way may
  read half a page; its staged chunk carries the table's old version and is never used.

On a CPU the same code runs without streams, in program order but for such passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload.tiers.pages import Run
from offload.tiers.pinned import HostRegion, PinBudget, commit_regions

logger = logging.getLogger(__name__)

BOUNCE_BYTES = (
    16 * 2**20
)  # a pinned bounce buffer; two per reader, only where pages could not be pinned
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # of cudaMemcpyKind
_MOST_PITCH = 2**31 - 1  # bytes from row to row that the runtime takes


@dataclass(slots=True)
class TransferCounters:
    """What crossed between the tiers since the runtime was attached. Bytes are KV bytes.

    Attributes:
        h2d_bytes: Host to device.
        d2h_bytes: Device to host.
        bounced_bytes: The part of h2d_bytes that went through a bounce buffer (pages that are not pinned).
        discarded_bytes: The part of h2d_bytes that was prefetched and then not needed.
    """

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    bounced_bytes: int = 0
    discarded_bytes: int = 0


class Pages(Protocol):
    """What a reader needs to know of a layer's host pages."""

    page_bytes: int
    busy: bool  # between this step's update and its eviction: pages may still be added
    written: torch.cuda.Event | None

    @property
    def version(self) -> int:
        """Grows when a column may mean other pages."""

    @property
    def batch(self) -> int:
        """Sequences."""

    @property
    def columns(self) -> int:
        """Pages of every sequence."""

    @property
    def shared_columns(self) -> int:
        """Leading columns that all sequences share."""

    @property
    def resident_columns(self) -> int:
        """Leading columns that are on the device anyway."""

    def runs(self, row: int, start: int, stop: int) -> list[Run]:
        """Contiguous pages of one sequence."""

    def even(self, rows: int, start: int, stop: int) -> tuple[int, int] | None:
        """The first page of these columns and pages between sequences, where they are equally far apart; else None."""

    def host_view(self, run: Run) -> Tensor:
        """The bytes of a run, uint8."""

    def is_pinned(self, run: Run) -> bool:
        """Whether the run's memory is pinned."""


@dataclass(slots=True, frozen=True)
class Chunk:
    """Columns [start, stop) of a layer, as staged: once if all sequences share them, else per sequence."""

    pages: Pages
    version: int
    start: int
    stop: int
    rows: int


class Streams:
    """The two copy streams of a device, or nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = device.type == "cuda"
        self.host_to_device = torch.cuda.Stream(device) if self.on else None
        self.device_to_host = torch.cuda.Stream(device) if self.on else None
        self._beside: torch.cuda.Stream | None = None

    @property
    def beside(self) -> torch.cuda.Stream | None:
        """A second compute stream, or None on a CPU; always the same, since libraries keep a workspace for each."""
        if self.on and self._beside is None:
            self._beside = torch.cuda.Stream(self.device)
        return self._beside

    def compute(self) -> torch.cuda.Stream | None:
        """The stream that kernels are launched on now; asking for it takes as long as launching one."""
        return torch.cuda.current_stream(self.device) if self.on else None

    def event(self) -> torch.cuda.Event | None:
        """A new event, or None on a CPU."""
        return torch.cuda.Event() if self.on else None

    def use(self, stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
        """Makes a copy stream current."""
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def record(
        self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None = None
    ) -> None:
        """Records an event on a copy stream, or on the compute stream."""
        if event is not None:
            event.record(stream or torch.cuda.current_stream(self.device))

    def wait(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None = None) -> None:
        """Lets a copy stream, or the compute stream, wait for an event."""
        if event is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_event(event)

    def synchronize(self) -> None:
        """Waits on the CPU until all copies are done."""
        if self.host_to_device is not None and self.device_to_host is not None:
            self.host_to_device.synchronize()
            self.device_to_host.synchronize()


class HostReader:
    """Streams the host pages of the layers, in the order of the model, through two device buffers.

    While a chunk is attended to, the next one is copied: of the same layer, or of the next layer, and after
    the last layer of the first one again, so that PCIe does not rest between steps. Each byte crosses once a
    step; columns that all sequences share cross once for all of them.
    """

    @torch.inference_mode(False)
    def __init__(self, streams: Streams, buffer_bytes: int, counters: TransferCounters) -> None:
        """Allocates the two buffers.

        Args:
            streams: Of the device.
            buffer_bytes: Of one buffer; must hold at least one page of every sequence.
            counters: Counted into.
        """
        self.buffer_bytes = buffer_bytes
        self.order: list[Pages] = []
        self._streams = streams
        self._counters = counters
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=streams.device) for _ in range(2)
        ]
        self._ready = [streams.event(), streams.event()]
        self._freed = [streams.event(), streams.event()]
        self._staged: deque[tuple[Chunk, int]] = deque()
        self._last: Chunk | None = None  # the chunk issued last: what follows it is prefetched
        self._free = deque([0, 1])
        self._bounce: _Bounce | None = None
        self._at_once = EvenCopies() if streams.on else None
        self._plans: dict[int, tuple[tuple[int, ...], list[Chunk]]] = {}  # by the identity of pages

    def plan(self, pages: Pages) -> list[Chunk]:
        """The chunks of a layer's pages, in order, resident ones left out. Each fits into one buffer."""
        first = pages.resident_columns
        shared = max(first, pages.shared_columns)
        asked = (pages.version, pages.batch, first, shared, pages.columns)
        known = self._plans.get(id(pages))
        if known is None or known[0] != asked or (known[1] and known[1][0].pages is not pages):
            known = self._plans[id(pages)] = asked, self._planned(pages, first, shared)
        return known[1]

    def _planned(self, pages: Pages, first: int, shared: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for rows, begin, end in ((1, first, shared), (pages.batch, shared, pages.columns)):
            most = max(1, self.buffer_bytes // (rows * pages.page_bytes))
            # Of about one size: beside a short chunk the next long one would have to wait for its buffer. In eights, so
            # that pages that come in seldom move the borders of what was prefetched.
            even = -(-(end - begin) // max(1, -(-(end - begin) // most)))
            step = max(1, min(most, -(-even // 8) * 8))
            chunks += [
                Chunk(pages, pages.version, at, min(at + step, end), rows)
                for at in range(begin, end, step)
            ]
        return chunks

    def read(self, pages: Pages) -> Iterator[tuple[Chunk, Tensor]]:
        """Yields a layer's chunks as device bytes; valid until the next one is asked for.

        Args:
            pages: The layer's. They must not change while being read.

        Yields:
            The chunk and uint8 [rows * columns * page_bytes], the pages of a sequence side by side.
        """
        compute = self._streams.compute()
        for chunk in self.plan(pages):
            if not self._staged or self._staged[0][0] != chunk:
                self._discard()
                self._issue(chunk)
            entry = self._staged[0]
            slot = entry[1]
            self._top_up()
            self._streams.wait(self._ready[slot], compute)
            nbytes = chunk.rows * (chunk.stop - chunk.start) * pages.page_bytes
            try:
                yield chunk, self._buffers[slot][:nbytes]
            finally:
                # Also when the reader's caller raised: the buffer must not stay taken.
                if self._staged and self._staged[0] is entry:
                    self._streams.record(self._freed[slot], compute)
                    self._staged.popleft()
                    self._free.append(slot)
            self._top_up()

    def prefetch(self) -> None:
        """Starts copying what comes next; call when a layer's pages have stopped changing for this step."""
        self._top_up()

    def load(self, pages: Pages, rows: int, columns: int, target: Tensor) -> None:
        """Copies the first columns to a device tensor; the compute stream waits for it.

        Args:
            pages: The layer's.
            rows: Sequences, or 1 for shared columns.
            columns: How many.
            target: [rows, columns, ...], contiguous, written whole.
        """
        self._discard()
        stream = self._streams.host_to_device
        begun, done = self._streams.event(), self._streams.event()
        self._streams.record(
            begun
        )  # the target's memory may still be in use by earlier work on compute
        self._streams.wait(begun, stream)
        self._streams.wait(pages.written, stream)
        with self._streams.use(stream):
            self._copy(pages, rows, 0, columns, target.view(-1).view(torch.uint8))
        self._streams.record(done, stream)
        self._streams.wait(done)

    def await_copies(self) -> None:
        """Waits on the CPU for copies under way: before memory that they write is given back."""
        self._streams.synchronize()

    def reset(self, order: list[Pages]) -> None:
        """Starts anew with the layers of a cache, in the order of the model.

        Also after an exception anywhere in here: no staged chunk and no buffer that was taken survives it.
        """
        self._streams.synchronize()
        self.order = order
        self._plans.clear()
        self._discard()
        self._free = deque([0, 1])
        self._last = None

    def _discard(self) -> None:
        for chunk, slot in self._staged:
            self._counters.discarded_bytes += (
                chunk.rows * (chunk.stop - chunk.start) * chunk.pages.page_bytes
            )
            self._free.append(slot)
        self._staged.clear()

    def _top_up(self) -> None:
        while self._free and self._last is not None:
            # What was read to its end goes on with the next layer, also where pages have been added behind it.
            ended = not self._staged and not self._last.pages.busy
            following = self._after(self._last, ended=ended)
            if following is None or any(chunk == following for chunk, _ in self._staged):
                return  # not known yet, or the pass after the next one
            self._issue(following)

    def _after(self, chunk: Chunk, *, ended: bool) -> Chunk | None:
        """The chunk that is read after this one, if that is known already.

        Args:
            chunk: Staged, or read.
            ended: Its layer's step is over.
        """
        same = [] if ended else self.plan(chunk.pages)
        for candidate in same:
            if candidate.start >= chunk.stop:
                return candidate
        if chunk.pages not in self.order:
            return None
        at = self.order.index(chunk.pages)
        for pages in self.order[at + 1 :] + self.order[: at + 1]:
            if pages.busy:
                return None  # its pages are still changing in this step
            if pages.columns > pages.resident_columns:
                return self.plan(pages)[0]
        return None

    def _issue(self, chunk: Chunk) -> None:
        slot = self._free.popleft()
        pages, stream = chunk.pages, self._streams.host_to_device
        self._streams.wait(self._freed[slot], stream)
        self._streams.wait(pages.written, stream)
        with self._streams.use(stream):
            self._copy(pages, chunk.rows, chunk.start, chunk.stop, self._buffers[slot])
        self._streams.record(self._ready[slot], stream)
        self._staged.append((chunk, slot))
        self._last = chunk

    def _copy(self, pages: Pages, rows: int, start: int, stop: int, buffer: Tensor) -> None:
        """Copies columns [start, stop) into device bytes, the pages of a sequence side by side."""
        if rows > 1 and self._at_once is not None and self._copy_evenly(pages, rows, start, stop, buffer):  # fmt: skip
            return
        for row in range(rows):
            for run in pages.runs(row, start, stop):
                at = (row * (stop - start) + run.column - start) * pages.page_bytes
                source = pages.host_view(run)
                target = buffer[at : at + source.numel()]
                self._counters.h2d_bytes += source.numel()
                if pages.is_pinned(run):
                    target.copy_(source, non_blocking=True)
                else:
                    if pages.written is not None:
                        pages.written.synchronize()
                    self._counters.bounced_bytes += source.numel()
                    self._bounced().copy(target, source)

    def _copy_evenly(self, pages: Pages, rows: int, start: int, stop: int, buffer: Tensor) -> bool:
        """The same as one copy, where the pages of all sequences lie alike; whether they do."""
        even = pages.even(rows, start, stop)
        if even is None or self._at_once is None:
            return False
        there = even_pages(pages, even, rows, start, stop)
        if there is None or not self._at_once.copy_in(buffer, there, self._streams.host_to_device):
            return False
        self._counters.h2d_bytes += there.width * there.height
        return True

    def _bounced(self) -> _Bounce:
        if self._bounce is None:
            self._bounce = _Bounce(self._streams)
        return self._bounce


@dataclass(frozen=True, slots=True)
class EvenRows:
    """Pinned memory of which rows are meant that lie equally far apart.

    Attributes:
        memory: uint8, from the first row's begin to the last one's end.
        width: Bytes of a row.
        height: Rows.
        apart: Bytes from one row's begin to the next one's.
    """

    memory: Tensor
    width: int
    height: int
    apart: int


def even_pages(
    pages: Pages, even: tuple[int, int] | None, rows: int, start: int, stop: int
) -> EvenRows | None:
    """Columns [start, stop) of several sequences as rows, of each sequence one; None where they are not even, or not pinned.

    Args:
        pages: Of a layer.
        even: What `pages.even(rows, start, stop)` says.
        rows: Sequences.
        start: First column.
        stop: One past the last column.
    """
    if even is None:
        return None
    first, apart = even
    whole = Run(page=first, column=start, count=apart * (rows - 1) + stop - start)
    if not pages.is_pinned(whole):
        return None
    size = pages.page_bytes
    return EvenRows(pages.host_view(whole), (stop - start) * size, rows, apart * size)


class EvenCopies:
    """Copies rows that lie equally far apart in pinned memory in one call of the CUDA runtime, which torch has no name for.

    Copied one by one, 64 sequences take longer to launch than to cross.
    """

    def __init__(self) -> None:
        """Finds the runtime that torch has loaded; without it `copy` does nothing."""
        self._runtime: ctypes.CDLL | None = None
        self._refused: str | None = None  # why there is none, until that was told
        major = (torch.version.cuda or "").partition(".")[0]
        try:
            runtime = ctypes.CDLL(f"libcudart.so.{major}")
            size = ctypes.c_size_t
            where = ctypes.c_void_p
            runtime.cudaMemcpy2DAsync.argtypes = [where, size, where, size, size, size, ctypes.c_int, where]  # fmt: skip
        except (OSError, AttributeError) as error:
            self._refused = str(error)
            return
        self._runtime = runtime

    def copy_in(self, target: Tensor, rows: EvenRows, stream: torch.cuda.Stream | None) -> bool:
        """Queues the copy of rows to a device.

        Args:
            target: uint8 on a CUDA device, at least height * width: written, rows side by side.
            rows: In pinned memory.
            stream: Of the device.

        Returns:
            Whether it was done. Else nothing was.
        """
        assert target.numel() >= rows.height * rows.width
        return self._copy(
            rows, stream, (target, rows.width), (rows.memory, rows.apart), _HOST_TO_DEVICE
        )

    def copy_out(self, rows: EvenRows, source: Tensor, stream: torch.cuda.Stream | None) -> bool:
        """Queues the copy of rows from a device.

        Args:
            rows: In pinned memory: written.
            source: uint8 on a CUDA device, rows side by side.
            stream: Of the device.

        Returns:
            Whether it was done. Else nothing was.
        """
        assert source.numel() >= rows.height * rows.width
        return self._copy(
            rows, stream, (rows.memory, rows.apart), (source, rows.width), _DEVICE_TO_HOST
        )

    def _copy(
        self, rows: EvenRows, stream: torch.cuda.Stream | None, target: tuple[Tensor, int], source: tuple[Tensor, int], kind: int
    ) -> bool:  # fmt: skip
        """The copy between two memories with their bytes from row to row."""
        if self._refused is not None:
            logger.warning("Host pages of several sequences are copied one by one, which is slower: %s.", self._refused)  # fmt: skip
            self._refused = None
        if self._runtime is None or stream is None or max(rows.width, rows.apart) >= _MOST_PITCH:
            return False
        assert rows.memory.numel() >= (rows.height - 1) * rows.apart + rows.width
        status = self._runtime.cudaMemcpy2DAsync(
            target[0].data_ptr(), target[1], source[0].data_ptr(), source[1], rows.width, rows.height, kind,
            stream.cuda_stream,
        )  # fmt: skip
        if status:
            self._runtime.cudaGetLastError()  # or torch would find it
            self._runtime = None
            self._refused = f"cudaMemcpy2DAsync returned {status}"
        return not status


class _Bounce:
    """Two pinned buffers through which ordinary memory reaches the device: one fills while one is copied."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        # Outside the user's pin budget on purpose: without these 32 MiB the copies would be synchronous.
        self._region = HostRegion(BOUNCE_BYTES, 2 * BOUNCE_BYTES, streams.device, PinBudget())
        commit_regions([(self._region, 2 * BOUNCE_BYTES)])
        self._done = [streams.event(), streams.event()]
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies pageable bytes to the device on the current (*in*) stream."""
        for at in range(0, source.numel(), BOUNCE_BYTES):
            slot, self._next = self._next, 1 - self._next
            done = self._done[slot]
            if done is not None:
                done.synchronize()  # the CPU refills the buffer: its last copy must be over
            piece = source[at : at + BOUNCE_BYTES]
            buffer = self._region.view(slot * BOUNCE_BYTES, piece.numel())
            buffer.copy_(piece)
            target[at : at + piece.numel()].copy_(buffer, non_blocking=True)
            self._streams.record(done, self._streams.host_to_device)


class HostWriter:
    """Copies evicted blocks to their host pages through two device buffers, on a stream of its own."""

    @torch.inference_mode(False)
    def __init__(self, streams: Streams, buffer_bytes: int, counters: TransferCounters) -> None:
        """Allocates the two buffers, each of `buffer_bytes`."""
        self.buffer_bytes = buffer_bytes
        self._streams = streams
        self._counters = counters
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=streams.device) for _ in range(2)
        ]
        self._drained = [streams.event(), streams.event()]
        self._next = 0
        self._at_once = EvenCopies() if streams.on else None

    def write(
        self,
        nbytes: int,
        pack: Callable[[Tensor], None],
        targets: Callable[[], list[tuple[int, Tensor]]],
        rows: EvenRows | None = None,
    ) -> torch.cuda.Event | None:
        """Packs blocks into a buffer on the compute stream and copies them to the host behind it.

        Args:
            nbytes: Bytes that `pack` fills; at most `buffer_bytes`.
            pack: Called once with uint8 [nbytes] on the device.
            targets: Tells (offset in the buffer, host bytes) of each contiguous piece.
            rows: The same, where the pieces are rows that lie equally far apart in pinned memory.

        Returns:
            Recorded behind the copies: whoever reads the pages waits for it.
        """
        assert nbytes <= self.buffer_bytes
        slot, self._next = self._next, 1 - self._next
        stream = self._streams.device_to_host
        self._streams.wait(self._drained[slot])
        buffer = self._buffers[slot][:nbytes]
        pack(buffer)
        packed = self._streams.event()
        self._streams.record(packed)
        self._streams.wait(packed, stream)
        at_once = self._at_once
        if rows is None or at_once is None or not at_once.copy_out(rows, buffer, stream):
            with self._streams.use(stream):
                for at, target in targets():
                    target.copy_(buffer[at : at + target.numel()], non_blocking=True)
        self._counters.d2h_bytes += nbytes
        self._streams.record(self._drained[slot], stream)
        written = self._streams.event()
        self._streams.record(written, stream)
        return written
