"""Mode fast: with every token selected it is exact, so its tokens must be those of the stock cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cards import DEVICES
from families import FAMILIES, PAD, left_padded, prompts
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import offload
from offload.cache import stock_layers
from offload.decode import _hooked, decode
from offload.errors import BudgetError, ConfigError, InputError
from offload.scheduler.layout import lay_out
from offload.tiers import path
from offload.tiers.transfer import Streams

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
# Of a replica alone: how far its logits are from the stock cache's, at most, and its share of all weights, at least.
# Random weights are harder than real ones. Mean keys make little of a cluster in which one token weighs nearly all.
ALONE = {
    "4k4v": (0.1, 0.2),
    "3k3v": (0.3, 0.2),
    "2k2v": (0.6, 0.2),
    "2k+clusters": (1.0, 0.2),
    "clusters": (1.0, 0.06),
}
# GQA, a bias on the keys, a softcap, sink logits, fused projections, learned positions, experts.
CAPTURED = ["llama", "qwen2", "gemma2", "gpt_oss", "phi3", "opt", "mixtral"]


def build(name: str, device: str) -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model.to(device)


@ON
@STEPS
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_with_every_token_selected_the_tokens_are_the_stock_caches(
    name: str, padded: bool, steps: dict[str, Any], device: str
) -> None:
    if device == "cpu" and steps != {"capture": False}:
        pytest.skip("graphs are captured on a card only")
    if steps.get("compile") and name not in ("llama", "qwen2"):
        pytest.skip("compiling takes long")
    if device == "cuda" and name not in CAPTURED:
        pytest.skip("the kernels have met others of the kind")
    if name == "mistral_sliding":
        pytest.skip("every layer of it has a window")
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
    kinds = {type(layer) for layer in stock_layers(model.config)}
    has_windows = kinds != {DynamicLayer}
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
@pytest.mark.parametrize("rung", ALONE)
def test_a_replica_comes_close_and_says_how_much_it_answered_for(rung: str, device: str) -> None:
    farthest, least_mass = ALONE[rung]
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    call = CALL | {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **call).logits[0]
    errors = {}
    for retrieved in (0, 16, 1024):
        settings = ALL | {"rung": rung, "retrieved": retrieved}
        with offload.attach(model, **settings, compile=False) as runtime:
            got = runtime.generate(ids, **call).logits[0]
            report = runtime.report()
        errors[retrieved] = float((got - want).norm() / want.norm())
        assert 0.0 <= report.tail_mass < 1.0
        assert (report.tail_mass > least_mass) == (retrieved == 0)
        assert report.skipped_mass <= 0.001
    assert errors[1024] < 1e-4
    assert errors[0] < farthest
    assert errors[1024] < errors[16] < errors[0]


@ON
def test_whole_layers_keep_everything_on_the_device(device: str) -> None:
    model = build("llama", device)
    ids, mask = left_padded(2, N, pads=(0, 130))
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    want = model.generate(**(inputs | CALL))
    layers = model.config.num_hidden_layers
    with offload.attach(model, **ALL, whole_layers=1, compile=False) as runtime:
        got = runtime.generate(**(inputs | CALL))
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.whole_layers == 1
    assert report.tokens_on_host > 400
    with offload.attach(model, **(ALL | {"retrieved": 16}), whole_layers=layers) as runtime:
        assert torch.equal(runtime.generate(**(inputs | CALL)), want)
        assert runtime.report().selected_bytes == 0
    with pytest.raises(ConfigError, match="more than the layers") as caught:
        offload.attach(model, **ALL, whole_layers=layers + 1)
    assert (caught.value.asked, caught.value.there) == (layers + 1, layers)


def test_what_is_streamed_although_there_is_a_replica_is_said() -> None:
    model = build("llama", "cpu")
    ids, mask = left_padded(1, 900, pads=(0,))
    few: dict[str, Any] = ALL | {"retrieved": 16, "window": 128}
    with offload.attach(model, **few) as runtime:
        want = model.generate(ids, **CALL)
        cache = runtime.new_cache(max_tokens=500)
        assert torch.equal(runtime.generate(ids, past_key_values=cache, **CALL), want)
        report = runtime.report()
    assert any("there is room for" in note for note in report.notes)
    assert (report.tail_mass, report.selected_bytes) == (0.0, 0)
    mask[:, 300:320] = 0
    with offload.attach(model, **few) as runtime:
        runtime.generate(ids, attention_mask=mask, **CALL)
        assert any("not all on the left" in note for note in runtime.report().notes)


def test_shares_in_the_report_are_those_of_the_run() -> None:
    model = build("llama", "cpu")
    ids = prompts(1, 900)
    call = CALL | {"max_new_tokens": 20}
    with offload.attach(model, **(ALL | {"retrieved": 16})) as runtime:
        cache = runtime.new_cache()
        model.generate(ids, past_key_values=cache, **(CALL | {"max_new_tokens": 100}))
        longer = torch.cat([ids, prompts(1, 200, seed=3)], dim=1)
        runtime.generate(longer, past_key_values=cache, **call)
        assert 0 < runtime.report().tail_mass < 1
        runtime.generate(ids, num_beams=2, **call)
        report = runtime.report()
        assert (report.tail_mass, report.selected_bytes) == (0.0, 0)


def test_the_expected_error_grows_with_what_the_replica_leaves_out() -> None:
    model = build("llama", "cpu")
    ids = prompts(2, N)
    few = ALL | {"retrieved": 16, "window": 128}
    found = {}
    for rung in ("4k4v", "3k3v", "2k2v"):
        with offload.attach(model, **(few | {"rung": rung})) as runtime:
            cache = runtime.new_cache(N + 200)
            got = runtime.generate(ids, past_key_values=cache, **(CALL | {"max_new_tokens": 8}))
            report = runtime.report()
            assert report.error_estimate is not None
            found[rung] = report.error_estimate
            assert f"{report.error_estimate:.2%}" in str(report)
            # Of fewer tokens on the host after a crop it is another, the same as in a new cache.
            cache.crop(300 - cache.get_seq_length())
            short = got[:, :330]
            runtime.generate(short, past_key_values=cache, **(CALL | {"max_new_tokens": 8}))
            cropped = runtime.report().error_estimate
            assert cropped != found[rung]
            runtime.generate(short, **(CALL | {"max_new_tokens": 8}))
            again = runtime.report()
            assert cropped is not None
            assert again.error_estimate is not None
            assert again.tokens_on_host > 0
            runtime.generate(ids[:1], num_beams=2, **(CALL | {"max_new_tokens": 2}))
            assert runtime.report().error_estimate == 0.0  # streamed
        assert 0.5 < cropped / again.error_estimate < 2
    assert 0 < found["4k4v"] < found["3k3v"] < found["2k2v"] < 1
    with offload.attach(model, **(ALL | {"rung": "2k2v"})) as runtime:
        runtime.generate(ids, **(CALL | {"max_new_tokens": 4}))
        report = runtime.report()
    assert report.tokens_on_host > 0
    assert report.error_estimate == 0.0  # every token is selected
    with offload.attach(model, **(few | {"rung": "2k+clusters"})) as runtime:
        runtime.generate(ids, **(CALL | {"max_new_tokens": 4}))
        report = runtime.report()
    assert report.error_estimate is None
    assert "expected error unknown" in str(report)


def test_an_unknown_length_takes_the_rung_with_the_most_room() -> None:
    model = build("llama", "cpu")
    with offload.attach(model, **(ALL | {"rung": "auto", "retrieved": 64})) as runtime:
        demand = runtime.budgets.demand(batch=1, tokens=None)
        one = demand.rungs[0].token_bytes + demand.scratch_token_bytes
        with pytest.raises(BudgetError) as caught:
            lay_out(demand, device_budget=0, host_budget=2**50)
        least = caught.value.requested
        roomy = lay_out(demand, device_budget=least + 20 * one * demand.longest, host_budget=2**50)
        tight = lay_out(demand, device_budget=least + one * demand.longest // 4, host_budget=2**50)
    assert roomy.rungs[0].name == "4k4v"
    assert roomy.replica_tokens == demand.longest
    assert tight.rungs[0].name == "2k+clusters"
    assert tight.replica_tokens < demand.longest


def test_layers_are_compiled_once_enough_tokens_are_asked_for() -> None:
    model = build("llama", "cpu")
    with offload.attach(model, mode="fast") as runtime:
        assert [runtime._wants_compiled(n) for n in (4000, 95, 1, 1)] == [False, False, True, True]
    for asked in (True, False):
        with offload.attach(model, mode="fast", compile=asked) as runtime:
            assert runtime._wants_compiled(1) is asked
    with pytest.raises(ConfigError, match="auto"):
        offload.attach(model, compile="sometimes")


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


def test_the_last_rung_is_taken_for_drafts_where_no_other_fits_and_its_layers_are_lifted() -> None:
    # Not on a card: what else a card holds moves by more than such a small model's rungs lie apart.
    model = build("llama", "cpu")
    ids = prompts(1, 3000)
    call = CALL | {"max_new_tokens": 4}
    want = model.generate(ids, **call)
    base: dict[str, Any] = {"compile": False, "chunk": 128, "retrieved": 4096, "row_cache": 0}
    base["staging"] = 64 * 1024  # spends nothing of what lifts layers
    drafts: dict[str, Any] = {"mode": "verified", "draft": 2}
    with offload.attach(model, **base, **drafts) as runtime:
        demand = runtime.budgets.demand(batch=1, tokens=3004, prompt=3000)
    least = {}
    for price in demand.rungs:
        alone = replace(demand, rungs=(price,), streams=False)
        with pytest.raises(BudgetError) as caught:
            lay_out(alone, device_budget=0, host_budget=2**50)
        least[price.rung.name] = caught.value.requested
    more = least["2k+clusters"] - least["clusters"]
    assert more > 0
    for lifted, quarters in ((0, 1), (1, 3)):
        budget = least["clusters"] + more * quarters // 4
        with offload.attach(model, **base, **drafts, gpu_memory=budget) as runtime:
            assert torch.equal(runtime.generate(ids, **call), want)
            report = runtime.report()
        assert (report.rung, report.lifted_layers) == ("clusters", lifted)
        assert report.accepted_tokens == report.drafted_tokens  # every token is selected
    # Where nobody verifies, every token is streamed instead.
    with offload.attach(model, **base, gpu_memory=least["clusters"] + more // 2) as runtime:
        assert torch.equal(runtime.generate(ids, **call), want)
        assert runtime.report().rung is None


class Heard(BaseStreamer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.heard.append("end")


@ON
@pytest.mark.parametrize(
    "call",
    [
        {"max_new_tokens": 20, "do_sample": False},
        {"max_new_tokens": 1, "do_sample": False, "repetition_penalty": 1.2},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 20},
        {"max_new_tokens": 20, "do_sample": False, "ends": (5, 9)},
        {"max_new_tokens": 20, "do_sample": True, "ends": (5, 9), "top_k": 2},
        {"max_new_tokens": 20, "do_sample": False, "ends": (19, 3)},
    ],
    ids=lambda call: "-".join(f"{key}{value}" for key, value in call.items()),
)
def test_our_loop_does_what_the_stock_loop_does(call: dict[str, Any], device: str) -> None:
    model = build("llama", device)
    ids, mask = left_padded(2, 200)
    ids, mask = ids.to(device), mask.to(device)
    call = {"attention_mask": mask, "eos_token_id": None, **call}
    ends = call.pop("ends", None)
    if ends is not None:  # the tokens that each row would give there end the run
        free = model.generate(ids, **call)
        call["eos_token_id"] = [int(free[row, 200 + at]) for row, at in enumerate(ends)]
    torch.manual_seed(3)
    want = model.generate(ids, **call)
    with offload.attach(model, mode="fast", capture=False) as runtime:
        cache = runtime.new_cache()
        torch.manual_seed(3)
        got = model.generate(ids, past_key_values=cache, custom_generate=decode, **call)
        assert torch.equal(got, want)
        if device == "cpu":
            after = torch.get_rng_state()
            torch.manual_seed(3)
            model.generate(ids, **call)
            assert torch.equal(torch.get_rng_state(), after)  # the next call samples alike too
        assert cache.get_seq_length() == got.shape[1] - 1
        stock, ours = Heard(), Heard()
        alone = call | {"attention_mask": mask[:1]}
        torch.manual_seed(4)
        model.generate(ids[:1], streamer=stock, past_key_values=runtime.new_cache(), **alone)
        torch.manual_seed(4)
        loop = partial(decode, streamer=ours)
        model.generate(
            ids[:1],
            streamer=ours,
            past_key_values=runtime.new_cache(),
            custom_generate=loop,
            **alone,
        )
    assert ours.heard == stock.heard


@ON
@pytest.mark.parametrize("waits", [False, True])
def test_who_can_tell_sees_no_step_behind_the_last_one(waits: bool, device: str) -> None:
    """Processors and criteria of a user's: they may count, draw, or refuse what lies behind the end."""
    model = build("llama", device)
    ids = prompts(1, 200).to(device)
    call: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True}
    torch.manual_seed(3)
    end = int(model.generate(ids, eos_token_id=None, **call)[0, 212])
    call["eos_token_id"] = end

    class Noisy(LogitsProcessor):
        seen = 0

        def __call__(self, ids: Any, scores: Any) -> Any:
            Noisy.seen += 1
            assert int(ids[0, -1]) != end or ids.shape[1] == 200
            return scores + torch.rand_like(scores)

    def allowed(batch: int, so_far: Any) -> list[int]:
        return [] if int(so_far[-1]) == end and len(so_far) > 200 else list(range(1, 128))

    for more in ({}, {"logits_processor": [Noisy()]}, {"prefix_allowed_tokens_fn": allowed}):
        after = []
        for ours in (False, True):
            Noisy.seen = 0
            torch.manual_seed(3)
            with offload.attach(model, mode="fast", capture=False) as runtime:
                own: dict[str, Any] = {}
                if ours:
                    loop = partial(decode, waits=waits)
                    own = {"past_key_values": runtime.new_cache(), "custom_generate": loop}
                made = [model.generate(ids, **call, **more, **own)]
                own.pop("past_key_values", None)
                made.append(
                    model.generate(ids, **call, **more)
                )  # with the random numbers that are left
            after.append((made, Noisy.seen))
        (want, calls), (got, our_calls) = after
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert our_calls == calls


