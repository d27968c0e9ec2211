"""Are tokens that the host has no room for what they were, once they are read again?"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from test_recompute import build
from torch import Tensor

import offload
from offload import reread
from offload.errors import BudgetError, CacheError, ConfigError, InputError, UnsupportedModelError
from offload.runtime import Runtime

_TIERS: dict[str, Any] = {"mode": "exact", "page": 16, "sinks": 16, "window": 64, "chunk": 48}
_P1 = (1 + 4 + 1) * 16 - 1
_CALL: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_HOST_BLOCKS = 3


def attach(model: Any, *, batch: int = 1, blocks: int = _HOST_BLOCKS, **more: Any) -> Runtime:
    """With room for a few blocks on the host."""
    with offload.attach(model, mode="exact") as runtime:
        block = batch * _TIERS["page"] * sum(runtime.shape.token_bytes)
    settings = _TIERS | {"cpu_memory": blocks * block + block // 2, "recompute": "prefix"} | more
    return offload.attach(model, **settings)


def generate(model: Any, ids: Tensor, new: int, **more: Any) -> Tensor:
    mask = more.pop("attention_mask", torch.ones_like(ids))
    made: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, **(_CALL | more))
    return made


@pytest.mark.parametrize("piece", [512, 20])
@pytest.mark.parametrize("prompt", [50, 300])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_all_three_phases_give_the_stock_caches_tokens(
    kind: str, prompt: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reread, "REREAD_TOKENS", piece)
    model: Any = FAMILIES[kind].build()
    ids = prompts(1, prompt)
    new = 160 if prompt == 50 else 20
    want = generate(model, ids, new)
    with attach(model) as runtime:
        got = generate(runtime, ids, new)
        report = runtime.report()
    assert torch.equal(got, want)
    second, third = report.phases
    assert (second.phase, second.planned) == ("II", _P1 + 1)
    assert (third.phase, third.planned) == ("III", _P1 + 1 + 16 * _HOST_BLOCKS)
    # In chunks of 48 the prompt comes to both at the end of one.
    assert second.tokens == second.planned
    assert third.tokens == third.planned
    assert report.tokens_on_host == 16 * _HOST_BLOCKS
    assert "I-II-III" in str(report)
    assert report.planned["reading again"] > 0


def test_several_padded_sequences_read_their_own_tokens_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reread, "REREAD_TOKENS", 24)
    model, mask = build("phi"), torch.ones((2, 300), dtype=torch.long)
    mask[0, :37] = 0
    ids = prompts(2, 300) % 190 + 2
    want = generate(model, ids, 40, attention_mask=mask)
    with attach(model, batch=2) as runtime:
        assert torch.equal(generate(runtime, ids, 40, attention_mask=mask), want)
        assert runtime.report().phases[-1].phase == "III"


def test_logits_are_those_of_the_stock_cache_to_1e_5() -> None:
    model = build("llama")
    ids = prompts(1, 330) % 190 + 2
    with torch.no_grad(), attach(model) as runtime:
        want = model(input_ids=ids).logits[:, 300:]
        cache = runtime.new_cache(max_tokens=400)
        model(input_ids=ids[:, :300], past_key_values=cache)
        found = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(300, 330)]  # fmt: skip
    logits = torch.cat(found, dim=1)
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_a_pass_tells_is_not_that_of_the_tokens_read_beside_it() -> None:
    model = build("llama")
    ids = prompts(1, 300) % 190 + 2
    more = {"output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True}
    want: Any = generate(model, ids, 6, **more)
    with attach(model) as runtime:
        got: Any = generate(runtime, ids, 6, **more)
        assert runtime.report().phases[-1].tokens is not None
    for ours, stock in zip(got.hidden_states[1:], want.hidden_states[1:], strict=True):
        assert len(ours) == len(stock)
        for state, other in zip(ours, stock, strict=True):
            torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


def test_a_cache_goes_on_in_a_second_turn_and_back_where_it_can() -> None:
    model = build("llama")
    ids = prompts(1, 330) % 190 + 2
    want = generate(model, ids, 10)
    with attach(model) as runtime:
        cache = runtime.new_cache(max_tokens=400)
        generate(runtime, ids[:, :250], 4, cache=cache)
        (store, *_) = cache.layer_stores
        assert store.dropped > 0
        assert torch.equal(generate(runtime, ids, 10, cache=cache), want)  # goes back behind 250
        gone = store.dropped
        with pytest.raises(CacheError, match="dropped"):
            store.crop(16 + 16 * gone - 3)
        assert not cache.can_go_back(store.length - 40)
        # Another text from within what was dropped: all is read anew.
        other = torch.cat([ids[:, :41], ids[:, 100:300]], dim=1)
        assert torch.equal(generate(runtime, other, 10, cache=cache), generate(model, other, 10))
        for one in cache.layer_stores:
            one.check()


def test_a_block_that_was_dropped_whole_can_be_forgotten() -> None:
    model = build("llama")
    ids = prompts(1, 330) % 190 + 2
    with torch.no_grad(), attach(model) as runtime:
        cache = runtime.new_cache(max_tokens=400)
        model(input_ids=ids[:, :300], past_key_values=cache)
        dropped = cache.layer_stores[0].dropped
        assert dropped > 4
        cache.crop(-(300 - 64))  # a sink and three blocks that are kept nowhere
        assert cache.layer_stores[0].dropped == 3
        logits = model(input_ids=ids[:, 64:200], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, model(input_ids=ids[:, :200]).logits[:, -1])


def test_no_thread_outlives_its_pass_even_if_that_is_interrupted() -> None:
    model = build("llama")
    ids = prompts(1, 300) % 190 + 2

    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "offload-reread"]

    with attach(model) as runtime:
        cache = runtime.new_cache(max_tokens=400)
        generate(runtime, ids[:, :250], 4, cache=cache)
        assert not readers()
        layer = model.model.layers[1].mlp
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(runtime, ids, 4, cache=cache)
        hook.remove()
        assert not readers()
        if cache.is_open:
            assert torch.equal(generate(runtime, ids, 4, cache=cache), generate(model, ids, 4))


def test_without_it_a_full_host_is_an_error_and_beams_still_are() -> None:
    model = build("llama")
    ids = prompts(1, 300) % 190 + 2
    with attach(model, recompute="off") as runtime, pytest.raises(BudgetError, match="host memory"):
        generate(runtime, ids, 10)
    with attach(model) as runtime, pytest.raises(BudgetError, match="host memory"):
        generate(runtime, ids, 10, num_beams=2)


def test_what_is_not_the_same_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="in mode exact only"):
        offload.attach(build("llama"), mode="fast", recompute="prefix")
    with attach(build("llama")) as runtime, pytest.raises(InputError, match="positions"):
        generate(runtime, prompts(1, 60), 4, position_ids=torch.arange(60)[None] + 5)
    turning = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        offload.attach(build("llama", rope_parameters=turning), mode="exact", recompute="prefix")


def test_a_pass_that_failed_between_two_layers_leaves_a_cache_that_is_right() -> None:
    """Layers before it have dropped more blocks than those behind; their logits are those of a clean run all the same."""
    model = build("llama")
    ids = prompts(1, 330) % 190 + 2
    with torch.no_grad(), attach(model) as runtime:
        want = model(input_ids=ids).logits[:, 250:298]
        cache = runtime.new_cache(max_tokens=400)
        model(input_ids=ids[:, :200], past_key_values=cache)
        model(input_ids=ids[:, 200:250], past_key_values=cache)
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, 250:298], past_key_values=cache)
        hook.remove()
        cache.settle()
        assert cache.is_open
        dropped = [store.dropped for store in cache.layer_stores]
        assert len(set(dropped)) == 2
        got = model(input_ids=ids[:, 250:298], past_key_values=cache).logits
        torch.testing.assert_close(got, want, atol=5e-5, rtol=0)
