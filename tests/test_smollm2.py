"""A real model: SmolLM2-135M over a real text of more than 2,000 tokens, most of it on the host."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from offload.compare import compare
from offload.loading import Loaded, load

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"mode": "exact", "window": 256, "chunk": 512}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(dtype=torch.float32)


def question(loaded: Loaded, characters: int) -> str:
    text = resources.files("offload").joinpath("data", "constitution.txt").read_text()
    content = f"{text[:characters]}\n\nWho chooses the officers of the House?"
    chat = [{"role": "user", "content": content}]
    return str(
        loaded.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    )


def test_greedy_tokens_on_a_long_prompt_equal_the_stock_caches(loaded: Loaded) -> None:
    model: Any = loaded.model
    inputs = loaded.tokenizer(question(loaded, 9600), return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 2000
    call: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    want: Tensor = model.generate(**inputs, **call)
    with offload.attach(model, **SETTINGS) as runtime:
        got = runtime.generate(**inputs, **call)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.tokens_on_host > 1600
    assert report.tokens_on_device < 256 + 64 + 64


def test_three_phases_give_the_stock_caches_tokens_at_the_tokens_that_are_planned(
    loaded: Loaded,
) -> None:
    """All on the device, then host pages, then the oldest tokens dropped and read again, all while decoding."""
    model: Any = loaded.model
    inputs = loaded.tokenizer(question(loaded, 500), return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    assert prompt < 192
    call: dict[str, Any] = {"max_new_tokens": 272 - prompt, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    want: Tensor = model.generate(**inputs, **call)
    with offload.attach(model, **SETTINGS) as runtime:
        page = 64 * sum(runtime.shape.token_bytes)
    tiers: dict[str, Any] = {"mode": "exact", "sinks": 64, "window": 64, "cpu_memory": page}
    with offload.attach(model, recompute="prefix", **tiers) as runtime:
        got = runtime.generate(**inputs, **call)
        report = runtime.report()
    assert torch.equal(got, want)
    # A sink, a block of the window, a tail: the third block that is whole pushes one to the host, the fourth one off it.
    assert [(c.phase, c.planned, c.tokens) for c in report.phases] == [("II", 192, 192), ("III", 256, 256)]  # fmt: skip
    assert (report.tokens_on_host, report.tokens_on_device) == (64, 271 - 2 * 64)


def test_a_padded_batch_and_beams_equal_the_stock_caches(loaded: Loaded) -> None:
    model: Any = loaded.model
    loaded.tokenizer.padding_side = "left"
    texts = [question(loaded, 3000), question(loaded, 1800)]
    inputs = loaded.tokenizer(texts, return_tensors="pt", padding=True)
    assert bool((inputs["attention_mask"] == 0).any())
    calls: list[dict[str, Any]] = [{"max_new_tokens": 12}, {"max_new_tokens": 8, "num_beams": 2}]
    for call in calls:
        want: Tensor = model.generate(**inputs, **call, do_sample=False)
        with offload.attach(model, **SETTINGS) as runtime:
            got = runtime.generate(**inputs, **call, do_sample=False)
            assert runtime.report().tokens_on_host > 200
        assert torch.equal(got, want)


def test_the_host_path_agrees_with_the_device_path_and_finds_what_mean_keys_hide(
    loaded: Loaded,
) -> None:
    """Of a planted fact the answer is the stock cache's; the device keeps only means over clusters."""
    model: Any = loaded.model
    inputs = loaded.tokenizer(question(loaded, 9600), return_tensors="pt")
    call: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    want: Tensor = model.generate(**inputs, **call)
    kl = {}
    for index in ("replica", "flat"):
        settings: dict[str, Any] = {"mode": "fast", "window": 256, "chunk": 512, "rung": "clusters", "retrieved": 256}  # fmt: skip
        with offload.attach(model, **settings, index=index) as runtime:
            cache = runtime.new_cache()
            got = runtime.generate(**inputs, past_key_values=cache, **call)
            kl[index] = compare(model, cache, want, 11)
        if index == "flat":
            assert torch.equal(got, want)
    assert kl["flat"].kl_mean < 2e-3
    assert kl["flat"].kl_mean < kl["replica"].kl_mean / 4
    assert kl["flat"].same_top == kl["flat"].steps
    # Where the replica itself is close, so are both ways to choose.
    logits = {}
    for index in ("replica", "flat"):
        settings = {"mode": "fast", "window": 256, "chunk": 512, "rung": "4k4v", "index": index}
        with offload.attach(model, **settings) as runtime:
            out = runtime.generate(
                **inputs, **call | {"max_new_tokens": 3}, output_logits=True, return_dict_in_generate=True
            )  # fmt: skip
            logits[index] = torch.stack(out.logits).log_softmax(-1)
    apart = logits["replica"].exp() * (logits["replica"] - logits["flat"])
    assert float(apart.sum(-1).max()) < 1e-3
