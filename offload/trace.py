"""What happened when? Memory while a model generates, the time of every token, and what each engine did in some steps.

A `Recorder` reads the allocator and the driver from a thread of its own, some times a second. `Watch` is a streamer: it
notes when tokens come, and lets torch's profiler see some of them. Both cost next to nothing where they are not used.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity

MOST_SAMPLES = 4096  # beyond, every other one is dropped and half as many are taken
MOST_EVENTS = 200_000  # of a trace: some 3 MB
_EVERY_S = 0.02
_BURST_S = 0.0001  # between tokens of one burst, at most: a replayed step of the smallest models takes twice as long

# Where tokens are, in the phases of `offload.scheduler.phases`.
PLACEMENTS = {
    "I": "all on the device",
    "II": "device and host",
    "III": "device and host, the oldest read again",
}

# The first pattern that a kernel's name matches says what it is for. Ours first: libraries use many words.
_KERNELS = (
    ("scan and selection", r"^_(scan|scan_clusters|blocks|votes|tokens)_kernel"),
    ("the replica's answer", r"^_(tail|clusters)_kernel"),
    ("selected rows", r"^_(rows|chosen|weigh|fetch|place)_kernel"),
    ("window and merge", r"^_(window|merge|combine)_kernel"),
    ("quantising", r"^_quantize"),
    ("rebuilding", r"^_rotate_kernel"),
    ("attention", r"flash|fmha|attention|mem_eff"),
    ("copies from the host", r"memcpy.*htod|memcpy.*host.*->.*device"),
    ("copies to the host", r"memcpy.*dtoh|memcpy.*device.*->.*(host|pinned|pageable)"),
    ("copies on the device", r"memcpy|memset|aten::copy_|aten::fill_|aten::clone"),
    ("matrix products", r"gemm|gemv|cutlass|cublas|nvjet|wgmma|xmma|splitk|aten::(mm|bmm|addmm|matmul|linear)"),
    ("compiled layers", r"^triton_"),
    ("elementwise and sums", r"elementwise|reduce_kernel|softmax|index|catarray|^aten::"),
)  # fmt: skip


def engine_of(kernel: str) -> str:
    """What a kernel, or an operator of a CPU, is for.

    Args:
        kernel: Its name, as the profiler gives it.
    """
    name = kernel.lower()
    return next((what for what, pattern in _KERNELS if re.search(pattern, name)), "other")


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at one time.

    Attributes:
        at: Seconds since the recording began.
        allocated: Bytes of live tensors on a card; None on a CPU.
        reserved: Bytes that torch holds of the card; None on a CPU.
        used: Bytes in use of the card, by whomever; on a CPU those of this process.
    """

    at: float
    allocated: int | None
    reserved: int | None
    used: int


class Recorder:
    """Samples memory while it is entered."""

    def __init__(self, device: torch.device, *, every: float = _EVERY_S) -> None:
        """Before the first sample.

        Args:
            device: Of the model.
            every: Seconds between samples.
        """
        self.samples: list[Sample] = []
        self.began = 0.0
        self._device = device
        self._every = every
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Recorder:
        self.began = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, name="offload-trace", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.samples.append(self._now())

    @property
    def most_used(self) -> int:
        """The most bytes in use in any sample."""
        return max(sample.used for sample in self.samples)

    def _sample(self) -> None:
        while not self._over.is_set():
            self.samples.append(self._now())
            if len(self.samples) > MOST_SAMPLES:
                del self.samples[1::2]
                self._every *= 2
            self._over.wait(self._every)

    def _now(self) -> Sample:
        at = time.perf_counter() - self.began
        if self._device.type != "cuda":
            return Sample(at, None, None, int(psutil.Process().memory_info().rss))
        free, total = torch.cuda.mem_get_info(self._device)
        return Sample(
            at,
            torch.cuda.memory_allocated(self._device),
            torch.cuda.memory_reserved(self._device),
            total - free,
        )


