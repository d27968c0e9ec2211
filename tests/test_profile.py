"""Where bytes and milliseconds of a run went, and whether it was planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts

from offload import profile as profiles
from offload.config import OffloadConfig
from offload.demand import DRIVER_GROWTH
from offload.errors import InputError
from offload.hardware import DeviceMemory
from offload.parts import Part
from offload.profile import LEAD, profile
from offload.runtime import Runtime
from offload.trace import Recorder, Sample

N = 500


def settings(**more: Any) -> OffloadConfig:
    return OffloadConfig.build(None, **({"sinks": 64, "window": 256, "mode": "fast"} | more))


def build() -> Any:
    return FAMILIES["llama"].build()


@pytest.mark.parametrize("mode", ["fast", "exact", "verified"])
def test_a_run_is_measured_beside_its_plan(mode: str) -> None:
    found = profile(build(), settings(mode=mode), prompts(1, N), max_new_tokens=10, looked_at=4)
    report = found.report
    assert (report.mode, report.prompt_tokens, report.new_tokens) == (mode, N, 10)
    assert found.bursts[-1][1] == 10
    assert len(found.token_ms) == 10 - found.bursts[0][1]
    assert 0 < found.prefill_until == found.bursts[0][0] <= found.samples[-1].at
    parts = {part.purpose: part for part in found.device}
    assert ("replica" in parts) == (mode != "exact")
    for purpose in ("sinks, window, tail", "staging", "eviction"):
        assert parts[purpose].measured == parts[purpose].planned
    assert parts["passes and states"].measured is None  # nobody counts on a CPU
    assert (found.peak, found.unaccounted) == (None, None)
    (pages,) = found.host
    assert pages.planned >= (pages.measured or 0) > 0
    assert found.looked_at >= 4
    assert found.engines["matrix products"] > 0
    assert sum(found.engines.values()) <= 1000 * found.looked_s / found.looked_at


def test_the_answer_is_as_long_as_asked_and_the_model_as_it_was() -> None:
    model = build()
    model.generation_config.eos_token_id = list(range(128))  # any token would end it
    implementation = model.config._attn_implementation
    found = profile(model, settings(), prompts(1, N), max_new_tokens=7, looked_at=0)
    assert found.report.new_tokens == 7
    assert (found.kernels, found.events, found.looked_at) == ([], [], 0)
    assert model.config._attn_implementation == implementation


def test_there_is_room_for_the_tokens_that_are_looked_at() -> None:
    found = profile(build(), settings(), prompts(1, N), max_new_tokens=5, looked_at=70)
    # Two pages more than the run alone: planned for, or the second generate would not have gone through.
    alone = profile(build(), settings(), prompts(1, N), max_new_tokens=5, looked_at=0)
    assert found.host[0].planned >= alone.host[0].planned
    assert 70 <= found.looked_at <= LEAD + 72


def test_what_no_purpose_explains_is_unaccounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, with an allocator and a driver that say what they are told to say."""
    report = profile(build(), settings(), prompts(1, N), max_new_tokens=3, looked_at=0).report
    mib = 2**20
    there = {"weights": 100 * mib, "window": 10 * mib, "replica": 5 * mib, "cached rows": 0, "staging": 2 * mib, "eviction": mib}  # fmt: skip
    planned = dict.fromkeys(report.planned, 0) | {"weights": 100 * mib, "sinks and window": 9 * mib, "tail": mib, "overhead": 700 * mib}  # fmt: skip
    planned["workspace"] = 25 * mib
    report = replace(report, bytes=report.bytes | there, planned=planned)
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 150 * mib)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 180 * mib)
    recorder = Recorder(torch.device("cpu"))
    recorder.samples = [
        Sample(0.0, 0, 0, 500 * mib),
        Sample(0.5, 9, 180 * mib, 760 * mib),
        Sample(1.0, 9, 160 * mib, 720 * mib),
    ]
    before = DeviceMemory(total=2**40, free=2**39, allocated=101 * mib, overhead=500 * mib)
    parts, peak, unaccounted = profiles._device_parts(report, before, recorder, card)
    measured = {part.purpose: part.measured for part in parts}
    assert measured["weights"] == 101 * mib  # other live tensors too
    # Passes took 31 MiB where 25 were planned: six that nobody accounts for.
    assert measured["passes and states"] == 25 * mib
    assert measured["allocator"] == 30 * mib
    assert measured["driver"] == 560 * mib
    assert peak == 760 * mib
    assert unaccounted == (760 - 180 - 560 + 6) * mib
    recorder.samples[1] = Sample(0.5, 9, 9, 9)  # the peak was between two samples
    assert profiles._device_parts(report, before, recorder, card)[1:] == (740 * mib, 6 * mib)
    # Somebody else took the card meanwhile: more than a driver grows by.
    recorder.samples[2] = Sample(1.0, 9, 160 * mib, 1720 * mib)
    parts, peak, unaccounted = profiles._device_parts(report, before, recorder, card)
    assert Part("driver", 500 * mib + DRIVER_GROWTH, 500 * mib + DRIVER_GROWTH) in parts
    assert unaccounted == (1560 - 500 + 6) * mib - DRIVER_GROWTH


