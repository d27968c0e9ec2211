"""A simulated run moves the bytes that were planned, and policies differ only where tokens do not fit."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, InputError
from offload.scheduler import phases
from offload.scheduler.cost import Heads, Shape
from offload.scheduler.profiles import PROFILES
from offload.scheduler.simulate import (
    Phased,
    Policy,
    Request,
    RequestSwap,
    Resident,
    Setting,
    SparseWindow,
    StaticSplit,
    WholeLayer,
    best,
    simulate,
)

GIB, MIB = 2**30, 2**20
SHAPE = Shape(
    layers=(Heads(16, 16, 64),) * 4, hidden=1024, itemsize=2, parameters=5e7, weights=100 * MIB
)
SETTING = Setting(
    shape=SHAPE, profile=PROFILES["h100"], device=108 * MIB, host=GIB, workspace=MIB, staging=MIB
)
WORKLOAD = [Request(64, 40)] * 8  # 12.9 MiB of K and V at the end, room for 5 beside buffers
ROOMY = replace(SETTING, device=GIB)


def test_policies_agree_where_everything_fits() -> None:
    policies: list[Policy] = [
        Resident(),
        StaticSplit(ROOMY, 100),
        RequestSwap(ROOMY),
        Phased(phases.plan(ROOMY.ask(WORKLOAD), ROOMY.profile)),
        SparseWindow(ROOMY, sparsity=0.0),
    ]
    results = [simulate(WORKLOAD, ROOMY, policy) for policy in policies]
    for result in results:
        assert result.seconds == pytest.approx(results[0].seconds)
        assert result.device_peak == results[0].device_peak
        assert (result.bytes_in, result.bytes_out, result.host_peak) == (0, 0, 0)
        assert (result.tokens, result.steps) == (320, 40)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.integers(1, 80),
    output=st.integers(1, 40),
    batch=st.integers(1, 8),
    device=st.integers(112, 200),
    host=st.integers(0, 64),
)
def test_what_is_moved_is_what_was_planned(
    prompt: int, output: int, batch: int, device: int, host: int
) -> None:
    setting = replace(SETTING, device=device * MIB, host=host * MIB)
    workload = [Request(prompt, output)] * batch
    try:
        plan = phases.plan(setting.ask(workload), setting.profile)
    except BudgetError:
        return
    result = simulate(workload, setting, Phased(plan))
    lengths = range(prompt, prompt + output)
    assert result.bytes_in == pytest.approx(sum(plan.step(n).bytes_in for n in lengths))
    end = plan.placement(batch * (prompt + output - 1))
    assert result.device_peak == plan.device_bytes(end)
    assert result.host_peak == max(plan.host_bytes(plan.placement(batch * n)) for n in lengths)
    assert result.bytes_out == pytest.approx(result.bytes_freed)
    # Beside what leaves the device, which a plan does not count. Of up to 16 steps each is priced, of more some.
    assert result.seconds == pytest.approx(plan.seconds, rel=0.05)
    assert sum(result.phases.values()) == result.seconds


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=8))
def test_every_policy_makes_every_token_within_the_budgets(
    lengths: list[tuple[int, int]],
) -> None:
    workload = [Request(*each) for each in lengths]
    policies: list[Policy] = [
        WholeLayer(SETTING),
        StaticSplit(SETTING, 0),
        RequestSwap(SETTING),
        Phased(phases.plan(SETTING.ask(workload), SETTING.profile)),
        SparseWindow(SETTING),
    ]
    for policy in policies:
        result = simulate(workload, SETTING, policy)
        assert result.tokens == sum(output for _, output in lengths)
        assert result.device_peak <= SETTING.device
        assert result.host_peak <= SETTING.host
        assert result.seconds > 0


def test_what_was_swapped_out_comes_back() -> None:
    result = simulate(WORKLOAD, SETTING, RequestSwap(SETTING))
    assert result.steps > 40
    assert result.bytes_in == result.bytes_out == result.bytes_freed > 0


def test_whole_layers_come_and_go_in_every_step() -> None:
    result = simulate(WORKLOAD, SETTING, WholeLayer(SETTING))
    every = sum(8 * n * SHAPE.kv_bytes for n in range(64, 104))
    assert result.bytes_in == every
    # Back too, and the prompts before.
    assert result.bytes_out == every - 8 * SHAPE.kv_bytes + 8 * 64 * SHAPE.kv_bytes
    assert result.host_peak == 8 * 103 * SHAPE.kv_bytes


def test_a_larger_static_share_is_faster_until_it_does_not_fit() -> None:
    results = [simulate(WORKLOAD, SETTING, StaticSplit(SETTING, share)) for share in (0, 5, 20)]
    assert results[0].seconds > results[1].seconds > results[2].seconds
    with pytest.raises(BudgetError) as refused:
        simulate(WORKLOAD, SETTING, StaticSplit(SETTING, 90))
    assert refused.value.requested > refused.value.available == SETTING.device
    swept = best(WORKLOAD, SETTING, [StaticSplit(SETTING, share) for share in (0, 5, 20, 90)])
    assert swept == results[2]
    with pytest.raises(BudgetError):
        best(WORKLOAD, SETTING, [StaticSplit(SETTING, 90)])


def test_phases_are_no_slower_than_the_best_static_split() -> None:
    static = best(WORKLOAD, SETTING, [StaticSplit(SETTING, share) for share in range(101)])
    plan = phases.plan(SETTING.ask(WORKLOAD), SETTING.profile)
    assert simulate(WORKLOAD, SETTING, Phased(plan)).seconds < static.seconds


def test_the_more_is_used_again_the_less_is_fetched() -> None:
    fetched = [
        simulate(WORKLOAD, SETTING, SparseWindow(SETTING, reuse=reuse)).bytes_in
        for reuse in (0.0, 0.5, 1.0)
    ]
    assert fetched[0] > fetched[1] > fetched[2]


def test_nothing_is_read_again_before_it_is_there() -> None:
    result = simulate(
        WORKLOAD, SETTING, Phased(phases.plan(SETTING.ask(WORKLOAD), SETTING.profile))
    )
    assert set(result.phases) <= {"prefill", "I", "II", "III"}


def test_bad_workloads_are_refused() -> None:
    with pytest.raises(InputError):
        simulate([], SETTING, Resident())
    for prompt, output in ((0, 1), (1, 0)):
        with pytest.raises(InputError):
            Request(prompt, output)
    for values in ({"sparsity": 1.0}, {"reuse": -0.1}, {"share": float("nan")}):
        with pytest.raises(InputError):
            SparseWindow(SETTING, **values)  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        simulate([Request(10**6, 1)], SETTING, RequestSwap(SETTING))


def test_the_tool_prints_and_says_that_nothing_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = Path(__file__).parents[2] / "tools" / "simulate.py"
    main = runpy.run_path(str(file))["main"]
    few = ["--gpu", "h100", "--batch", "4", "--output", "8", "--gpu-memory", "14GiB"]
    assert main(few) == 0
    assert "simulated, not measured" in capsys.readouterr().out
    assert main([*few, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["h100"]
    assert record["basis"] == "simulated"
    rows = record["policies"]
    over = rows["ours, sparse"]["tokens_per_s"] / rows["static split"]["tokens_per_s"]
    assert record["predicted_ratios"]["alisa_vs_static_split"] == pytest.approx(over)
    assert main(["--gpu", "abacus"]) == 1
