"""Steps that leave tokens out: with none left out they are the stock cache's, and what they take is what was planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, left_padded, prompts

import offload
from offload.errors import ConfigError
from offload.scheduler import window
from offload.scheduler.window import SparseWindow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ON = pytest.mark.parametrize("device", DEVICES)
SETTINGS: dict[str, Any] = {
    "mode": "fast", "page": 16, "sinks": 0, "window": 48, "chunk": 100, "compile": False,
}  # fmt: skip
N = 300
CALL: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}


def build(name: str, device: str) -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model.to(device)


@ON
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("near", [None, 64, 0, 16], ids=["near", "both", "far", "ahead"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss", "opt"])
def test_where_none_is_left_out_the_tokens_are_the_stock_caches(
    name: str, padded: bool, near: int | None, capture: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if device == "cpu" and capture:
        pytest.skip("graphs are captured on a card only")
    monkeypatch.setattr(SparseWindow, "chosen", lambda self, tokens: tokens)
    if near is not None:
        monkeypatch.setattr(SparseWindow, "near", lambda self, tokens: [near])
    if near == 16:  # most rows on the host do not come while the layer before computes
        monkeypatch.setattr(window, "STAGED_BYTES", 0)
    model = build(name, device)
    ids, mask = left_padded(2, N, pads=(0, 90))
    inputs: dict[str, Any] = {"attention_mask": mask.to(device)} if padded else {}
    want = model.generate(ids.to(device), **inputs, **CALL)
    with offload.attach(model, **SETTINGS, sparsity=0.5, capture=capture) as runtime:
        got = runtime.generate(ids.to(device), **inputs, **CALL)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.rung == "window"
    assert report.tokens_on_host > 200
    assert report.left_out is not None
    assert report.left_out < 1e-5
    row = report.selected_bytes
    assert report.fetched_bytes == (row if near == 0 else 0 if near is None else pytest.approx(row * (1 - near / 304), rel=0.2))  # fmt: skip
    assert any("are read on the host" in note for note in report.notes) == (near is not None)


@ON
def test_what_is_left_out_is_said_and_planned(device: str) -> None:
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    with offload.attach(model, **SETTINGS, sparsity=0.7) as runtime:
        cache = runtime.new_cache(max_tokens=N + 60)
        runtime.generate(ids, cache=cache, **CALL)
        report = runtime.report()
        layout = cache.layout
        assert layout is not None
        paths = [store.path for store in cache.layer_stores]
        assert all(path is not None for path in paths)
        # 30 of 100 tokens, the window among them.
        length = cache.get_seq_length()
        for store, path in zip(cache.layer_stores, paths, strict=True):
            assert path is not None
            attended = path.selected_bytes()[0] // (2 * 2 * store.shape.width * store.shape.dtype.itemsize)  # fmt: skip
            assert 0 < attended + store.device_tokens <= 0.3 * length
            assert path.nbytes + path.row_cache_nbytes > 0
        for planned, measured in (("replica", "replica"), ("cached rows", "cached rows")):
            assert report.bytes is not None
            assert 0.7 * layout.device[planned] <= report.bytes[measured] <= layout.device[planned]
        # Again the same tokens, and exactly where all is attended to.
        first = runtime.generate(ids, **CALL)
        assert torch.equal(runtime.generate(ids, **CALL), first)
    assert report.left_out is not None
    assert 0.2 < report.left_out < 0.9
    assert report.error_estimate is None
    assert "left out" in str(report)


@ON
def test_what_fits_the_device_is_attended_to_and_a_length_has_to_be_known(device: str) -> None:
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    want = model.generate(ids, **CALL)
    settings = SETTINGS | {"window": "auto"}
    with offload.attach(model, **settings, sparsity=0.9) as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)
        assert runtime.report().rung is None
    with offload.attach(model, **SETTINGS, sparsity=0.9) as runtime:
        cache = runtime.new_cache()
        assert torch.equal(runtime.generate(ids, cache=cache, **CALL), want)
        assert runtime.report().rung is None


@ON
def test_a_budget_that_has_no_room_for_all_rows_leaves_some_on_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        window, "STAGED_BYTES", 0
    )  # else two layers' memory is as large as what is left out
    model = build("llama", device)
    ids = prompts(2, N).to(device)
    with offload.attach(model, **SETTINGS, sparsity=0.2, staging="64KiB") as runtime:
        whole = runtime.generate(ids, **CALL)
        most = runtime._last.layout
    assert most is not None
    budget = most.device_bytes - most.device["cached rows"] // 4
    if device == "cuda":
        pytest.skip("the budget of a card is in steps of what its allocator holds")
    with offload.attach(model, **SETTINGS, sparsity=0.2, gpu_memory=budget, staging="64KiB") as runtime:  # fmt: skip
        assert torch.equal(runtime.generate(ids, **CALL), whole)
        report, layout = runtime.report(), runtime._last.layout
    assert layout is not None
    assert layout.device_bytes <= budget
    assert {rung.near for rung in layout.rungs} != {most.rungs[0].near}
    assert report.fetched_bytes > 0


@pytest.mark.parametrize(
    "other",
    [{"mode": "exact"}, {"mode": "verified"}, {"rung": "4k4v"}, {"ladder": True}, {"index": "flat"}, {"retrieved": 64}, {"row_cache": 128}],
)  # fmt: skip
def test_keys_that_exclude_it_are_named(other: dict[str, Any]) -> None:
    model = build("llama", "cpu")
    with pytest.raises(ConfigError, match="leave tokens out"):
        offload.attach(model, sparsity=0.5, **other)
