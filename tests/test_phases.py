"""Does a run go through the phases that its layout plans, at those tokens, and give the stock cache's tokens?"""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

import offload
from offload.config import OffloadConfig
from offload.profile import profile
from offload.scheduler.layout import Layout
from offload.scheduler.phases import Phase, course
from offload.scheduler.rungs import RUNGS
from offload.trace import PLACEMENTS, perfetto

_TIERS: dict[str, Any] = {"mode": "exact", "page": 16, "sinks": 16, "window": 64, "chunk": 48}
_P1 = (1 + 4 + 1) * 16 - 1  # one sink, four blocks of the window, and a tail that is not whole
_CALL: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def layout_of(*, sinks: int, window: int, page: int, half: bool, host: int | None = None) -> Layout:
    return Layout(
        chunk=128, sink_blocks=sinks, window_blocks=window, host_tokens=0, staging_bytes=0,
        eviction_bytes=0, device={}, host={}, rungs=RUNGS[:1] if half else (), page=page, host_blocks=host,
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [50, 200])
def test_tokens_leave_the_device_at_the_token_that_is_planned(prompt: int) -> None:
    model: Any = FAMILIES["llama"].build()
    ids = prompts(1, prompt)
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=100, **_CALL)
    with offload.attach(model, **_TIERS) as runtime:
        got = runtime.generate(ids, attention_mask=mask, max_new_tokens=100, **_CALL)
        report = runtime.report()
    assert torch.equal(got, want)
    (change,) = report.phases
    assert (change.phase, change.planned) == ("II", _P1 + 1)
    # While the prompt is read tokens come in chunks of 48: the second one ends with the token with which a block leaves.
    assert change.tokens == _P1 + 1
    assert "II from 96 tokens, as planned" in str(report)
    assert report.to_dict()["phases"][0]["tokens"] == _P1 + 1


def test_a_prefill_changes_phase_with_a_chunk() -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, **_TIERS | {"chunk": 64}) as runtime:
        runtime.generate(prompts(1, 200), max_new_tokens=4, **_CALL)
        (change,) = runtime.report().phases
    assert (change.planned, change.tokens) == (_P1 + 1, 128)
    assert str(change) == "II from 128 tokens, planned from 96"


def test_a_run_that_ends_before_has_one_phase() -> None:
    model: Any = FAMILIES["llama"].build()
    with offload.attach(model, **_TIERS) as runtime:
        runtime.generate(prompts(1, 50), max_new_tokens=_P1 - 50, **_CALL)
        assert runtime.report().phases == []
        # Planned for, as far as anyone knows; but the answer ends sooner.
        stop = runtime.generate(prompts(1, 50), max_new_tokens=1, **_CALL)[0, -1]
        call = _CALL | {"eos_token_id": int(stop)}
        runtime.generate(prompts(1, 50), max_new_tokens=200, **call)
        (change,) = runtime.report().phases
    assert (change.planned, change.tokens, change.at) == (_P1 + 1, None, None)
    assert str(change) == "II planned from 96 tokens, not reached"


def test_a_cache_that_goes_back_is_in_the_first_phase_again() -> None:
    model: Any = FAMILIES["llama"].build()
    with torch.no_grad(), offload.attach(model, **_TIERS) as runtime:
        cache = runtime.new_cache(max_tokens=400)
        model(input_ids=prompts(1, 150), past_key_values=cache)

        def left() -> int | None:
            change = cache.layer_stores[0].left
            return None if change is None else change.tokens

        assert left() == 150
        cache.crop(-130)
        assert left() is None
        for token in prompts(1, 100)[0, 20:]:
            model(input_ids=token[None, None], past_key_values=cache)
        # What is left of the window is not filled again from the host: it has room for four blocks again.
        assert left() == _P1 + 1


@pytest.mark.parametrize("mode", ["exact", "fast"])
@settings(max_examples=12, deadline=None)
@given(prompt=st.integers(2, 700), more=st.integers(1, 300))
def test_the_rule_of_a_layout_is_what_stores_do(mode: str, prompt: int, more: int) -> None:
    model: Any = FAMILIES["llama"].build()
    tiers: dict[str, Any] = {"mode": mode, "sinks": 64, "window": 256, "chunk": 128}
    with torch.no_grad(), offload.attach(model, **tiers) as runtime:
        cache = runtime.new_cache(max_tokens=1000)
        for start in range(0, prompt - 1, 128):
            ids = prompts(1, prompt)[:, start : min(start + 128, prompt - 1)]
            model(input_ids=ids, past_key_values=cache)
        alone = (prompt - 1) % 128 == 1  # such a chunk is a step
        for tokens in range(prompt, prompt + more):
            model(input_ids=torch.ones((1, 1), dtype=torch.long), past_key_values=cache)
            layout, (store, *_) = cache.layout, cache.layer_stores
            assert layout is not None
            if alone and mode == "fast":
                continue
            assert store.host_tokens == layout.on_host(tokens, prompt=prompt)
            phase = course(layout, tokens=None).phase(tokens)
            assert (phase is Phase.DEVICE) == (store.left is None)


@given(
    sinks=st.integers(0, 3), window=st.integers(1, 9), page=st.sampled_from([1, 16, 64]),
    half=st.booleans(), prompt=st.integers(0, 900), host=st.none() | st.integers(0, 8),
)  # fmt: skip
def test_tokens_leave_one_way_and_every_token_is_somewhere(
    sinks: int, window: int, page: int, half: bool, prompt: int, host: int | None
) -> None:
    layout = layout_of(sinks=sinks, window=window, page=page, half=half, host=host)
    before = (0, 0)
    found = course(layout, tokens=1000, prompt=prompt)
    for tokens in range(1, 1001):
        on_host = layout.on_host(tokens, prompt=prompt)
        now = (
            on_host + layout.dropped(tokens, prompt=prompt),
            layout.dropped(tokens, prompt=prompt),
        )
        assert now >= before
        assert 0 <= now[0] <= tokens
        assert host is None or on_host <= host * page
        assert (found.phase(tokens) is not Phase.DEVICE) == (tokens > layout.most_on_device) == (now[0] > 0)  # fmt: skip
        before = now
    assert found.host_share == layout.on_host(1000, prompt=prompt) / 1000


def test_the_trace_shows_the_phases() -> None:
    config = OffloadConfig.build(None, **_TIERS)
    found = profile(
        FAMILIES["llama"].build(), config, prompts(1, 50), max_new_tokens=100, looked_at=0
    )
    ((at, phase),) = found.changes
    assert phase == "II"
    # The token with which the first block left came after the 46th token of the answer and not behind the 49th.
    times = {tokens: when for when, tokens in found.bursts}
    assert times[_P1 - 50] < at < times[_P1 - 50 + 4]
    data = perfetto([], found.samples, found.bursts, prefill_until=found.prefill_until, changes=found.changes)  # fmt: skip
    rows = json.loads(gzip.decompress(data))["traceEvents"]
    slices = [row for row in rows if row.get("tid") == 3 and row["ph"] == "X"]
    assert [row["name"] for row in slices] == [f"phase {p}: {PLACEMENTS[p]}" for p in ("I", "II")]
    assert slices[0]["ts"] + slices[0]["dur"] == pytest.approx(slices[1]["ts"], abs=1)
    assert slices[1]["ts"] == pytest.approx(1e6 * at, abs=1)
    assert found.to_dict()["phases"] == [{"at_s": at, "phase": "II"}]
