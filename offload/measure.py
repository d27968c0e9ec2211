"""How fast is this machine? Some seconds of copies, products and searches, with the pieces that a run is made of.

On a card less than 1 GiB of its memory is used and 512 MiB of host memory are pinned. A number is the median of `_REPEATS` runs
behind one that is not counted: it compiles, and brings clocks up. What runs on the device is timed by its own events, what
the host waits for by the clock.

Numba and torch are imported here, Triton where there is a card: `offload.probe` imports this module when it measures.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload import hardware
from offload.errors import BudgetError
from offload.index.lanes import BLOCK, CHANNELS
from offload.index.paged import BFLOAT16, Rows, Scratch, attend_some
from offload.index.scan import scan
from offload.index.workers import Workers
from offload.probe import Fingerprint, Probe, Quantity, Unit
from offload.tiers.pinned import HostBudget, HostRegion, PinBudget, commit_regions
from offload.tiers.transfer import Streams
from offload.units import GIB, KIB, MIB

logger = logging.getLogger(__name__)

_REPEATS = 5
_TIMES = 8  # launches in a row: but for the first, none waits for the host, which takes 10 to 50 µs for one
HOST_BYTES = 512 * MIB  # WSL2 and some containers pin no more; few processors cache as much
_LEAST_HOST_BYTES = 64 * MIB
DEVICE_BYTES = GIB  # more is never held at once
_BLOCKS = tuple(64 * KIB * 4**i for i in range(6))  # 64 KiB to 64 MiB
_COPIES = 256  # at most, in one run
_DEVICE_STREAM = 256 * MIB  # of each of two: five times what the largest cards cache
_PRODUCT = 4096, 4096, 14336  # a chunk, and the largest matrix of the 8B shape
_PROMPT = 2048, 16384  # queries and keys
# Heads, their size, query heads of a KV head: the 8B shape. Pages as the runtime has them.
_HEADS, _SIZE, _GROUPS, _PAGE = 8, 128, 4, 64
_ROWS = 2048  # of one call: Python hands a task to a thread in 20 µs, so that it has to take longer


def measured(fingerprint: Fingerprint) -> Probe:
    """Measures this machine.

    Args:
        fingerprint: Of it.

    Raises:
        BudgetError: The card or the host have too little free memory.
    """
    began = time.perf_counter()
    device = _device_of(fingerprint.card)
    free = hardware.host_memory().available
    nbytes = min(HOST_BYTES, free // 4 // _LEAST_HOST_BYTES * _LEAST_HOST_BYTES)
    if nbytes < _LEAST_HOST_BYTES:
        raise BudgetError(
            "Measuring this machine", requested=4 * _LEAST_HOST_BYTES, available=free,
            setting="memory.cpu", change="Close other programs.",
        )  # fmt: skip
    budget = PinBudget(limit=nbytes)
    region = HostRegion(
        _LEAST_HOST_BYTES, nbytes, device, budget, HostBudget(available=lambda held: free - held)
    )
    try:
        # Piece by piece: where the driver refuses one, those before it stay pinned.
        for stop in range(_LEAST_HOST_BYTES, nbytes + 1, _LEAST_HOST_BYTES):
            commit_regions([(region, stop)])
        pinnable = _pinnable(device, region, budget, free)
        found = _of_host(region)
        of_card = _OF_NO_CARD
        if device.type == "cuda":
            with torch.cuda.device(device), torch.inference_mode():
                of_card = _of_card(device, region)
    except torch.OutOfMemoryError as error:
        # The allocator may be capped, or another program was quicker.
        raise _too_little(hardware.device_memory(device).free) from error
    finally:
        region.close()
    return Probe(
        fingerprint=fingerprint, date=datetime.now(UTC).isoformat(timespec="seconds"),
        took_s=time.perf_counter() - began, pinnable=pinnable, **found, **of_card,
    )  # fmt: skip


def _device_of(card: str | None) -> torch.device:
    """The device that torch has of a card; the CPU without one."""
    if card is None:
        return torch.device("cpu")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if torch.cuda.get_device_name(i) == card:
                return torch.device("cuda", i)
    logger.warning("torch cannot use %s: only the host is measured. offload doctor says why.", card)
    return torch.device("cpu")


def _quantity(value: float, unit: Unit) -> Quantity:
    return Quantity(value, unit, "measured")


def _clocked(run: Callable[[], object]) -> float:
    """Seconds of a call, by the clock."""
    run()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


# The host.


def _pinnable(device: torch.device, region: HostRegion, budget: PinBudget, free: int) -> Quantity:
    """How much host memory can be pinned."""
    if device.type == "cuda":
        if budget.refused is not None:
            return _quantity(region.pinned, "B")
        return Quantity(
            free, "B", "computed"
        )  # a driver that grants 512 MiB has no limit of its own
    try:
        import resource
    except ImportError:  # Windows
        return Quantity(free, "B", "computed")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Quantity(free if limit == resource.RLIM_INFINITY else min(limit, free), "B", "computed")


def _of_host(region: HostRegion) -> dict[str, Any]:
    """What the cores do with host memory."""
    memory = _filled(region)
    workers = Workers()
    try:
        return {
            "host_stream": _stream(memory, workers),
            "host_scan": _scan(memory, workers),
            "host_attend": _attend(memory, workers),
            "worker_hand_off": _worker_hand_off(workers),
        }
    finally:
        workers.close()


def _filled(region: HostRegion) -> NDArray[np.uint16]:
    """The region full of bfloat16 numbers: memory that was never written is one page of zeros, which a cache holds."""
    numbers = np.random.default_rng(0).standard_normal(_LEAST_HOST_BYTES // 8, dtype=np.float32)
    memory: NDArray[np.uint16] = region.view(0, region.committed).numpy().view(np.uint16)
    memory.reshape(-1, numbers.size)[:] = numbers.view(np.uint32) >> 16
    return memory


def _stream(memory: NDArray[np.uint16], workers: Workers) -> Quantity:
    # The largest of whole numbers takes the fewest instructions of all that NumPy does with them, and lets go of the lock.
    parts = np.array_split(memory.view(np.int64), 4 * workers.threads)
    seconds = _clocked(lambda: workers.run(lambda i, worker: parts[i].max(), len(parts)))
    return _quantity(memory.nbytes / seconds, "B/s")


def _scan(memory: NDArray[np.uint16], workers: Workers) -> Quantity:
    bits, rows = 4, _SIZE // CHANNELS
    codes = memory.view(np.uint8).reshape(-1, rows, CHANNELS * BLOCK * bits // 8)
    random = np.random.default_rng(1)
    lows, steps = (random.random((len(codes), _SIZE), dtype=np.float32) for _ in range(2))
    queries = random.standard_normal((_GROUPS, _SIZE), dtype=np.float32)
    tasks = 4 * workers.threads
    starts = np.linspace(0, len(codes), tasks + 1).astype(int)
    most = int(np.diff(starts).max())
    scores = [np.empty((_GROUPS, most * BLOCK), np.float32) for _ in range(workers.threads)]

    def task(i: int, worker: int) -> None:
        part = slice(starts[i], starts[i + 1])
        scan(codes[part], lows[part], steps[part], queries, bits, scores[worker])

    seconds = _clocked(lambda: workers.run(task, tasks))
    return _quantity((codes.nbytes + lows.nbytes + steps.nbytes) / seconds, "B/s")


def _attend(memory: NDArray[np.uint16], workers: Workers) -> Quantity:
    pool = memory.reshape(-1, _PAGE, _HEADS, 2 * _SIZE)
    table = np.arange(len(pool), dtype=np.int64)
    random = np.random.default_rng(2)
    queries = random.standard_normal((_GROUPS, _SIZE), dtype=np.float32) / np.float32(_SIZE**0.5)
    # Each run has rows of its own: what a cache holds of the last one is not asked for again.
    tasks = 4 * workers.threads
    drawn = [np.sort(random.choice(len(pool) * _PAGE, _ROWS, replace=False)) for _ in range(tasks * (_REPEATS + 1))]  # fmt: skip
    chosen = iter(drawn)
    scratches = [Scratch.of(_GROUPS, _ROWS, _SIZE, _SIZE, _ROWS) for _ in range(workers.threads)]
    ids = np.empty((workers.threads, _ROWS), np.int32)
    out = np.empty((workers.threads, _GROUPS, _SIZE), np.float32)
    lse = np.empty((workers.threads, _GROUPS), np.float32)

    def task(i: int, worker: int) -> None:
        rows = Rows(pool, BFLOAT16, table, i % _HEADS, _SIZE)
        attend_some(rows, next(chosen), queries, 0.0, scratches[worker], ids[worker], out[worker], lse[worker])  # fmt: skip

    seconds = _clocked(lambda: workers.run(task, tasks))
    return _quantity(tasks * _ROWS * pool.shape[-1] * pool.itemsize / seconds, "B/s")


def _worker_hand_off(workers: Workers) -> Quantity:
    def run() -> None:
        for _ in range(100):
            workers.run(lambda i, worker: None, workers.threads)

    return _quantity(_clocked(run) / 100, "s")


# The card.

_OF_NO_CARD: dict[str, Any] = dict.fromkeys(
    ("free_bytes", "h2d", "d2h", "dma_from", "zero_copy", "device_stream", "gemm", "attention", "launch", "hand_off")
)  # fmt: skip


def _of_card(device: torch.device, region: HostRegion) -> dict[str, Any]:
    """What a card does, and the link to it."""
    held = torch.cuda.memory_reserved(device)
    free = hardware.device_memory(device).free
    if free < DEVICE_BYTES:
        raise _too_little(free)
    found = dict(_OF_NO_CARD)
    pinned = region.view(0, region.pinned // _LEAST_HOST_BYTES * _LEAST_HOST_BYTES)
    if pinned.numel():
        found["h2d"], found["d2h"] = _copies(pinned, device)
        found["hand_off"] = _hand_off(pinned, device)
        found["zero_copy"] = _zero_copy(pinned, device)
        if found["zero_copy"] is not None:
            fastest = max(rate.value for rate in found["zero_copy"].values())
            found["dma_from"] = dma_from(found["h2d"], fastest)
    found["device_stream"], least_free = _device_stream(device)
    # Of a process that has a model on the card less is free by that, and torch holds as much more.
    found["free_bytes"] = least_free + held
    found["gemm"] = {name: _product(name, device) for name in ("bfloat16", "float16", "float32")}
    found["attention"] = _attention(device)
    found["launch"] = _launch(device)
    torch.cuda.empty_cache()
    return found


def _too_little(free: int) -> BudgetError:
    return BudgetError(
        "Measuring this card", requested=DEVICE_BYTES, available=free, setting="memory.gpu",
        change="Close other programs that use it.",
    )  # fmt: skip


def _timed(run: Callable[[], object], times: int = 1) -> float:
    """Seconds of a call, as the current stream takes them.

    Args:
        run: Launches work.
        times: Calls in a row.
    """

    def calls() -> None:
        for _ in range(times):
            run()

    calls()
    found: list[float] = []
    for _ in range(_REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        calls()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / 1000 / times)
    return median(found)


def _copies(pinned: Tensor, device: torch.device) -> tuple[dict[int, Quantity], dict[int, Quantity]]:  # fmt: skip
    """Copies to the card and back, by the bytes of one."""
    streams = Streams(device)
    there = torch.empty(max(_BLOCKS), dtype=torch.uint8, device=device)
    torch.cuda.synchronize()  # before other streams write to it
    h2d, d2h = {}, {}
    for block in _BLOCKS:
        # One behind the other; none crosses a border of what was pinned at once.
        parts = pinned.view(-1, block)[: min(_COPIES, 4 * max(_BLOCKS) // block)]
        with streams.use(streams.host_to_device):
            h2d[block] = _rate_of([(there[:block], part) for part in parts])
        with streams.use(streams.device_to_host):
            d2h[block] = _rate_of([(part, there[:block]) for part in parts])
    return h2d, d2h


def _rate_of(copies: list[tuple[Tensor, Tensor]]) -> Quantity:
    def run() -> None:
        for target, source in copies:
            target.copy_(source, non_blocking=True)

    return _quantity(sum(target.numel() for target, _ in copies) / _timed(run), "B/s")


def dma_from(h2d: Mapping[int, Quantity], kernel_bytes_per_s: float) -> Quantity | None:
    """Bytes of a copy from which the copy engine is as fast as a kernel; None where no size that was measured is.

    Between two sizes that were measured rates are taken to lie on a line, both in logarithms.

    Args:
        h2d: Rates of the copy engine, by bytes of a copy.
        kernel_bytes_per_s: Of a kernel that reads host memory itself.
    """
    before: tuple[int, float] | None = None
    for block, rate in sorted(h2d.items()):
        if rate.value >= kernel_bytes_per_s:
            size = float(block)
            if before is not None:
                share = math.log(kernel_bytes_per_s / before[1]) / math.log(rate.value / before[1])
                size = before[0] * (block / before[0]) ** share
            return Quantity(round(size), "B", "computed")
        before = block, rate.value
    return None


def _hand_off(pinned: Tensor, device: torch.device) -> Quantity:
    host, there, arrived = (
        pinned[:4],
        torch.zeros(4, dtype=torch.uint8, device=device),
        torch.cuda.Event(),
    )

    def run() -> None:
        for _ in range(100):
            host.copy_(there, non_blocking=True)
            arrived.record()
            arrived.synchronize()
            there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    return _quantity(_clocked(run) / 100, "s")


def _zero_copy(pinned: Tensor, device: torch.device) -> dict[int, Quantity] | None:
    """Rows that a kernel reads from host memory, by their bytes; None without Triton, which a warning says."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("Without Triton no kernel reads host memory: that is not measured.")
        return None
    return {2 * size * 2: _rows(pinned, size, device) for size in (32, 64, 128, 256)}


