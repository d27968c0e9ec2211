"""How do many heads search without the interpreter? Threads that wait in compiled code for a table of tasks.

A search takes a fraction of a millisecond, and as long takes what Python does for one: its arguments, a lock that one thread
holds at a time, threads woken one by one. Here the tasks are rows of numbers, addresses among them, written once and
searched again for every token; a thread that is free takes the next one by an atomic step. Behind a batch the threads look
for another one for a moment, then sleep until a byte comes through a pipe.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from offload.index.grouped import GROUPED, SIZE, members
from offload.index.lanes import BLOCK
from offload.index.paged import FLOAT32, Rows, Scratch, attend_scored, candidates, score_chosen
from offload.index.scan import scan_blocks
from offload.index.workers import cores

carray: Any = numba.carray  # type: ignore[attr-defined]
FLAT, CLUSTERS = range(2)
WHOLE, SCAN, PICK, SCORE, ATTEND = range(5)

_Q, _F = np.int64, np.float32
TASK = np.dtype(
    [
        ("index", _Q), ("stage", _Q), ("part", _Q), ("parts", _Q), ("pool_at", _Q), ("pages", _Q), ("page", _Q), ("heads", _Q), ("width", _Q), ("kind", _Q),
        ("table_at", _Q), ("columns", _Q), ("head", _Q), ("key_dim", _Q), ("first", _Q), ("count", _Q),
        ("codes_at", _Q), ("lows_at", _Q), ("steps_at", _Q), ("coded", _Q), ("order_at", _Q), ("starts_at", _Q),
        ("query_at", _Q), ("groups", _Q), ("scale", _F), ("softcap", _F), ("wanted", _Q),
        ("ids_at", _Q), ("k", _Q), ("out_at", _Q), ("lse_at", _Q), ("slot", _Q),
    ]
)  # fmt: skip
"""One task. What ends in `_at` is an address.

index: `FLAT` or `CLUSTERS`. stage: `WHOLE`, or a part of it, in this order: `SCAN` scores codes, `PICK` chooses keys by
them, `SCORE` reads their rows, `ATTEND` attends; scan and score do `part` of `parts`. pool: [pages, page, heads, width] of
`offload.index.paged.Rows`, whose `kind`, `table` [columns], `head`, `key_dim` follow. codes, lows, steps: of `Coded`, four
bits, which stand for `coded` keys. order, starts: of `Groups`. query: float32 [groups, D], not yet times `scale`. wanted: keys that are scored
exactly, or clusters. ids, out, lse: written; a place for which no key is left repeats the first. slot: in whose scratch,
-1 for the thread's own; the stages of a search need one to themselves.
"""

_SIZES = ("groups", "tokens", "tops", "candidates", "width", "tile", "channels")
# A scratch: addresses, and the sizes of what is there.
_SPACE = np.dtype([*((name + "_at", _Q) for name in Scratch._fields), *((name, _Q) for name in _SIZES)])  # fmt: skip

# Places of a crew's numbers, far enough apart that no two lie in one line of a cache.
_PLACES = 160
(
    _EPOCH, _TICKET, _FINISHED, _SLEEPERS, _STOP, _FAILED, _TASKS, _SPACES_AT, _COUNT, _LOOKS,
) = range(0, _PLACES, 16)  # fmt: skip
_BUFFER = 4096
# For so long a thread looks for work before it sleeps: longer than a device takes for its part of a layer, since a thread
# that sleeps may come when all is done. What one look takes differs tenfold between processors.
_AWAKE_S = 3e-3
_LOOKS_TIMED = 2000


def _pointer(kind: Any) -> Any:
    """An intrinsic: an address as a pointer to so many of a kind."""

    def typed(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return intrinsic(typed)


_bytes, _shorts, _signed = _pointer(types.uint8), _pointer(types.uint16), _pointer(types.int8)
_ints, _longs, _floats = _pointer(types.int32), _pointer(types.int64), _pointer(types.float32)
_tasks, _spaces = _pointer(from_dtype(TASK)), _pointer(from_dtype(_SPACE))


def _place(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    array = make_array(signature.args[0])(context, builder, values[0])
    return builder.gep(array.data, [values[1]])


def _add_typed(typing: Any, numbers: Any, at: Any, value: Any) -> Any:
    """Adds to a number in one step; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature, values)
        return builder.atomic_rmw("add", place, values[2], "seq_cst")

    return types.int64(numbers, types.int64, types.int64), generate


_add: Any = intrinsic(_add_typed)


