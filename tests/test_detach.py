"""Detached, a model is as it was before it was attached."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, TIERS, prompts
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

import offload

SETTINGS: dict[str, Any] = TIERS | {"chunk": 100}
CALL: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
N = 300


def state(model: Any) -> Any:
    """All of a model that a user could see changed, but for its weights."""
    hooks = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_backward_hooks",
        "_forward_hooks_with_kwargs",
    )
    return (
        set(vars(model)),
        [[dict(getattr(module, name)) for name in hooks] for module in model.modules()],
        [
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config")
        ],
        model.config.to_dict(),
        model.generation_config.to_dict(),
        model.training,
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "falcon_h1", "qwen3_next"])
def test_detach_leaves_nothing_behind(name: str) -> None:
    model: Any = FAMILIES[name].build()
    before = state(model)
    want = model.generate(prompts(1, N), **CALL)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
        assert state(model) != before
    assert state(model) == before
    assert torch.equal(model.generate(prompts(1, N), **CALL), want)


def test_an_attach_that_fails_leaves_nothing_behind() -> None:
    model: Any = FAMILIES["llama"].build()
    before = state(model)
    with pytest.raises(MemoryError):
        offload.attach(model, gpu_memory="100KiB")
    assert state(model) == before


def composite() -> Any:
    """A tiny model of images and text, whose parts have attention implementations of their own."""
    text: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "initializer_range": 0.2,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens: dict[str, Any] = {
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Gemma3ForConditionalGeneration(config).float().eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=None)
    return model


def test_every_part_of_a_composite_model_gets_its_own_attention_back() -> None:
    model = composite()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before = state(model)
    assert {"sdpa", "eager"} <= set(before[2])
    ids = prompts(1, N, vocab=120)
    want = model.generate(ids, **CALL)
    with offload.attach(model, **SETTINGS) as runtime:
        got = runtime.generate(ids, **CALL)
        assert runtime.report().tokens_on_host > 200
    assert torch.equal(got, want)
    assert state(model) == before


def test_a_model_that_is_forgotten_is_freed_with_its_runtime() -> None:
    model: Any = FAMILIES["llama"].build()
    runtime = offload.attach(model, **SETTINGS)
    runtime.generate(prompts(1, N), past_key_values=runtime.new_cache(), **CALL)
    seen = weakref.ref(model)
    del model, runtime
    gc.collect()
    assert seen() is None


def test_one_model_can_be_attached_again_and_again_with_other_settings() -> None:
    model: Any = FAMILIES["llama"].build()
    want = model.generate(prompts(1, N), **CALL)
    for window in (16, 64, 256):
        with offload.attach(model, **{**SETTINGS, "window": window}) as runtime:
            assert torch.equal(runtime.generate(prompts(1, N), **CALL), want)


def test_two_models_attached_together_do_not_meet() -> None:
    models: list[Any] = [FAMILIES[name].build() for name in ("llama", "qwen3")]
    want = [m.generate(prompts(1, N), **CALL) for m in models]
    runtimes = [offload.attach(m, **SETTINGS) for m in models]
    for _ in range(2):
        for runtime, tokens in zip(runtimes, want, strict=True):
            assert torch.equal(runtime.generate(prompts(1, N), **CALL), tokens)
    runtimes[0].detach()
    assert torch.equal(runtimes[1].generate(prompts(1, N), **CALL), want[1])
    runtimes[1].detach()