@ON
def test_keys_that_are_not_finite_are_named(device: str) -> None:
    model = build("llama", device)

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] < 300:
            return output
        output = output.clone()
        output[:, 150] = torch.inf
        return output

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(spoil)
    with (
        offload.attach(model, **ALL, compile=False) as runtime,
        pytest.raises(InputError, match="layer 1") as caught,
    ):
        runtime.generate(prompts(1, N).to(device), **CALL)
    hook.remove()
    assert caught.value.asked == "tokens 128 to 191"


@ON
def test_heads_without_a_kernel_are_computed_by_the_reference(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path, "LARGEST_HEAD", 8)
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    want = model.generate(ids, **CALL)
    with offload.attach(model, **ALL) as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)
        notes = runtime.report().notes
    assert device == "cpu" or any("no kernel" in note for note in notes)


@ON
@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_result_keeps_of_each_step_is_that_steps(hidden: bool, device: str) -> None:
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    call = CALL | {"max_new_tokens": 90, "return_dict_in_generate": True, "output_logits": True}
    call["output_hidden_states"] = hidden
    want = model.generate(ids, **call)
    with offload.attach(model, **ALL, compile=False) as runtime:
        got = runtime.generate(ids, **call)
        report = runtime.report()
    assert torch.equal(got.sequences, want.sequences)
    for ours, stock in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    if hidden:
        for step in (1, 40, 89):
            for ours, stock in zip(got.hidden_states[step], want.hidden_states[step], strict=True):
                torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    assert (report.replayed_steps > 80) == (device == "cuda" and not hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["4k4v", "2k+clusters"])
