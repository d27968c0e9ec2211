"""A layout and a placement of the same tokens have one price, and what it decides flips where it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.cost import (
    LAUNCHING,
    LINK,
    Heads,
    Placement,
    Shape,
    Way,
    hidden_share,
    placed,
    placement_of,
    step,
    times,
)
from offload.scheduler.layout import (
    MOST_REPEATS,
    Demand,
    HiddenPrice,
    Layout,
    RungPrice,
    hidden_page_bytes,
    lay_out,
)
from offload.scheduler.profiles import PROFILES
from offload.scheduler.rungs import RUNGS

H100, MIB, PAGE, PLENTY = PROFILES["h100"], 2**20, 64, 2**50
# Llama-2-7B: as many KV heads as query heads. An input is half of a token's keys and values.
MHA = Shape(
    layers=(Heads(32, 32, 128),) * 32,
    hidden=4096,
    itemsize=2,
    parameters=6.6e9,
    weights=13 * 2**30,
)
EXACT = Way(mode="exact", batch=1, prompt=30_000)
FAST = replace(EXACT, mode="fast")


def of_heads(kv: int) -> Shape:
    return replace(MHA, layers=(Heads(32, kv, 128),) * 32)


def demand(shape: Shape, *, tokens: int = 32_768, batch: int = 1, inputs: int = 0) -> Demand:
    """A run; of each page `inputs` tokens are kept as inputs of attention."""
    a_layer = shape.kv_bytes // len(shape.layers)
    hidden = None
    if inputs:
        page_bytes = hidden_page_bytes(shape.hidden, inputs, a_layer, 2, PAGE)
        n = len(shape.layers)
        hidden = HiddenPrice(
            tokens=inputs, page_bytes=(page_bytes,) * n, row_bytes=(shape.hidden * 2,) * n,
            flops=shape.rebuild_flops, workspace=MIB, angle_bytes=512,
        )  # fmt: skip
    return Demand(
        batch=batch, tokens=tokens, page=PAGE, sinks=PAGE, window=None, chunk=2048, staging=None,
        token_bytes=(a_layer,) * len(shape.layers), weights=shape.weights, overhead=0, workspace=MIB,
        workspace_per_token=1024, other_kv=3 * MIB, hidden=hidden,
    )  # fmt: skip


def laid_out(asked: Demand, kv_room: int) -> Layout:
    """With so many bytes beside the weights."""
    return lay_out(asked, device_budget=asked.weights + kv_room, host_budget=PLENTY)


@given(
    room=st.integers(5 * 2**30, 20 * 2**30),
    inputs=st.integers(0, PAGE),
    batch=st.integers(1, 3),
    tokens=st.integers(3000, 40_000),
)
def test_what_a_step_copies_is_what_the_host_holds_and_the_device_does_not(
    room: int, inputs: int, batch: int, tokens: int
) -> None:
    layout = laid_out(demand(MHA, tokens=tokens, batch=batch, inputs=inputs), room)
    way = replace(EXACT, batch=batch, prompt=tokens - 100)
    where = placement_of(layout, MHA, way)
    busy = step(layout, MHA, H100, way)
    assert busy == placed(where, MHA, H100)
    assert busy.bytes_in == pytest.approx((1 - layout.resident_share) * layout.host_bytes)
    made = where.resident + where.fetched + where.rebuilt
    # Every token once; a block that is not full counts as one.
    assert batch * tokens <= made * (1 + 1e-9) <= batch * (tokens + 2 * PAGE) * (1 + 1e-6)


@given(
    room=st.integers(4 * 2**30, 18 * 2**30),
    more=st.integers(1, 4 * 2**30),
    inputs=st.sampled_from([0, 0, 24, PAGE]),
)
def test_more_budget_is_never_predicted_slower_than_a_block_of_the_window_costs(
    room: int, more: int, inputs: int
) -> None:
    """Mode exact, whose tokens are the same at every budget: mode fast spends more of it on better replicas."""
    less, roomy = (
        step(laid_out(demand(MHA, inputs=inputs), size), MHA, H100, EXACT)
        for size in (room, room + more)
    )
    # Where the rest is enough for one page more in each buffer, the window gives up a block for it.
    block = placed(Placement(sequences=1, resident=0, fetched=PAGE), MHA, H100)
    assert roomy.seconds <= less.seconds + block.link
    if more >= 2**30:
        assert roomy.seconds <= less.seconds


def test_inputs_are_rebuilt_at_the_price_of_a_placement() -> None:
    layout = laid_out(demand(MHA, inputs=48), 2 * 2**30)
    assert layout.hidden is not None
    busy, pages = step(layout, MHA, H100, EXACT), layout.host_tokens // PAGE
    streamed = 1 - layout.resident_share
    by_hand = placed(
        Placement(
            sequences=1,
            resident=(layout.sink_blocks + layout.window_blocks) * PAGE
            + layout.resident_share * layout.host_tokens,
            fetched=16 * pages * streamed,
            rebuilt=48 * pages * streamed,
            read=3 * MIB,
        ),
        MHA,
        H100,
    )
    assert busy.device.keys() == by_hand.device.keys()
    for part, seconds in by_hand.device.items():
        assert busy.device[part] == pytest.approx(seconds), part
    assert busy.link == pytest.approx(by_hand.link)
    found = times(layout, MHA, H100, EXACT)
    assert found.parts == busy.device | {LINK: busy.link, LAUNCHING: busy.launching}
    assert found.token == busy.seconds


def test_a_replica_is_scanned_and_not_streamed() -> None:
    price = RungPrice(rung=RUNGS[0], layer_bytes=(1217,) * 32, row_bytes=(0,) * 32)
    asked = replace(demand(of_heads(8)), rungs=(price,), scratch_bytes=MIB)
    layout = laid_out(asked, 3 * 2**30)
    assert layout.rungs
    fast = step(layout, of_heads(8), H100, FAST)
    assert (fast.link, fast.bytes_in) == (0, 0)
    assert fast.device["replica"] == layout.device["replica"] / H100.bytes_per_s
    assert fast.device["selection"] > 0
    exact = step(layout, of_heads(8), H100, EXACT)
    assert exact.bytes_in == layout.host_bytes
    more = step(layout, of_heads(8), H100, replace(FAST, selected=1024))
    assert more.device["selection"] - fast.device["selection"] == pytest.approx(32 * 0.28e-6 * 960)


def test_what_the_host_searches_is_priced_by_its_bytes_and_rows_and_as_it_was_timed() -> None:
    price = RungPrice(rung=RUNGS[-1], layer_bytes=(256,) * 32, row_bytes=(0,) * 32)
    own = replace(demand(of_heads(8), tokens=131_232), rungs=(price,), scratch_bytes=MIB)
    # Of `clusters`: 9 bytes a key, nine rows for each of the 256 tokens of 256 KV heads.
    asked = replace(own, searched_bytes=9 * 8 * 32, searched_rows=9 * 8 * 32)
    layouts = [lay_out(one, device_budget=one.weights + 3 * 2**30, host_budget=PLENTY) for one in (own, asked)]  # fmt: skip
    way = replace(FAST, selected=256)
    device, searched = (step(layout, of_heads(8), H100, way) for layout in layouts)
    assert "search" not in device.device
    # Seconds of 32 layers: 16.7 and 20.3 ms of searches in two runs, 1.4 and 1.8 of hand-offs (benchmarks/host.json).
    timed = 20.1e-3
    assert searched.device["search"] == pytest.approx(timed, rel=0.1)
    # The card reads no rows then, and scores as before.
    assert 0 < searched.device["selection"] < device.device["selection"]
    fewer = step(layouts[1], of_heads(8), H100, replace(way, selected=64))
    assert fewer.device["search"] < 0.7 * searched.device["search"]


@given(tokens=st.integers(1, 40_000))
def test_a_step_gets_dearer_as_the_sequence_grows_and_ends_at_the_layouts_price(
    tokens: int,
) -> None:
    layout = laid_out(demand(MHA), 4 * 2**30)
    now = step(layout, MHA, H100, EXACT, tokens=tokens)
    later = step(layout, MHA, H100, EXACT, tokens=tokens + 100)
    assert now.seconds <= later.seconds * (1 + 1e-9)
    assert (now.link == 0) == (tokens <= layout.most_on_device)
    end = step(layout, MHA, H100, EXACT, tokens=32_768)
    assert end.seconds == pytest.approx(step(layout, MHA, H100, EXACT).seconds, rel=0.01)


@given(room=st.integers(5 * 2**30, 12 * 2**30), host=st.integers(PAGE * MHA.kv_bytes, 8 * 2**30))
def test_what_the_host_has_no_room_for_is_read_again_within_both_budgets(
    room: int, host: int
) -> None:
    asked = replace(demand(MHA), prefix_token_bytes=50_000)
    layout = lay_out(asked, device_budget=asked.weights + room, host_budget=host)
    assert layout.host_bytes <= host
    assert layout.device_bytes <= asked.weights + room
    where = placement_of(layout, MHA, EXACT)
    assert bool(where.dropped) == (layout.host_blocks is not None)
    if layout.host_blocks is None:
        return
    again = layout.dropped_tokens + layout.sink_blocks * PAGE
    assert layout.device["reading again"] >= again * 50_000
    assert where.dropped == again
    there = where.resident + where.fetched + layout.dropped_tokens
    assert 32_768 <= there * (1 + 1e-9) <= 32_768 + 2 * PAGE + 1
    # With a token more on the host none is dropped that need not be.
    assert layout.host_bytes > host - PAGE * MHA.kv_bytes
    busy = step(layout, MHA, H100, EXACT)
    assert busy.device["prefix"] > 2 * MHA.parameters * again / H100.gemm_flops * 0.999


def test_rebuilding_pays_with_as_many_kv_heads_as_query_heads_and_never_at_a_quarter() -> None:
    """At 4 to 1 an input is twice a token's keys and values: nothing is rebuilt, whatever the card."""
    fetched = step(laid_out(demand(MHA), 2 * 2**30), MHA, H100, EXACT).seconds
    rebuilt = step(laid_out(demand(MHA, inputs=PAGE), 2 * 2**30), MHA, H100, EXACT).seconds
    assert rebuilt < 0.6 * fetched
    for flops_per_byte in (10.0, 1e4, 1e9):
        shares = [hidden_share(2 * kv * 128, 4096, 2, flops_per_byte) for kv in (32, 24, 17, 16, 8)]
        assert min(shares[:3]) > 0
        assert shares[3:] == [0, 0]  # at 2 to 1 an input is as large


