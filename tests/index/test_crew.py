"""Searches without the interpreter, against the same ones called one by one, and the threads that do them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offload.index import crew as crews
from offload.index.crew import TASK, Crew, search_rows, spaces_of, staged
from offload.index.finders import Finder, finder
from offload.index.paged import BFLOAT16, FLOAT16, FLOAT32, Rows, Scratch

PAGE, HEADS, GROUPS, K = 64, 3, 4, 24


class Case:
    """Some heads' rows and finders, and room for what is found."""

    def __init__(self, name: str, kind: int, tokens: int, key_dim: int, value_dim: int) -> None:
        random = np.random.default_rng(tokens + key_dim)
        shape = (tokens // PAGE, PAGE, HEADS, key_dim + value_dim)
        values = random.standard_normal(shape).astype(np.float32)
        pool: NDArray[Any] = values
        if kind == BFLOAT16:
            pool = (values.view(np.uint32) >> 16).astype(np.uint16)
        elif kind == FLOAT16:
            pool = values.astype(np.float16).view(np.uint16)
        table = random.permutation(shape[0]).astype(np.int64)
        self.rows = [Rows(pool, kind, table, head, key_dim) for head in range(HEADS)]
        self.queries = random.standard_normal((HEADS, GROUPS, key_dim)).astype(np.float32)
        self.tokens = tokens
        self.finders: list[Finder] = []
        for rows in self.rows:
            self.finders.append(finder(name, tokens, key_dim))
            # What is not a whole block stays without codes.
            self.finders[-1].extend(rows, tokens, Scratch.of(1, 128 * key_dim, key_dim, value_dim, 1), None)  # fmt: skip
        self.dims = key_dim, value_dim
        self.out = np.full((HEADS, GROUPS, value_dim), np.nan, np.float32)
        self.lse = np.full((HEADS, GROUPS), np.nan, np.float32)
        self.ids = np.full((HEADS, K), -7, np.int32)

    def scratch(self) -> Scratch:
        one = self.finders[0]
        scored, exact = one.scored(self.tokens, GROUPS, K), one.candidates(GROUPS, K)
        return Scratch.of(GROUPS, scored, *self.dims, exact)

    def tasks(self, first: int, scale: float, softcap: float) -> NDArray[Any]:
        tasks = np.zeros(HEADS, TASK)
        for head, task in enumerate(tasks):
            search_rows(task, self.rows[head])
            task["groups"] = GROUPS
            task["first"], task["count"] = first, self.tokens
            task["query_at"], task["k"] = self.queries[head].ctypes.data, K
            task["ids_at"], task["out_at"] = self.ids[head].ctypes.data, self.out[head].ctypes.data
            task["lse_at"] = self.lse[head].ctypes.data
            task["scale"], task["softcap"] = scale, softcap
            self.finders[head].describe(task)
        return tasks

    def want(self, first: int, scale: float, softcap: float) -> tuple[Any, ...]:
        """The same by calls."""
        out, lse, ids = np.empty_like(self.out), np.empty_like(self.lse), np.empty_like(self.ids)
        scaled = (self.queries * np.float32(scale)).astype(np.float32)
        for head, one in enumerate(self.finders):
            one.attend(
                self.rows[head], first, self.tokens, scaled[head], softcap, self.scratch(), ids[head], out[head], lse[head]
            )  # fmt: skip
            ids[head][ids[head] < 0] = max(0, ids[head][0])
        return out, lse, ids

    def check(self, want: tuple[Any, ...]) -> None:
        for got, wanted in zip((self.out, self.lse, self.ids), want, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["flat", "clusters"])
@pytest.mark.parametrize(
    ("kind", "tokens", "key_dim", "value_dim", "first", "scale", "softcap"),
    [
        (BFLOAT16, 4096, 64, 64, 0, 0.125, 0.0),
        (FLOAT16, 2048 + 192, 128, 64, 70, 1.0, 5.0),
        (FLOAT32, 2048 + 64, 33, 40, 0, 0.3, 0.0),
        (FLOAT32, 64, 32, 32, 45, 1.0, 0.0),
        (FLOAT32, 64, 32, 32, 64, 1.0, 0.0),
    ],
)
def test_tasks_find_what_calls_find(
    name: str, kind: int, tokens: int, key_dim: int, value_dim: int, first: int, scale: float, softcap: float
) -> None:  # fmt: skip
    case = Case(name, kind, tokens, key_dim, value_dim)
    want = case.want(first, scale, softcap)
    for threads in (1, 2, 5):
        case.out[:], case.lse[:], case.ids[:] = np.nan, np.nan, -7
        scratches = [case.scratch() for _ in range(threads)]
        spaces = spaces_of(scratches)
        tasks, crew = case.tasks(first, scale, softcap), Crew(threads)
        for _ in range(3):
            crew.run([tasks], spaces)
            case.check(want)
        crew.run([tasks[:0]], spaces)
        crew.run([], spaces)
        crew.close()


@pytest.mark.parametrize("name", ["flat", "clusters"])
@pytest.mark.parametrize("first", [0, 100, 4096])
def test_a_search_that_several_share_finds_the_same(name: str, first: int) -> None:
    case = Case(name, BFLOAT16, 4096 + 64, 64, 64)
    want = case.want(first, 0.125, 3.0)
    for threads, parts in ((3, 2), (4, 3), (4, 16)):
        crew, scratches = Crew(threads), [case.scratch() for _ in range(threads)]
        spaces = spaces_of(scratches)
        batches = staged(case.tasks(first, 0.125, 3.0), parts)
        for _ in range(5):
            for scratch in scratches:
                scratch.scores[:], scratch.exact[:] = np.nan, np.nan
            crew.run(batches, spaces)
            case.check(want)
        crew.close()


def test_every_task_is_done_once_by_threads_awake_or_asleep() -> None:
    case = Case("flat", FLOAT32, 64, 32, 32)
    crew, scratches = Crew(3), [case.scratch() for _ in range(3)]
    spaces = spaces_of(scratches)
    for n in (1, 2, 3, 500):
        tasks = np.repeat(case.tasks(0, 1.0, 0.0)[:1], n)
        lse = np.empty((n, GROUPS), np.float32)
        tasks["lse_at"] = lse.ctypes.data + 4 * GROUPS * np.arange(n)
        want = case.want(0, 1.0, 0.0)[1][0]
        for rest in (0.0, 0.0, 0.05, 0.0):
            time.sleep(rest)
            lse[:] = np.nan
            crew.run([tasks], spaces)
            np.testing.assert_array_equal(lse, np.tile(want, (n, 1)))
    crew.close()


def test_threads_end_with_the_crew_or_when_nobody_holds_it() -> None:
    case = Case("flat", FLOAT32, 64, 32, 32)
    scratches = [case.scratch() for _ in range(3)]
    spaces, tasks = spaces_of(scratches), case.tasks(0, 1.0, 0.0)

    def ours() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("offload-search")]

    before = set(ours())
    crew = Crew(3)
    crew.close()  # that never began
    crew.run([tasks], spaces)
    assert len(set(ours()) - before) == 2
    crew.close()
    assert set(ours()) == before
    crew.run([tasks], spaces)  # begins anew
    started = set(ours()) - before
    assert len(started) == 2
    del crew
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_an_error_in_a_thread_reaches_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("flat", FLOAT32, 64, 32, 32)
    scratches = [case.scratch() for _ in range(3)]
    spaces, tasks = spaces_of(scratches), case.tasks(0, 1.0, 0.0)
    crew = Crew(3)

    def fails(*args: Any) -> None:
        raise IndexError("no such row")

    monkeypatch.setattr(crews, "_help", fails)

    def run() -> None:
        for _ in range(1000):  # the first batches may be over before the threads have begun
            crew.run([tasks], spaces)
            time.sleep(0.001)

    with pytest.raises(IndexError, match="no such row"):
        run()
    monkeypatch.undo()
    crew.run([tasks], spaces)
    case.check(case.want(0, 1.0, 0.0))
    crew.close()


