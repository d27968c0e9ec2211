"""Every repetition does what its name says, from the same depth, which is read once."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, VOCAB, prompts

from offload import bench as module
from offload.bench import Case, Fidelity, Row, Sample, Subject, bench, cases, in_order, random_ids
from offload.config import OffloadConfig
from offload.errors import BudgetError, InputError
from offload.runtime import Runtime, attach

SETTINGS: dict[str, Any] = {"sinks": 64, "window": 256}
DEPTH, READ, MADE, TIMES = 500, 70, 8, 2


def build(name: str = "llama") -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model


def config(mode: str, **more: Any) -> OffloadConfig:
    return OffloadConfig.build(mode=mode, **SETTINGS, **more)


@dataclass
class Call:
    """One call of generate."""

    mode: str
    prompt: torch.Tensor
    reused: int
    made: int
    held: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of `Runtime.generate`, with what the cache held behind it."""
    made: list[Call] = []
    right = Runtime.generate

    def generate(self: Runtime, inputs: Any = None, **kwargs: Any) -> Any:
        result = right(self, inputs, **kwargs)
        report = self.report()
        made.append(
            Call(
                mode=self.config.mode, prompt=inputs.clone(), reused=report.reused_tokens,
                made=result.shape[1] - inputs.shape[1], held=kwargs["cache"].get_seq_length(),
            )
        )  # fmt: skip
        return result

    monkeypatch.setattr(Runtime, "generate", generate)
    return made


def sample(seconds: float = 1.0, tokens: int = 8, **more: Any) -> Sample:
    return Sample(tokens=tokens, seconds=seconds, **more)


def row(*samples: Sample, mode: str = "fast", case: Case | None = None, **more: Any) -> Row:
    subject = Subject(name="tiny", model_type="llama", parameters=1, weights_bytes=4, dtype="float32", device="cpu")  # fmt: skip
    case = case or Case(generated=8, depth=600)
    return Row(subject=subject, mode=mode, case=case, samples=samples, **more)


def test_cases_are_named_and_ordered_as_llama_bench_has_them() -> None:
    found = cases([512, 0, 2048, 512], [0, 128], [0, 32768])
    assert [case.name for case in found] == [
        "pp512",
        "pp2048",
        "tg128",
        "pp512 @ d32768",
        "pp2048 @ d32768",
        "tg128 @ d32768",
    ]
    assert [case.tokens for case in found[:3]] == [512, 2048, 128]


@pytest.mark.parametrize("lengths", [{}, {"prompt": 1, "generated": 1}, {"prompt": -1}])
def test_a_case_either_reads_or_generates(lengths: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="neither"):
        Case(**lengths)


@pytest.mark.parametrize("mode", ["exact", "fast", "verified"])
def test_every_repetition_starts_at_the_depth_which_is_read_once(
    mode: str, calls: list[Call]
) -> None:
    asked = cases([READ], [MADE], [0, DEPTH])
    rows = bench(build(), asked, configs=[config(mode)], repetitions=TIMES)
    assert [found.case for found in rows] == asked
    assert [len(found.samples) for found in rows] == [TIMES] * 4

    fills = [call for call in calls if call.prompt.shape[1] == DEPTH]
    assert len(fills) == 1
    assert sum(found.fills for found in rows) == 1
    assert all(found.goes_back for found in rows)
    for case in asked:
        runs = [call for call in calls if call.prompt.shape[1] == case.fed and call.held == case.room - 1]  # fmt: skip
        runs = [call for call in runs if call.made == (case.generated or 1)]
        assert len(runs) == TIMES + 1  # the warm-up is not counted
        assert [call.reused for call in runs] == [case.depth] * (TIMES + 1)
    assert len(calls) == 1 + 4 * (TIMES + 1)

    for found in rows:
        case = found.case
        for each in found.samples:
            assert each.tokens == case.tokens
            assert each.seconds > 0
            assert each.tokens_on_device + each.tokens_on_host == case.room - 1
        # Equal caches: what a run moves to the host was there since the warm-up.
        assert len({each.tokens_on_host for each in found.samples}) == 1
        assert (found.host_bytes > 0) == (case.depth > 0)


def test_one_cache_a_depth_has_room_for_the_longest_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int | None] = []
    right = Runtime.new_cache

    def new_cache(self: Runtime, max_tokens: int | None = None) -> Any:
        rooms.append(max_tokens)
        return right(self, max_tokens)

    monkeypatch.setattr(Runtime, "new_cache", new_cache)
    bench(build(), cases([READ], [MADE, 90], [0, 100]), configs=[config("exact")], repetitions=1)
    assert rooms == [1 + 90, 100 + 1 + 90]