def test_the_share_that_is_rebuilt_is_the_fastest_of_all_that_a_page_can_have() -> None:
    """On a card whose products take longer than its link, the split of the formula is within a page's grain of the best."""
    card = replace(H100, gemm_flops=1e14)
    flops_per_byte = card.gemm_flops / card.pcie
    share = hidden_share(8192, 4096, 2, flops_per_byte)
    assert 0 < share < 1
    found = {
        n: step(laid_out(demand(MHA, inputs=n), 2 * 2**30), MHA, card, EXACT).seconds
        for n in range(1, PAGE + 1)
    }
    best = min(found, key=lambda n: found[n])
    # The formula counts the products alone; a step has weights and attention to do besides.
    assert found[round(share * PAGE)] <= 1.05 * found[best]


def test_a_step_that_is_not_captured_takes_no_less_than_python_needs_to_launch_it() -> None:
    whole = laid_out(demand(MHA, tokens=8192), 20 * 2**30)
    eager = replace(EXACT, prompt=8000, captured=False)
    busy = step(whole, MHA, H100, eager)
    assert (busy.link, busy.limit) == (0, LAUNCHING)
    assert busy.seconds == busy.launching == pytest.approx(32 * 0.92e-3)
    captured = step(whole, MHA, H100, replace(eager, captured=True))
    assert captured.launching == pytest.approx(32 * 0.2e-3)
    assert captured.limit != LAUNCHING
    assert step(whole, MHA, H100, replace(FAST, prompt=8000)).launching == 0
    # Each layer's pages come in pieces of a staging buffer: smaller ones are more, until Python is what a step waits for.
    asked = replace(demand(MHA), staging=4 * MIB)
    small, large = (laid_out(one, 13 * 2**30) for one in (asked, replace(asked, staging=64 * MIB)))
    few, many = (step(layout, MHA, H100, EXACT) for layout in (large, small))
    assert (few.limit, many.limit) == (LINK, LAUNCHING)
    pieces = -(-many.bytes_in // (32 * 4 * MIB))
    assert 32 * pieces > MOST_REPEATS
    beyond = 32 * pieces - MOST_REPEATS  # are no graphs
    assert many.launching == pytest.approx(32 * 0.2e-3 + MOST_REPEATS * 0.1e-3 + beyond * 0.22e-3)
    anew = step(small, MHA, H100, replace(EXACT, captured=False))
    assert anew.launching == pytest.approx(32 * (0.92e-3 + pieces * 0.22e-3))


def test_pages_are_kept_in_memory_that_only_prefill_needs_and_are_not_streamed() -> None:
    asked = replace(demand(MHA, batch=2), workspace=2**30, step_workspace=2**20)
    layout = laid_out(asked, 10 * 2**30)
    assert layout.idle_bytes == layout.device["workspace"] - 2**20
    way = replace(EXACT, batch=2)
    busy, where = step(layout, MHA, H100, way), placement_of(layout, MHA, way)
    column = 2 * PAGE * MHA.kv_bytes
    kept = layout.idle_bytes // column * column
    assert kept > 2**29
    assert busy.bytes_in == pytest.approx(layout.host_bytes - kept)
    none = placement_of(replace(layout, idle_bytes=0), MHA, way)
    assert where.resident - none.resident == pytest.approx(kept / MHA.kv_bytes)
    # While few tokens are on the host, all of them are.
    first = step(layout, MHA, H100, way, tokens=layout.most_on_device + 1)
    assert (first.link, first.bytes_in) == (0, 0)


def test_what_is_settled_between_steps_overlaps_with_nothing() -> None:
    where = Placement(sequences=1, resident=1000, fetched=10**6)
    rests, settles = placed(where, MHA, H100), placed(replace(where, settled=2), MHA, H100)
    assert (settles.link, settles.computes) == (rests.link, rests.computes)
    assert settles.seconds - rests.seconds == pytest.approx(2 * 1.5e-3)