@pytest.mark.parametrize(
    "steps",
    [{"capture": False}, {"compile": False}, {"compile": True}],
    ids=["eager", "captured", "compiled"],
)
def test_rows_that_cannot_be_pinned_come_by_way_of_the_host(
    steps: dict[str, Any], rung: str
) -> None:
    model = build("llama", "cuda")
    ids = prompts(2, N).cuda()
    want = model.generate(ids, **CALL)
    settings = ALL | steps | {"rung": rung}
    with offload.attach(model, **settings, pinned_memory="64KiB") as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)
        report = runtime.report()
    captured = steps.get("capture", True)
    assert report.replayed_steps == (CALL["max_new_tokens"] - 1 if captured else 0)
    assert any("not all host pages are pinned" in note for note in report.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 64])
def test_rows_come_the_same_from_pinned_and_from_other_pages(rows: int) -> None:
    model = build("llama", "cuda")
    ids = prompts(2, N).cuda()
    call = CALL | {"return_dict_in_generate": True, "output_logits": True, "temperature": None}
    # Fewer tokens than there are, so that those of each step count; evictions move pages that are not pinned.
    settings = ALL | {"retrieved": 16, "row_cache": rows, "compile": False}
    logits = []
    for pinned in ("auto", "64KiB"):
        with offload.attach(model, **settings, pinned_memory=pinned) as runtime:
            out = runtime.generate(ids, **call)
            report = runtime.report()
        assert report.replayed_steps > 100
        assert report.tail_mass > 0.0
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "steps", [{"capture": False}, {"compile": False}], ids=["eager", "captured"]
)
def test_cached_rows_change_no_logit_over_turns_crops_and_copies(steps: dict[str, Any]) -> None:
    model = build("llama", "cuda")
    ids, others = prompts(2, N).cuda(), prompts(2, 300, seed=5).cuda()
    call = CALL | {"return_dict_in_generate": True, "output_logits": True}
    logits: dict[int, list[torch.Tensor]] = {}
    for slots in (0, 64):
        few = ALL | {"retrieved": 32, "window": 128, "row_cache": slots}
        with offload.attach(model, **few, **steps) as runtime:
            cache = runtime.new_cache(N + 700)
            first = runtime.generate(ids, past_key_values=cache, **call)
            report = runtime.report()
            second = runtime.generate(
                torch.cat([first.sequences, others], dim=1), past_key_values=cache, **call
            )
            cache.crop(
                200 - cache.get_seq_length()
            )  # tokens of the host go, and others take their place
            third = runtime.generate(
                torch.cat([ids[:, :200], others], dim=1), past_key_values=cache, **call
            )
            copies = runtime.generate(
                ids[:1], **(call | {"do_sample": True, "num_return_sequences": 2, "top_k": 1})
            )
            logits[slots] = [x for run in (first, second, third, copies) for x in run.logits]
            assert (report.fetched_bytes < report.selected_bytes) == (slots > 0)
            assert report.fetched_bytes > 0
            assert report.bytes["cached rows"] == slots * 2 * 2 * model.config.num_hidden_layers * (
                report.selected_bytes // (2 * 2 * 32 * model.config.num_hidden_layers) + 4
            )
    assert all(torch.equal(a, b) for a, b in zip(logits[0], logits[64], strict=True))