def test_each_mode_is_attached_by_itself_and_the_model_is_given_back() -> None:
    model = build()
    before = model.config._attn_implementation
    rows = bench(model, cases([], [MADE], [DEPTH]), configs=[config("exact"), config("fast")], repetitions=1)  # fmt: skip
    assert [found.mode for found in rows] == ["exact", "fast"]
    assert [found.fidelity.steps for found in rows] == ["exact", "replica"]
    assert rows[1].rung is not None
    assert 0 < (rows[1].fidelity.tail_mass or 0) < 1
    assert model.config._attn_implementation == before
    attach(model).detach()


def test_a_model_that_cannot_go_back_is_filled_anew_for_every_run(calls: list[Call]) -> None:
    asked = cases([READ], [MADE], [0, DEPTH])
    rows = bench(build("gemma3"), asked, configs=[config("exact"), config("verified")], repetitions=TIMES)  # fmt: skip
    shallow, deep = rows[:2], rows[2:4]
    assert all(found.goes_back and not found.fills for found in shallow)
    assert all(not found.goes_back and found.fills == TIMES + 1 for found in deep)
    assert len([call for call in calls if call.prompt.shape[1] == DEPTH]) == 2 * (TIMES + 1)
    for case in asked:
        runs = [c for c in calls if c.prompt.shape[1] == case.fed and c.made == (case.generated or 1)]  # fmt: skip
        assert [(c.reused, c.held) for c in runs] == [(case.depth, case.room - 1)] * (TIMES + 1)
    assert [found.status for found in rows[4:]] == ["not supported"] * 4
    assert "cannot forget" in rows[4].reason


def test_what_does_not_fit_is_a_row_and_the_others_go_on() -> None:
    model = build()
    asked = cases([3000], [MADE], [0, 300])
    # A page of this model's 4 layers of 128 B a token is 32 KiB: two beyond the window, not forty.
    rows = bench(model, asked, configs=[config("exact", cpu_memory="128KiB")], repetitions=1)
    assert [found.status for found in rows] == [
        "does not fit", "measured", "does not fit", "measured",
    ]  # fmt: skip
    assert "memory.cpu" in rows[0].reason
    assert not rows[0].samples
    assert rows[0].to_dict()["tokens_per_s"] is None


def test_a_mode_that_does_not_fit_at_all_has_only_such_rows() -> None:
    rows = bench(build(), cases([READ], [MADE]), configs=[config("exact", gpu_memory="1KiB"), config("exact")], repetitions=1)  # fmt: skip
    assert sorted(found.status for found in rows) == ["does not fit"] * 2 + ["measured"] * 2


def test_a_run_that_runs_out_of_memory_costs_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runtime.generate

    def generate(self: Runtime, inputs: Any = None, **kwargs: Any) -> Any:
        if kwargs["max_new_tokens"] == MADE:
            raise BudgetError("The pool", requested=2, available=1, setting="memory.cpu")
        return right(self, inputs, **kwargs)

    monkeypatch.setattr(Runtime, "generate", generate)
    rows = bench(build(), cases([READ], [MADE]), configs=[config("exact")], repetitions=1)
    assert [found.status for found in rows] == ["measured", "does not fit"]


def test_the_given_tokens_are_those_that_are_read(calls: list[Call]) -> None:
    ids = prompts(1, 400, seed=7)
    bench(build(), cases([READ], [MADE], [100]), configs=[config("exact")], ids=ids, repetitions=1)
    assert calls
    assert all(torch.equal(call.prompt, ids[:, : call.prompt.shape[1]]) for call in calls)


def test_a_text_that_is_too_short_says_what_is_there() -> None:
    with pytest.raises(InputError) as caught:
        bench(build(), cases([READ], [MADE], [DEPTH]), configs=[config("exact")], ids=prompts(1, DEPTH + READ))  # fmt: skip
    assert (caught.value.asked, caught.value.there) == ("571 tokens", "570 tokens")
    with pytest.raises(InputError, match="Nothing is counted"):
        bench(build(), cases([READ], []), configs=[config("exact")], repetitions=0)


def test_random_tokens_come_from_the_seed() -> None:
    model = build()
    ids = random_ids(model, 300, seed=1)
    assert torch.equal(ids, random_ids(model, 300, seed=1))
    assert torch.equal(ids[:, :20], random_ids(model, 20, seed=1))
    assert not torch.equal(ids, random_ids(model, 300, seed=2))
    assert int(ids.max()) < VOCAB
    assert PAD in ids  # it hides nothing: a mask goes with it


def test_the_end_of_a_text_ends_no_run_and_what_does_is_told() -> None:
    model = build()
    model.generation_config.eos_token_id = list(range(VOCAB))
    (found,) = bench(model, cases([], [MADE]), configs=[config("exact")], repetitions=1)
    assert found.samples[0].tokens_on_device == MADE
    model.generation_config.max_time = 1e-9
    with pytest.raises(InputError) as caught:
        bench(model, cases([], [MADE]), configs=[config("exact")], repetitions=1)
    assert caught.value.there == "0 read, 1 generated"


