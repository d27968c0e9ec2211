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
        self._asked: list[SimpleQueue[_Batch | None]] = []
        self._done: SimpleQueue[None] = SimpleQueue()
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
            for queue in self._asked[: max(0, helpers)]:
                queue.put(batch)
            batch.work(0)
            for _ in range(helpers):
                self._done.get()
        if batch.error is not None:
            raise batch.error

    def close(self) -> None:
        """Ends the threads. A later batch starts new ones."""
        with self._lock:
            _stop(self._asked)

    def _start(self) -> None:
        queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._asked.append(queue)
        number = len(self._asked)
        threading.Thread(
            target=_serve, args=(queue, self._done, number), name=f"offload-search-{number}", daemon=True
        ).start()  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(asked: SimpleQueue[_Batch | None], done: SimpleQueue[None], worker: int) -> None:
    while (batch := asked.get()) is not None:
        batch.work(worker)
        del batch  # it holds what the task does
        done.put(None)


def _stop(asked: list[SimpleQueue[_Batch | None]]) -> None:
    for queue in asked:
        queue.put(None)
    asked.clear()
