"""How does host memory become pinned: exactly as much as was asked, fast, and growing without moving?

An anonymous mapping reserves addresses; `commit` brings a prefix of it into memory with huge pages, touched
by many threads, and registers it with CUDA. torch's own pinned allocator rounds sizes up to a power of two
and pins 1.4 to 1.8 GiB/s on the machine where this way pinned 3 to 16. Where the driver refuses to pin more
(WSL2, some containers), the rest stays ordinary memory and is copied through a pinned bounce buffer.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.errors import BudgetError

logger = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_TOUCH_BYTES = 64 * 2**20  # one task of the touching threads
_REGISTER_BYTES = (
    1 * 2**30
)  # one registration; a refusal then costs at most this much of what could be pinned
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module


@dataclass(slots=True)
class PinBudget:
    """How much may be pinned, shared by all regions of a runtime.

    Attributes:
        limit: Bytes, or None for as much as the driver grants.
        held: Bytes pinned now.
        refused: Why pinning stopped, once it has.
    """

    limit: int | None = None
    held: int = 0
    refused: str | None = None

    def grant(self, asked: int, unit: int) -> int:
        """Bytes of `asked` that may still be pinned, in whole units."""
        if self.refused is not None:
            return 0
        if self.limit is None:
            return asked
        granted = min(asked, max(0, self.limit - self.held) // unit * unit)
        if granted < asked:
            self.stop(f"memory.pinned allows {self.limit} bytes")
        return granted

    def stop(self, reason: str) -> None:
        """Ends pinning for this runtime, with one warning."""
        if self.refused is None:
            self.refused = reason
            logger.warning(
                "No more host memory is pinned (%s); the rest of the KV cache is ordinary memory and is "
                "copied through a pinned bounce buffer, which is slower.",
                reason,
            )


@dataclass(slots=True)
class HostBudget:
    """How much host memory pages may take, shared by all regions of a runtime.

    Attributes:
        available: Tells how many bytes may be committed in addition, given those held already.
        held: Bytes committed now.
    """

    available: Callable[[int], int] | None = None
    held: int = 0

    def require(self, nbytes: int) -> None:
        """Raises BudgetError unless so many more bytes may be committed."""
        if self.available is None:
            return
        there = self.available(self.held)
        if nbytes > there:
            raise BudgetError(
                "More host memory for the KV cache",
                requested=nbytes,
                available=there,
                setting="memory.cpu",
                change="Raise memory.cpu, close caches that are not used, or shorten the context.",
            )

    def room(self) -> int | None:
        """Bytes that may be committed in addition; None for no limit."""
        return None if self.available is None else max(0, self.available(self.held))


@dataclass(slots=True)
class _Registered:
    start: int
    nbytes: int


@dataclass(slots=True, eq=False)
class HostRegion:
    """Host memory at one fixed address; its committed prefix only grows.

    Attributes:
        unit: Bytes that no border of pinned memory may cut (a KV page): one copy must lie within one
            registration.
        reserve: Bytes of address space. No memory is used before `commit_regions`.
        device: Whose copies it serves; memory is pinned for a CUDA device only. For a CPU the same budget
            decides which pages count as pinned, so that both ways of copying run there too.
        budget: What may be pinned.
        host: What may be committed.
        committed: Bytes usable.
        pinned: Bytes pinned, a prefix.
    """

    unit: int
    reserve: int
    device: torch.device
    budget: PinBudget
    host: HostBudget = field(default_factory=HostBudget)
    committed: int = 0
    pinned: int = 0
    _map: mmap.mmap | None = field(default=None, init=False)
    _bytes: Tensor | None = field(default=None, init=False)
    _registered: list[_Registered] = field(default_factory=list, init=False)

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        self.unit = math.lcm(self.unit, _PAGE)
        self.reserve = max(1, -(-self.reserve // self.unit)) * self.unit
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
            self._map = mmap.mmap(-1, self.reserve, flags=flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                try:
                    self._map.madvise(mmap.MADV_HUGEPAGE)
                except OSError:  # a kernel without huge pages: slower to touch, else the same
                    logger.debug("huge pages are not available")
        else:
            self._map = mmap.mmap(-1, self.reserve)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, start: int, nbytes: int) -> Tensor:
        """Bytes [start, start + nbytes) of the committed prefix, uint8."""
        assert self._bytes is not None
        assert start + nbytes <= self.committed
        return self._bytes[start : start + nbytes]

    @property
    def edges(self) -> list[int]:
        """Ascending offsets where separately registered memory meets; no single copy may cross one."""
        borders = [part.start for part in self._registered[1:]]
        return borders + ([self.pinned] if 0 < self.pinned < self.committed else [])

    def close(self) -> None:
        """Unpins and lets go of the memory. Tensors of this region must not be used afterwards."""
        if self._registered and self._bytes is not None:
            torch.cuda.synchronize(self.device)
            address = self._bytes.data_ptr()
            for part in self._registered:
                torch.cuda.cudart().cudaHostUnregister(address + part.start)
        self._registered.clear()
        self.budget.held -= self.pinned
        self.host.held -= self.committed
        self.committed = self.pinned = 0
        self._bytes = None
        self._map = None

    def __del__(self) -> None:
        # Memory that is unmapped while registered poisons its addresses for later registrations.
        if getattr(self, "_map", None) is not None and not sys.is_finalizing():
            self.close()


def commit_regions(grow: Sequence[tuple[HostRegion, int]]) -> None:
    """Makes a prefix of each region usable: touched in parallel, then pinned as far as the budget goes.

    Args:
        grow: (region, bytes that shall be usable in all). Growing costs; a smaller size changes nothing.

    Raises:
        BudgetError: The host budget or a region's reserved addresses do not suffice; nothing was committed.
    """
    todo = []
    for region, nbytes in grow:
        if nbytes > region.reserve:
            raise BudgetError(
                "A layer's host pages",
                requested=nbytes,
                available=region.reserve,
                setting="memory.cpu",
                change="One layer may take its share of the host's memory; shorten the context.",
            )
        target = -(-nbytes // region.unit) * region.unit
        if target > region.committed:
            todo.append((region, region.committed, target))
    if not todo:
        return
    more: dict[int, tuple[HostBudget, int]] = {}
    for region, start, stop in todo:
        more[id(region.host)] = (
            region.host,
            more.get(id(region.host), (region.host, 0))[1] + stop - start,
        )
    for host, nbytes in more.values():
        host.require(nbytes)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        touched = []
        for region, start, stop in todo:
            assert region._bytes is not None
            touch = (
                region.device.type == "cuda"
            )  # elsewhere memory may come when it is first written
            touched.append(
                [
                    pool.submit(_touch, region._bytes.data_ptr() + at, min(_TOUCH_BYTES, stop - at))
                    for at in range(start, stop, _TOUCH_BYTES)
                ]
                if touch
                else []
            )
        # Registering one region overlaps with touching the next ones.
        for (region, start, stop), tasks in zip(todo, touched, strict=True):
            for task in tasks:
                task.result()
            region.committed = stop
            region.host.held += stop - start
            if region.pinned == start:
                _pin(region, start, stop)


def _touch(address: int, nbytes: int) -> None:
    """Brings pages into memory; releases the interpreter lock meanwhile."""
    status = -1
    if sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        status = madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
    if status != 0:
        ctypes.memset(address, 0, nbytes)


def _pin(region: HostRegion, start: int, stop: int) -> None:
    """Registers [start, stop) piece by piece until the budget or the driver says no."""
    step = max(1, _REGISTER_BYTES // region.unit) * region.unit
    for at in range(start, stop, step):
        wanted = min(step, stop - at)
        granted = region.budget.grant(wanted, region.unit)
        if granted and region.device.type == "cuda":
            assert region._bytes is not None
            with torch.cuda.device(region.device):
                address = region._bytes.data_ptr() + at
                status = torch.cuda.cudart().cudaHostRegister(address, granted, 0)
            if int(status) != 0:
                _clear_refused_pin(region.device)
                region.budget.stop(f"the driver refused with error {int(status)}")
                granted = 0
            else:
                region._registered.append(_Registered(at, granted))
        region.pinned += granted
        region.budget.held += granted
        if granted < wanted:
            return


def _clear_refused_pin(device: torch.device) -> None:
    """Takes away the error that a refused pin leaves: the next launch would report it as its own."""
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as error:
        logger.debug("cleared after a refused pin: %s", error)
