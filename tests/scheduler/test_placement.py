"""The ways to tokens that a step lacks flip where their prices say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.scheduler.cost import HAND_OFFS_S, SEARCH_ROW_BYTES, Heads, Shape
from offload.scheduler.placement import ATTENDED, COPIED, REBUILT, ways
from offload.scheduler.profiles import profile_of

H100 = profile_of("h100")


def shape(kv: int, *, queries: int = 32) -> Shape:
    layers = (Heads(queries, kv, 128),) * 32
    return Shape(layers=layers, hidden=4096, itemsize=2, parameters=6.7e9, weights=13 * 10**9)


def test_prices_are_bytes_over_rates() -> None:
    found = ways(shape(32), H100, sequences=64, tokens=600, absent=40)
    rows = 64 * 40 * 32 * 32
    assert found[COPIED] == pytest.approx(rows * 2 * 128 * 2 / H100.pcie / 0.94)
    # Rows that lie anywhere take the host as long as some times their bytes in order.
    assert found[ATTENDED] == pytest.approx(
        32 * HAND_OFFS_S + rows * SEARCH_ROW_BYTES / H100.host_bytes_per_s
    )
    # Of 600 tokens every one is some head's: their inputs.
    assert found[REBUILT] == pytest.approx(64 * 600 * 4096 * 2 * 32 / H100.pcie / 0.94)


def test_the_host_is_asked_where_its_memory_is_faster_than_the_link_by_more_than_the_hand_offs() -> (
    None
):
    slow = replace(H100, host_bytes_per_s=H100.pcie)
    fast = replace(H100, host_bytes_per_s=H100.pcie * 10)
    for profile, cheapest in ((slow, COPIED), (fast, ATTENDED)):
        found = ways(shape(32), profile, sequences=64, tokens=600, absent=40)
        assert min(found, key=lambda way: found[way]) == cheapest
    few = ways(shape(32), fast, sequences=1, tokens=600, absent=40)
    assert few[COPIED] < few[ATTENDED]


def test_inputs_pay_with_one_kv_head_that_is_as_wide_as_all() -> None:
    layers = (Heads(1, 1, 4096),) * 32
    one = Shape(layers=layers, hidden=4096, itemsize=2, parameters=6.7e9, weights=13 * 10**9)
    found = ways(one, replace(H100, gemm_flops=1e16), sequences=1, tokens=100_000, absent=4000)
    assert found[REBUILT] == pytest.approx(found[COPIED] / 2)
    apart = ways(
        shape(32), replace(H100, gemm_flops=1e16), sequences=1, tokens=100_000, absent=4000
    )
    assert apart[REBUILT] > apart[COPIED]


def test_nothing_is_rebuilt_where_nothing_is_absent() -> None:
    assert set(ways(shape(8), H100, sequences=1, tokens=100, absent=0)) == {COPIED, ATTENDED}
