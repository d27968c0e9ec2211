"""What does every way of making one layer's token on the device have in common? A table of pages, lengths, and padding.

Lengths are read from device memory, so that a captured graph can replay a step. What a step may read is published between two
steps; `step` launches kernels and nothing else. `offload.tiers.replica` makes steps by a low-bit replica of all offloaded
tokens, `offload.tiers.sparse` by some of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.tiers.rows import RowShape
from offload.tiers.search import Found, HostSearch

_Scratch = TypeVar("_Scratch")

_SENT = 4  # small tensors that are kept, so that other layers find them
LARGEST_HEAD = 256  # of the kernels
PRIORITY = -1  # of what runs beside the tail: few programs that much waits for come before its many


class StepMemory:
    """What the steps of all layers share: scratch, one set for each kind of layer, and which tokens are padding.

    Attributes:
        padding: int32 [B]: so many first tokens of each sequence are padding; None without any. Its address stays
            while the number of sequences does, so that a graph may keep it.
        version: Grows whenever `padding` means something else.
        is_left: Whether padding is all on the left.
        beside: A second and a third stream: window and selected rows are attended to while the replica is read.
        suspended: Every token is streamed for now (beams).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[Any, ...], Any] = {}
        self._sent: dict[tuple[tuple[int, ...], bytes], Tensor] = {}
        self.padding: Tensor | None = None
        self.version = 0
        self._seen: Tensor | None = None
        on_card = device.type == "cuda"
        self.beside = [torch.cuda.Stream(device, PRIORITY) for _ in range(2)] if on_card else []
        self.is_left = True
        self.suspended = False

    def made(
        self, kind: tuple[Any, ...], sizes: tuple[int, ...], make: Callable[[], _Scratch]
    ) -> _Scratch:
        """The scratch for layers of a kind.

        Those whose steps write other parts have one of their own: what a step does not write stays empty.

        Args:
            kind: What tells it from that of other layers.
            sizes: Those of another kind of the same sizes stay; others of this kind give way.
            make: Makes it, where there is none.
        """
        key = (*kind, *sizes)
        if key not in self._made:
            # Another number of blocks or sequences takes the place of what there was.
            for old in [old for old in self._made if old[: len(kind)] == kind]:
                del self._made[old]
            self._made[key] = make()
        made: _Scratch = self._made[key]
        return made

    def on_device(self, numbers: NDArray[np.int32]) -> Tensor:
        """Numbers on the device. Layers that are told the same ones get the same tensor: a copy makes the host wait for the device.

        Args:
            numbers: Not to be changed afterwards.
        """
        key = (numbers.shape, numbers.tobytes())
        if key not in self._sent:
            while len(self._sent) >= _SENT:
                del self._sent[next(iter(self._sent))]
            self._sent[key] = torch.from_numpy(np.ascontiguousarray(numbers)).to(self._device)
        return self._sent[key]

    def take_padding(self, visible: Tensor | None) -> bool:
        """Notes which tokens are padding; the same mask is looked at once.

        Args:
            visible: Boolean [B, length], False where a key is padding; None without padding.

        Returns:
            Whether padding is all on the left, which is what the device path understands.
        """
        if visible is None:
            self.version += self.padding is not None
            self.padding = self._seen = None
            self.is_left = True
            return True
        if visible is not self._seen:
            self._seen = visible
            hidden = (~visible).sum(dim=1, dtype=torch.int32)
            places = torch.arange(visible.shape[1], device=visible.device)
            self.is_left = bool(((places >= hidden.unsqueeze(1)) == visible).all())
            if self.padding is None or self.padding.shape != hidden.shape:
                self.padding = hidden
                self.version += 1
            elif not torch.equal(self.padding, hidden):
                self.padding.copy_(hidden)
                self.version += 1
        return self.is_left


@dataclass(frozen=True, slots=True)
class Published:
    """What a step may read.

    Attributes:
        blocks: Of every sequence, on the host.
        first_token: Position of the first token there.
        tokens: Of every sequence.
        pool: [pages, P, H_kv, D + D_v]: host pages; None while nothing is there.
        pinned: Whether kernels can read them.
    """

    blocks: int
    first_token: int
    tokens: int
    pool: Tensor | None
    pinned: bool