MILLISECOND = 2_000_000  # clock cycles, about


def sleep_on_the_way_to_the_host(monkeypatch: pytest.MonkeyPatch, cycles: int) -> None:
    use = Streams.use

    def delayed(self: Streams, stream: torch.cuda.Stream | None) -> Any:
        if stream is not None and stream is self.device_to_host:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
        return use(self, stream)

    monkeypatch.setattr(Streams, "use", delayed)


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
def test_a_row_is_selected_only_once_it_is_on_the_host(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", "cuda")
    ids = prompts(2, N).cuda()
    want = model.generate(ids, **CALL)
    sleep_on_the_way_to_the_host(monkeypatch, 50 * MILLISECOND)
    if not waits:
        monkeypatch.setattr(path, "_await_copy", lambda written, device: None)
    with offload.attach(model, **ALL, compile=False) as runtime:
        cache = runtime.new_cache(N + 200)
        cache.start(2)
        for store in cache.layer_stores:  # what has not arrived shows
            whole = store.region.view(0, store.region.committed)
            whole.view(torch.float32).fill_(torch.nan)
        got = runtime.generate(ids, past_key_values=cache, **CALL)
        assert runtime.report().replayed_steps > 100
    assert torch.equal(got, want) == waits


@pytest.mark.gpu
@pytest.mark.slow
def test_a_greedy_run_gives_the_same_tokens_a_hundred_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama", "cuda")
    ids = prompts(2, N).cuda()
    few = ALL | {"retrieved": 16, "window": 128, "row_cache": 64}
    random = torch.Generator().manual_seed(0)
    seen = set()
    with offload.attach(model, **few, compile=False) as runtime:
        cache = runtime.new_cache(N + 400)
        use = Streams.use

        def delayed(self: Streams, stream: torch.cuda.Stream | None) -> Any:
            cycles = int(torch.randint(0, MILLISECOND, (1,), generator=random))
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
            return use(self, stream)

        monkeypatch.setattr(Streams, "use", delayed)
        for run in range(101):
            got = runtime.generate(
                ids, past_key_values=cache, max_new_tokens=260, do_sample=False, eos_token_id=None
            )
            # The first run keeps some tokens in the window that every later one begins with on the host.
            if run > 0:
                seen.add(tuple(got.flatten().tolist()))
            assert runtime.report().replayed_steps > 250
            cache.crop(N - 1 - cache.get_seq_length())
    assert len(seen) == 1


def test_hooks_of_a_stranger_are_named_and_others_are_not() -> None:
    model = build("llama", "cpu")
    assert _hooked(model) is None
    with offload.attach(model, mode="exact"):  # has hooks of its own
        assert _hooked(model) is None
        model(
            input_ids=prompts(1, 8), output_hidden_states=True
        )  # for which transformers sets hooks
        assert _hooked(model) is None
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert _hooked(model) == "no graph calls the hooks of model.layers.1.mlp"
        hook.remove()
        model.register_forward_pre_hook(partial(print))
        assert _hooked(model) == "no graph calls the hooks of LlamaForCausalLM"
