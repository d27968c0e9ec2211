"""What only a card can show: budgets as the driver counts them, half precision, 4-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import left_padded, prompts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import offload
from offload.decode import captured_steps
from offload.errors import BudgetError
from offload.tiers.transfer import EvenCopies
from offload.trace import Watch

pytestmark = pytest.mark.gpu

MIB = 2**20


def wide_llama(dtype: torch.dtype) -> Any:
    """Half a GiB of KV at 8,192 tokens in half precision, so that budgets are far above allocator rounding."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=128,
        max_position_embeddings=32768,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def driver_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def budget_of(model: Any, **sizes: Any) -> int:
    with offload.attach(model, mode="exact") as runtime:
        return runtime.budget_for(**sizes)


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "hooked"])
def test_device_bytes_stay_under_the_budget_at_every_step(replayed: bool) -> None:
    model = wide_llama(torch.bfloat16)
    ids = prompts(1, 8192).cuda()
    budget = budget_of(model, kv_share=0.25, prompt_tokens=8192, new_tokens=80)
    seen: list[int] = []
    if not replayed:
        model.register_forward_hook(lambda *_: seen.append(driver_bytes()))
    watch = Watch(lambda _: seen.append(driver_bytes()))
    torch.cuda.empty_cache()
    with offload.attach(model, mode="exact", gpu_memory=budget) as runtime:
        torch.cuda.reset_peak_memory_stats()
        runtime.generate(ids, max_new_tokens=80, do_sample=False, streamer=watch)
        report = runtime.report()
        others = driver_bytes() - torch.cuda.memory_reserved()
    assert report.replayed_steps == (79 if replayed else 0)
    assert any("hooks of LlamaForCausalLM" in note for note in report.notes) == (not replayed)
    assert len(seen) >= 80
    assert max(seen) <= budget
    assert torch.cuda.max_memory_reserved() + others <= budget  # between the hooks, too
    assert report.tokens_on_host > 4096
    assert report.bytes["host_pageable"] == 0
    assert report.bytes["resident"] > 0  # the prefill's workspace holds pages while decoding


def test_resident_pages_change_no_token_and_save_their_bytes() -> None:
    model = wide_llama(torch.float32)
    ids = prompts(1, 4096).cuda()
    call: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False}
    want = model.generate(ids, **call)
    budget = budget_of(model, kv_share=0.25, prompt_tokens=4096, new_tokens=200)
    with offload.attach(model, mode="exact", gpu_memory=budget) as runtime:
        cache = runtime.new_cache(4400)
        got = runtime.generate(ids, past_key_values=cache, **call)
        stores: Any = cache.stores
        assert all(store.resident_columns > 0 for store in stores)
        streamed = runtime.report().decode_h2d_bytes
        host_bytes = sum(store.columns * store.page_bytes for store in stores)
        resident = sum(store.resident_bytes for store in stores)
        assert streamed <= 71 * (host_bytes - resident) + resident
        # A second turn takes the memory for its prefill, and gives it to pages again.
        longer = torch.cat([got, prompts(1, 300, seed=1).cuda()], dim=1)
        second = runtime.generate(longer, past_key_values=cache, max_new_tokens=16, do_sample=False)
    assert torch.equal(got, want)
    assert torch.equal(second, model.generate(longer, max_new_tokens=16, do_sample=False))


@pytest.mark.parametrize("recompute", ["off", "hidden"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_exact_steps_are_replayed_and_give_the_tokens_of_the_stock_cache(
    recompute: str, padded: bool
) -> None:
    model = wide_llama(torch.float32)
    ids, mask = left_padded(2, 1500, pads=(0, 130) if padded else (0, 0))
    ids, mask = ids.cuda(), mask.cuda()
    tiers: dict[str, Any] = {"page": 64, "window": 256, "chunk": 512, "scheduler": {"recompute": recompute}}  # fmt: skip
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "top_k": 20}]
    for call in ways:
        call |= {"max_new_tokens": 150, "attention_mask": mask}
        torch.manual_seed(5)
        want = model.generate(ids, **call)
        made = {}
        for capture in (True, False):
            with offload.attach(model, mode="exact", capture=capture, **tiers) as runtime:
                torch.manual_seed(5)
                made[capture] = runtime.generate(ids, **call)
                report = runtime.report()
                assert report.replayed_steps == (149 if capture else 0)
                assert report.notes == []
        assert torch.equal(made[True], made[False])
        assert torch.equal(made[True], want)