class StepPath(ABC):
    """The device path of one layer: what its steps may read.

    Attributes:
        shape: Of the rows.
        lengths: int32 [1 + B]: rows on the device, then blocks of each sequence on the host. Kernels read them; a step adds one
            to the first.
        search: Finds tokens on the host; None where the device selects them.
        epoch: Grows whenever an address changes that a captured graph has kept.
        steps: Made since `reset_stats`.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        shape: RowShape,
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
            memory: Scratch, shared with the other layers.
            batch: Sequences.
            blocks: Blocks on the host that there is room for; 0 where everything stays on the device.
            slots: Slots of the window, the tail's too.
            page: Tokens of a slot.
            device: Where.
        """
        self.shape = shape
        self.search: HostSearch | None = None
        self.epoch = 0
        self.steps = 0
        self._memory = memory
        self._page = page
        self._device = device
        self.lengths = torch.zeros(1 + batch, dtype=torch.int32, device=device)
        self._starts = torch.zeros(slots, dtype=torch.int32, device=device)
        self._table = torch.zeros((batch, max(1, blocks)), dtype=torch.int32, device=device)
        self._hidden: Tensor | None = None  # padding among the host's tokens, int32 [B]
        self._padding_version = 0
        self._known = 0  # columns of the table that are right
        self._splits = splits(slots * page, batch * shape.kv_heads)

    # What it holds.

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks on the host that there is room for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes on the device of what stands for the host's tokens, the page table too."""

    @property
    @abstractmethod
    def row_cache_nbytes(self) -> int:
        """Bytes on the device of rows that are on the host as well."""

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels know this device and these head sizes; else the references compute, and synchronise."""
        widest = max(self.shape.key_dim, self.shape.value_dim)
        return self._device.type == "cuda" and widest <= LARGEST_HEAD

    # What its steps left.

    def reset_stats(self) -> None:
        """Begins to add up anew."""
        self.steps = 0
        if self.search is not None:
            self.search.reset_stats()

    @abstractmethod
    def masses(self) -> Tensor:
        """float32 [2] on the host: the share of all weights that was not attended to exactly, and that of blocks not read; means."""

    def left_out(self) -> float | None:
        """Share of all weights that steps leave out, of a prompt's last queries; None where they leave none out."""
        return None

    @abstractmethod
    def error_estimate(self) -> float:
        """What the outputs of all steps are expected to be off by, relative to them, in the mean square; NaN where nobody knows."""

    @abstractmethod
    def selected_bytes(self) -> tuple[int, int]:
        """Bytes of rows that a step attended to exactly, and how many of them came from the host: means."""

    @abstractmethod
    def bad_block(self, blocks: int) -> int | None:
        """The first block whose keys or values were not finite, or too large for what stands for them.

        Args:
            blocks: Blocks on the host.
        """

    # Whether it may step.

    def can_step(self, visible: Tensor | None, blocks: int) -> bool:
        """Whether a step can be made here; if not, every token is streamed.

        Args:
            visible: As in `StepMemory.take_padding`.
            blocks: Blocks on the host.
        """
        return self._memory.take_padding(visible) and self.can_step_now(blocks)

    def can_step_now(self, blocks: int) -> bool:
        """Whether a step can be made with the padding that was noted last."""
        return not self._memory.suspended and self.why_streamed(blocks) is None

    def why_streamed(self, blocks: int) -> str | None:
        """Why every token is streamed though there is a device path, or None.

        Args:
            blocks: Blocks on the host.
        """
        if blocks > self.blocks:
            room, there = self.blocks * self._page, blocks * self._page
            return f"{there:,} tokens are on the host, there is room for {room:,}"
        return None if self._memory.is_left else "padding is not all on the left"

    @property
    def is_padded(self) -> bool:
        """Whether any sequence begins with padding."""
        return self._memory.padding is not None

    def suspend(self, wanted: bool) -> bool:
        """Whether every token is streamed until this is called again; says whether it was until now."""
        was, self._memory.suspended = self._memory.suspended, wanted
        return was

    @property
    def is_published(self) -> bool:
        """Whether what `publish` wrote of padding still holds."""
        return self._padding_version == self._memory.version

    # Changes, outside of any graph.

    @abstractmethod
    def append(self, rows: Tensor, first_block: int) -> None:
        """Takes note of whole blocks that leave the window.

        Args:
            rows: [B, n * P, H_kv, D + D_v] on the device.
            first_block: Where they go. Blocks behind the room that there is are left out.
        """

    def forget_table(self, columns: int) -> None:
        """Columns may mean other pages, and tokens other rows, than those that were published.

        Args:
            columns: The first ones, which hold what they held.
        """
        self._known = 0
        if self.search is not None:
            self.search.truncate(columns)

    def select_sequences(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""
        self.forget_table(self.blocks)
        if self.search is not None:
            self.search.select_sequences(rows.cpu().numpy())
        if rows.numel() != self.lengths.numel() - 1:
            self.epoch += 1
            self.lengths = torch.zeros(1 + rows.numel(), dtype=torch.int32, device=self._device)
            self._table = self._table.index_select(0, rows)

    def publish(
        self,
        *,
        n_rows: int,
        blocks: int,
        first_token: int,
        pages: NDArray[np.int64],
        starts: list[int],
        written: torch.cuda.Event | None,
        pool: Tensor | None = None,
        pinned: bool = True,
    ) -> None:
        """Tells the kernels what they may read.

        Args:
            n_rows: Rows on the device.
            blocks: Blocks of every sequence on the host.
            first_token: Position of the first token there.
            pages: [B, blocks], their pages.
            starts: Position of the first token of each slot in use.
            written: The event behind the last copy to a host page.
            pool: [pages, P, H_kv, D + D_v]: host pages; None while nothing is there.
            pinned: Whether kernels can read them.
        """
        if blocks:
            _await_copy(written, self._device)
            if written is not None and not pinned:
                written.synchronize()
            # Columns that were published keep their pages until `forget_table` says otherwise.
            fresh = pages[:, self._known : blocks].astype(np.int32)
            self._table[:, self._known : blocks] = self._memory.on_device(fresh)
        self._padding_version = self._memory.version
        padding = self._memory.padding
        if padding is None:
            self._hidden = None
        else:
            hidden = (padding - first_token).clamp_(min=0)
            if self._hidden is None or self._hidden.shape != hidden.shape:
                self._hidden = hidden
                self.epoch += 1
            else:
                self._hidden.copy_(hidden)
        if padding is not None or self._reads_starts:
            self._starts[: len(starts)] = self._memory.on_device(np.asarray(starts, np.int32))
        there = Published(blocks, first_token, n_rows + blocks * self._page, pool, pinned)
        self._take_blocks(there)
        self._known = blocks
        self.lengths[:1].fill_(n_rows)
        self.lengths[1:].fill_(blocks)

    _reads_starts = False  # whether steps want the position of a slot where there is no padding

    @abstractmethod
    def _take_blocks(self, there: Published) -> None:
        """What is to be done where blocks are published; of these `_known` are not new."""

    # Queries of a prompt, of which some paths learn.

    @property
    def is_learning(self) -> bool:
        """Whether queries of a prompt are to be asked what its tokens weigh: `weigh_keys` for all, before the next `publish`."""
        return False

    def learn(  # noqa: B027 - most paths do not
        self, query: Tensor, lse: Tensor, stop: int, *, scale: float, softcap: float | None
    ) -> None:
        """Takes note of queries of several tokens that were attended with.

        Args:
            query: [B, H_q, Q, D].
            lse: float32 [B, H_q, Q]: over all tokens up to each of them.
            stop: Position behind the last of them.
            scale: Factor on the dot products.
            softcap: As in `offload.kernels.attend`.
        """

    def weigh_keys(self, keys: Tensor, positions: Tensor) -> None:
        """Adds what tokens weigh to the queries that were learned.

        Args:
            keys: [B, H_kv, N, D] on the device.
            positions: Integers [N].
        """
        raise NotImplementedError

    def hidden_tokens(self) -> list[int]:
        """Of each sequence, tokens on the host that are padding."""
        if self._hidden is None:
            return [0] * (self.lengths.numel() - 1)
        return [int(n) for n in self._hidden.tolist()]

    # One step.

    @abstractmethod
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
        """Attends with one new token per sequence to the tokens of its choice and itself, and appends it to the window.

        Args:
            query: [B, H_q, D].
            key: [B, H_kv, D].
            value: [B, H_kv, D_v].
            window: [B, slots, P, H_kv, D + D_v].
            pool: [pages, P, H_kv, D + D_v] in host memory; None while nothing is on the host.
            scale: Factor on the dot products.
            softcap: As in `offload.kernels.attend`.
            sink_logits: [H_q], likewise.
            gather: None where kernels can read the pool; else what copies rows of tokens [B, H_kv, k] to
                [B, H_kv, k, D + D_v], both on the host.
            search: Where the host selects: what attends there, for queries float32 [B, H_q, D].

        Returns:
            [B, H_q, D_v], in the dtype of `query`.
        """


def _await_copy(written: torch.cuda.Event | None, device: torch.device) -> None:
    """Lets the current stream wait until the last block is on the host."""
    if written is not None:
        torch.cuda.current_stream(device).wait_event(written)


def splits(n_rows: int, programs: int) -> int:
    """Programs per KV head over a window: a power of two.

    On an H100 with 8 KV heads 16 to 64 read 131,072 rows at the full rate, and 1,024 rows take 5 us with 16 and
    8 us with 64.
    """
    wanted = max(1, min(32, n_rows // 128, 512 // programs))
    return 1 << (wanted.bit_length() - 1)
