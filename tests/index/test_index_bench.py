"""Bars of the index bench are of all rows that it has, whichever run measured them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    sys.path.insert(0, str(BENCH))
    return runpy.run_path(str(BENCH / "index.py"))


def rows(at: str, tokens: int, ratio: float, hnsw: float, graph: float) -> list[dict[str, Any]]:
    return [
        {"what": f"best pair, {at}", "tokens": tokens, "ratio": ratio},
        {
            "what": f"at recall 0.95, {at}",
            "tokens": tokens,
            "scanned": {"hnsw": hnsw, "hnsw, not centred": None, "graph": graph},
        },
        {"what": f"flat 4 bits, overfetch 4, {at}", "tokens": tokens, "recall": 1 - ratio},
        {"what": f"pair: flat 4 bits, overfetch 4, {at}", "tokens": tokens, "ratio_codes": 9.0},
    ]


def test_the_worse_model_stays_whichever_comes_last(bench: dict[str, Any]) -> None:
    small, other = rows("7800", 7800, 0.1, 0.2, 0.1), rows("Other 8192", 8192, 0.3, 0.2, 0.12)
    want = {"flat_recall100": 0.7, "graph_over_hnsw_scanned": 0.6, "pair_error_ratio": 0.3}
    for both in (small + other, other + small):
        assert bench["bars"](both) == pytest.approx(want)


def test_a_context_that_was_measured_again_counts_as_it_is_now(bench: dict[str, Any]) -> None:
    record = bench["Record"]("index", settings={}, rows=rows("Other 8192", 8192, 0.2, 0.2, 0.1))
    earlier = {
        "environment": {"commit": "before"},
        "settings": {},
        "rows": rows("7800", 7800, 0.1, 0.2, 0.1) + rows("Other 8192", 8192, 0.5, 0.2, 0.2),
    }
    bench["keep"](record, earlier)
    assert bench["bars"](record.rows)["pair_error_ratio"] == 0.2
    assert [row.get("commit") for row in record.rows] == ["before"] * 4 + [None] * 4


def test_shorter_contexts_of_a_model_make_no_bar(bench: dict[str, Any]) -> None:
    both = rows("4096", 4096, 0.9, 0.2, 0.2) + rows("7800", 7800, 0.1, 0.2, 0.1)
    assert bench["bars"](both + both[:4])["pair_error_ratio"] == 0.1
    long = rows("Other 32768", 32768, 0.1, 0.2, 0.02)
    assert bench["bars"](both + long)["graph_scanned_at_recall95_32k"] == 0.02
    assert "graph_scanned_at_recall95_32k" not in bench["bars"](both)


def test_a_pair_needs_summaries_that_are_small_enough(bench: dict[str, Any]) -> None:
    pairs = [
        {"what": "pair: ivf, probes 4, 7800", "ratio_means": 0.5, "ratio_codes": 0.2},
        {"what": "pair: exact, 7800", "output_error": 1.0},
        {"what": "pair: ivf, probes 4, Other 7800", "ratio_means": 0.1, "ratio_codes": 0.1},
    ]
    found = bench["pairs_of"](pairs[:2], "7800", {"means": 0.07, "codes": 0.11})
    assert sorted(ratio for ratio, _, _ in found) == [0.2, 0.5]
    found = bench["pairs_of"](pairs[:2], "7800", {"means": 0.07, "codes": 0.12})
    assert [ratio for ratio, _, _ in found] == [0.5]