def test_searches_of_two_callers_do_not_mix() -> None:
    cases = [Case("flat", BFLOAT16, tokens, 64, 64) for tokens in (4096, 4224)]
    wants = [case.want(0, 0.125, 0.0) for case in cases]
    crew = Crew(4)
    scratches = [cases[1].scratch() for _ in range(4)]  # of both, as layers share them
    spaces, wrong = spaces_of(scratches), []

    def search(i: int) -> None:
        batches = staged(cases[i].tasks(0, 0.125, 0.0), 2)
        for _ in range(300):
            crew.run(batches, spaces)
            if not np.array_equal(cases[i].lse, wants[i][1]):
                wrong.append(i)

    for case in cases:  # compiles
        crew.run(staged(case.tasks(0, 0.125, 0.0), 2), spaces)
    callers = [threading.Thread(target=search, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    crew.close()


def test_a_start_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("flat", FLOAT32, 64, 32, 32)
    scratches = [case.scratch() for _ in range(4)]
    spaces, tasks = spaces_of(scratches), case.tasks(0, 1.0, 0.0)
    crew, start, started = Crew(4), threading.Thread.start, iter(range(10))

    def fails(self: threading.Thread) -> None:
        if next(started) == 1:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="new thread"):
        crew.run([tasks], spaces)
    monkeypatch.undo()
    before = threading.active_count()
    crew.run([tasks], spaces)
    assert threading.active_count() == before + 3
    case.check(case.want(0, 1.0, 0.0))
    crew.close()


def test_a_process_that_was_forked_starts_threads_of_its_own() -> None:
    # In a process of its own: a fork of this one would have the locks of other threads.
    code = """
import os, sys, threading, warnings
sys.path.insert(0, sys.argv[1])
import test_crew as t
case = t.Case("flat", t.FLOAT32, 64, 32, 32)
scratches = [case.scratch() for _ in range(3)]
spaces, tasks = t.spaces_of(scratches), case.tasks(0, 1.0, 0.0)
want, crew = case.want(0, 1.0, 0.0), t.Crew(3)
crew.run([tasks], spaces)
warnings.simplefilter("ignore")
child = os.fork()
if not child:
    crew.run([tasks], spaces)
    case.check(want)
    os._exit(0 if threading.active_count() == 3 else 7)
crew.close()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], timeout=120, check=False
    )
    assert run.returncode == 0