def test_an_interrupted_run_has_told_its_rows_and_gives_the_model_back() -> None:
    model, rows = build(), []

    def keep(found: Row) -> None:
        rows.append(found)
        if len(rows) == 2:
            raise KeyboardInterrupt

    asked = cases([READ], [MADE], [0, 100])
    with pytest.raises(KeyboardInterrupt):
        bench(model, asked, configs=[config("exact")], repetitions=1, on_row=keep)
    assert [found.case.name for found in rows] == ["tg8", "pp70"]  # the shorter one first
    assert [found.case.name for found in in_order(rows, asked)] == ["pp70", "tg8"]
    attach(model).detach()


def test_there_is_a_delay_between_two_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("offload.bench.time.sleep", slept.append)
    bench(build(), cases([READ], [MADE], [0, 9]), configs=[config("exact")], repetitions=1, delay_s=0.5)  # fmt: skip
    assert slept == [0.5] * 3


def test_compiling_never_begins_in_the_middle_of_the_repetitions() -> None:
    short, long = cases([], [8]), cases([], [8, 4096])
    assert module._settled(config("fast"), short).decode.compile is False
    assert module._settled(config("fast"), long).decode.compile is True
    assert module._settled(config("fast", compile=True), short).decode.compile is True
    assert module._settled(config("fast", compile=False), long).decode.compile is False


def test_a_row_is_the_mean_of_its_samples_and_the_most_that_any_took() -> None:
    found = row(
        sample(1.0, device_bytes=10, host_bytes=7, peak_bytes=12),
        sample(2.0, device_bytes=11, host_bytes=6, peak_bytes=20),
    )
    assert found.tokens_per_s == 6.0
    assert found.deviation == statistics.stdev([8.0, 4.0])
    assert found.ms_per_token == 187.5
    assert (found.device_bytes, found.peak_bytes, found.host_bytes) == (11, 20, 7)
    assert row(sample(1.0)).deviation == 0.0
    assert row(sample(1.0)).peak_bytes is None


def test_a_sample_has_the_seconds_of_its_case_without_capturing_and_the_bytes_of_both_tiers() -> (
    None
):
    with attach(build(), mode="exact") as runtime:
        report = replace(
            runtime.report(), prefill_s=2.0, decode_s=5.0, capture_s=1.0,
            bytes={"weights": 8, "window": 4, "host_pinned": 2, "host_pageable": 1},
        )  # fmt: skip
    reading = module._sample(Case(prompt=6, depth=9), report, None)
    writing = module._sample(Case(generated=8, depth=9), report, 13)
    assert (reading.tokens, reading.seconds, reading.tokens_per_s) == (6, 2.0, 3.0)
    assert (writing.tokens, writing.seconds, writing.tokens_per_s) == (8, 4.0, 2.0)
    assert (writing.device_bytes, writing.host_bytes, writing.peak_bytes) == (12, 3, 13)
    assert (reading.peak_bytes, writing.capture_s) == (None, 1.0)


def test_fidelity_says_what_the_steps_were() -> None:
    offloaded: dict[str, Any] = {"tokens_on_host": 64}
    half = sample(tail_mass=0.5, skipped_mass=0.25, error_estimate=0.5, **offloaded)
    none = sample(tail_mass=0.0, skipped_mass=0.75, error_estimate=0.0, **offloaded)
    unknown = sample(tail_mass=0.5, skipped_mass=0.25, error_estimate=None, **offloaded)
    exact = Fidelity(steps="exact")
    assert row(half, none, rung="4k4v").fidelity == Fidelity(
        steps="replica", tail_mass=0.25, skipped_mass=0.5, error_estimate=0.25
    )
    assert row(half, unknown, rung="clusters").fidelity.error_estimate is None
    assert row(half, rung="4k4v", case=Case(prompt=8, depth=600)).fidelity == exact
    assert row(half, mode="exact").fidelity == exact
    assert row(half, rung=None).fidelity == exact  # every token was streamed
    assert row(sample(tail_mass=0.5), rung="4k4v").fidelity == exact  # nothing was offloaded
    drafted = [sample(verify_passes=2, accepted_tokens=9), sample(verify_passes=2, accepted_tokens=5)]  # fmt: skip
    assert row(*drafted, mode="verified", rung="4k4v").fidelity == Fidelity(
        steps="verified", accepted_per_pass=3.5
    )


@pytest.mark.gpu
def test_on_a_card_the_peak_is_counted_and_capturing_is_not_timed() -> None:
    model = build().cuda()
    rows = bench(model, cases([READ], [MADE], [DEPTH]), configs=[config("fast")], repetitions=TIMES)
    for found in rows:
        assert found.peak_bytes is not None
        assert found.peak_bytes >= found.subject.weights_bytes
    for each in rows[1].samples:
        assert each.capture_s > 0
        assert each.seconds > 0
    assert any("not compiled" in note for note in rows[1].notes)
