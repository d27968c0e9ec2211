"""Device bytes stay under the budget at every step; memory comes back when a cache goes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES, TIERS, prompts

import offload
from offload.hardware import DeviceMemory
from offload.tiers.store import LayerStore
from offload.units import GIB, KIB

CALL: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
N = 700


def buffers(stores: list[Any]) -> int:
    """Device bytes of stores and of their shared buffers, counted from the tensors themselves."""
    total: int = sum(store.device_bytes for store in stores)
    for part in (stores[0]._reader, stores[0]._writer):
        total += sum(buffer.nbytes for buffer in part._buffers)
    return total


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_device_bytes_stay_under_the_budget_at_every_step(share: float, batch: int) -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, mode="exact", page=16, sinks=16, chunk=64) as free:
        budget = free.budget_for(kv_share=share, prompt_tokens=N, new_tokens=40, batch=batch)
    with offload.attach(
        model, mode="exact", page=16, sinks=16, chunk=64, gpu_memory=budget
    ) as runtime:
        caches: list[Any] = []
        held: list[int] = []

        def measure(*_: Any) -> None:
            caches[:] = [cache for cache in runtime._caches if cache.stores]
            held.extend(runtime.shape.weights + buffers(cache.stores) for cache in caches)

        model.register_forward_hook(measure)
        runtime.generate(prompts(batch, N), **CALL)
        report = runtime.report()
    assert len(held) >= 40
    # What the pools do not take is what the plan keeps for activations.
    assert max(held) + report.planned["workspace"] <= budget
    assert sum(report.planned.values()) <= budget
    if share < 1:
        assert report.tokens_on_host > 0
        assert report.tokens_on_device >= share * N * 0.9
    else:
        assert report.tokens_on_host == 0


def test_host_bytes_are_those_of_the_tokens_and_no_more() -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, **TIERS) as runtime:
        runtime.generate(prompts(1, N), **CALL)
        report = runtime.report()
        page = 16 * runtime.shape.token_bytes[0]
        layers = len(runtime.shape.rows)
    pages = -(-(N + 40 - 80) // 16)
    assert report.bytes["host_pinned"] == layers * pages * page
    assert report.bytes["host_pageable"] == 0


def test_a_pin_limit_leaves_the_rest_pageable_and_is_named_in_the_report() -> None:
    model: Any = FAMILIES["llama"].build()
    want = model.generate(prompts(1, N), **CALL)
    settings = TIERS | {"chunk": 100}
    with offload.attach(model, pinned_memory=64 * KIB, **settings) as runtime:
        got = runtime.generate(prompts(1, N), **CALL)
        report = runtime.report()
    assert got.tolist() == want.tolist()
    assert 0 < report.bytes["host_pinned"] <= 64 * KIB
    assert report.bytes["host_pageable"] > 0
    assert report.bounced_bytes > 0
    assert any("pinned" in note for note in report.notes)


def test_a_cache_without_a_length_grows_as_it_is_used() -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, **TIERS) as runtime:
        cache = runtime.new_cache()
        ids = prompts(1, 200)
        for _ in range(3):
            turn: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            want = model.generate(**turn, **CALL)
            ids = runtime.generate(**turn, past_key_values=cache, **CALL)
            assert torch.equal(ids, want)
        store: Any = cache.stores[0]
        assert store.host_tokens + 16 * 6 >= ids.shape[1] - 1
        assert store.host_tokens <= store._table.capacity * 16 <= 2 * store.host_tokens


def test_memory_comes_back_when_a_cache_is_closed_or_forgotten() -> None:
    model: Any = FAMILIES["llama"].build()
    gc.collect()
    before = sum(type(o) is LayerStore for o in gc.get_objects())
    with offload.attach(model, **TIERS) as runtime:
        gc.disable()
        try:
            runtime.generate(prompts(1, N), **CALL)
            alive = sum(type(o) is LayerStore for o in gc.get_objects())
        finally:
            gc.enable()
        assert alive == before  # without waiting for the collector
        held = runtime.budgets.pins.held
        for _ in range(3):  # host pages are used again, not taken again
            runtime.generate(prompts(1, N), **CALL)
        assert runtime.budgets.pins.held == held
        cache = runtime.new_cache()
        runtime.generate(prompts(1, N), past_key_values=cache, **CALL)
        del cache
        gc.collect()
        runtime.generate(prompts(1, N), **CALL)
        assert runtime.budgets.pins.held == held
        pins = runtime.budgets.pins
    assert pins.held == 0


def test_weights_that_are_mapped_from_a_file_are_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = FAMILIES["llama"].build()
    memory = DeviceMemory(total=GIB, free=GIB, allocated=0, overhead=0)
    monkeypatch.setattr("offload.budget.device_memory", lambda device: memory)
    with offload.attach(model, reserve="1KiB") as runtime:
        assert runtime.report().budget == GIB - KIB
