"""Fast steps and exact ones over the same tokens: what is reported is what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, prompts
from transformers import DynamicCache

import offload
from offload.cache import CACHE
from offload.compare import compare
from offload.errors import InputError

N, STEPS = 600, 12
SETTINGS: dict[str, Any] = {"mode": "fast", "sinks": 64, "window": 256, "compile": False}


def build(name: str = "llama") -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model


@torch.no_grad()
def stock_rows(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """log-softmax [STEPS, V] of the last steps, by transformers' own cache."""
    first = ids.shape[1] - 1 - STEPS
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :first], **{CACHE: cache})
    rows = [model(input_ids=ids[:, at : at + 1], **{CACHE: cache}).logits[0, -1] for at in range(first, first + STEPS)]  # fmt: skip
    return torch.log_softmax(torch.stack(rows).float(), -1)


@pytest.mark.parametrize("retrieved", [0, 4096])
def test_the_divergence_is_that_of_the_stock_cache(retrieved: int) -> None:
    model = build()
    prompt = prompts(1, N)
    ids = model.generate(prompt, max_new_tokens=STEPS + 4, do_sample=False, eos_token_id=None)
    exact = stock_rows(model, ids)
    with offload.attach(model, **SETTINGS, rung="2k2v", retrieved=retrieved) as runtime:
        cache = runtime.new_cache()
        got = runtime.generate(
            prompt, cache=cache, max_new_tokens=STEPS + 4, do_sample=False, eos_token_id=None
        )
        if retrieved:
            assert torch.equal(got, ids)
        # The sequence is the stock one, whatever the fast steps made.
        runtime.generate(ids, cache=cache, max_new_tokens=1, do_sample=False, eos_token_id=None)
        found = compare(model, cache, ids, STEPS)
        assert cache.get_seq_length() == ids.shape[1] - 1
        assert found.steps == STEPS
        if retrieved:  # every token is attended to exactly
            assert found.same_top == STEPS
            assert found.kl_max < 1e-6
            return
        assert 1e-6 < found.kl_mean <= found.kl_max
        again = compare(model, cache, ids, STEPS)
        assert again == found
    assert int((exact.argmax(-1) == ids[0, -STEPS:]).sum()) == STEPS


def test_what_cannot_be_repeated_is_refused() -> None:
    model = build()
    ids = prompts(1, 300)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        runtime.generate(ids, cache=cache, max_new_tokens=1, do_sample=False, eos_token_id=None)
        for steps in (0, 300):
            with pytest.raises(InputError, match="cannot be repeated"):
                compare(model, cache, ids, steps)