def _rows(pinned: Tensor, size: int, device: torch.device) -> Quantity:
    """Rows of bfloat16 keys and values of such a size, anywhere."""
    from offload.kernels.combine import empty_partials
    from offload.kernels.gather import attend_rows, row_slots

    row = 2 * size * 2
    pages = pinned.numel() // (_PAGE * _HEADS * row)
    pool = pinned[: pages * _PAGE * _HEADS * row].view(torch.bfloat16)
    pool = pool.view(pages, _PAGE, _HEADS, 2 * size)
    table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    # Each launch has tokens of its own, as far as there are so many: a cache may hold those of the last one.
    order = torch.stack([torch.randperm(pages * _PAGE)[: 16 * _ROWS] for _ in range(_HEADS)])
    tokens = itertools.cycle(
        [part.contiguous()[None] for part in order.to(device, torch.int32).split(_ROWS, dim=1)]
    )
    query = torch.zeros((1, _HEADS * _GROUPS, size), dtype=torch.bfloat16, device=device)
    partials = empty_partials(1, _HEADS * _GROUPS, row_slots(_ROWS), size, device)

    def run() -> None:
        attend_rows(
            query, pool, table, next(tokens), partials, first_slot=0, key_dim=size, scale=size**-0.5
        )  # fmt: skip

    return _quantity(_HEADS * _ROWS * row / _timed(run, _TIMES), "B/s")