def _get_typed(typing: Any, numbers: Any, at: Any) -> Any:
    """A number as it is now."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature, values)
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(numbers, types.int64), generate


_get: Any = intrinsic(_get_typed)


def _set_typed(typing: Any, numbers: Any, at: Any, value: Any) -> Any:
    """Writes a number, and everything written before it."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature, values)
        builder.store_atomic(values[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(numbers, types.int64, types.int64), generate


_set: Any = intrinsic(_set_typed)


def _pause_typed(typing: Any) -> Any:
    """Lets the other thread of a core work."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(
                cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), []
            )
        return context.get_dummy_value()

    return types.none(), generate


_pause: Any = intrinsic(_pause_typed)


_read: Any = types.ExternalFunction("read", types.intp(types.int32, types.intp, types.uintp))
_write: Any = types.ExternalFunction("write", types.intp(types.int32, types.intp, types.uintp))
_yield: Any = types.ExternalFunction("sched_yield", types.int32())


@njit(nogil=True, cache=True)
def _blocks(task: Any) -> Any:
    """Of codes; the last may stand for fewer keys than fit."""
    each = BLOCK if task.index == FLAT else GROUPED
    return (task.coded + each - 1) // each


@njit(nogil=True, cache=True)
def _search(pool: Any, task: Any, query: Any, space: Any, own: Any) -> None:
    """All stages but the scan, with rows of either kind."""
    kind, key_dim, stage = task.kind, task.key_dim, task.stage
    table = carray(_longs(task.table_at), task.columns)
    chosen = carray(_longs(space.ids_at), space.tokens)
    found = carray(_longs(space.found_at), 1)
    exact = carray(_floats(space.exact_at), (space.groups, space.candidates))
    peaks = carray(_floats(space.peaks_at), space.groups)
    votes = carray(_floats(space.votes_at), space.tokens)
    order = carray(_longs(space.order_at), space.tokens)
    counts = carray(_ints(space.counts_at), 2048)
    row = carray(_floats(own.row_at), own.width)
    if stage in (WHOLE, PICK):
        blocks = _blocks(task)
        codes = carray(_bytes(task.codes_at), (blocks, own.channels // 4, 2 * BLOCK))
        lows = carray(_floats(task.lows_at), (blocks, key_dim))
        steps = carray(_floats(task.steps_at), (blocks, key_dim))
        scores = carray(_floats(space.scores_at), (space.groups, space.tokens))
        weights = carray(_signed(own.weights_at), (own.tile, own.channels))
        total = carray(_ints(own.total_at), (own.tile, BLOCK))
        tops = carray(_floats(space.tops_at), (space.groups, space.tops))
        if task.index == FLAT:
            found[0] = candidates(
                pool, kind, table, task.head, key_dim, codes, lows, steps, 4, task.first, task.count, query, task.wanted,
                stage == PICK, scores, tops, peaks, votes, chosen, order, row, weights, total, counts,
            )  # fmt: skip
        else:
            tokens = carray(_ints(task.order_at), task.coded)
            starts = carray(_ints(task.starts_at), task.coded // SIZE + 1)
            found[0] = members(
                codes, lows, steps, 4, tokens, starts, task.first, task.count, query, task.wanted, space.candidates,
                stage == PICK, scores, tops, peaks, votes, chosen, order, weights, total, counts,
            )  # fmt: skip
    some = chosen[: found[0]]
    if stage in (WHOLE, SCORE):
        first = found[0] * task.part // task.parts
        stop = found[0] * (task.part + 1) // task.parts
        score_chosen(
            pool, kind, table, task.head, key_dim, some, first, stop, query, task.softcap, exact, row
        )  # fmt: skip
    if stage in (WHOLE, ATTEND):
        ids = carray(_ints(task.ids_at), task.k)
        out = carray(_floats(task.out_at), (task.groups, task.width - key_dim))
        lse = carray(_floats(task.lse_at), task.groups)
        attend_scored(
            pool, kind, table, task.head, key_dim, some, ids, out, lse, exact, peaks, votes, order, row, counts
        )  # fmt: skip
        for i in range(ids.shape[0]):
            if ids[i] < 0:
                ids[i] = max(0, ids[0])


@njit(nogil=True, cache=True)
def _perform(task: Any, space: Any, own: Any) -> None:
    """One task, with the scratch that it names and that of this thread."""
    given = carray(_floats(task.query_at), (task.groups, task.key_dim))
    query = carray(_floats(own.query_at), (task.groups, task.key_dim))
    for g in range(task.groups):
        for c in range(task.key_dim):
            query[g, c] = given[g, c] * task.scale
    if task.stage == SCAN:
        blocks = _blocks(task)
        scan_blocks(
            carray(_bytes(task.codes_at), (blocks, own.channels // 4, 2 * BLOCK)),
            carray(_floats(task.lows_at), (blocks, task.key_dim)),
            carray(_floats(task.steps_at), (blocks, task.key_dim)),
            4, blocks * task.part // task.parts, blocks * (task.part + 1) // task.parts, query,
            carray(_signed(own.weights_at), (own.tile, own.channels)),
            carray(_ints(own.total_at), (own.tile, BLOCK)),
            carray(_floats(space.scores_at), (space.groups, space.tokens)),
            carray(_floats(space.tops_at), (space.groups, space.tops)),
        )  # fmt: skip
        return
    shape = (task.pages, task.page, task.heads, task.width)
    if task.kind == FLOAT32:
        _search(carray(_floats(task.pool_at), shape), task, query, space, own)
    else:
        _search(carray(_shorts(task.pool_at), shape), task, query, space, own)


@njit(nogil=True, cache=True)
def _work(numbers: Any, me: int) -> None:
    """Takes tasks until there are none."""
    while True:
        left = _add(numbers, _TICKET, -1) - 1
        if left < 0:
            return
        # Whoever holds a ticket reads what was written before the tickets were.
        count = _get(numbers, _COUNT)
        task = carray(_tasks(_get(numbers, _TASKS)), count)[count - 1 - left]
        spaces = carray(_spaces(_get(numbers, _SPACES_AT)), me + 1 + max(0, task.slot))
        _perform(task, spaces[task.slot if task.slot >= 0 else me], spaces[me])
        _add(numbers, _FINISHED, 1)


@njit(nogil=True, cache=True)
def _help(numbers: Any, me: int, pipe: int, buffer_at: int) -> None:
    """What a thread does until it is told to stop."""
    seen = 0
    while True:
        looks = 0
        while _get(numbers, _EPOCH) == seen and _get(numbers, _STOP) == 0:
            if looks < _get(numbers, _LOOKS):
                looks += 1
                _pause()
                continue
            _add(numbers, _SLEEPERS, 1)
            # Whoever asks counts sleepers after it has asked: one of the two sees the other.
            if _get(numbers, _EPOCH) == seen and _get(numbers, _STOP) == 0:
                _read(pipe, buffer_at, 1)
            _add(numbers, _SLEEPERS, -1)
        if _get(numbers, _STOP) != 0:
            return
        seen = _get(numbers, _EPOCH)
        _work(numbers, me)


@njit(nogil=True, cache=True)
def _look(numbers: Any, count: int) -> None:
    """As often as that, as a thread of `_help` does that finds nothing."""
    for _ in range(count):
        if _get(numbers, _EPOCH) == 0 and _get(numbers, _STOP) == 0:
            _pause()


@njit(nogil=True, cache=True)
def _lead(numbers: Any, count: int, tasks_at: int, spaces_at: int, pipe: int, buffer_at: int) -> Any:  # fmt: skip
    """Asks for tasks, takes part, waits for the last one. Returns whether all were done."""
    _set(numbers, _FINISHED, 0)
    _set(numbers, _TASKS, tasks_at)
    _set(numbers, _SPACES_AT, spaces_at)
    _set(numbers, _COUNT, count)
    _set(numbers, _TICKET, count)
    _add(numbers, _EPOCH, 1)
    asleep = _get(numbers, _SLEEPERS)
    if asleep > 0:  # more would not be there to be sent; who sleeps on is not needed
        _write(pipe, buffer_at, min(asleep, _BUFFER))
    _work(numbers, 0)
    looks = 0
    while _get(numbers, _FINISHED) < count:
        if _get(numbers, _FAILED) != 0:
            return False
        looks += 1
        if looks < 1000:
            _pause()
        else:
            _yield()
    return _get(numbers, _FAILED) == 0


def search_rows(task: np.void, rows: Rows) -> None:
    """Makes a task a whole search of these rows, in its thread's own scratch; what is asked of them is written by others.

    Args:
        task: A `TASK`, written.
        rows: Which have to stay.
    """
    task["stage"], task["parts"], task["slot"] = WHOLE, 1, -1
    task["pool_at"], task["kind"] = rows.pool.ctypes.data, rows.kind
    task["pages"], task["page"], task["heads"], task["width"] = rows.pool.shape
    task["table_at"], task["columns"] = rows.table.ctypes.data, len(rows.table)
    task["head"], task["key_dim"] = rows.head, rows.key_dim


def staged(tasks: NDArray[Any], parts: int) -> list[NDArray[Any]]:
    """The same searches in stages, one batch after the other, so that several threads share one.

    Args:
        tasks: `TASK` [n], whole ones; task i works in scratch i.
        parts: Of what can be shared out.
    """
    one = tasks.copy()
    one["slot"] = np.arange(len(one))
    many = np.repeat(one, parts)
    many["part"], many["parts"] = np.arange(len(many)) % parts, parts
    batches = [many.copy(), one.copy(), many.copy(), one.copy()]
    for batch, stage in zip(batches, (SCAN, PICK, SCORE, ATTEND), strict=True):
        batch["stage"] = stage
    return batches


class _Pipe:
    """A pipe on which threads sleep. It is closed when nobody holds it any more."""

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe()
        self.end = weakref.finalize(self, os.close, self.writes)
        weakref.finalize(self, os.close, self.reads)


class Crew:
    """Threads that search, and the calling one, which takes part.

    One thread asks at a time; others wait for it.

    Attributes:
        threads: That work on a batch, the calling one included.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Starts nothing: threads are started by the first batch.

        Args:
            threads: At most so many work on a batch; None: as many as this process may use cores.
        """
        self.threads = max(1, threads or cores())
        self._lock = threading.Lock()
        self._helpers: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._numbers = np.zeros(_PLACES, np.int64)
        self._buffer = np.zeros(_BUFFER, np.uint8)
        self._pipe: _Pipe | None = None
        self._process = 0  # threads do not live on in a process that was forked
        self._stop: Callable[[], object] = lambda: None

    def run(self, batches: Sequence[NDArray[Any]], spaces: NDArray[Any]) -> None:
        """Does all tasks, those of a batch in any order, one batch after the other; nobody else's come between.

        Args:
            batches: `TASK` [n] each. What they name has to stay.
            spaces: Of `spaces_of`: one for each thread, and for each slot that a task names.

        Raises:
            BaseException: A task raised it, under `NUMBA_BOUNDSCHECK` only.
        """
        with self._lock:
            done = False
            try:
                if self._pipe is None or self._process != os.getpid():
                    self._start()
                assert self._pipe is not None
                pipe, buffer = self._pipe.writes, self._buffer.ctypes.data
                done = all(
                    _lead(self._numbers, len(tasks), tasks.ctypes.data, spaces.ctypes.data, pipe, buffer)
                    for tasks in batches
                )  # fmt: skip
            finally:
                if not done:
                    self._end()  # its threads may be within a task, whose memory must stay
            if not done:
                raise self._errors.pop() if self._errors else RuntimeError("a thread that searches ended")  # fmt: skip

    def close(self) -> None:
        """Ends the threads. A later batch starts new ones."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._numbers = np.zeros(_PLACES, np.int64)
        self._errors = []
        # A thread that looks for work keeps one that has some from a core, where there are fewer.
        self._numbers[_LOOKS] = _looks(self._numbers) if self.threads <= cores() else 0
        self._pipe = pipe = _Pipe()
        self._process = os.getpid()
        self._stop = weakref.finalize(self, _stop, self._numbers, pipe)
        self._helpers = []
        for me in range(1, self.threads):
            args = (self._numbers, me, pipe, self._buffer, self._errors)
            thread = threading.Thread(target=_serve, args=args, name=f"offload-search-{me}", daemon=True)  # fmt: skip
            thread.start()
            self._helpers.append(thread)

    def _end(self) -> None:
        helpers, self._helpers = self._helpers, []
        self._pipe = None
        self._numbers[_TICKET] = 0
        self._stop()
        for thread in helpers:
            thread.join()


def spaces_of(scratches: list[Scratch]) -> NDArray[Any]:
    """What tasks are told of scratches, which have to stay."""
    spaces = np.zeros(len(scratches), _SPACE)
    for space, scratch in zip(spaces, scratches, strict=True):
        for name in Scratch._fields:
            space[name + "_at"] = getattr(scratch, name).ctypes.data
        space["groups"], space["tokens"] = scratch.scores.shape
        space["tops"], space["candidates"] = scratch.tops.shape[1], scratch.exact.shape[1]
        space["width"] = scratch.row.shape[0]
        space["tile"], space["channels"] = scratch.weights.shape
    return spaces


def _looks(numbers: NDArray[np.int64]) -> int:
    """How often a thread looks in `_AWAKE_S`."""
    _look(numbers, 1)
    fastest = _AWAKE_S
    for _ in range(3):
        began = time.perf_counter()
        _look(numbers, _LOOKS_TIMED)
        fastest = min(fastest, time.perf_counter() - began)
    return int(_LOOKS_TIMED * _AWAKE_S / fastest)


def _serve(numbers: NDArray[np.int64], me: int, pipe: _Pipe, buffer: NDArray[np.uint8], errors: list[BaseException]) -> None:  # fmt: skip
    try:
        _help(numbers, me, pipe.reads, buffer.ctypes.data + me % 1024)
    except BaseException as error:  # noqa: BLE001 - whoever asked gets it
        errors.append(error)
        numbers[_FAILED] = 1


def _stop(numbers: NDArray[np.int64], pipe: _Pipe) -> None:
    numbers[_STOP] = 1
    pipe.end()  # whoever sleeps on it reads that it ended
