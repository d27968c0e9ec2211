"""Every decision has the two costs that made it, and flips where they say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from test_plan import SHAPE, machine
from test_recompute import build

import offload
from offload.checkpoint import FileRow, FileShape
from offload.config import OffloadConfig
from offload.decisions import BYTES, MS, RUN_MS, STEP_BYTES, TOKEN_MS, Choice
from offload.plan import Machine, plan
from offload.scheduler.profiles import PROFILES

GIB = 2**30
MHA = replace(
    SHAPE, name="7B", rows=(FileRow(32, 128, 128, 2),) * 32, max_positions=4096, weights=13 * GIB
)


def decided(
    what: str, *, shape: FileShape = SHAPE, there: Machine | None = None, context: int = 131_072, **settings: Any
) -> Choice:  # fmt: skip
    """The decision whose subject begins so."""
    config = OffloadConfig.build(None, **settings)
    found = plan(config, shape, there or machine(), context=context)
    (choice,) = [choice for choice in found.decisions if choice.what.startswith(what)]
    return choice


def test_kv_leaves_the_device_where_it_no_longer_fits() -> None:
    settings: dict[str, Any] = {"mode": "exact", "chunk": 4096}  # else it would shrink first
    fits = decided("KV", context=32_768, **settings)
    assert fits.chosen == "all on the device"
    assert fits.cost is not None
    exactly = machine(fits.cost / GIB)
    assert decided("KV", context=32_768, there=exactly, **settings).chosen == fits.chosen
    a_little_less = replace(exactly, device=exactly.device - 2**20)
    less = decided("KV", context=32_768, there=a_little_less, **settings)
    assert less.chosen == "on the device and the host"
    assert less.cost is not None
    # What all of it would take is what it takes where it fits, and more than there is.
    assert less.cost <= exactly.device - 2**20 < (less.instead_cost or 0)
    assert decided("KV", context=32_768, mode="exact", window=4096).why == "cache.window is set"


@pytest.mark.parametrize(("heads", "known"), [(32, True), (24, True), (16, False), (8, False)])
def test_rebuilding_is_weighed_from_mha_to_a_quarter_of_the_heads(heads: int, known: bool) -> None:
    """An input of 4,096 numbers against keys and values of 256 a head: with 16 heads it is as many."""
    shape = replace(MHA, rows=(FileRow(heads, 128, 128, 2),) * 32)
    there = machine(18, 200, "h100")
    choice = decided("tokens", shape=shape, there=there, context=65_536, mode="exact")
    assert choice.chosen == "keys and values fetched"
    assert choice.unit == (MS if known else BYTES)
    assert choice.cost is not None
    assert choice.instead_cost is not None
    if known:
        assert choice.instead_cost < choice.cost
        assert choice.why.endswith("the other one is cheaper")
        turned = decided("tokens", shape=shape, there=there, context=65_536, mode="exact", recompute="hidden")  # fmt: skip
        assert (turned.cost, turned.instead_cost) == (choice.instead_cost, choice.cost)
        assert "cheaper" not in turned.why
    else:
        assert choice.cost == sum(shape.token_bytes) <= choice.instead_cost


def test_fetching_is_cheaper_again_on_a_card_that_multiplies_slowly() -> None:
    """What is asked for is done; the costs say that it does not pay."""
    slow = replace(PROFILES["h100"], gemm_flops=3e12)
    there = Machine(profile=slow, device=18 * GIB, host=200 * GIB)
    settings: dict[str, Any] = {"mode": "exact", "recompute": "hidden", "recomputed": 1.0}
    choice = decided("tokens", shape=MHA, there=there, context=65_536, **settings)
    assert choice.instead == "keys and values fetched"
    assert choice.why.endswith("the other one is cheaper")


def test_a_replica_is_a_fraction_of_streaming_and_rungs_say_what_the_next_would_take() -> None:
    steps = decided("steps")
    assert steps.unit == MS
    assert (steps.cost or 0) < 0.1 * (steps.instead_cost or 0)
    rung = decided("rung", context=300_000, there=machine(23, 300), rung="2k2v")
    assert (rung.what, rung.chosen) == ("rung of layers 0 to 31", "2k2v")
    config = OffloadConfig.build(None)
    found = plan(config, SHAPE, machine(22, 300), context=200_000)
    groups = [choice for choice in found.decisions if choice.what.startswith("rung")]
    assert len(groups) == 2  # some layers are lifted, the others have no room for it
    assert found.layout is not None
    spare = 22 * GIB - found.layout.device_bytes
    assert sum(choice.cost or 0 for choice in groups) == found.layout.device["replica"]
    low = min(groups, key=lambda choice: choice.chosen)
    assert (low.instead_cost or 0) - (low.cost or 0) > spare
    kept = decided("rung of layers 0, 31", whole_layers=2, context=100_000)
    assert (kept.what, kept.chosen) == ("rung of layers 0, 31", "kept as they are")


def test_layers_are_compiled_where_it_pays_in_the_long_run() -> None:
    short, long = (
        plan(OffloadConfig(), SHAPE, machine(), context=131_072, output=n).decisions
        for n in (512, 16_384)
    )
    (as_they_are,) = [choice for choice in short if choice.what == "layers"]
    (compiled,) = [choice for choice in long if choice.what == "layers"]
    assert (as_they_are.chosen, compiled.chosen, compiled.unit) == ("as they are", "compiled", RUN_MS)  # fmt: skip
    assert (as_they_are.cost or 0) < (as_they_are.instead_cost or 0)
    assert (compiled.cost or 0) < (compiled.instead_cost or 0)


def test_drafts_are_as_long_as_makes_tokens_come_fastest() -> None:
    best = decided("drafts", mode="verified")
    assert best.unit == TOKEN_MS
    for length in (1, 16, 64):
        asked = decided("drafts", mode="verified", draft=length)
        assert asked.why == "decode.draft is set"
        assert (best.cost or 0) <= (asked.cost or 0)
        # Memory that a longer draft's pass needs keeps no pages.
        assert asked.instead_cost == pytest.approx(best.instead_cost, rel=0.02)


def test_a_chunk_that_shrank_says_what_a_whole_one_would_take() -> None:
    choice = decided("chunk", there=machine(16.3), context=16_384, mode="exact")
    assert choice.instead == "4,096"
    assert choice.why == "the device budget has no room for more"
    assert (choice.cost or 0) < (choice.instead_cost or 0)
    assert decided("chunk", chunk=512, context=16_384).why == "prefill.chunk is set"


def test_the_oldest_tokens_are_dropped_where_the_host_ends_and_not_before() -> None:
    settings: dict[str, Any] = {"mode": "exact", "recompute": "prefix", "chunk": 1024}
    config = OffloadConfig.build(None, **settings)

    def planned(host: int, config: OffloadConfig = config) -> Any:
        there = replace(machine(18), host=host)
        return plan(config, SHAPE, there, context=65_536)

    roomy = planned(2**40)
    assert roomy.layout.dropped_tokens == 0
    assert roomy.phases.p2 is None
    needed = roomy.layout.host_bytes
    assert planned(needed).layout == roomy.layout
    short = planned(needed - 1)
    assert short.layout.dropped_tokens > 0
    assert short.layout.host_bytes < needed
    assert short.layout.device_bytes <= 18 * GIB
    assert short.phases.p2 == short.phases.p1 + short.layout.host_blocks * 64
    assert short.phases.dropped_share == pytest.approx(short.layout.dropped_tokens / 65_536, abs=1e-3)  # fmt: skip
    assert "on III, at the end" in str(short.phases)
    # The card computes more; a chunk that is read needs the dropped ones too. The link copies all that the host has, where
    # else memory that only prefill needs keeps a part of it.
    assert short.times.parts["prefix"] > 0
    a_byte = roomy.times.parts["PCIe"] / (needed - roomy.layout.idle_bytes)
    assert short.times.parts["PCIe"] == pytest.approx(a_byte * short.layout.host_bytes, rel=0.01)
    assert short.times.prefill > roomy.times.prefill
    (choice,) = [c for c in short.decisions if c.what == "the oldest tokens"]
    assert choice.cost == short.layout.host_bytes < choice.instead_cost
    kept = planned(needed - 1, OffloadConfig.build(config, recompute="off"))
    assert kept.missing.setting == "memory.cpu"
    assert kept.suggestions[0].change == "--set scheduler.recompute=prefix"


def test_a_run_reports_its_decisions_and_its_bytes_by_purpose() -> None:
    model, ids = build("llama"), prompts(1, 400) % 190 + 2
    tiers: dict[str, Any] = {"mode": "exact", "page": 16, "sinks": 16, "window": 64, "chunk": 96}
    with offload.attach(model, recompute="hidden", **tiers) as runtime:
        assert not runtime.report().device_parts
        assert not runtime.report().decisions
        runtime.generate(ids, max_new_tokens=8, do_sample=False)
        report = runtime.report()
    kv, tokens, chunk = report.decisions
    assert kv.cost == sum(report.planned.values())
    # On a card that nobody knows steps are weighed by what they copy: inputs are half.
    assert (tokens.unit, tokens.cost) == (STEP_BYTES, report.planned_host)
    assert tokens.instead_cost == 2 * report.planned_host
    assert (chunk.chosen, chunk.why) == ("96 tokens", "prefill.chunk is set")
    parts = {part.purpose: part for part in report.device_parts}
    assert parts["weights"].planned == parts["weights"].measured == runtime.shape.weights
    assert parts["staging"].planned == parts["staging"].measured
    assert parts["passes and states"].measured is None
    assert report.unaccounted is None
    shown = str(report)
    for line in ("  decided KV: on the device and the host", "    pages "):
        assert line in shown
    assert shown.startswith(report.summary)
    assert "decided" not in report.summary
    json.dumps(report.to_dict())


def test_drafts_of_a_run_are_weighed_as_they_were_measured() -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, mode="verified", sinks=64, window=256, draft=16) as runtime:
        ids = prompts(1, 500)
        runtime.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)  # fmt: skip
        report = runtime.report()
    (drafts,) = [choice for choice in report.decisions if choice.what == "drafts"]
    assert drafts.source == "measured"
    assert drafts.cost == pytest.approx(report.ms_per_token, rel=0.2)
    assert drafts.instead_cost == pytest.approx(1000 * report.verify_s / report.verify_passes)
    (steps,) = [choice for choice in report.decisions if choice.what == "steps"]
    assert (steps.unit, steps.instead_cost) == (STEP_BYTES, report.planned_host)


def test_a_report_has_the_plans_price_of_a_token_beside_what_it_took() -> None:
    model = build("llama")
    ids = prompts(2, 400) % 190 + 2
    call: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    with offload.attach(model, mode="exact", page=16, sinks=16, window=64, chunk=96) as runtime:
        runtime.generate(ids, **call)
        unknown = runtime.report()
        assert (unknown.predicted_ms, unknown.predicted_parts) == (None, {})
        assert "predict" not in str(unknown)
        runtime.budgets._profile = PROFILES["h100"]
        cache = runtime.new_cache(max_tokens=500)
        runtime.generate(ids, cache=cache, **call)
        report, layout = runtime.report(), cache.layout
        assert layout is not None
        # A CPU captures nothing.
        want = runtime.budgets.predicted(
            layout, batch=2, prompt=400, output=20, exact=True, captured=False
        )
        assert want is not None
        assert report.predicted_ms == 1000 * want.token
        assert report.predicted_parts == {part: 1000 * s for part, s in want.parts.items()}
        assert report.predicted_limit == want.limit == "launching"
        ms = 1000 * (report.decode_s - report.capture_s) / 20
        assert report.prediction_error == pytest.approx(report.predicted_ms / ms - 1)
        assert report.to_dict()["prediction_error"] == report.prediction_error
        assert f"{report.predicted_ms:.1f} ms a token ({report.prediction_error:+.0%}), most of it launching" in str(report)  # fmt: skip
        # However much room there is, a token has the price of those that are there.
        for room in ({}, {"max_tokens": 100_000}):
            runtime.generate(ids, cache=runtime.new_cache(**room), **call)
            assert runtime.report().predicted_ms == pytest.approx(report.predicted_ms, rel=0.05)
        # Beams have no price.
        runtime.generate(ids, num_beams=2, **call)
        assert runtime.report().predicted_ms is None


def test_chosen_tokens_leave_the_device_where_its_budget_ends_and_copies_are_priced() -> None:
    settings: dict[str, Any] = {"mode": "fast", "sparsity": 0.5, "chunk": 1024}
    wide = machine(26, 200, "h100")
    steps = decided("steps", there=wide, **settings)
    assert steps.unit == MS
    assert steps.cost is not None
    assert steps.instead_cost is not None
    assert steps.cost < steps.instead_cost
    assert "scheduler.sparsity = 0.5" in steps.why
    found = {}
    for gib in (21, 23, 26):
        rows = decided("chosen tokens", there=machine(gib, 200, "h100"), **settings)
        assert rows.unit == BYTES
        assert rows.cost is not None
        assert rows.instead_cost is not None
        found[gib] = rows.cost / rows.instead_cost
    assert found[21] < found[23] < found[26]
    lacks = decided("tokens that the device", there=machine(21, 200, "h100"), **settings)
    assert lacks.chosen == "copied from the host"
    assert lacks.cost is not None
    assert lacks.instead_cost is not None
    # One says it of its own accord where the other way is cheaper.
    assert ("is cheaper" in lacks.why) == (lacks.instead_cost < lacks.cost)
