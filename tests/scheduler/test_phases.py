"""A plan in three phases keeps its budgets, gets no slower by more of them, and decides as its costs say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, InputError
from offload.scheduler import phases
from offload.scheduler.cost import Busy, Heads, Placement, Shape, placed, reading
from offload.scheduler.phases import Ask, Phase, PhasePlan
from offload.scheduler.profiles import PROFILES, Profile

GIB, MIB = 2**30, 2**20
H100 = PROFILES["h100"]
MHA = Shape(
    layers=(Heads(32, 32, 128),) * 32,
    hidden=4096,
    itemsize=2,
    parameters=6.65e9,
    weights=int(13.3e9),
)
GQA = replace(MHA, layers=(Heads(32, 8, 128),) * 32)
OPT = Ask(
    shape=MHA, batch=64, prompt=128, output=512, device=16 * GIB, host=192 * GIB, workspace=GIB
)

SHAPES = st.builds(
    Shape,
    layers=st.lists(
        st.builds(Heads, st.just(8), st.sampled_from([1, 2, 8]), st.just(64)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    hidden=st.just(512),
    itemsize=st.just(2),
    parameters=st.floats(1e6, 1e9),
    weights=st.integers(1, 100 * MIB),
)
ASKS = st.builds(
    Ask,
    shape=SHAPES,
    batch=st.integers(1, 6),
    prompt=st.integers(1, 300),
    output=st.integers(1, 60),
    device=st.integers(0, 120 * MIB),
    host=st.integers(0, 8 * MIB),
    workspace=st.integers(0, MIB),
    staging=st.sampled_from([4096, MIB]),
    inputs=st.booleans(),
    prefix=st.booleans(),
)
CARDS = st.sampled_from([H100, PROFILES["rtx3060"], replace(H100, pcie=1e9)])


def planned(ask: Ask, profile: Profile) -> PhasePlan | None:
    try:
        return phases.plan(ask, profile)
    except BudgetError:
        return None


@settings(max_examples=60, deadline=None)
@given(ask=ASKS, profile=CARDS, device=st.integers(0, 20 * MIB), host=st.integers(0, 8 * MIB))
def test_more_budget_never_predicts_slower(
    ask: Ask, profile: Profile, device: int, host: int
) -> None:
    least = planned(ask, profile)
    if least is None:
        return
    for more in (
        replace(ask, device=ask.device + device),
        replace(ask, host=ask.host + host),
        replace(ask, device=ask.device + device, host=ask.host + host),
    ):
        found = planned(more, profile)
        assert found is not None
        assert found.seconds <= least.seconds * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(ask=ASKS, profile=CARDS)
def test_every_token_is_somewhere_within_the_budgets(ask: Ask, profile: Profile) -> None:
    found = planned(ask, profile)
    assert phases.fits(ask) == (found is not None)
    if found is None:
        return
    before = Phase.DEVICE
    for tokens in range(1, ask.longest + 1):
        where = found.placement(tokens * ask.batch)
        kept = where.resident + where.fetched + where.rebuilt + where.dropped
        assert kept == tokens * ask.batch
        assert min(where.resident, where.fetched, where.rebuilt, where.dropped) >= 0
        assert found.host_bytes(where) <= ask.host
        assert found.device_bytes(where) <= ask.device
        phase = found.phase(tokens)
        assert (phase is Phase.DEVICE) == (tokens <= found.p1)
        assert (phase is Phase.AGAIN) == (found.p2 is not None and tokens > found.p2)
        assert phase.value >= before.value  # I, II, III: in order as texts too
        before = phase
        assert not where.dropped or ask.prefix
        assert not where.rebuilt or ask.inputs


@settings(max_examples=60, deadline=None)
@given(ask=ASKS)
def test_the_longest_context_is_planned_and_a_token_more_is_refused(ask: Ask) -> None:
    output = phases.longest(ask)
    if not output:
        assert planned(replace(ask, output=1), H100) is None
        return
    assert phases.fits(replace(ask, output=output))
    longer = replace(ask, output=output + 1)
    with pytest.raises(BudgetError) as refused:
        phases.plan(longer, H100)
    assert refused.value.requested > refused.value.available
    found = phases.changes(longer)
    assert len(found) <= 3
    for change in found:
        assert phases.fits(phases._changed(longer, change.what, change.value)), change


@settings(max_examples=60, deadline=None)
@given(ask=ASKS)
def test_what_a_refusal_asks_for_is_what_that_budget_lacks(ask: Ask) -> None:
    missing = phases._missing(ask)
    if missing is None:
        return
    what, requested, _ = missing
    enough = phases._missing(phases._changed(ask, what, requested))
    assert enough is None or enough[0] != what
    less = phases._missing(phases._changed(ask, what, requested - 1))
    assert less is not None
    assert less[0] == what


def test_a_plan_is_the_same_every_time() -> None:
    assert phases.plan(OPT, H100) == phases.plan(OPT, H100)


def test_phase_two_begins_at_the_token_where_the_device_ends() -> None:
    found = phases.plan(OPT, H100)
    token = OPT.batch * MHA.kv_bytes
    room = OPT.device - MHA.weights - OPT.workspace - 2 * OPT.staging
    assert found.p1 == room // token
    assert found.phase(found.p1) is Phase.DEVICE
    assert found.phase(found.p1 + 1) is Phase.HOST
    exactly = replace(OPT, device=OPT.device - room + 200 * token)
    assert phases.plan(exactly, H100).p1 == 200
    assert phases.plan(replace(exactly, device=exactly.device - 1), H100).p1 == 199


def test_phase_three_begins_where_the_host_ends() -> None:
    # A link so fast that nothing is dropped before it has to be.
    fast = replace(H100, pcie=1e15)
    ask = replace(OPT, host=OPT.batch * 500 * MHA.kv_bytes, inputs=False)
    found = phases.plan(ask, fast)
    assert found.p2 == (found.capacity + OPT.batch * 500) // OPT.batch
    assert found.phase(found.p2) is Phase.HOST
    assert found.phase(found.p2 + 1) is Phase.AGAIN
    assert found.beta > 0


def test_inputs_pay_where_they_are_smaller_and_not_from_two_query_heads_to_a_kv_head_on() -> None:
    assert phases.plan(OPT, H100).share > 0
    assert MHA.input_bytes == MHA.kv_bytes // 2
    for kv in (16, 8):
        shape = replace(MHA, layers=(Heads(32, kv, 128),) * 32)
        assert not shape.rebuilds
        assert phases.plan(replace(OPT, shape=shape, device=15 * GIB), H100).share == 0


def test_only_layers_with_larger_keys_and_values_keep_inputs() -> None:
    mixed = replace(MHA, layers=(Heads(32, 32, 128), Heads(32, 8, 128)))
    assert mixed.kv_bytes == 2 * 2 * 128 * 2 * (32 + 8) // 2
    assert mixed.input_bytes == 4096 * 2 + 2 * 8 * 128 * 2
    assert mixed.rebuild_flops == 2 * 4096 * (2 * 32 * 128)


def test_the_split_lets_link_and_card_finish_together() -> None:
    # A card on which rebuilding everything would take longer than the link.
    ask = replace(OPT, prefix=False)
    card = PROFILES["rtx4090"]
    found = phases.plan(ask, card)
    assert 0 < found.share < phases._SHARES
    middle = found.step(ask.prompt + ask.output // 2)
    one_more = replace(found, share=found.share + 1).step(ask.prompt + ask.output // 2)
    step = abs(one_more.computes - middle.computes) + abs(one_more.link - middle.link)
    assert abs(middle.computes - middle.link) <= step


@pytest.mark.parametrize(("pcie", "pays"), [(1e9, True), (1e13, False)])
def test_dropping_pays_where_the_link_is_slow(pcie: float, pays: bool) -> None:
    ask = replace(OPT, shape=GQA, batch=4, prompt=8192, output=64, device=15 * GIB)
    found = phases.plan(ask, replace(H100, pcie=pcie))
    assert (found.p2 is not None) == pays


def test_a_decision_has_the_two_costs_that_made_it() -> None:
    found = phases.plan(OPT, H100)
    inputs, dropped = found.decisions
    only = phases.plan(replace(OPT, inputs=False), H100)
    kept = phases._timed(replace(found, ask=replace(OPT, prefix=False)))
    assert inputs.seconds == dropped.seconds == found.seconds
    assert inputs.instead_seconds == only.seconds
    assert dropped.instead_seconds == kept.seconds
    assert found.seconds < min(only.seconds, kept.seconds)


def test_the_share_of_inputs_is_spread_over_the_tokens() -> None:
    found = replace(phases.plan(OPT, H100), share=20)
    for tokens in range(1, 200):
        as_inputs = sum(found.keeps_input(token) for token in range(tokens))
        assert as_inputs == tokens * 20 // phases._SHARES


def test_what_fits_the_device_has_no_later_phase_and_no_buffers() -> None:
    whole = MHA.weights + GIB + OPT.batch * OPT.longest * MHA.kv_bytes
    found = phases.plan(replace(OPT, device=whole, host=0), H100)
    assert (found.p1, found.p2, found.alpha, found.beta) == (OPT.longest, None, 0, 0)
    assert found.device_bytes(found.placement(OPT.batch * OPT.longest)) == whole
    assert found.decisions == ()


def test_a_group_is_no_slower_than_all_at_once() -> None:
    ask = replace(OPT, batch=12, output=32, device=15 * GIB)
    group = phases.grouped(ask, H100)
    turns = -(-ask.batch // group.ask.batch)
    assert turns * group.seconds <= phases.plan(ask, H100).seconds


def test_groups_are_refused_where_one_sequence_is() -> None:
    with pytest.raises(BudgetError):
        phases.grouped(replace(OPT, device=GIB), H100)


def test_a_refusal_names_three_changes() -> None:
    short = replace(OPT, host=GIB, prefix=False)
    with pytest.raises(BudgetError, match=r"Any of these is enough: prefix = on; .*; ") as refused:
        phases.plan(short, H100)
    assert refused.value.available == GIB
    assert refused.value.setting == "memory.cpu"


def test_the_timeline_shows_where_phases_begin() -> None:
    found = phases.plan(OPT, H100)
    rows = [line.split() for line in found.timeline(4).splitlines()[1:]]
    by_tokens = {row[0]: row[1] for row in rows}
    assert found.p2 is not None
    assert by_tokens["128"] == "II"
    assert by_tokens[f"{found.p2 + 1}"] == "III"
    assert by_tokens["639"] == "III"


@pytest.mark.parametrize("field", ["batch", "output", "prompt", "staging"])
def test_nothing_to_plan_is_an_error(field: str) -> None:
    with pytest.raises(InputError, match=field):
        replace(OPT, **{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "entry", ["pcie", "gemm_flops", "bytes_per_s", "attention_flops", "memory"]
)
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_a_profile_has_no_entry_that_no_machine_has(entry: str, value: float) -> None:
    with pytest.raises(InputError, match=entry):
        replace(H100, **{entry: value})  # type: ignore[arg-type]


def test_a_step_costs_what_its_formulas_say() -> None:
    where = Placement(
        sequences=2, resident=10, fetched=20, rebuilt=30, dropped=40, staging=MIB, bytes_out=5
    )
    busy: Busy = placed(where, MHA, H100)
    rate = H100.bytes_per_s
    assert busy.device["weights"] == MHA.weights / rate
    assert busy.device["attention"] == (10 + 2 * 90) * MHA.kv_bytes / rate
    rebuilt = 30 * 32 * 2 * 4096 * 2 * 4096 / H100.gemm_flops + 60 * 32 * 8192 / rate
    assert busy.device["rebuild"] == pytest.approx(rebuilt)
    groups = 40 * (8192 + 16384) / MIB
    read = reading(MHA.work, H100, sequences=2, tokens=40, passes=groups)
    assert busy.device["prefix"] == read
    assert busy.bytes_in == 20 * 32 * 16384 + 30 * 32 * 8192
    assert busy.link == pytest.approx(busy.bytes_in / H100.pcie / 0.94)
    assert busy.seconds == max(busy.link, sum(busy.device.values()))
