"""A layout keeps its budgets, uses them, and says what is missing."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from offload.errors import BudgetError
from offload.scheduler.layout import (
    USEFUL_STAGING_BYTES,
    Demand,
    Layout,
    RungPrice,
    budget_for,
    lay_out,
)
from offload.scheduler.rungs import RUNGS

MIB = 2**20
PLENTY = 2**50

DEMANDS = st.builds(
    Demand,
    batch=st.integers(1, 4),
    tokens=st.one_of(st.none(), st.integers(1, 200_000)),
    page=st.sampled_from([16, 64]),
    sinks=st.sampled_from([0, 64, 128]),
    window=st.one_of(st.none(), st.integers(1, 50).map(lambda n: 64 * n)),
    chunk=st.one_of(st.none(), st.integers(1, 8192)),
    staging=st.none(),
    token_bytes=st.lists(st.sampled_from([256, 1024, 4096]), min_size=1, max_size=6).map(tuple),
    weights=st.integers(0, 100 * MIB),
    overhead=st.integers(0, 10 * MIB),
    workspace=st.integers(0, MIB),
    workspace_per_token=st.integers(0, 4096),
    other_kv=st.integers(0, MIB),
)
EXTRA = st.one_of(st.just(0), st.integers(0, 2000 * MIB))


def laid_out(demand: Demand, budget: int) -> Layout | BudgetError:
    try:
        return lay_out(demand, device_budget=budget, host_budget=PLENTY)
    except BudgetError as error:
        return error


def least_budget(demand: Demand) -> int:
    refused = laid_out(demand, -1)
    assert isinstance(refused, BudgetError)
    return refused.requested


@given(demand=DEMANDS)
def test_what_a_refusal_asks_for_is_enough(demand: Demand) -> None:
    refused = laid_out(demand, -1)
    assert isinstance(refused, BudgetError)
    assert refused.requested > refused.available
    assert isinstance(laid_out(demand, refused.requested), Layout)
    assert isinstance(laid_out(demand, refused.requested - 1), BudgetError)


@given(demand=DEMANDS, extra=EXTRA)
def test_a_layout_stays_within_its_device_budget(demand: Demand, extra: int) -> None:
    budget = least_budget(demand) + extra
    layout = laid_out(demand, budget)
    assert isinstance(layout, Layout)
    assert layout.device_bytes <= budget
    assert layout.staging_bytes >= demand.batch * demand.page * max(demand.token_bytes)


@given(demand=DEMANDS, extra=EXTRA, more=st.integers(0, 500 * MIB))
def test_more_budget_never_puts_more_on_the_host(demand: Demand, extra: int, more: int) -> None:
    # A chunk that grows takes memory too.
    demand = replace(demand, chunk=demand.chunk or 512, tokens=demand.tokens or 100_000)
    budget = least_budget(demand) + extra
    less, greater = laid_out(demand, budget), laid_out(demand, budget + more)
    assert isinstance(less, Layout)
    assert isinstance(greater, Layout)
    assert greater.host_bytes <= less.host_bytes


@given(demand=DEMANDS, extra=EXTRA)
def test_explicit_values_are_never_changed(demand: Demand, extra: int) -> None:
    budget = least_budget(demand) + extra
    layout = laid_out(demand, budget)
    assert isinstance(layout, Layout)
    assert layout.sink_blocks * demand.page == demand.sinks
    if demand.window is not None:
        assert layout.window_blocks * demand.page == demand.window
    if demand.chunk is not None:
        assert layout.chunk == demand.chunk


DEMAND = Demand(
    batch=1,
    tokens=10_000,
    page=64,
    sinks=64,
    window=None,
    chunk=None,
    staging=None,
    token_bytes=(4096,) * 4,
    weights=100 * MIB,
    overhead=MIB,
    workspace=MIB,
    workspace_per_token=8192,
)


def test_everything_stays_on_the_device_if_it_fits() -> None:
    layout = lay_out(DEMAND, device_budget=PLENTY, host_budget=0)
    assert layout.host_tokens == 0
    assert (layout.sink_blocks + layout.window_blocks) * 64 >= 10_000


def test_the_chunk_shrinks_before_the_run_is_refused() -> None:
    tight = budget_for(replace(DEMAND, chunk=512), device_tokens=64 + 4 * 64)
    layout = lay_out(DEMAND, device_budget=tight, host_budget=PLENTY)
    assert layout.chunk == 512
    with pytest.raises(BudgetError):
        lay_out(replace(DEMAND, chunk=4096), device_budget=tight, host_budget=PLENTY)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_budget_for_leaves_room_for_the_share(share: float) -> None:
    budget = budget_for(DEMAND, device_tokens=int(share * 10_000))
    layout = lay_out(DEMAND, device_budget=budget, host_budget=PLENTY)
    on_device = (layout.sink_blocks + layout.window_blocks) * 64
    assert share * 10_000 <= on_device
    # No more than that, unless all of it fits once the buffers of streaming are not needed.
    assert on_device <= share * 10_000 + 256 or layout.host_tokens == 0


def test_too_little_host_memory_names_both_sizes_and_the_setting() -> None:
    with pytest.raises(BudgetError) as caught:
        lay_out(replace(DEMAND, window=640), device_budget=PLENTY, host_budget=MIB)
    assert caught.value.setting == "memory.cpu"
    assert caught.value.requested == -(-(10_000 - 704) // 64) * 64 * 4096 * 4
    assert caught.value.available == MIB


def test_copies_of_one_prompt_share_its_host_pages() -> None:
    alone = lay_out(replace(DEMAND, window=640), device_budget=PLENTY, host_budget=PLENTY)
    beams = replace(DEMAND, window=640, batch=4, copies=4, prompt=9_000)
    shared = lay_out(beams, device_budget=PLENTY, host_budget=PLENTY)
    assert alone.host_bytes < shared.host_bytes < 2 * alone.host_bytes


LAYER_BYTES = {
    "4k4v": (1200, 1000, 1200),
    "3k3v": (900, 750, 900),
    "2k2v": (600, 500, 600),
    "2k+clusters": (400, 300, 400),
    "clusters": (250, 200, 250),
}
LADDER = tuple(
    RungPrice(
        rung=rung,
        layer_bytes=LAYER_BYTES[rung.name] * 2,
        row_bytes=(MIB if rung.tokens == 256 else 0, 0, 0) * 2,
    )
    for rung in RUNGS
)
FAST = replace(
    DEMAND,
    tokens=100_000,
    chunk=512,
    token_bytes=(4096,) * 6,
    rungs=LADDER,
    scratch_bytes=1000,
    scratch_token_bytes=20,
)


@given(extra=st.integers(0, 1500 * MIB), unknown=st.booleans())
def test_a_ladder_of_replicas_stays_within_the_budget(extra: int, unknown: bool) -> None:
    demand = replace(FAST, tokens=None, longest=100_000) if unknown else FAST
    budget = least_budget(replace(demand, rungs=())) + extra
    layout = lay_out(demand, device_budget=budget, host_budget=PLENTY)
    assert layout.device_bytes <= budget
    assert len(layout.rungs) in (0, 6)
    if layout.rungs and not unknown:
        assert layout.replica_tokens >= layout.host_tokens > 0
        held = {price.rung: price.layer_bytes for price in LADDER}
        per_token = sum(held[rung][i] for i, rung in enumerate(layout.rungs))
        assert layout.device["replica"] == layout.replica_tokens * per_token
        rows = sum(layout.rungs[i].tokens == 256 for i in (0, 3))
        assert layout.device["cached rows"] == rows * MIB


@given(extra=st.integers(0, 1500 * MIB), more=st.integers(0, 300 * MIB))
def test_more_budget_never_makes_a_replica_worse(extra: int, more: int) -> None:
    base = least_budget(replace(FAST, rungs=()))

    def bits(budget: int) -> int:
        layout = lay_out(FAST, device_budget=budget, host_budget=PLENTY)
        if not layout.host_tokens:
            return 6 * 160
        return sum(10 * rung.bits + (not rung.clustered) for rung in layout.rungs)

    assert bits(base + extra) <= bits(base + extra + more)


def test_cached_rows_cost_no_rung_and_nothing_where_nothing_is_offloaded() -> None:
    two = next(price for price in LADDER if price.rung.name == "2k2v")
    cached = replace(two, row_bytes=(50 * MIB,) * 6)
    plain = replace(two, rung=replace(two.rung, caches=False), row_bytes=(0,) * 6)
    demand = replace(FAST, rungs=(cached, plain), streams=False)
    least = least_budget(demand)
    tight = lay_out(demand, device_budget=least, host_budget=PLENTY)
    assert {rung.name for rung in tight.rungs} == {"2k2v"}
    assert not any(rung.caches for rung in tight.rungs)
    assert (tight.device["cached rows"], tight.lifted_layers) == (0, 0)
    roomy = lay_out(demand, device_budget=least + 400 * MIB, host_budget=PLENTY)
    assert all(rung.caches for rung in roomy.rungs)
    assert roomy.device["cached rows"] == 300 * MIB
    short = replace(demand, tokens=1_000, window=4_096)
    layout = lay_out(short, device_budget=PLENTY, host_budget=PLENTY)
    assert (layout.host_tokens, layout.device["cached rows"]) == (0, 0)


def test_the_first_and_the_last_layers_are_lifted_first() -> None:
    low, above = LADDER[2], LADDER[1]
    tight = replace(FAST, rungs=(low,), streams=False)
    needed = least_budget(tight)
    least = lay_out(tight, device_budget=needed, host_budget=PLENTY)
    one = least.replica_tokens * (above.layer_bytes[0] - low.layer_bytes[0])
    scratch = FAST.scratch_bytes + least.replica_tokens * FAST.scratch_token_bytes
    extra = 2 * one + scratch + MIB
    demand = replace(FAST, staging=least.staging_bytes)
    layout = lay_out(demand, device_budget=needed + extra, host_budget=PLENTY)
    assert [rung.bits for rung in layout.rungs] == [3, 2, 2, 2, 2, 3]


def test_buffers_grow_to_a_useful_size_before_layers_are_lifted() -> None:
    low = replace(FAST, rungs=LADDER[2:3], streams=False)
    needed = least_budget(low)
    small = lay_out(low, device_budget=needed, host_budget=PLENTY).staging_bytes
    for extra in (2 * MIB, 20 * MIB, 2 * USEFUL_STAGING_BYTES):
        layout = lay_out(FAST, device_budget=needed + extra, host_budget=PLENTY)
        assert layout.lifted_layers == 0
        assert small + extra // 2 - MIB < layout.staging_bytes <= small + extra // 2


@given(whole=st.integers(0, 6), batch=st.integers(1, 3))
def test_whole_layers_take_device_bytes_and_no_host_bytes(whole: int, batch: int) -> None:
    demand = replace(FAST, rungs=LADDER[:1], streams=False, whole_layers=whole, batch=batch)
    none = replace(demand, whole_layers=0)
    roomy = least_budget(demand)
    some = lay_out(demand, device_budget=roomy, host_budget=PLENTY)
    if not some.host_tokens:  # all of it took no more
        return
    plain = lay_out(none, device_budget=least_budget(none), host_budget=PLENTY)
    assert some.whole == frozenset((0, 5, 1, 4, 2, 3)[:whole])
    assert some.host_bytes == plain.host_bytes * (6 - whole) // 6
    tokens = -(-100_000 // 64) * 64 - (some.sink_blocks + some.window_blocks) * 64
    more = some.device["sinks and window"] - plain.device["sinks and window"]
    assert more == batch * tokens * 4096 * whole


def test_a_rung_that_was_asked_for_is_not_changed() -> None:
    asked = replace(FAST, rungs=LADDER[2:], streams=False)
    roomy = lay_out(asked, device_budget=least_budget(asked) + 900 * MIB, host_budget=PLENTY)
    assert {rung.name for rung in roomy.rungs} == {"2k2v"}
    for price, way_out in ((LADDER[0], "one of fewer bits"), (LADDER[-1], "which then streams")):
        only = replace(FAST, rungs=(price,), streams=False)
        refused = laid_out(only, least_budget(only) - 1)
        assert isinstance(refused, BudgetError)
        assert price.rung.name in str(refused)
        assert way_out in str(refused)


def test_the_last_rung_is_taken_only_where_no_other_fits() -> None:
    needed = [
        least_budget(replace(FAST, rungs=(price,), streams=False, chunk=None)) for price in LADDER
    ]
    assert needed == sorted(needed, reverse=True)
    for budget, want in ((needed[-2], "2k+clusters"), (needed[-2] - 1, "clusters")):
        layout = lay_out(replace(FAST, chunk=None), device_budget=budget, host_budget=PLENTY)
        assert layout.rung is not None
        assert layout.rung.name == want
    streamed = lay_out(replace(FAST, chunk=None), device_budget=needed[-1] - 1, host_budget=PLENTY)
    assert streamed.rung is None


@given(errors=st.lists(st.floats(0, 1e-3), min_size=6, max_size=6), spare=st.integers(0, 900 * MIB))
def test_a_ladder_gives_bits_to_the_layers_that_need_them_and_stays_within_the_budget(
    errors: list[float], spare: int
) -> None:
    faithful = [price for price in LADDER if price.rung.bits and not price.rung.clustered]
    ladder = tuple(
        replace(price, errors=tuple(error * 8.0**-bits for error in errors))
        for price, bits in ((price, price.rung.bits) for price in faithful)
    )
    low = replace(FAST, rungs=LADDER[2:3], streams=False)
    budget = least_budget(low) + spare
    demand = replace(FAST, rungs=tuple(LADDER[:3]), ladder=ladder, streams=False)
    layout = lay_out(demand, device_budget=budget, host_budget=PLENTY)
    assert layout.device_bytes <= budget
    uniform = lay_out(replace(demand, ladder=()), device_budget=budget, host_budget=PLENTY)
    assert layout.host_bytes <= uniform.host_bytes
    assert len(layout.whole) < 6

    def error(found: Layout) -> float:
        pairs = enumerate(zip(errors, found.rungs, strict=True))
        return sum(e * 8.0**-rung.bits for i, (e, rung) in pairs if i not in found.whole)

    # One step of one layer is what a greedy choice may lose.
    assert error(layout) <= error(uniform) + max(errors) * 8.0**-2


@given(
    errors=st.lists(st.floats(1e-9, 1e-3), min_size=6, max_size=6),
    spare=st.integers(0, 900 * MIB),
    rows=st.integers(1, 40),
)
def test_cached_rows_cost_no_layer_its_bits_and_take_what_is_left(
    errors: list[float], spare: int, rows: int
) -> None:
    faithful = [price for price in LADDER if price.rung.bits and not price.rung.clustered]
    plain = tuple(
        replace(
            price, rung=replace(price.rung, caches=False), row_bytes=(0,) * 6,
            errors=tuple(error * 8.0**-price.rung.bits for error in errors),
        )
        for price in faithful
    )  # fmt: skip
    cached = tuple(
        replace(price, rung=replace(price.rung, caches=True), row_bytes=(rows * MIB,) * 6)
        for price in plain
    )
    low = replace(FAST, rungs=LADDER[2:3], streams=False)
    budget = least_budget(low) + spare
    demand = replace(FAST, rungs=tuple(LADDER[:3]), streams=False)
    without, both = (
        lay_out(replace(demand, ladder=ladder), device_budget=budget, host_budget=PLENTY)
        for ladder in (plain, cached + plain)
    )
    assert [replace(rung, caches=False) for rung in both.rungs] == list(without.rungs)
    assert both.whole == without.whole
    assert both.device_bytes <= budget
    layers = [layer for layer in range(6) if layer not in both.whole]
    n = sum(both.rungs[layer].caches for layer in layers)
    more = demand.batch * rows * MIB
    assert both.device_bytes - without.device_bytes == n * more
    assert n == len(layers) or budget - both.device_bytes < more


@given(matters=st.integers(0, 5), batch=st.integers(1, 3))
def test_the_layer_that_matters_most_keeps_its_tokens_as_they_are(matters: int, batch: int) -> None:
    errors = [1e-3 if layer == matters else 1e-9 for layer in range(6)]
    ladder = tuple(
        replace(price, errors=tuple(error * 8.0**-price.rung.bits for error in errors))
        for price in LADDER[:3]
    )
    four = replace(FAST, rungs=LADDER[:1], streams=False, batch=batch)
    budget = least_budget(four) + batch * 100_000 * 1_300  # buffers take some
    demand = replace(four, rungs=tuple(LADDER[:3]), ladder=ladder)
    layout = lay_out(demand, device_budget=budget, host_budget=PLENTY)
    assert layout.device_bytes <= budget
    assert layout.whole == frozenset({matters})
    tokens = -(-100_000 // 64) * 64 - (layout.sink_blocks + layout.window_blocks) * 64
    plain = lay_out(four, device_budget=least_budget(four), host_budget=PLENTY)
    more = layout.device["sinks and window"] - plain.device["sinks and window"]
    assert more == batch * tokens * demand.token_bytes[matters]
    asked = replace(demand, whole_layers=1)
    roomy = lay_out(asked, device_budget=2 * budget, host_budget=PLENTY)
    assert not roomy.host_tokens or 0 in roomy.whole


def test_a_ladder_changes_nothing_where_everything_fits() -> None:
    ladder = tuple(replace(price, errors=(1e-6,) * 6) for price in LADDER[:3])
    demand = replace(FAST, rungs=tuple(LADDER[:3]), streams=False)
    plain = lay_out(demand, device_budget=PLENTY, host_budget=PLENTY)
    assert (
        lay_out(replace(demand, ladder=ladder), device_budget=PLENTY, host_budget=PLENTY) == plain
    )
    assert not plain.rungs


def test_where_the_weights_alone_are_too_large_nothing_else_is_blamed() -> None:
    for rungs in ((), LADDER[:1]):
        demand = replace(FAST, rungs=rungs, weights=10 * 2**30, overhead=2**20)
        refused = laid_out(demand, 10 * 2**30)
        assert isinstance(refused, BudgetError)
        assert "The weights alone take more" in str(refused)
        assert "prefill.chunk" not in str(refused)
        assert isinstance(laid_out(demand, refused.requested), Layout)
