"""Bad input gets a clear error, and nothing is lost by it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED, TIERS, left_padded, prompts

import offload
from offload.errors import (
    BudgetError,
    CacheError,
    ConfigError,
    InputError,
    LostHandleError,
    UnsupportedModelError,
)

SETTINGS: dict[str, Any] = TIERS | {"chunk": 100}
CALL: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
N = 300


@pytest.fixture
def model() -> Any:
    return FAMILIES["llama"].build()


@pytest.fixture
def runtime(model: Any) -> Any:
    with offload.attach(model, **SETTINGS) as runtime:
        yield runtime


def test_a_budget_below_weights_and_window_is_refused_at_attach(model: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        offload.attach(model, gpu_memory="100KiB")
    assert caught.value.requested > caught.value.available == 100 * 1024
    assert caught.value.setting == "memory.gpu"
    assert model.config._attn_implementation == "sdpa"
    offload.attach(model, gpu_memory=caught.value.requested).detach()


@pytest.mark.parametrize("size", ["0", "-1GiB", "24 gigs", "nan", ""])
def test_sizes_that_are_none_are_refused(model: Any, size: str) -> None:
    with pytest.raises(ConfigError):
        offload.attach(model, gpu_memory=size)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({"gpu_memroy": "1GiB"}, "gpu_memory"), ({"memory": {"gpus": "1GiB"}}, "gpu")],
)
def test_unknown_settings_name_the_nearest(model: Any, settings: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        offload.attach(model, **settings)


def test_a_page_that_does_not_divide_the_window_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        offload.attach(model, page=64, window=100)


def test_right_padding_is_refused(runtime: Any) -> None:
    ids, mask = left_padded(2, N)
    with pytest.raises(InputError, match="right"):
        runtime.generate(ids.flip(1), attention_mask=mask.flip(1), **CALL)


@pytest.mark.parametrize(
    "argument",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 64},
        {"penalty_alpha": 0.6},
        {"output_attentions": True},
        {"use_cache": False},
        {"custom_generate": "somebody/something"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_that_go_past_the_cache_are_refused(runtime: Any, argument: Any) -> None:
    with pytest.raises(InputError, match=next(iter(argument))):
        runtime.generate(prompts(1, N), **CALL, **argument)


def test_a_misspelled_argument_is_found_before_the_prompt_is_read(model: Any, runtime: Any) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("the prompt was read"))
    with pytest.raises(InputError, match=r"temprature.*Did you mean temperature"):
        runtime.generate(prompts(1, N), **CALL, temprature=0.5)


def test_the_models_own_generation_config_is_heeded_too(model: Any, runtime: Any) -> None:
    model.generation_config.use_cache = False
    with pytest.raises(InputError, match="use_cache"):
        runtime.generate(prompts(1, N), **CALL)
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    with pytest.raises(InputError, match="cache_implementation"):
        runtime.generate(prompts(1, N), **CALL)


def test_no_sequences_are_an_empty_prompt(runtime: Any) -> None:
    with pytest.raises(InputError, match="empty"):
        runtime.generate(torch.empty((0, 5), dtype=torch.long), **CALL)


def test_more_device_memory_than_there_is_is_refused(model: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        offload.attach(model, gpu_memory="100TiB")
    assert caught.value.requested == 100 * 2**40
    assert caught.value.available < 2**40


def seen(ids: torch.Tensor) -> dict[str, Any]:
    """Without a mask transformers takes a generated pad token for padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_an_explicit_host_budget_holds_while_caches_grow_and_over_several(model: Any) -> None:
    with offload.attach(model, cpu_memory="200KiB", **SETTINGS) as runtime:
        cache = runtime.new_cache()
        ids = prompts(1, 100)

        def talk_on() -> None:
            nonlocal ids
            while True:
                ids = runtime.generate(**seen(ids), past_key_values=cache, max_new_tokens=50)

        with pytest.raises(BudgetError) as caught:
            talk_on()
        assert caught.value.setting == "memory.cpu"
        assert runtime.budgets.host.held <= 200 * 1024
        # Nothing was lost: the cache goes on where it was.
        assert ids.shape[1] >= 400
        assert cache.get_seq_length() > ids.shape[1]
        got = runtime.generate(**seen(ids), past_key_values=cache, max_new_tokens=1)
        assert torch.equal(got, model.generate(**seen(ids), max_new_tokens=1))
        with pytest.raises(BudgetError):
            runtime.generate(prompts(1, 900), **CALL)