def test_pages_of_several_sequences_come_in_one_copy_and_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wide_llama(torch.float32)
    ids = prompts(5, 900).cuda()
    copies: list[tuple[int, bool]] = []
    copy = EvenCopies._copy

    def counted(self: Any, *args: Any) -> bool:
        done = copy(self, *args)
        copies.append((args[-1], done))
        return done

    monkeypatch.setattr(EvenCopies, "_copy", counted)
    made = []
    for at_once in (True, False):
        with monkeypatch.context() as patched:
            if not at_once:
                patched.setattr(EvenCopies, "_copy", lambda *args: False)
            with offload.attach(model, mode="exact", page=16, window=128, chunk=128, staging="2MiB") as runtime:  # fmt: skip
                made.append(runtime.generate(ids, max_new_tokens=80, do_sample=False))
                made.append(torch.tensor(runtime.report().decode_h2d_bytes))
    assert len(copies) > 8 * 80
    assert all(done for _, done in copies)
    assert {kind for kind, _ in copies} == {1, 2}  # both ways
    assert torch.equal(made[0], made[2])
    assert made[1] == made[3]
    assert torch.equal(made[0], model.generate(ids, max_new_tokens=80, do_sample=False))


def test_a_replayed_exact_run_ends_where_the_stock_one_does_and_goes_on() -> None:
    model = wide_llama(torch.float32)
    ids = prompts(1, 1500).cuda()
    call: dict[str, Any] = {"max_new_tokens": 120, "do_sample": False}
    free = model.generate(ids, **call)
    # The last of some tokens that have not come before, wherever it stands in a page.
    end = next(int(free[0, at]) for at in range(1590, 1500, -1) if int(free[0, at]) not in free[0, 1500:at])  # fmt: skip
    want = model.generate(ids, eos_token_id=end, **call)
    assert 1500 < want.shape[1] < free.shape[1]
    with offload.attach(model, mode="exact", window=256, chunk=512) as runtime:
        cache = runtime.new_cache(2400)
        got = runtime.generate(ids, past_key_values=cache, eos_token_id=end, **call)
        assert torch.equal(got, want)
        longer = torch.cat([got, prompts(1, 300, seed=1).cuda()], dim=1)
        second = runtime.generate(longer, past_key_values=cache, **call)
        assert runtime.report().replayed_steps == 119
    assert torch.equal(second, model.generate(longer, **call))


