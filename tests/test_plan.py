"""A plan is what the runtime does: its bytes, its times, its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from offload.checkpoint import FileRow, FileShape
from offload.config import OffloadConfig
from offload.demand import (
    ALLOCATOR_SLACK,
    CUBLAS_WORKSPACE,
    DRIVER_GROWTH,
    NEAREST_BYTES,
    Held,
    activation_bytes,
    demand_of,
    parts_bytes,
    way_of,
)
from offload.errors import BudgetError, InputError
from offload.plan import BAND, FITS, NOT, SLOW, Machine, longest, machine_of, plan, shape_of
from offload.scheduler import cost
from offload.scheduler.layout import lay_out
from offload.scheduler.profiles import PROFILES, profile_of
from offload.scheduler.rungs import FIDELITY, RUNGS, Fidelity, fidelity_of

ROOT = Path(__file__).parents[1]
GIB = 2**30
CAP = int(22.5 * GIB)
ROW = FileRow(8, 128, 128, 2)
HEADS = ((32, 128),) * 32
SHAPE = FileShape(
    name="8B",
    model_type="llama",
    dtype="bfloat16",
    layers=32,
    rows=(ROW,) * 32,
    heads=HEADS,
    windows=(),
    hidden=4096,
    vocabulary=128256,
    max_positions=131072,
    parameters=8_030_261_248 - 128256 * 4096,
    read_bytes=2 * (8_030_261_248 - 128256 * 4096),
    weights=16_060_522_496,
    weights_are="read",
    workspace_per_token=activation_bytes(4096, 14336, 2) + parts_bytes(HEADS, (ROW,)),
)
FAST = OffloadConfig.build(chunk=2048)
COMPILED = OffloadConfig.build(FAST, compile=True)  # as those of `decode.py` are
H100 = PROFILES["h100"]


def record(name: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"benchmarks/{name}.json is not in this checkout")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {row["what"]: row for row in rows}


def as_it_ran(tokens: int, planned: dict[str, int]) -> Any:
    """The demand of a measured run, with what its device held."""
    held = Held(
        total=85_017_493_504,
        weights=planned["weights"],
        overhead=planned["overhead"] - ALLOCATOR_SLACK - DRIVER_GROWTH,
        on_card=True,
    )
    window: dict[str, Any] = {"window": 512} if tokens == 32768 else {}
    config = OffloadConfig.build(chunk=2048, **window)
    return demand_of(config, SHAPE, held, batch=1, tokens=tokens + 544, prompt=tokens)


@pytest.mark.parametrize("on_card", [True, False])
def test_what_draws_a_graph_on_a_card_is_planned(on_card: bool) -> None:
    held = Held(total=24 * 2**30, weights=2**34, overhead=0, on_card=on_card)
    demands = {
        index: demand_of(OffloadConfig.build(mode="fast", index=index), SHAPE, held, batch=1, tokens=32768, prompt=32000)
        for index in ("graph", "hnsw")
    }  # fmt: skip
    more = NEAREST_BYTES + CUBLAS_WORKSPACE if on_card else 0
    assert demands["graph"].workspace == demands["hnsw"].workspace + more
    assert demands["graph"].least_workspace == demands["hnsw"].least_workspace + more


@pytest.mark.parametrize("tokens", [8192, 32768, 131072, 262144])
def test_bytes_and_times_are_those_that_were_measured(tokens: int) -> None:
    row = record("decode")[f"ours {tokens}"]
    layout = lay_out(as_it_ran(tokens, row["planned"]), device_budget=CAP, host_budget=2**50)
    # How a little rest is spent on buffers has changed since; the runtime measures its workspace, and has counted that
    # of captured steps since.
    same = set(layout.device) - {"staging", "workspace"}
    assert {k: layout.device[k] for k in same} == {k: row["planned"][k] for k in same}
    assert layout.device["workspace"] == pytest.approx(
        row["planned"]["workspace"] + CUBLAS_WORKSPACE, rel=0.01
    )
    assert (None if layout.rung is None else layout.rung.name) == row["rung"]
    found = cost.times(
        layout, shape_of(SHAPE), H100, way_of(COMPILED, batch=1, prompt=tokens, output=544)
    )
    assert 1000 * found.token == pytest.approx(row["ms_per_token"], rel=0.03)
    if tokens != 262144:  # with a buffer that was too small
        assert found.prefill == pytest.approx(row["prefill_s"], rel=BAND["calibrated"])


@pytest.mark.parametrize("tokens", [32768, 131072, 262144])
def test_a_plan_from_a_file_is_near_what_profile_measures_and_never_under(tokens: int) -> None:
    row = record("cli_card")[f"profile fast {tokens}"]
    there, config = Machine(profile=H100, device=CAP, host=2**40), OffloadConfig()
    found = plan(config, SHAPE, there, context=tokens, output=64)
    assert found.layout is not None
    assert found.times is not None
    assert 1 <= found.layout.device_bytes / row["measured_bytes"] <= 1.03
    assert 1000 * found.times.token == pytest.approx(row["measured_ms"], rel=0.15)


def test_verified_and_exact_tokens_take_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = record("decode")["ours 131072"]["planned"]
    demand = as_it_ran(131072, planned)
    layout = lay_out(demand, device_budget=CAP, host_budget=2**50)
    shape = shape_of(SHAPE)
    config = OffloadConfig.build(mode="verified", compile=True)
    way = way_of(config, batch=1, prompt=131072, output=1024)
    rows = record("verified")
    assert pytest.approx(rows["agreement q.gguf"]["share"], abs=5e-4) == cost.AGREEMENT[4]
    ran = rows["verified 131072"]
    # In those 1,024 tokens more drafts were rejected than in the mean.
    rejected = ran["new_tokens"] - ran["accepted"]
    monkeypatch.setitem(cost.AGREEMENT, 4, ran["accepted"] / (ran["accepted"] + rejected))
    found = cost.times(layout, shape, H100, way)
    assert 1000 * found.token == pytest.approx(ran["ms_per_token"], rel=0.1)
    streamed = lay_out(replace(demand, rungs=()), device_budget=CAP, host_budget=2**50)
    found = cost.times(streamed, shape, H100, replace(way, mode="exact"))
    assert found.limit == "PCIe"
    measured = record("generate")["ours exact"]["ms_per_token"]
    assert 1000 * found.token == pytest.approx(measured, rel=BAND["calibrated"])


def machine(gib: float = 23, host: float = 48, card: str = "rtx4090") -> Machine:
    return Machine(profile=PROFILES[card], device=int(gib * GIB), host=int(host * GIB))


@settings(deadline=None, max_examples=25)
@given(
    gib=st.floats(17, 60),
    host=st.floats(1, 200),
    mode=st.sampled_from(["fast", "verified", "exact"]),
    batch=st.integers(1, 3),
)
def test_the_longest_context_fits_and_a_token_more_does_not(
    gib: float, host: float, mode: str, batch: int
) -> None:
    config, there = OffloadConfig.build(mode=mode), machine(gib, host)
    tokens = longest(config, SHAPE, there, output=16, batch=batch)
    more = plan(config, SHAPE, there, context=max(64, tokens + 1), output=16, batch=batch)
    assert more.verdict == NOT
    if tokens > 64:
        found = plan(config, SHAPE, there, context=tokens, output=16, batch=batch)
        assert found.verdict in (FITS, SLOW)
        assert found.layout is not None
        assert found.layout.device_bytes <= there.device
        assert found.layout.host_bytes <= there.host


def test_several_sequences_are_not_drafted_and_each_setting_counts() -> None:
    """What the runtime does with a setting, the times know of."""

    def token(batch: int = 1, **settings: Any) -> float:
        found = plan(
            OffloadConfig.build(**settings), SHAPE, machine(23, 200), context=131_072, batch=batch
        )
        assert found.times is not None
        return found.times.token

    fast, verified, exact = (token(mode=mode) for mode in ("fast", "verified", "exact"))
    assert fast < verified < 0.2 * exact
    assert token(2, mode="verified") > 10 * fast
    assert token(mode="fast", retrieved=4096) > 1.2 * fast
    assert token(mode="verified", draft=1) > 3 * verified
    assert token(mode="verified", look_ahead=False) > verified


def test_weights_that_are_not_read_cost_no_time() -> None:
    """Of a mixture a token meets some experts; packed weights are read as they lie there."""
    few = replace(
        SHAPE, parameters=SHAPE.parameters / 8, read_bytes=SHAPE.read_bytes / 8, experts_met=1 / 8
    )
    packed = replace(SHAPE, read_bytes=SHAPE.read_bytes / 4, quantised="bitsandbytes")
    times = []
    for shape in (SHAPE, packed, few):
        found = plan(FAST, shape, machine(), context=16_384)
        assert found.times is not None
        times.append(found.times)
    assert times[0].token > times[1].token > times[2].token
    assert times[0].prefill == pytest.approx(times[1].prefill, rel=0.05)
    assert [any("experts" in note for note in plan(FAST, s, machine(), context=8192).notes) for s in (SHAPE, few)] == [False, True]  # fmt: skip
    assert any("bitsandbytes" in note for note in plan(FAST, packed, machine(), context=8192).notes)


def test_what_is_pasted_gives_the_same_plan() -> None:
    config = OffloadConfig.build(mode="verified", rung="4k4v", sinks=128, compile=True)
    found = plan(config, SHAPE, machine(), context=131_072)
    pasted = OffloadConfig.from_toml(found.toml)
    assert pasted.mode == "verified"
    assert machine_of(PROFILES["rtx4090"], pasted) == machine()
    assert (pasted.replica.rung, pasted.cache.sinks, pasted.decode.compile) == ("4k4v", 128, True)
    again = plan(pasted, SHAPE, machine(), context=131_072)
    assert again.layout == found.layout


def test_slow_says_what_limits() -> None:
    found = plan(OffloadConfig.build(mode="exact"), SHAPE, machine(), context=131_072)
    assert found.verdict == SLOW
    assert found.times is not None
    assert found.times.limit == "PCIe"
    assert any("data sheet" in note for note in found.notes)
    with pytest.raises(InputError, match="no room"):
        plan(FAST, SHAPE, machine(), context=512, output=512)


def test_cards_are_known_by_the_names_that_people_and_drivers_give_them() -> None:
    for name in ("rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090"):
        assert profile_of(name) is PROFILES["rtx4090"]
    assert profile_of("NVIDIA H100 80GB HBM3") is PROFILES["h100"]
    assert profile_of("NVIDIA GeForce RTX 4060 Ti") is PROFILES["rtx4060ti-16gb"]
    assert profile_of("NVIDIA A100-SXM4-80GB") is PROFILES["a100"]
    for other in ("RTX 4090 Laptop", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"):
        with pytest.raises(InputError, match="rtx3090"):
            profile_of(other)
    with pytest.raises(BudgetError, match="no more"):
        machine_of(PROFILES["rtx3090"], OffloadConfig.build(gpu_memory="100GiB"))


def test_more_of_anything_is_never_slower_by_much() -> None:
    """A better card, a shorter context: the model has no cliffs the wrong way."""
    last = 0.0
    for context in (16_384, 65_536, 131_072, 262_144):
        found = plan(FAST, SHAPE, machine(), context=context)
        assert found.times is not None
        assert found.times.token > 0.95 * last
        last = found.times.token
    times = []
    for card in ("rtx3090", "rtx4090", "h100"):
        found = plan(FAST, SHAPE, machine(card=card), context=131_072)
        assert found.times is not None
        times.append(found.times.token)
    assert times == sorted(times, reverse=True)


def test_the_fidelity_of_a_rung_is_what_was_measured_of_the_worse_model() -> None:
    file = ROOT / "benchmarks" / "fidelity.json"
    if not file.is_file():
        pytest.skip("the record is not in this checkout")
    rows = {row["what"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    for name, said in FIDELITY.items():
        tokens = next(rung.tokens for rung in RUNGS if rung.name == name)
        found = [rows[f"{model}: {name}:{tokens}"] for model in ("smollm2", "q.gguf")]
        assert said.kl == pytest.approx(max(row["kl_mean"] for row in found), rel=0.03)
        assert said.same_top == pytest.approx(min(row["same_top"] for row in found), abs=1e-6)
    four = RUNGS[0]
    assert fidelity_of(four, "auto") == fidelity_of(four, 128) == FIDELITY["4k4v"]
    assert fidelity_of(four, 16) is None  # fewer exact tokens than were measured
    assert fidelity_of(RUNGS[-1], "auto") is None
    assert fidelity_of(None, "auto") == Fidelity(0.0, 1.0)
