"""The swap of whole sequences that sparse steps are measured against: every token is made, and none for nothing but copies."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.scheduler.cost import Heads, Shape
from offload.scheduler.profiles import profile_of
from offload.scheduler.simulate import Setting

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SHAPE = Shape(layers=(Heads(2, 2, 64),) * 2, hidden=128, itemsize=2, parameters=1e6, weights=2_000_000)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    sys.path.insert(0, str(BENCH))
    return runpy.run_path(str(BENCH / "scheduler.py"))


def swapped(bench: dict[str, Any], tokens: int, requests: int, link: float = 1e15) -> tuple[float, int]:  # fmt: skip
    """Seconds and steps with room for so many tokens, where a step takes a millisecond."""
    setting = Setting(
        shape=SHAPE, profile=profile_of("h100"), device=SHAPE.weights + tokens * SHAPE.kv_bytes, host=2**40
    )  # fmt: skip
    found: tuple[float, int] = bench["swapped_seconds"]({1: [(400, 1.0)]}, setting, requests, link)
    return found


def test_all_at_once_where_all_fit_and_one_by_one_where_one_does(bench: dict[str, Any]) -> None:
    whole = bench["PROMPT"] + bench["ANSWER"]
    seconds, steps = swapped(bench, 4 * whole, 4)
    assert steps == bench["ANSWER"]
    assert seconds == pytest.approx(steps / 1000)
    seconds, steps = swapped(bench, whole, 4)
    # While they are short, more than one fits.
    assert bench["ANSWER"] < steps < 4 * bench["ANSWER"]
    assert seconds == pytest.approx(steps / 1000)


def test_a_slow_link_makes_swaps_late(bench: dict[str, Any]) -> None:
    whole = bench["PROMPT"] + bench["ANSWER"]
    fast, steps = swapped(bench, 2 * whole, 5)
    slow, same = swapped(bench, 2 * whole, 5, link=SHAPE.kv_bytes * 10_000)
    assert steps == same
    assert slow > fast