def test_a_model_in_training_mode_is_refused(model: Any, runtime: Any) -> None:
    model.train()
    with pytest.raises(InputError, match="training"):
        runtime.generate(prompts(1, N), **CALL)
    runtime.detach()
    with pytest.raises(InputError, match="training"):
        offload.attach(model)


def test_an_empty_prompt_is_refused(runtime: Any) -> None:
    with pytest.raises((InputError, ValueError)):
        runtime.generate(torch.empty((1, 0), dtype=torch.long), **CALL)


@pytest.mark.parametrize(
    "prompt", ["text", [1, 2, 3], {"input_ids": prompts(1, 3)}, torch.rand(1, 3), prompts(1, 3)[0]]
)
def test_what_is_no_batch_of_token_ids_is_refused(runtime: Any, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"not a tensor of token ids|another shape"):
        runtime.generate(prompt, **CALL)


def test_sizes_of_caches_and_shares_that_make_no_sense_are_refused(runtime: Any) -> None:
    for tokens in (0, -5):
        with pytest.raises(InputError, match="at least one token"):
            runtime.new_cache(max_tokens=tokens)
    for share in (0.0, -1.0, 30.0):
        with pytest.raises(InputError, match="share"):
            runtime.budget_for(kv_share=share, prompt_tokens=100, new_tokens=10)


def test_a_mask_of_another_shape_is_refused(runtime: Any) -> None:
    with pytest.raises(InputError, match="shape"):
        runtime.generate(prompts(1, N), attention_mask=torch.ones(1, N - 3), **CALL)


def test_a_prompt_beyond_the_models_positions_warns_and_is_not_cut(
    model: Any, runtime: Any, caplog: pytest.LogCaptureFixture
) -> None:
    limit = model.config.max_position_embeddings
    ids = prompts(1, limit + 10)
    with caplog.at_level(logging.WARNING, "offload"):
        out = runtime.generate(ids, **CALL)
    assert out.shape[1] == limit + 22
    assert any("made for" in record.message for record in caplog.records)


def test_attaching_twice_is_refused(model: Any, runtime: Any) -> None:
    with pytest.raises(InputError, match="attached already"):
        offload.attach(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match="transformers model"):
        offload.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_would_come_out_wrong_are_refused_by_name(name: str) -> None:
    model: Any = REFUSED[name].build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError) as caught:
        offload.attach(model)
    assert caught.value.model_type in str(caught.value)
    assert caught.value.reason in str(caught.value)
    assert model.config._attn_implementation == before


