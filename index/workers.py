"""How are the searches of many heads shared out among threads? A pool that is asked for one batch of tasks at a time.

Numba's own threads must not be used: two callers of a `parallel=True` function abort the process. Tasks here let go of
the interpreter's lock, so plain threads run them side by side.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue

Task = Callable[[int, int], None]


class _Batch:
    """Tasks that were asked for together."""

    def __init__(self, task: Task, n: int) -> None:
        self._task = task
        self._n = n
        self._next: Iterator[int] = itertools.count()  # its `next` is one step of the interpreter
        self.error: BaseException | None = None
        self.ended: list[threading.Event] = []  # one for each helper

    def take_error(self) -> BaseException | None:
        """The error, which is then not held here: a traceback that holds this batch would live until the garbage collector comes."""
        error, self.error = self.error, None
        return error

    def work(self, worker: int) -> None:
        """Runs tasks until there are none, or one has failed."""
        try:
            while self.error is None and (i := next(self._next)) < self._n:
                self._task(i, worker)
        except BaseException as error:  # noqa: BLE001 - whoever asked gets it
            self.error = error


class Workers:
    """Threads that wait for tasks, and the calling one, which takes part.

    One thread asks at a time; others wait for it.

    Attributes:
        threads: That work on a batch, the calling one included.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Starts nothing: threads are started by the first batch that has work for them.

        Args:
            threads: At most so many work on a batch; None: as many as this process may use cores.
        """
        self.threads = max(1, threads or cores())
        self._asked: list[SimpleQueue[tuple[_Batch, threading.Event] | None]] = []
        self._lock = threading.Lock()
        self._stop = weakref.finalize(self, _stop, self._asked)

    def run(self, task: Task, n: int) -> None:
        """Runs `task(i, worker)` for i from 0 to n - 1, in any order, and returns when all are over.

        Args:
            task: `worker`, from 0 to `threads` - 1, is another number for each task that runs at the same time.
            n: Tasks.

        Raises:
            BaseException: The first that a task raised; tasks that had not begun are left out.
        """
        batch = _Batch(task, n)
        with self._lock:
            helpers = min(self.threads, n) - 1
            while len(self._asked) < helpers:
                self._start()
            try:
                for queue in self._asked[: max(0, helpers)]:
                    ended = threading.Event()
                    queue.put((batch, ended))
                    batch.ended.append(ended)
                batch.work(0)
            except BaseException as error:  # noqa: BLE001 - an interrupt between two of them; raised below
                batch.error = error
            while not all(event.is_set() for event in batch.ended):
                try:  # an interrupt ends the batch, but its helpers are waited for: what they read must stay
                    for event in batch.ended:
                        event.wait()
                except BaseException as error:  # noqa: BLE001 - raised below
                    batch.error = error
        failed = batch.take_error()
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # its traceback holds this frame

    def close(self) -> None:
        """Ends the threads. A later batch starts new ones."""
        with self._lock:
            _stop(self._asked)

    def _start(self) -> None:
        queue: SimpleQueue[tuple[_Batch, threading.Event] | None] = SimpleQueue()
        number = len(self._asked) + 1
        threading.Thread(
            target=_serve, args=(queue, number), name=f"offload-search-{number}", daemon=True
        ).start()  # fmt: skip
        self._asked.append(queue)  # only what has a thread is ever asked


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(asked: SimpleQueue[tuple[_Batch, threading.Event] | None], worker: int) -> None:
    while (asked_for := asked.get()) is not None:
        batch, ended = asked_for
        batch.work(worker)
        del batch, asked_for  # they hold what the task does
        ended.set()


def _stop(asked: list[SimpleQueue[tuple[_Batch, threading.Event] | None]]) -> None:
    for queue in asked:
        queue.put(None)
    asked.clear()
