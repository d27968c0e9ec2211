"""Greedy tokens equal the stock cache's, for every family and every way of calling generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, TIERS, Family, left_padded, prompts

import offload

N_PROMPT = 430
# Sinks + window are 80 tokens: the context is over five times as long, and most of it goes to the host.
SETTINGS = TIERS


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way of calling generate."""

    batch: int = 1
    chunk: int
    new: int = 24
    beams: int = 1


MODES = {
    "plain": Mode(chunk=4096),
    "chunked": Mode(chunk=100),
    "padded": Mode(batch=3, chunk=100),
    "beams": Mode(chunk=128, new=16, beams=3),
}


def stock(family: Family, model: Any, **call: Any) -> torch.Tensor:
    model.set_attn_implementation(family.stock_attention)
    tokens: torch.Tensor = model.generate(**call)
    return tokens


# On a GPU one mode is enough for every family: it has chunks, a batch and a mask. Beams move pages as well.
ON_GPU = [(name, "padded") for name in FAMILIES] + [("llama", "beams"), ("gemma3", "beams")]
CASES = [
    *(pytest.param(name, mode, "cpu", id=f"{name}-{mode}") for name in FAMILIES for mode in MODES),
    *(
        pytest.param(name, mode, "cuda", id=f"{name}-{mode}-cuda", marks=pytest.mark.gpu)
        for name, mode in ON_GPU
    ),
]


@pytest.mark.parametrize(("name", "mode", "device"), CASES)
def test_greedy_tokens_equal_the_stock_caches(name: str, mode: str, device: str) -> None:
    family, how = FAMILIES[name], MODES[mode]
    model: Any = family.build()
    model.to(device)
    if mode == "padded":
        ids, mask = left_padded(how.batch, N_PROMPT)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    else:
        inputs = {"input_ids": prompts(how.batch, N_PROMPT).to(device)}
    call: dict[str, Any] = {
        **inputs,
        "max_new_tokens": how.new,
        "do_sample": False,
        "num_beams": how.beams,
    }
    want = stock(family, model, **call)
    with offload.attach(model, chunk=how.chunk, **SETTINGS) as runtime:
        got = runtime.generate(**call)
        report = runtime.report()
    assert torch.equal(got, want)
    assert runtime.shape.offloaded == family.full_layers
    if family.full_layers:
        assert report.tokens_on_host > 300
        assert report.tokens_on_device <= 80 + 16
    # Detached, the model is as it was.
    assert torch.equal(stock(family, model, **call), want)
