"""Pages are conserved, shared by what continues one past, and copied in few runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from offload.errors import CacheError
from offload.tiers.pages import PageTable
from offload.tiers.transfer import EvenCopies, EvenRows

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6)),
        st.tuples(st.just("truncate"), st.integers(0, 12)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    ),
    max_size=12,
)


@given(actions=ACTIONS, batch=st.integers(1, 3), capacity=st.integers(0, 20))
def test_a_page_never_changes_hands_while_a_column_refers_to_it(
    actions: list[tuple[str, Any]], batch: int, capacity: int
) -> None:
    table = PageTable(batch, capacity)
    content: dict[int, str] = {}  # what was written to each page last
    want: list[list[str]] = [[] for _ in range(batch)]  # what each sequence should read
    written = 0
    for action, value in actions:
        if action == "append":
            table.grow(table.capacity + table.missing(value))
            fresh = table.append(value)
            assert len(set(fresh.ravel().tolist())) == fresh.size
            for row in range(len(want)):
                for page in fresh[row].tolist():
                    written += 1
                    content[page] = f"block {written}"
                    want[row].append(content[page])
        elif action == "truncate":
            table.truncate(value)
            want = [row[:value] for row in want]
        else:
            rows = np.asarray([row % len(want) for row in value])
            table.select(rows)
            want = [list(want[row]) for row in rows]
        table.check()
        for row, blocks in enumerate(want):
            assert [content[page] for page in table.ids[row].tolist()] == blocks
        shared = table.shared_columns
        assert all(len({row[column] for row in want}) == 1 for column in range(shared))


@given(
    ids=st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True),
    edges=st.lists(st.integers(1, 30), max_size=4, unique=True).map(sorted),
)
def test_runs_cover_the_columns_in_order_and_cross_no_edge(
    ids: list[int], edges: list[int]
) -> None:
    table = PageTable(1, 31)
    table._ids = np.asarray([ids])
    runs = table.runs(0, 0, len(ids), edges)
    covered = [(run.column + i, run.page + i) for run in runs for i in range(run.count)]
    assert covered == list(enumerate(ids))
    for run in runs:
        assert not any(run.page < edge < run.page + run.count for edge in edges)


@given(
    order=st.permutations(range(4)),
    batch=st.integers(2, 4),
    grown=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    room=st.integers(0, 6),
    edges=st.lists(st.integers(0, 40), max_size=2),
    data=st.data(),
)
def test_pages_are_even_exactly_where_runs_of_all_sequences_begin_equally_far_apart(
    order: list[int], batch: int, grown: list[int], room: int, edges: list[int], data: Any
) -> None:
    table = PageTable(batch, batch * room)
    for columns in grown:
        table.grow(table.capacity + table.missing(columns))
        table.append(columns)
    table.select(np.array([row for row in order if row < batch]))
    start = data.draw(st.integers(0, table.columns - 1))
    stop = data.draw(st.integers(start + 1, table.columns))
    runs = [table.runs(row, start, stop, sorted(edges)) for row in range(batch)]
    firsts = [of[0].page for of in runs]
    apart = firsts[1] - firsts[0]
    last = firsts[-1] + stop - start - 1
    wanted = (
        all(len(of) == 1 for of in runs)
        and apart >= stop - start
        and all(b - a == apart for a, b in pairwise(firsts))
        and not any(firsts[0] < edge <= last for edge in edges)
    )
    assert table.even(batch, start, stop, edges) == ((firsts[0], apart) if wanted else None)


def test_a_fresh_tables_sequences_are_one_run_each() -> None:
    table = PageTable(3, 30)
    for _ in range(10):
        table.append(1)
    assert [len(table.runs(row, 0, 10, [])) for row in range(3)] == [1, 1, 1]


def test_a_full_table_refuses_and_loses_nothing() -> None:
    table = PageTable(2, 5)
    table.append(2)
    with pytest.raises(CacheError) as caught:
        table.append(1)
    assert (caught.value.asked, caught.value.there) == (2, 1)
    table.check()
    assert table.columns == 2


def test_without_the_runtimes_copy_it_is_said_once_that_pages_are_copied_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "0")  # there is no such library
    copies = EvenCopies()
    memory = torch.zeros(64, dtype=torch.uint8)
    rows = EvenRows(memory, width=8, height=2, apart=16)
    assert not copies.copy_in(memory, rows, None)
    assert not copies.copy_out(rows, memory, None)
    assert [record.message[:52] for record in caplog.records] == ["Host pages of several sequences are copied one by on"]  # fmt: skip