def test_what_repeats_between_graphs_is_captured_and_gives_the_same_logits() -> None:
    model = wide_llama(torch.float32)
    ids = prompts(1, 3200).cuda()
    tiers: dict[str, Any] = {"page": 16, "window": 128, "chunk": 512, "staging": "2MiB", "recompute": "hidden", "recomputed": 0.5}  # fmt: skip
    made: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    with torch.no_grad(), offload.attach(model, mode="exact", **tiers) as runtime:
        for captures in made:
            cache = runtime.new_cache(max_tokens=3300)
            runtime.generate(ids[:, :3000], cache=cache, max_new_tokens=2, do_sample=False)
            cache.crop(3000 - cache.get_seq_length())
            with captured_steps(model, cache, compiles=False) as step:
                if not captures:
                    step.reason = "not wanted"
                for at in range(3000, 3100):
                    where = torch.full((1, 1), at, device="cuda")
                    call = {"position_ids": where, "past_key_values": cache}
                    made[captures].append(
                        model(input_ids=ids[:, at : at + 1], **call).logits.clone()
                    )
                if captures:
                    assert step.reason is None
                    assert step._graph is not None
                    found = step._graph.repeats
                    assert found.reason is None
                    # 8 layers of at least 8 chunks; most of them stay while some 6 blocks leave the window.
                    assert 64 <= found.captured < 0.3 * 64 * step.replays
                    assert len(found._graphs) < found.captured
            cache.close("it was measured")
    for one, other in zip(made[True], made[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_exception_between_graphs_leaves_a_cache_that_goes_on() -> None:
    model = wide_llama(torch.float32)
    ids = prompts(1, 1500).cuda()
    # A padding token would be masked where an answer has it.
    call: dict[str, Any] = {"do_sample": False, "pad_token_id": None}
    want = model.generate(ids, max_new_tokens=60, **call)
    with offload.attach(model, mode="exact", window=256, chunk=512) as runtime:
        cache = runtime.new_cache(2400)
        call["past_key_values"] = cache
        made = runtime.generate(ids, max_new_tokens=10, **call)
        store: Any = cache.layer_stores[5]
        kept = store._attend_and_take_in
        left = [25]

        def breaks(*args: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("in the middle of a step")
            return kept(*args)

        store._attend_and_take_in = breaks
        with pytest.raises(RuntimeError, match="in the middle"):
            runtime.generate(made, max_new_tokens=40, **call)
        assert left == [0]
        del store._attend_and_take_in
        length = cache.get_seq_length()
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        got = runtime.generate(want[:, : length + 1], max_new_tokens=1559 - length, **call)
        assert runtime.report().reused_tokens == length
    assert torch.equal(got, want)


def test_a_budget_below_the_weights_is_refused_before_anything_is_allocated() -> None:
    model = wide_llama(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    with pytest.raises(BudgetError) as caught:
        offload.attach(model, mode="exact", gpu_memory=before // 2)
    assert caught.value.requested > caught.value.available
    assert torch.cuda.memory_allocated() <= before + MIB
    assert model.config._attn_implementation != "offload"


def test_the_allocator_refuses_what_an_explicit_budget_does_not_allow() -> None:
    model = wide_llama(torch.bfloat16)
    budget = budget_of(model, kv_share=0.5, prompt_tokens=4096, new_tokens=16)
    with (
        offload.attach(model, mode="exact", gpu_memory=budget),
        pytest.raises(torch.OutOfMemoryError),
    ):
        torch.empty(budget, dtype=torch.uint8, device="cuda")
    torch.empty(budget, dtype=torch.uint8, device="cuda")  # detached, the card is free again


def step_logits(run: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = run.generate(
        ids,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_differ_from_the_stock_caches_by_rounding_only(dtype: torch.dtype) -> None:
    model = wide_llama(dtype)
    ids = prompts(1, 3001).cuda()
    _, want = step_logits(model, ids)
    with offload.attach(model, mode="exact", window=512, chunk=700) as runtime:
        _, got = step_logits(runtime, ids)
        assert runtime.report().tokens_on_host > 2000
    error = (got[0] - want[0]).square().mean().sqrt() / want[0].std()
    # Eight layers of matrix products in the dtype; stock against stock in chunks differs as much.
    limit = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}[dtype]
    assert float(error) <= limit


def test_pages_that_cannot_be_pinned_give_the_same_tokens_and_are_named() -> None:
    model = wide_llama(torch.float32)
    ids = prompts(1, 3001).cuda()
    call: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False}
    want = model.generate(ids, **call)
    with offload.attach(
        model, mode="exact", window=512, chunk=512, pinned_memory="40MiB"
    ) as runtime:
        got = runtime.generate(ids, **call)
        report = runtime.report()
    assert torch.equal(got, want)
    assert 0 < report.bytes["host_pinned"] <= 40 * MIB
    assert report.bytes["host_pageable"] > 0
    assert report.bounced_bytes > 0
    assert any("pinned" in note for note in report.notes)


def test_a_model_with_nf4_weights_attaches_generates_and_detaches(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    assert bitsandbytes.__version__
    wide_llama(torch.float32).cpu().save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, dtype=torch.float32, device_map={"": 0}
    )
    ids = prompts(1, 2001).cuda()
    call: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    want = model.generate(ids, **call)
    with offload.attach(model, mode="exact", window=256, chunk=512) as runtime:
        got = runtime.generate(ids, **call)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.tokens_on_host > 1000
    assert (
        report.bytes["weights"] < 150 * MIB
    )  # 104 MiB of linear layers in 4 bits, not 256 in float32
    assert torch.equal(model.generate(ids, **call), want)


def test_a_stock_call_after_detach_finds_the_memory_free() -> None:
    model = wide_llama(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with offload.attach(model, mode="exact", window=1024) as runtime:
        runtime.generate(prompts(1, 4096).cuda(), max_new_tokens=4, do_sample=False)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + MIB
