"""What layers need is measured on the prompt, and the cache is laid out by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, prompts
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import offload
from offload import attention as attending
from offload import sensitivity
from offload.cache import CACHE
from offload.config import OffloadConfig
from offload.demand import ladder_rungs
from offload.scheduler.rungs import RUNGS, Rung

N = 1100  # tokens of a prompt
CODED = [rung for rung in RUNGS if rung.bits and not rung.clustered]


def build(name: str = "llama") -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model


def errors(model: Any, rungs: list[Rung]) -> list[tuple[float, ...]]:
    with offload.attach(model, mode="fast", sinks=64, window=256) as runtime:
        return sensitivity.layer_errors(model, runtime.shape.modules, prompts(1, N), rungs)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss", "qwen3_next", "bamba"])
def test_fewer_bits_cost_more_in_every_layer(name: str) -> None:
    found = errors(build(name), CODED[:2])
    assert len(found) == 2
    assert len(found[0]) >= 1
    assert all(0 < four < three for four, three in zip(*found, strict=True))


def test_the_layer_that_matters_more_has_the_larger_error() -> None:
    model = build()
    with torch.no_grad():  # what the first layer's attention says counts for nothing
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
    (found,) = errors(model, CODED[1:2])
    assert found[0] < 0.01 * max(found[1:])


def test_an_error_is_what_the_replica_of_that_layer_alone_does() -> None:
    """Against attention in one piece, each query with its own rows exact."""
    model, rung, ids = build(), Rung("3k3v", 3, 8), prompts(1, N)
    (found,) = errors(model, [rung])
    read, first, last = N - 32, 64, 256
    stop = first + (N - 32 - last - first) // 64 * 64

    def low(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        if module.layer_idx != 1 or query.shape[2] != 32:
            return attending._stock(
                module, query, key, value, mask, softcap=None, s_aux=None, **more
            ), None
        keys, values = key.clone(), value.clone()
        keys[:, :, first:stop], values[:, :, first:stop] = sensitivity._replica(
            key[:, :, first:stop], value[:, :, first:stop], rung
        )
        groups = query.shape[1] // key.shape[1]
        wide = [t.repeat_interleave(groups, 1) for t in (key, keys, value, values)]
        exact, coded = (query @ wide[i].mT * more["scaling"] for i in (0, 1))
        share = coded[..., first:stop].log_softmax(-1)
        best = share.unflatten(1, (-1, groups)).amax(2).topk(rung.tokens, -1).indices + first
        rows = torch.ones_like(exact[:, ::groups], dtype=torch.bool)
        rows[..., first:stop] = False
        rows = rows.scatter(-1, best, True).repeat_interleave(groups, 1)
        hidden = torch.arange(N) > torch.arange(read, N)[:, None]
        weights = torch.where(rows, exact, coded).masked_fill(hidden, float("-inf")).softmax(-1)
        out = (weights * rows) @ wide[2] + (weights * ~rows) @ wide[3]
        return out.transpose(1, 2), None

    AttentionInterface.register("low", low)
    AttentionMaskInterface.register("low", sdpa_mask)
    distributions = []
    for kind in ("sdpa", "low"):
        model.set_attn_implementation(kind)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :read], **{CACHE: cache})
            logits = model(input_ids=ids[:, read:], **{CACHE: cache}).logits[0]
        distributions.append(logits.double().log_softmax(-1))
    exact, other = distributions
    want = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert found[1] == pytest.approx(want, rel=1e-3)


def test_a_token_that_can_never_come_costs_nothing_and_nan_is_not_taken_for_nothing() -> None:
    exact = torch.tensor([[0.25, 0.75, 0.0]]).log()
    other = torch.tensor([[0.5, 0.5, 0.0]]).log()
    want = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert sensitivity._divergence(exact, other) == pytest.approx(want)
    assert math.isnan(sensitivity._divergence(exact, torch.full_like(exact, float("nan"))))


def test_attention_is_ours_again_behind_an_exception() -> None:
    model = build()
    with (
        offload.attach(model, mode="fast", sinks=64, window=256) as runtime,
        pytest.raises(KeyError),
    ):
        sensitivity.layer_errors(model, runtime.shape.modules, prompts(1, N), [Rung("5k5v", 5, 8)])
    assert AttentionInterface()[attending.NAME] is attending.attention


def laid_out(model: Any, *, ids: torch.Tensor | None = None, **settings: Any) -> Any:
    common: dict[str, Any] = {
        "mode": "fast",
        "sinks": 64,
        "window": 256,
        "staging": "1MiB",
        "chunk": 128,
        "retrieved": 64,
    }
    with offload.attach(model, **(common | settings)) as runtime:
        cache = runtime.new_cache(max_tokens=N + 8)
        ids = prompts(1, N) if ids is None else ids
        out = runtime.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == ids.shape[1] + 4
        return cache.layout, runtime.report().notes


def test_a_cache_is_laid_out_by_what_the_prompt_says() -> None:
    model = build()
    with torch.no_grad():  # of two layers the second matters
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
    uniform, _ = laid_out(model, rung="3k3v")
    budget = uniform.device_bytes
    plain, notes = laid_out(model, gpu_memory=budget)
    assert not any("by what the prompt says" in note for note in notes)
    mixed, notes = laid_out(model, gpu_memory=budget, ladder=True)
    assert mixed.device_bytes <= budget
    assert mixed.rungs[0].bits == 2
    assert mixed.rungs[1].bits == 4
    assert plain.rungs[0].bits >= 3
    assert any("by what the prompt says: 2 4" in note for note in notes)
    roomier = laid_out(model, rung="4k4v", whole_layers=1)[0]
    assert roomier.whole == {0}
    whole, notes = laid_out(model, gpu_memory=roomier.device_bytes, ladder=True)
    assert whole.whole == {1}
    assert whole.device_bytes <= roomier.device_bytes
    assert any("by what the prompt says: 4 whole" in note for note in notes)


def test_verified_tokens_are_the_stock_caches_with_layers_of_several_kinds() -> None:
    model, ids = build(), prompts(1, N)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
    want = model.generate(ids, max_new_tokens=24, do_sample=False)
    budget = laid_out(model, mode="verified", rung="3k3v")[0].device_bytes
    with offload.attach(
        model, mode="verified", sinks=64, window=256, staging="1MiB", chunk=128, retrieved=64,
        gpu_memory=budget, ladder=True,
    ) as runtime:  # fmt: skip
        cache = runtime.new_cache(max_tokens=N + 24)
        out = runtime.generate(ids, cache=cache, max_new_tokens=24, do_sample=False)
        report = runtime.report()
        assert cache.layout is not None
        assert [rung.bits for rung in cache.layout.rungs] == [2, 4]
    assert torch.equal(out, want)
    assert report.verify_passes > 0


def test_a_short_prompt_or_several_are_laid_out_as_ever() -> None:
    model = build()
    budget = laid_out(model, rung="3k3v")[0].device_bytes
    for ids in (prompts(1, 900), prompts(1, N)[:, :700]):
        _, notes = laid_out(model, ids=ids, gpu_memory=budget, ladder=True)
        assert any("replica.ladder measures one prompt" in note for note in notes)
        assert not any("by what the prompt says" in note for note in notes)


def test_layers_may_have_any_bits_with_as_many_exact_tokens_as_others() -> None:
    """Of one number of exact tokens all share their scratch."""
    asked = OffloadConfig.build(None, mode="fast", ladder=True)
    offered = [(rung.bits, rung.tokens) for rung in ladder_rungs(asked)]
    assert offered == [(4, 64), (4, 256), (3, 64), (3, 256), (2, 64), (2, 256)]
    given = OffloadConfig.build(asked, retrieved=32)
    assert [rung.bits for rung in ladder_rungs(given)] == [4, 3, 2]
    assert ladder_rungs(OffloadConfig.build(asked, rung="3k3v")) == ()
    assert ladder_rungs(OffloadConfig.build(asked, mode="exact")) == ()