def test_a_pass_of_mode_verified_is_one_burst_that_is_looked_at_whole() -> None:
    found = profile(build(), settings(mode="verified", draft=16), prompts(1, N), max_new_tokens=60, looked_at=20)  # fmt: skip
    report = found.report
    assert report.verify_passes >= 3
    assert len(found.bursts) <= report.verify_passes + 2
    assert len(found.token_ms) == 60 - found.bursts[0][1]
    assert sum(found.token_ms) / 1000 == pytest.approx(report.decode_s, rel=0.5)
    assert found.looked_at >= 16  # a whole pass
    assert found.looked_s / found.looked_at > 0.2 * report.decode_s / 60
    assert found.engines["matrix products"] > 0


@pytest.mark.parametrize("name", ["mistral_sliding", "gpt2", "bamba"])
def test_any_model_that_attaches_is_profiled(name: str) -> None:
    found = profile(FAMILIES[name].build(), settings(mode="exact"), prompts(1, 300), max_new_tokens=4, looked_at=2)  # fmt: skip
    assert found.report.new_tokens == 4
    assert found.looked_at == 2


def test_what_was_measured_is_there_if_no_more_tokens_fit() -> None:
    model = build()
    model.config.max_position_embeddings = N + 12
    found = profile(model, settings(), prompts(1, N), max_new_tokens=5, looked_at=16)
    assert (found.report.new_tokens, found.looked_at) == (5, 0)


def test_an_interrupt_leaves_no_profiler_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = build(), Runtime.generate
    calls: list[int] = []

    def generate(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            put, more["streamer"].put = more["streamer"].put, None
            del put
        return right(self, *given, **more)

    monkeypatch.setattr(Runtime, "generate", generate)
    with pytest.raises(TypeError):
        profile(model, settings(), prompts(1, N), max_new_tokens=4, looked_at=2)
    assert not torch._C._autograd._profiler_enabled()
    assert getattr(model, "_offload_runtime", None) is None


@pytest.mark.gpu
def test_nearly_every_byte_of_a_card_is_accounted_for() -> None:
    model = build().to("cuda", torch.bfloat16)
    found = profile(model, settings(), prompts(1, N).cuda(), max_new_tokens=20, looked_at=8)
    assert found.peak is not None
    assert found.unaccounted is not None
    assert abs(found.unaccounted) <= max(0.01 * found.peak, 4 * 2**20)
    assert found.engines["selected rows"] > 0
    assert {event.track.split()[0] for event in found.events} == {"stream"}


@pytest.mark.parametrize(("sequences", "tokens"), [(2, 5), (1, 0)])
def test_what_cannot_be_profiled_is_refused(sequences: int, tokens: int) -> None:
    with pytest.raises(InputError, match="one sequence and at least one token"):
        profile(build(), settings(), prompts(sequences, N), max_new_tokens=tokens)