def _device_stream(device: torch.device) -> tuple[Quantity, int]:
    """The card's memory, and what is free of it while most of it is taken."""
    torch.cuda.empty_cache()  # what the last measurement took goes back first; so below
    one, other = (torch.zeros(_DEVICE_STREAM, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = _timed(lambda: one.copy_(other), _TIMES)
    free = hardware.device_memory(device).free
    nbytes = one.numel() + other.numel()
    return _quantity(nbytes / seconds, "B/s"), free


def _product(dtype: str, device: torch.device) -> Quantity:
    """A chunk of a prompt times a matrix of the 8B shape."""
    torch.cuda.empty_cache()
    rows, inner, columns = _PRODUCT
    kind = getattr(torch, dtype)
    left = torch.randn((rows, inner), dtype=kind, device=device)
    right = torch.randn((inner, columns), dtype=kind, device=device)
    out = torch.empty((rows, columns), dtype=kind, device=device)
    seconds = _timed(lambda: torch.mm(left, right, out=out), _TIMES)
    return _quantity(2 * rows * inner * columns / seconds, "FLOP/s")


def _attention(device: torch.device) -> Quantity:
    """Of a part of a chunk to what came long before it."""
    from offload.kernels.attend import attend

    torch.cuda.empty_cache()
    rows, tokens = _PROMPT
    heads = _HEADS * _GROUPS
    query = torch.randn((1, heads, rows, _SIZE), dtype=torch.bfloat16, device=device)
    key, value = torch.randn((2, 1, _HEADS, tokens, _SIZE), dtype=torch.bfloat16, device=device)
    seconds = _timed(lambda: attend(query, key, value, scale=_SIZE**-0.5), _TIMES)
    return _quantity(4 * heads * _SIZE * rows * tokens / seconds, "FLOP/s")


def _launch(device: torch.device) -> Quantity:
    one, launches = (
        torch.zeros(1, device=device),
        500,
    )  # fewer than a stream takes before it makes the host wait

    def run() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            one.add_(1)
        return (time.perf_counter() - began) / launches

    run()
    return _quantity(median(run() for _ in range(_REPEATS)), "s")