class Watch:
    """A streamer that notes when tokens come.

    Mode verified brings those of a pass in one burst: what comes closer together than any step takes is one.

    Attributes:
        bursts: `time.perf_counter()` and the number of tokens so far, behind each burst.
    """

    def __init__(self, on_burst: Callable[[int], None] | None = None) -> None:
        """Before the prompt, which comes first.

        Args:
            on_burst: Called when a burst begins, with the number of tokens before it.
        """
        self.bursts: list[tuple[float, int]] = []
        self._on_burst = on_burst
        self._prompt = True
        self._last = 0.0

    @property
    def tokens(self) -> int:
        """So far."""
        return self.bursts[-1][1] if self.bursts else 0

    def put(self, value: Any) -> None:
        """As transformers calls it."""
        if self._prompt:
            self._prompt = False
            return
        now = time.perf_counter()
        if self.bursts and now - self._last < _BURST_S:
            self.bursts[-1] = (now, self.tokens + value.numel())
        else:
            if self._on_burst is not None:
                self._on_burst(self.tokens)
            self.bursts.append((now, self.tokens + value.numel()))
        self._last = time.perf_counter()

    def end(self) -> None:
        """As transformers calls it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a kernel took in the steps that were watched.

    Attributes:
        name: As the profiler gives it.
        engine: What it is for.
        seconds: In all steps.
        calls: Likewise.
    """

    name: str
    engine: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel or copy, or one operator of a CPU.

    Attributes:
        name: As the profiler gives it.
        track: Of the stream or thread.
        began: Seconds since the first event.
        seconds: That it took.
        own: Of these, those in which nothing that it calls ran.
    """

    name: str
    track: str
    began: float
    seconds: float
    own: float


class Steps:
    """Lets torch's profiler see some tokens of a generate; its `on_burst` is that of a `Watch`."""

    def __init__(self, device: torch.device, *, first: int, count: int) -> None:
        """Before the generate.

        Args:
            device: Of the model.
            first: The token from which on it is looked.
            count: Tokens that are looked at, at least; a pass of mode verified brings several at once.
        """
        self._on_card = device.type == "cuda"
        self._first, self._last = first, first + count
        activities = [ProfilerActivity.CUDA if self._on_card else ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self._device = device
        self._began = -1
        self.tokens = 0
        self.seconds = 0.0
        self._at = 0.0

    def on_burst(self, so_far: int) -> None:
        """Begins or ends.

        Args:
            so_far: Tokens.
        """
        if self._began < 0 and so_far >= self._first:
            self._wait()
            self._profiler.start()
            self._began, self._at = so_far, time.perf_counter()
        elif self._began >= 0 and not self.tokens and so_far >= self._last:
            self.close(so_far)

    def close(self, so_far: int) -> None:
        """Ends, if it began and has not ended.

        Args:
            so_far: Tokens.
        """
        if self._began < 0 or self.tokens:
            return
        try:
            self._wait()
            self.seconds = time.perf_counter() - self._at
        finally:
            self._profiler.stop()
        self.tokens = max(1, so_far - self._began)

    def kernels(self) -> list[Kernel]:
        """What ran, the slowest first."""
        if not self.tokens:
            return []
        found: dict[str, tuple[float, int]] = {}
        for event in self._events():
            seconds, calls = found.get(event.name, (0.0, 0))
            found[event.name] = (seconds + event.own, calls + 1)
        kernels = [
            Kernel(name, engine_of(name), seconds, calls)
            for name, (seconds, calls) in found.items()
        ]
        return sorted(kernels, key=lambda kernel: -kernel.seconds)

    def events(self) -> list[Event]:
        """All that ran, by when it began."""
        return sorted(self._events(), key=lambda event: event.began) if self.tokens else []

    def _wait(self) -> None:
        if self._on_card:
            torch.cuda.synchronize(self._device)

    def _events(self) -> Iterable[Event]:
        """On a card what ran there; on a CPU the operators."""
        raw = self._profiler.events() or []
        first = min((event.time_range.start for event in raw), default=0)
        for event in raw:
            on_card = event.device_type.name != "CPU"
            if on_card != self._on_card:
                continue
            taken = event.time_range.elapsed_us()
            own = taken if on_card else event.self_cpu_time_total
            track = f"stream {event.device_resource_id}" if on_card else f"thread {event.thread}"
            began = event.time_range.start - first
            yield Event(event.name, track, began / 1e6, taken / 1e6, own / 1e6)


def perfetto(
    events: Iterable[Event],
    samples: Iterable[Sample],
    bursts: Iterable[tuple[float, int]],
    *,
    prefill_until: float,
    changes: Iterable[tuple[float, str]] = (),
) -> bytes:
    """A trace that ui.perfetto.dev opens: Chrome's JSON, gzipped.

    One track for each stream or thread of the steps that were looked at; beside them the whole run: its phases, its
    tokens and its memory. The two have clocks of their own.

    Args:
        events: Of some steps. Of more than `MOST_EVENTS` the longest are kept.
        samples: Of the whole run.
        bursts: Seconds from the first sample, and tokens so far, of each burst of tokens.
        prefill_until: Seconds from the first sample to the end of the prefill.
        changes: Seconds from the first sample to the begin of each later phase of placement, and its number: "II", "III".
    """
    longest = sorted(events, key=lambda event: -event.seconds)[:MOST_EVENTS]
    tracks = {name: i for i, name in enumerate(sorted({event.track for event in longest}), 1)}
    rows: list[dict[str, Any]] = [_named(1, "the run"), _named(2, "steps looked at")]
    rows += [_named(2, name, tid) for name, tid in tracks.items()]
    rows += [_named(1, "phases", 1), _named(1, "tokens", 2)]
    ticks = list(bursts)
    ended = ticks[-1][0] if ticks else prefill_until
    for name, began, until in (("prefill", 0.0, prefill_until), ("decode", prefill_until, ended)):
        rows.append(_slice(1, 1, name, began, until - began))
    rows.append(_named(1, "placement", 3))
    phases = [(0.0, "I"), *changes]
    ended = max(ended, phases[-1][0])
    for (began, phase), (until, _) in zip(phases, [*phases[1:], (ended, "")], strict=True):
        rows.append(_slice(1, 3, f"phase {phase}: {PLACEMENTS[phase]}", began, until - began))
    for (began, before), (until, so_far) in pairwise(ticks):
        name = f"token {so_far}" if so_far == before + 1 else f"tokens {before + 1} to {so_far}"
        rows.append(_slice(1, 2, name, began, until - began))
    for sample in samples:
        shown = {"in use": sample.used, "reserved": sample.reserved, "allocated": sample.allocated}
        values = {name: size for name, size in shown.items() if size is not None}
        rows.append({"ph": "C", "pid": 1, "name": "bytes", "ts": 1e6 * sample.at, "args": values})
    for event in sorted(longest, key=lambda event: event.began):
        rows.append(_slice(2, tracks[event.track], event.name, event.began, event.seconds))
    return gzip.compress(json.dumps({"traceEvents": rows}).encode(), mtime=0)


def _slice(pid: int, tid: int, name: str, began: float, seconds: float) -> dict[str, Any]:
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name,
        "ts": round(1e6 * began, 3), "dur": round(1e6 * seconds, 3),
    }  # fmt: skip


def _named(pid: int, name: str, tid: int | None = None) -> dict[str, Any]:
    what = "process_name" if tid is None else "thread_name"
    return {"ph": "M", "pid": pid, "tid": tid or 0, "name": what, "args": {"name": name}}
