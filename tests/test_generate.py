"""What people do with generate works, and gives the stock cache's tokens."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, TIERS, left_padded, prompts
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import offload
from offload.prefill import Progress
from offload.runtime import Runtime

SETTINGS: dict[str, Any] = TIERS | {"chunk": 100}
N = 360


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param].build()


@contextmanager
def attached(model: Any, **settings: Any) -> Iterator[Runtime]:
    with offload.attach(model, **{**SETTINGS, **settings}) as runtime:
        yield runtime


def same(model: Any, ids: Tensor, *, seed: int | None = None, **call: Any) -> Any:
    """Generates with the stock cache, then with ours; returns ours after comparing."""
    call = {"max_new_tokens": 20, "do_sample": False, **call}
    if seed is not None:
        torch.manual_seed(seed)
    want = model.generate(ids, **call)
    with attached(model) as runtime:
        if seed is not None:
            torch.manual_seed(seed)
        got = runtime.generate(ids, **call)
        assert runtime.report().tokens_on_host > 200
    assert torch.equal(got, want)
    return got


class Listener(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_every_token(model: Any) -> None:
    ids, listener = prompts(1, N), Listener()
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    with attached(model) as runtime:
        runtime.generate(ids, max_new_tokens=20, do_sample=False, streamer=listener)
    assert listener.tokens == want[0].tolist()
    assert listener.ended


def test_stopping_criteria_and_eos_end_early(model: Any) -> None:
    ids = prompts(1, N)
    free = model.generate(ids, max_new_tokens=20, do_sample=False)
    eos = int(free[0, N + 7])
    ended = same(model, ids, eos_token_id=eos)
    assert ended.shape[1] < N + 20
    stop = StoppingCriteriaList([lambda seen, scores: torch.tensor([seen.shape[1] >= N + 5])])
    assert same(model, ids, stopping_criteria=stop).shape[1] == N + 5


def test_rows_that_end_at_different_steps_are_padded_alike(model: Any) -> None:
    ids, mask = left_padded(3, N)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    eos = int(free[1, N + 4])
    same(model, ids, attention_mask=mask, eos_token_id=eos, pad_token_id=PAD)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_with_a_seed_gives_the_same_tokens(model: Any, seed: int) -> None:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    same(model, prompts(1, N), seed=seed, **options)


def test_several_returned_sequences_share_one_prefill(model: Any) -> None:
    ids = prompts(2, N)
    same(model, ids, seed=3, do_sample=True, num_return_sequences=3)
    with attached(model) as runtime:
        fed: list[tuple[int, int]] = []
        hook = model.register_forward_pre_hook(
            lambda m, a, k: fed.append(tuple(k["input_ids"].shape)), with_kwargs=True
        )
        runtime.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=3)
        hook.remove()
    assert fed == [(2, 100), (2, 100), (2, 100), (2, 59), (6, 1), (6, 1), (6, 1)]


def test_beams_and_returned_beams_equal_the_stock_caches(model: Any) -> None:
    same(model, prompts(2, N), num_beams=4, num_return_sequences=2, max_new_tokens=12)


def test_beams_of_a_generation_config_count_too(model: Any) -> None:
    config = GenerationConfig(num_beams=3, max_new_tokens=10, pad_token_id=PAD, eos_token_id=None)
    want = model.generate(prompts(1, N), generation_config=config)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        got = runtime.generate(prompts(1, N), generation_config=config, past_key_values=cache)
        known = cache.token_ids
        assert known is not None
        assert known.shape == (3, N + 9)
        assert any(torch.equal(beam, got[0, : N + 9]) for beam in known)
    assert torch.equal(got, want)


def test_padding_is_inferred_from_pad_tokens_as_transformers_does(model: Any) -> None:
    ids, _ = left_padded(3, N)
    same(model, ids, pad_token_id=PAD)


def test_guidance_and_its_second_passes_work(model: Any) -> None:
    same(model, prompts(1, N), guidance_scale=1.5, max_new_tokens=8)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        call: dict[str, Any] = {"guidance_scale": 1.5, "max_new_tokens": 8, "do_sample": False}
        got = runtime.generate(prompts(1, N), past_key_values=cache, **call)
        assert cache.token_ids is not None
        assert torch.equal(cache.token_ids, got[:, : N + 7])


def test_one_token_prompts_can_be_continued_in_several_ways(model: Any) -> None:
    start = prompts(1, 1)
    calls: list[dict[str, Any]] = [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "do_sample": False},
    ]
    for call in calls:
        torch.manual_seed(0)
        want = model.generate(start, max_new_tokens=100, **call)
        with attached(model) as runtime:
            torch.manual_seed(0)
            assert torch.equal(runtime.generate(start, max_new_tokens=100, **call), want)


def test_beams_on_a_cache_of_the_users_are_laid_out_for_all_of_them(model: Any) -> None:
    ids = prompts(1, N)
    want = model.generate(ids, num_beams=4, max_new_tokens=30, do_sample=False)
    with attached(model) as free:
        need = free.budget_for(kv_share=0.2, prompt_tokens=N, new_tokens=30, batch=4)
    settings: dict[str, Any] = {
        "mode": "exact",
        "page": 16,
        "sinks": 16,
        "chunk": 64,
        "gpu_memory": need,
    }
    with offload.attach(model, **settings) as runtime:
        cache = runtime.new_cache()
        got = runtime.generate(
            ids, past_key_values=cache, num_beams=4, max_new_tokens=30, do_sample=False
        )
        assert cache.layout is not None
        held = sum(store.device_bytes for store in cache.layer_stores)
        assert held == cache.layout.device["sinks and window"] + cache.layout.device["tail"]
    assert torch.equal(got, want)


def test_inference_mode_of_one_call_does_not_matter_to_the_next(model: Any) -> None:
    ids = prompts(1, N)
    call: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **call)
    with attached(model) as runtime:
        with torch.inference_mode():
            assert torch.equal(runtime.generate(ids, num_beams=2, **call)[:, :N], ids)
            assert torch.equal(runtime.generate(ids, **call), want)
        assert torch.equal(runtime.generate(ids, **call), want)


def test_what_a_cache_holds_is_known_after_it_was_used_directly() -> None:
    model: Any = FAMILIES["llama"].build()
    first, other = prompts(1, N), prompts(1, N, seed=9)
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    with attached(model) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(first, past_key_values=cache, **call)
        cache.crop(-200)
        model.generate(
            torch.cat([answer[:, : cache.get_seq_length()], other], dim=1),
            past_key_values=cache,
            **call,
        )
        talk = torch.cat([answer, prompts(1, 30, seed=3)], dim=1)
        got = runtime.generate(talk, past_key_values=cache, **call)
        assert runtime.report().reused_tokens == N + 9 - 200
    assert torch.equal(got, model.generate(talk, **call))


def test_lookup_on_a_kept_cache_leaves_no_window_growing(model: Any) -> None:
    ids = prompts(1, N)
    call: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    with attached(model) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **call)
        talk = torch.cat([answer, prompts(1, 200, seed=2)], dim=1)
        seen: dict[str, Any] = {"input_ids": talk, "attention_mask": torch.ones_like(talk)}
        got = runtime.generate(**seen, past_key_values=cache, **call)
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            assert window is None or layer.keys.shape[-2] < window
    assert torch.equal(got, model.generate(**seen, **call))


def test_a_history_changed_after_stock_use_is_noticed() -> None:
    model: Any = FAMILIES["llama"].build()
    first = prompts(1, N)
    changed = first.clone()
    changed[0, 100:] = prompts(1, N - 100, seed=5)[0]
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    with attached(model) as runtime:
        cache = runtime.new_cache()
        model.generate(first, past_key_values=cache, **call)
        longer = torch.cat([changed, prompts(1, 50, seed=6)], dim=1)
        got = runtime.generate(longer, past_key_values=cache, **call)
        common = int((first == changed)[0].int().cumprod(0).sum())
        assert runtime.report().reused_tokens == common
    assert torch.equal(got, model.generate(longer, **call))


def test_a_cache_used_with_gradients_keeps_no_graph() -> None:
    model: Any = FAMILIES["llama"].build()
    with attached(model) as runtime:
        cache = runtime.new_cache()
        model(input_ids=prompts(1, 200), past_key_values=cache)
        assert not any(store._window.requires_grad for store in cache.layer_stores)
        assert cache.token_ids is not None
        assert torch.equal(cache.token_ids, prompts(1, 200))


def test_prompt_lookup_and_an_assistant_change_no_token(model: Any) -> None:
    ids = prompts(1, N - 60)
    ids = torch.cat([ids, ids[:, :60]], dim=1)  # something to look up
    same(model, ids, prompt_lookup_num_tokens=4, max_new_tokens=40)
    same(model, ids, assistant_model=FAMILIES["llama"].build(), max_new_tokens=40)
    assert not model._forward_pre_hooks


def test_early_exit_changes_no_token() -> None:
    model: Any = FAMILIES["llama"].build()  # gemma3 fails with the stock cache of transformers 5.17
    ids = prompts(1, N)
    call: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    want = model.generate(ids, **call)
    with attached(model) as runtime:
        assert torch.equal(runtime.generate(ids, assistant_early_exit=1, **call), want)


def test_processors_of_scores_see_what_they_would_see(model: Any) -> None:
    ids = prompts(1, N)
    same(model, ids, repetition_penalty=1.3, no_repeat_ngram_size=3, bad_words_ids=[[3], [7, 8]])
    same(model, ids, guidance_scale=1.5, negative_prompt_ids=prompts(1, 50, seed=4))
    same(model, ids, seed=1, num_beams=3, do_sample=True)


def test_masks_and_positions_of_other_kinds_mean_the_same(model: Any) -> None:
    ids, mask = left_padded(3, N)
    same(model, ids, attention_mask=mask.bool())
    holes = mask.clone()
    holes[:, 120:150] = 0
    same(model, ids, attention_mask=holes)
    same(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) + 4) * mask)


def test_scores_in_the_result_are_the_stock_caches(model: Any) -> None:
    call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    call["return_dict_in_generate"] = True
    want = model.generate(prompts(1, N), **call)
    with attached(model) as runtime:
        got = runtime.generate(prompts(1, N), **call)
    assert len(got.logits) == len(want.logits) == 8
    for ours, stock in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_prompts_of_embeddings_work_and_are_reported(model: Any) -> None:
    ids = prompts(1, N)
    embeddings = model.get_input_embeddings()(ids).detach()
    call: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(inputs_embeds=embeddings, **call)
    with attached(model) as runtime:
        runtime.generate(prompts(1, 200), **call)
        assert torch.equal(runtime.generate(inputs_embeds=embeddings, **call), want)
        report = runtime.report()
    assert report.tokens_on_host > 200
    assert report.decode_s > 0
    assert (report.prompt_tokens, report.reused_tokens) == (0, 0)  # not of the run before


def test_a_runtime_works_in_another_thread_as_text_iterators_need(model: Any) -> None:
    ids = prompts(1, N)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    got: list[Tensor] = []
    with attached(model) as runtime:

        def work() -> None:
            got.append(runtime.generate(ids, max_new_tokens=12, do_sample=False))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(got[0], want)


def test_max_length_counts_the_prompt(model: Any) -> None:
    assert same(model, prompts(1, N), max_new_tokens=None, max_length=N + 9).shape[1] == N + 9


@pytest.mark.parametrize("length", [1, 2, 16, 63, 80, 81])
def test_prompts_shorter_than_the_window_work(model: Any, length: int) -> None:
    ids = prompts(1, length)
    want = model.generate(ids, max_new_tokens=100, do_sample=False)
    with attached(model) as runtime:
        got = runtime.generate(ids, max_new_tokens=100, do_sample=False)
    assert torch.equal(got, want)


def fed_tokens(model: Any, run: Any) -> int:
    """Tokens per sequence that forward passes got during a call."""
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: fed.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return sum(fed)


def test_a_second_turn_reads_only_what_is_new(model: Any) -> None:
    first, more = prompts(1, N), prompts(1, 150, seed=1)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(first, past_key_values=cache, max_new_tokens=10, do_sample=False)
        talk = torch.cat([answer, more], dim=1)
        result: list[Tensor] = []
        fed = fed_tokens(
            model,
            lambda: result.append(
                runtime.generate(talk, past_key_values=cache, max_new_tokens=10, do_sample=False)
            ),
        )
        assert runtime.report().reused_tokens == N + 9  # the last token was never fed
        assert fed == talk.shape[1] - (N + 9) + 9
    assert torch.equal(result[0], model.generate(talk, max_new_tokens=10, do_sample=False))


def test_a_history_that_differs_is_read_anew_from_where_it_differs() -> None:
    model: Any = FAMILIES["llama"].build()
    first = prompts(1, N)
    changed = first.clone()
    changed[0, 200:] = prompts(1, N - 200, seed=5)[0]
    with attached(model) as runtime:
        cache = runtime.new_cache()
        runtime.generate(first, past_key_values=cache, max_new_tokens=10, do_sample=False)
        got = runtime.generate(changed, past_key_values=cache, max_new_tokens=10, do_sample=False)
        common = int((first == changed)[0].int().cumprod(0).sum())
        assert runtime.report().reused_tokens == common
        again = runtime.generate(changed, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert runtime.report().reused_tokens == N - 1
    want = model.generate(changed, max_new_tokens=10, do_sample=False)
    assert torch.equal(got, want)
    assert torch.equal(again, want)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "jamba", "lfm2"])
def test_hybrids_go_on_from_a_warm_cache(name: str) -> None:
    model: Any = FAMILIES[name].build()
    with attached(model) as runtime:
        cache = runtime.new_cache()
        call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        answer = runtime.generate(prompts(1, 200), past_key_values=cache, **call)
        talk = torch.cat([answer, prompts(1, 40, seed=1)], dim=1)
        got = runtime.generate(talk, past_key_values=cache, **call)
    assert torch.equal(got, model.generate(talk, **call))


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_a_padded_conversation_goes_on_from_a_warm_cache(name: str) -> None:
    model: Any = FAMILIES[name].build()
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    ids, mask = left_padded(3, N)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(ids, attention_mask=mask, past_key_values=cache, **call)
        talk = torch.cat([answer, prompts(3, 40, seed=2)], dim=1)
        seen = torch.nn.functional.pad(mask, (0, 50), value=1)
        got = runtime.generate(talk, attention_mask=seen, past_key_values=cache, **call)
        assert runtime.report().reused_tokens == N + 9
    assert torch.equal(got, model.generate(talk, attention_mask=seen, **call))


def test_rows_that_ended_early_are_masked_later_and_nothing_is_read_again(model: Any) -> None:
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    ids, mask = left_padded(3, N)
    free = model.generate(ids, attention_mask=mask, **call)
    eos = int(free[1, N + 4])
    with attached(model) as runtime:
        cache = runtime.new_cache()
        length = 1
        for turn in range(3):
            seen: dict[str, Any] = {"attention_mask": mask, **call, "eos_token_id": eos}
            want = model.generate(ids, pad_token_id=PAD, **seen)
            answer = runtime.generate(ids, past_key_values=cache, pad_token_id=PAD, **seen)
            assert torch.equal(answer, want)
            assert runtime.report().reused_tokens == length - 1
            length = answer.shape[1]
            added = (answer[:, ids.shape[1] :] != PAD).long()
            more = prompts(3, 30, seed=turn)
            ids = torch.cat([answer, more], dim=1)
            mask = torch.cat([mask, added, torch.ones_like(more)], dim=1)
            assert turn or int((added == 0).sum()) > 0


def test_tokens_that_were_read_with_another_mask_are_read_anew() -> None:
    model: Any = FAMILIES["llama"].build()
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    ids, mask = left_padded(2, N, pads=(0, 90))
    with attached(model) as runtime:
        cache = runtime.new_cache()
        runtime.generate(ids, attention_mask=torch.ones_like(mask), past_key_values=cache, **call)
        got = runtime.generate(ids, attention_mask=mask, past_key_values=cache, **call)
        assert runtime.report().reused_tokens == 0
        assert cache.token_ids is not None
        assert (cache.token_ids[1, :90] == -1).all()
        other = ids.masked_fill(mask == 0, 5)  # another padding token is no other padding
        again = runtime.generate(other, attention_mask=mask, past_key_values=cache, **call)
        assert runtime.report().reused_tokens == N - 1
    want = model.generate(ids, attention_mask=mask, **call)
    assert torch.equal(got, want)
    assert torch.equal(again[:, N:], want[:, N:])


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1", "qwen3_next"])
def test_a_cache_that_was_reset_is_as_new(name: str) -> None:
    model: Any = FAMILIES[name].build()
    call: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    with attached(model) as runtime:
        cache = runtime.new_cache()
        runtime.generate(prompts(1, N), past_key_values=cache, **call)
        cache.reset()
        assert cache.get_seq_length() == 0
        other = prompts(1, N, seed=7)
        got = runtime.generate(other, past_key_values=cache, **call)
        assert runtime.report().reused_tokens == 0
    assert torch.equal(got, model.generate(other, **call))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name_and_nobody_is_warned(model: Any, name: str) -> None:
    ids = prompts(1, N)
    call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attached(model) as runtime:
            cache = runtime.new_cache()
            with_cache: dict[str, Any] = {name: cache, **call}
            got = runtime.generate(ids, **with_cache)
            assert torch.equal(got, want)
            talk = torch.cat([got, prompts(1, 20, seed=1)], dim=1)
            runtime.generate(talk, **with_cache)
            assert runtime.report().reused_tokens == got.shape[1] - 1
            assert torch.equal(runtime.generate(ids, prompt_lookup_num_tokens=3, **call), want)


def test_stock_generate_takes_our_cache(model: Any) -> None:
    ids = prompts(1, N)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert all(store.host_tokens > 200 for store in cache.layer_stores)
        assert runtime.report().tokens_on_host > 200
        talk = torch.cat([got, prompts(1, 40, seed=2)], dim=1)
        longer = model.generate(talk, max_new_tokens=20, do_sample=False, past_key_values=cache)
        plain = model.generate(ids, max_new_tokens=20, do_sample=False)  # and none at all
    assert torch.equal(got, want)
    assert torch.equal(plain, want)
    assert torch.equal(longer, model.generate(talk, max_new_tokens=20, do_sample=False))


def test_stock_beams_over_padding_take_our_cache(model: Any) -> None:
    ids, mask = left_padded(2, N)
    call: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 12}
    want = model.generate(ids, do_sample=False, **call)
    with attached(model) as runtime:
        cache = runtime.new_cache()
        got = model.generate(ids, do_sample=False, past_key_values=cache, **call)
    assert torch.equal(got, want)


def test_a_cache_in_the_result_goes_on_into_the_next_turn(model: Any) -> None:
    ids = prompts(1, N)
    with attached(model) as runtime:
        first = runtime.generate(
            ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True
        )
        talk = torch.cat([first.sequences, prompts(1, 20, seed=1)], dim=1)
        got = runtime.generate(
            talk, past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False
        )
        assert runtime.report().reused_tokens == N + 9
    assert torch.equal(got, model.generate(talk, max_new_tokens=10, do_sample=False))


def test_progress_is_told_chunk_by_chunk(model: Any) -> None:
    seen: list[Progress] = []
    with attached(model) as runtime:
        runtime.generate(prompts(1, N), max_new_tokens=2, do_sample=False, on_progress=seen.append)
    assert [p.processed for p in seen] == [0, 100, 200, 300, N - 1]
    assert {(p.total, p.cached) for p in seen} == {(N, 0)}
    assert seen[-1].tokens_per_s > 0


def test_the_report_counts_tokens_bytes_and_time(model: Any) -> None:
    with attached(model) as runtime:
        runtime.generate(prompts(2, N), max_new_tokens=5, do_sample=False)
        report = runtime.report()
        rows = sum(runtime.shape.token_bytes)
    assert (report.prompt_tokens, report.new_tokens, report.chunk) == (N, 5, 100)
    assert report.tokens_on_device + report.tokens_on_host == N + 4
    assert report.bytes["host_pinned"] == 2 * rows * -(-(N + 5 - 80) // 16) * 16
    assert report.bytes["window"] == 2 * rows * (80 + 16)
    assert report.decode_h2d_bytes > 0
    assert report.ms_per_token > 0
    assert report.to_dict()["ms_per_token"] == report.ms_per_token
    assert "tokens" in str(report)
