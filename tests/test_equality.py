"""Greedy tokens equal the stock cache's, for every family and every way of calling generate."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family, left_padded, prompts
from transformers import PreTrainedModel

import offload

N_PROMPT = 430
# Sinks + window are 80 tokens: the context is over five times as long, and most of it goes to the host.
SETTINGS = {"page": 16, "sinks": 16, "window": 64}

MODES = {
    "plain": {"batch": 1, "chunk": 4096, "new": 24, "kwargs": {}},
    "chunked": {"batch": 1, "chunk": 100, "new": 24, "kwargs": {}},
    "padded": {"batch": 3, "chunk": 100, "new": 24, "kwargs": {}},
    "beams": {"batch": 1, "chunk": 128, "new": 16, "kwargs": {"num_beams": 3}},
}


def stock(family: Family, model: PreTrainedModel, **call: object) -> torch.Tensor:
    model.set_attn_implementation(family.stock_attention)
    return model.generate(**call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_the_stock_caches(name: str, mode: str) -> None:
    family, how = FAMILIES[name], MODES[mode]
    model = family.build()
    if mode == "padded":
        ids, mask = left_padded(how["batch"], N_PROMPT)
        inputs = {"input_ids": ids, "attention_mask": mask}
    else:
        inputs = {"input_ids": prompts(how["batch"], N_PROMPT)}
    call = {**inputs, "max_new_tokens": how["new"], "do_sample": False, **how["kwargs"]}
    want = stock(family, model, **call)
    with offload.attach(model, chunk=how["chunk"], **SETTINGS) as runtime:
        got = runtime.generate(**call)
        report = runtime.report()
    assert torch.equal(got, want)
    assert runtime.shape.offloaded == family.full_layers
    if family.full_layers:
        assert report.tokens_on_host > 300
        assert report.tokens_on_device <= 80 + 16
    # Detached, the model is as it was.
    assert torch.equal(stock(family, model, **call), want)
