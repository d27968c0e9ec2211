"""Mode fast: with every token selected it is exact, so its tokens must be those of the stock cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cards import DEVICES
from families import FAMILIES, PAD, left_padded, prompts

import offload
from offload.errors import BudgetError, ConfigError
from offload.scheduler.layout import lay_out

N = 700
CALL: dict[str, Any] = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None}
# Sinks, a window of four blocks, and of the other tokens all are selected.
ALL: dict[str, Any] = {
    "mode": "fast",
    "sinks": 64,
    "window": 256,
    "rung": "4k4v",
    "retrieved": 1024,
}
STEPS = pytest.mark.parametrize(
    "steps",
    [
        {"capture": False},
        pytest.param({"compile": False}, marks=pytest.mark.gpu),
        pytest.param({"compile": True}, marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
    ids=["eager", "captured", "compiled"],
)
ON = pytest.mark.parametrize("device", DEVICES)


def build(name: str, device: str) -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model.to(device)


@ON
@STEPS
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_with_every_token_selected_the_tokens_are_the_stock_caches(
    name: str, padded: bool, steps: dict[str, Any], device: str
) -> None:
    if device == "cpu" and steps != {"capture": False}:
        pytest.skip("graphs are captured on a card only")
    model = build(name, device)
    ids, mask = left_padded(2, N, pads=(0, 130))
    inputs: dict[str, Any] = {"attention_mask": mask.to(device)} if padded else {}
    want = model.generate(ids.to(device), **inputs, **CALL)
    with offload.attach(model, **ALL, **steps) as runtime:
        got = runtime.generate(ids.to(device), **inputs, **CALL)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.rung == "4k4v"
    assert report.tokens_on_host > 400
    assert report.tail_mass < 1e-6
    has_windows = name in ("gemma2", "gpt_oss")
    captured = device == "cuda" and steps.get("capture", True) and not has_windows
    # The last token of the prompt and the first that finds tokens on the host run as they are.
    assert report.replayed_steps == (CALL["max_new_tokens"] - 1 if captured else 0)
    assert any("eagerly" in note for note in report.notes) == (
        device == "cuda" and steps.get("capture", True) and has_windows
    )


@ON
def test_what_fits_the_device_stays_there_and_is_exact(device: str) -> None:
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    want = model.generate(ids, **CALL)
    with offload.attach(model, mode="fast", compile=False) as runtime:
        got = runtime.generate(ids, **CALL)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.rung is None
    assert report.tokens_on_host == 0


@ON
def test_a_conversation_goes_on_from_a_warm_cache(device: str) -> None:
    model = build("llama", device)
    call = CALL | {"max_new_tokens": 40}
    with offload.attach(model, **ALL, compile=False) as runtime:
        cache = runtime.new_cache()
        ids = prompts(2, N).to(device)
        for turn in range(4):
            want = model.generate(ids, **call)
            got = runtime.generate(ids, past_key_values=cache, **call)
            assert torch.equal(got, want)
            cut = (0, 100, 30, 0)[turn]  # the user edits the end of what was said
            more = prompts(2, 90, seed=turn + 5).to(device)
            ids = torch.cat([got[:, : got.shape[1] - cut], more], dim=1)
        assert runtime.report().reused_tokens > N


@ON
def test_several_answers_and_beams_are_the_stock_caches(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    sampled: dict[str, Any] = {"max_new_tokens": 80, "do_sample": True, "num_return_sequences": 3}
    beams: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, "num_beams": 3}
    for call in (sampled, beams):
        torch.manual_seed(7)
        want = model.generate(ids, eos_token_id=None, **call)
        with offload.attach(model, **ALL, compile=False) as runtime:
            torch.manual_seed(7)
            assert torch.equal(runtime.generate(ids, eos_token_id=None, **call), want)
            cache = runtime.new_cache()
            torch.manual_seed(7)
            if call is sampled:
                continue
            # A cache that has a replica streams for beams.
            other = runtime.new_cache()
            runtime.generate(ids, past_key_values=other, max_new_tokens=1, do_sample=False)
            with pytest.raises(offload.CacheError, match="number of sequences"):
                runtime.generate(ids, past_key_values=other, eos_token_id=None, **call)
            got = runtime.generate(ids, past_key_values=cache, eos_token_id=None, **call)
            assert torch.equal(got, want)


@ON
def test_padding_that_is_not_all_on_the_left_is_streamed_exactly(device: str) -> None:
    model = build("llama", device)
    ids, mask = left_padded(2, N, pads=(0, 130))
    mask[:, 300:320] = 0
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    want = model.generate(**inputs, **CALL)
    few = ALL | {"retrieved": 16}
    with offload.attach(model, **few, compile=False) as runtime:
        assert torch.equal(runtime.generate(**(inputs | CALL)), want)


@ON
@pytest.mark.parametrize("bits", ["4k4v", "3k3v", "2k2v"])
def test_a_replica_comes_close_and_says_how_much_it_answered_for(bits: str, device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    call = CALL | {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **call).logits[0]
    errors = {}
    for retrieved in (0, 16, 1024):
        settings = ALL | {"rung": bits, "retrieved": retrieved}
        with offload.attach(model, **settings, compile=False) as runtime:
            got = runtime.generate(ids, **call).logits[0]
            report = runtime.report()
        errors[retrieved] = float((got - want).norm() / want.norm())
        assert 0.0 <= report.tail_mass < 1.0
        assert (report.tail_mass > 0.2) == (retrieved == 0)
        assert report.skipped_mass <= 0.001
    assert errors[1024] < 1e-4
    assert errors[0] < {"4k4v": 0.1, "3k3v": 0.3, "2k2v": 0.6}[bits]
    assert errors[1024] < errors[16] < errors[0]


def test_pages_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="64"):
        offload.attach(build("llama", "cpu"), mode="fast", page=32)


@ON
def test_a_rung_that_does_not_fit_is_an_error_and_auto_takes_one_that_does(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, 3000).to(device)
    call = CALL | {"max_new_tokens": 4}
    base: dict[str, Any] = {"mode": "fast", "compile": False, "chunk": 128}
    with offload.attach(model, **base, rung="4k4v") as runtime:
        demand = runtime.budgets.demand(batch=1, tokens=3004, prompt=3000)
        with pytest.raises(BudgetError) as caught:
            lay_out(demand, device_budget=0, host_budget=2**50)
        least = caught.value.requested
        replica = demand.rungs[0].token_bytes * 2600
        budget = least - replica // 8
    with (
        pytest.raises(BudgetError, match="4k4v") as caught,
        offload.attach(model, **base, rung="4k4v", gpu_memory=budget) as runtime,
    ):
        runtime.generate(ids, **call)
    assert caught.value.setting == "memory.gpu"
    with offload.attach(model, **base, gpu_memory=budget) as runtime:
        runtime.generate(ids, **call)
        assert runtime.report().rung in ("3k3v", "2k2v")