def test_a_model_that_is_not_listed_but_changes_its_keys_is_found_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Cache

    update = Cache.update

    def scaled(self: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = update(self, key, value, *args, **kwargs)
        return key * 1.0, value

    monkeypatch.setattr(Cache, "update", scaled)
    with pytest.raises(UnsupportedModelError, match="did not reach attention"):
        offload.attach(model)


def test_another_attention_set_meanwhile_is_an_error_and_not_wrong_tokens(
    model: Any, runtime: Any
) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(LostHandleError):
        runtime.generate(prompts(1, N), **CALL)
    model.set_attn_implementation("offload")
    runtime.generate(prompts(1, N), **CALL)


def test_a_cache_is_refused_by_another_model_of_the_same_shape(runtime: Any) -> None:
    other: Any = FAMILIES["llama"].build()
    with offload.attach(other, **SETTINGS) as second:
        cache = runtime.new_cache()
        with pytest.raises(CacheError, match="another model"):
            second.generate(prompts(1, N), past_key_values=cache, **CALL)
        with pytest.raises(CacheError, match="another model"):
            other.generate(prompts(1, N), past_key_values=cache, **CALL)


def test_a_stock_cache_is_refused(runtime: Any) -> None:
    from transformers import DynamicCache

    with pytest.raises(InputError, match="new_cache"):
        runtime.generate(prompts(1, N), past_key_values=DynamicCache(), **CALL)


def test_a_cache_of_another_batch_is_refused(runtime: Any) -> None:
    cache = runtime.new_cache()
    runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
    with pytest.raises(CacheError):
        runtime.generate(prompts(2, N + 50), past_key_values=cache, **CALL)


def test_after_detach_runtime_and_caches_are_closed(model: Any) -> None:
    runtime = offload.attach(model, **SETTINGS)
    cache = runtime.new_cache()
    runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
    runtime.detach()
    runtime.detach()  # may be repeated
    with pytest.raises(CacheError, match="detached"):
        runtime.generate(prompts(1, N), **CALL)
    with pytest.raises(CacheError, match="detached"):
        runtime.new_cache()
    with offload.attach(model, **SETTINGS) as again:
        for run in (again, model):
            with pytest.raises(CacheError, match="detached"):
                run.generate(prompts(1, N + 30), past_key_values=cache, **CALL)


def test_host_memory_that_is_not_there_is_refused_before_it_is_taken(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload import budget as module
    from offload.hardware import HostMemory

    with offload.attach(model, **SETTINGS) as runtime:
        scarce = HostMemory(total=2**31, available=2**30 + 5000, limited_by="cgroup")
        monkeypatch.setattr(module, "host_memory", lambda: scarce)
        with pytest.raises(BudgetError) as caught:
            runtime.generate(prompts(1, N), **CALL)
        assert caught.value.setting == "memory.cpu"
        assert caught.value.available == 5000
        assert caught.value.requested == 256 * -(-(N + 12 - 80) // 16) * 16 * 2
        monkeypatch.undo()
        runtime.generate(prompts(1, N), **CALL)


def test_memory_that_runs_out_while_a_cache_is_built_leaves_it_usable(
    model: Any, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.tiers.store import LayerStore

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    cache = runtime.new_cache()
    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "__init__", fail)
        with pytest.raises(torch.OutOfMemoryError):
            runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
    got = runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
    assert torch.equal(got, model.generate(prompts(1, N), **CALL))


def test_idle_host_memory_makes_room_for_a_larger_run(model: Any) -> None:
    with offload.attach(model, cpu_memory="400KiB", **SETTINGS) as runtime:
        caches = [runtime.new_cache() for _ in range(2)]
        for cache in caches:
            runtime.generate(prompts(1, 400), past_key_values=cache, **CALL)
        for cache in caches:
            cache.close()
        runtime.generate(prompts(1, 780), **CALL)  # 704 tokens of 512 bytes on the host
        assert runtime.budgets.host.held <= 400 * 1024


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_more_beams_than_a_cache_has_room_for_are_refused_before_anything_happens(
    name: str,
) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(ids, past_key_values=cache, **CALL)
        talk = torch.cat([answer, prompts(1, 20, seed=1)], dim=1)
        seen: dict[str, Any] = {"input_ids": talk, "attention_mask": torch.ones_like(talk)}
        with pytest.raises(CacheError, match="room"):
            runtime.generate(**seen, past_key_values=cache, num_beams=3, **CALL)
        got = runtime.generate(**seen, past_key_values=cache, **CALL)
    assert torch.equal(got, model.generate(**seen, **CALL))


def test_a_cache_has_one_owner_and_cannot_be_copied(runtime: Any) -> None:
    import copy

    cache = runtime.new_cache()
    for make in (copy.copy, copy.deepcopy):
        with pytest.raises(CacheError, match="cannot be copied"):
            make(cache)


class Interrupted(Exception):
    """Raised by the tests in the middle of things."""


def raising_streamer(after: int, error: type[BaseException]) -> Any:
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.left = after

        def put(self, value: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise error

        def end(self) -> None:
            pass

    return Streamer()


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_after_an_exception_between_steps_a_cache_keeps_what_it_had(
    name: str, error: type[BaseException]
) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        with pytest.raises(error):
            runtime.generate(
                ids, past_key_values=cache, streamer=raising_streamer(5, error), **CALL
            )
        assert (
            cache.get_seq_length() == N + 4
        )  # five steps, the first of them the prompt's last token
        assert cache.token_ids is not None
        assert cache.token_ids.tolist() == want[:, : N + 4].tolist()
        assert torch.equal(runtime.generate(ids, **CALL), want)
        longer = torch.cat([want, prompts(1, 9, seed=1)], dim=1)
        got = runtime.generate(longer, past_key_values=cache, **CALL)
    assert torch.equal(got, model.generate(longer, **CALL))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2, 9])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2"])
def test_after_an_exception_inside_a_step_all_layers_go_back_together(
    name: str, layer: int, step: int
) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    seen = 0

    def fail(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            raise Interrupted

    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        layers = model.model.layers
        hook = layers[layer % len(layers)].mlp.register_forward_hook(fail)
        with pytest.raises(Interrupted):
            runtime.generate(ids, past_key_values=cache, **CALL)
        hook.remove()
        if cache.is_open:  # a full sliding window cannot go back: then it is closed
            assert len({layer.get_seq_length() for layer in cache.layers}) == 1
            assert torch.equal(runtime.generate(ids, past_key_values=cache, **CALL), want)
        else:
            assert name != "llama"
        assert torch.equal(runtime.generate(ids, **CALL), want)


def test_an_exception_while_a_layer_takes_tokens_in_closes_the_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.tiers.store import LayerStore

    ids = prompts(1, N)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()

        def fail(*_: Any) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(LayerStore, "_evict", fail)
        with pytest.raises(MemoryError, match="no more"):
            runtime.generate(ids, past_key_values=cache, **CALL)
        monkeypatch.undo()
        with pytest.raises(CacheError, match="taking tokens in"):
            runtime.generate(ids, past_key_values=cache, **CALL)
        assert torch.equal(runtime.generate(ids, **CALL), model.generate(ids, **CALL))


def test_interrupted_copies_leave_no_buffer_taken(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.tiers.transfer import HostReader

    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    copy, calls = HostReader._copy, 0

    def interrupted(self: HostReader, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 12, 13):
            raise KeyboardInterrupt
        copy(self, *args)

    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        monkeypatch.setattr(HostReader, "_copy", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                runtime.generate(ids, past_key_values=cache, **CALL)
        assert torch.equal(runtime.generate(ids, past_key_values=cache, **CALL), want)


def test_an_interrupted_stock_generate_does_not_trip_the_next_one(
    model: Any, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.attention import hand_over

    ids = prompts(1, N)

    def late(*args: Any, **kwargs: Any) -> Any:
        hand_over(*args, **kwargs)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("offload.cache.hand_over", late)
        with pytest.raises(Interrupted):
            model.generate(ids, past_key_values=runtime.new_cache(), **CALL)
    got = model.generate(ids, past_key_values=runtime.new_cache(), **CALL)
    assert torch.equal(got, model.generate(ids, **CALL))


HYBRIDS = ["qwen3_next", "falcon_h1", "lfm2"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_exception_between_steps_loses_no_recurrent_state(name: str) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        with pytest.raises(Interrupted):
            runtime.generate(
                ids, past_key_values=cache, streamer=raising_streamer(3, Interrupted), **CALL
            )
        assert cache.get_seq_length() == N + 2
        talk = torch.cat([want, prompts(1, 9, seed=1)], dim=1)
        got = runtime.generate(talk, past_key_values=cache, **CALL)
        assert runtime.report().reused_tokens == N + 2
    assert torch.equal(got, model.generate(talk, **CALL))


def failing_mlp(model: Any, *, layer: int, call: int) -> Any:
    """A hook that raises when a layer's MLP runs for the `call`-th time."""
    mlps = [m for name, m in model.named_modules() if name.endswith((".mlp", ".feed_forward"))]
    seen = 0

    def fail(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == call:
            raise Interrupted

    return mlps[layer].register_forward_hook(fail)


FAST: dict[str, Any] = {"mode": "fast", "sinks": 64, "window": 128, "chunk": 100, "retrieved": 512}


@pytest.mark.parametrize("settings", [SETTINGS, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_tokens_of_a_pass_that_broke_off_are_not_taken_for_those_of_the_next(
    settings: dict[str, Any], stock: bool
) -> None:
    model: Any = FAMILIES["llama"].build()
    broken, other = prompts(1, 600, seed=1), prompts(1, 600, seed=2)
    want = model.generate(broken, **CALL)
    with offload.attach(model, **settings) as runtime:
        cache = runtime.new_cache()
        hook = failing_mlp(model, layer=0, call=1)
        with pytest.raises(Interrupted):
            (model if stock else runtime).generate(broken, past_key_values=cache, **CALL)
        hook.remove()
        runtime.generate(other, past_key_values=cache, **CALL)
        got = runtime.generate(broken, past_key_values=cache, **CALL)
        assert runtime.report().reused_tokens < 100
        assert cache.token_ids is not None
        assert torch.equal(cache.token_ids, got[:, :-1])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_recurrent_state_that_cannot_go_back_closes_the_cache_and_says_so(name: str) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        hook = failing_mlp(model, layer=0, call=6)
        with pytest.raises(Interrupted):
            runtime.generate(ids, past_key_values=cache, **CALL)
        hook.remove()
        with pytest.raises(CacheError, match="cannot go back"):
            runtime.generate(ids, past_key_values=cache, **CALL)
        assert torch.equal(runtime.generate(ids, **CALL), model.generate(ids, **CALL))


@pytest.mark.parametrize("name", ["llama", "gemma3", *HYBRIDS])
@pytest.mark.parametrize("layer", [0, -1])
def test_a_step_of_stock_generate_that_broke_off_gives_no_wrong_tokens(
    name: str, layer: int
) -> None:
    model: Any = FAMILIES[name].build()
    ids = prompts(1, N)
    with offload.attach(model, **SETTINGS) as runtime:

        def broken() -> tuple[Any, torch.Tensor]:
            cache = runtime.new_cache()
            answer = model.generate(ids, past_key_values=cache, **CALL)
            talk = torch.cat([answer, prompts(1, 30, seed=3)], dim=1)
            hook = failing_mlp(model, layer=layer, call=1)
            with pytest.raises(Interrupted):
                model.generate(talk, past_key_values=cache, **CALL)
            hook.remove()
            return cache, torch.cat([talk, prompts(1, 5, seed=8)], dim=1)

        cache, longer = broken()
        want = model.generate(longer, **CALL)
        if name == "llama":
            if layer == 0:  # some layers held a token more: who counted it must count again
                with pytest.raises(CacheError, match="mended"):
                    model.generate(longer, past_key_values=cache, **CALL)
            assert torch.equal(model.generate(longer, past_key_values=cache, **CALL), want)
            cache, longer = broken()
            assert torch.equal(runtime.generate(longer, past_key_values=cache, **CALL), want)
        elif name == "gemma3" and layer == -1:  # every layer has taken the token in: all is well
            assert torch.equal(model.generate(longer, past_key_values=cache, **CALL), want)
        else:
            for run in (model, runtime):
                with pytest.raises(CacheError, match="cannot go back"):
                    run.generate(longer, past_key_values=cache, **CALL)
                cache, longer = broken()


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_exceptions_of_callbacks_leave_the_runtime_usable(
    model: Any, runtime: Any, error: type[BaseException]
) -> None:
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    cache = runtime.new_cache()

    def fail(*_: Any) -> Any:
        raise error

    calls: list[dict[str, Any]] = [
        {"on_progress": fail},
        {"logits_processor": [fail]},
        {"stopping_criteria": [fail]},
        {"prefix_allowed_tokens_fn": fail},
    ]
    for call in calls:
        for kept in ({}, {"past_key_values": cache}):
            with pytest.raises(error):
                runtime.generate(ids, **CALL, **call, **kept)
        assert torch.equal(runtime.generate(ids, **CALL), want)
        assert torch.equal(runtime.generate(ids, past_key_values=cache, **CALL), want)


@pytest.mark.parametrize(
    "argument",
    [
        {"num_beams": 2, "streamer": raising_streamer(0, Interrupted)},
        {"stop_strings": ["a"]},
        {"do_sample": True, "temperature": 0.0},
        {"max_new_tokens": None, "max_length": N - 1},
        {"num_return_sequences": 2},
        {"token_healing": True},
    ],
    ids=lambda argument: "-".join(argument),
)
def test_what_the_loop_would_refuse_is_refused_before_the_prompt_is_read(
    model: Any, runtime: Any, argument: Any
) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("the prompt was read"))
    with pytest.raises(ValueError, match=r".+"):
        runtime.generate(prompts(1, N), **{**CALL, **argument})


def test_assisted_decoding_of_a_batch_is_refused_before_the_prompt_is_read(
    model: Any, runtime: Any
) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("the prompt was read"))
    with pytest.raises(InputError, match="one sequence"):
        runtime.generate(prompts(2, N), prompt_lookup_num_tokens=3, **CALL)


def test_a_second_generate_within_the_first_is_refused_and_the_first_goes_on(
    model: Any, runtime: Any
) -> None:
    ids = prompts(1, N)
    refused: list[str] = []

    def again(*_: Any) -> None:
        with pytest.raises(InputError, match="generating already") as caught:
            runtime.generate(ids, **CALL)
        refused.append(str(caught.value))

    want = model.generate(ids, **CALL)
    assert torch.equal(runtime.generate(ids, on_progress=again, **CALL), want)
    assert refused
    assert torch.equal(runtime.generate(ids, **CALL), want)


def test_a_closed_cache_says_that_it_was_closed(model: Any, runtime: Any) -> None:
    cache = runtime.new_cache()
    runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
    cache.close()
    cache.close()  # may be repeated
    for run in (runtime, model):
        with pytest.raises(CacheError, match="closed"):
            run.generate(prompts(1, N + 30), past_key_values=cache, **CALL)
    with pytest.raises(CacheError, match="closed"):
        cache.reset()


def test_a_history_that_a_window_cannot_go_back_to_is_refused_and_the_cache_kept() -> None:
    model: Any = FAMILIES["gemma3"].build()
    ids = prompts(1, N)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        answer = runtime.generate(ids, past_key_values=cache, **CALL)
        with pytest.raises(InputError, match="cannot go back"):
            runtime.generate(ids, past_key_values=cache, **CALL)
        talk = torch.cat([answer, prompts(1, 20, seed=1)], dim=1)
        got = runtime.generate(talk, past_key_values=cache, **CALL)
        assert runtime.report().reused_tokens == answer.shape[1] - 1
    assert torch.equal(got, model.generate(talk, **CALL))
