"""The search for better settings, with runs that are made up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.config import OffloadConfig
from offload.errors import BudgetError, InputError
from offload.tune import (
    GAIN,
    Outcome,
    Predicted,
    Runs,
    Tuned,
    knobs,
    tune,
    tuned_toml,
    with_settings,
)

CONFIG = OffloadConfig.build(None, mode="fast")
OUTPUT = 100


def made_up(config: OffloadConfig) -> Outcome:
    """Faster with smaller chunks down to 2,048 and with whole layers; fewer exact tokens cost fidelity."""
    chunk = config.prefill.chunk
    prefill = {1024: 12.0, 2048: 6.0, 4096: 8.0}.get(chunk if isinstance(chunk, int) else 0, 10.0)
    whole = config.replica.whole_layers == 2
    selected = config.retrieval.tokens
    error = {32: 0.04, 64: 0.02, 128: 0.01}.get(selected if isinstance(selected, int) else 64, 0.02)
    token = (0.008 if whole else 0.010) * (0.9 if selected == 32 else 1.0)
    return Outcome(prefill_s=prefill, token_s=token, error=error)


def search(measure: Callable[[OffloadConfig], Outcome] = made_up, **more: Any) -> Tuned:
    given: dict[str, Any] = {"objective": "speed", "output": OUTPUT} | more
    config, runs = given.pop("config", CONFIG), given.pop("runs", None)
    return tune(config, measure, runs or Runs(None, {}), **given)


def test_speed_is_gained_where_fidelity_stays() -> None:
    found = search()
    assert found.settings == {"prefill.chunk": 2048, "replica.whole_layers": 2}
    assert found.before.seconds(OUTPUT) == pytest.approx(11.0)
    assert found.after.seconds(OUTPUT) == pytest.approx(6.8)
    assert found.is_over
    assert found.after.error == found.before.error


def test_fidelity_is_gained_where_speed_stays() -> None:
    found = search(objective="fidelity")
    assert found.settings["retrieval.tokens"] == 128
    assert found.after.error == 0.01
    assert found.after.seconds(OUTPUT) <= 1.1 * found.before.seconds(OUTPUT)
    slow = search(
        lambda config: Outcome(
            prefill_s=1.0,
            token_s=0.1 if config.retrieval.tokens == 128 else 0.01,
            error=made_up(config).error,
        ),
        objective="fidelity",
    )
    assert slow.settings == {}


def test_what_is_set_already_stays() -> None:
    config = OffloadConfig.build(None, chunk=1024)
    assert "prefill.chunk" not in {knob.key for knob in knobs(config)}
    found = search(config=config, output=1000)
    assert found.settings == {"replica.whole_layers": 2}
    chunks = {knob.key: knob.values for knob in knobs(CONFIG, 3000)}["prefill.chunk"]
    assert chunks == (1024, 2048)  # longer ones hold all of such a prompt
    exact = {knob.key for knob in knobs(OffloadConfig.build(None, mode="exact"))}
    assert exact == {"prefill.chunk", "decode.staging"}
    assert "decode.draft" in {knob.key for knob in knobs(OffloadConfig.build(None, mode="verified"))}  # fmt: skip


def test_a_gain_that_was_luck_is_none() -> None:
    asked: list[str] = []

    def lucky(config: OffloadConfig) -> Outcome:
        asked.append(config.to_toml())
        first = asked.count(asked[-1]) == 1
        tried = config.prefill.chunk == 2048
        return Outcome(prefill_s=8.0 if tried and first else 10.0, token_s=0.01, error=0.0)

    found = search(lucky)
    assert found.settings == {}
    assert found.before == found.after


def test_differences_as_small_as_noise_are_none() -> None:
    found = search(lambda config: Outcome(prefill_s=10 - (config.prefill.chunk == 2048) * 5 * GAIN))
    assert found.settings == {}


def test_a_search_that_was_stopped_repeats_no_run(tmp_path: Path) -> None:
    made: list[str] = []

    def stopped(config: OffloadConfig) -> Outcome:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(config.to_toml())
        return made_up(config)

    file, fingerprint = tmp_path / "runs.json", {"model": "a", "tokens": (1, 2)}
    with pytest.raises(KeyboardInterrupt):
        search(stopped, runs=Runs(file, fingerprint))
    again: list[str] = []

    def going_on(config: OffloadConfig) -> Outcome:
        again.append(config.to_toml())
        return made_up(config)

    runs = Runs(file, fingerprint)
    assert runs.kept == 4
    found = search(going_on, runs=runs)
    assert found.settings == {"prefill.chunk": 2048, "replica.whole_layers": 2}
    confirmed = again[-2:]  # two at the end are made anew
    assert not set(again[:-2]) & set(made)
    assert confirmed[0] == made[0]
    # Of another model nothing is remembered.
    assert Runs(file, {"model": "b"}).kept == 0


def test_time_ends_a_search_with_what_is_found() -> None:
    def slow(config: OffloadConfig) -> Outcome:
        time.sleep(0.05)
        return made_up(config)

    found = search(slow, until=time.monotonic() + 0.18)
    assert not found.is_over
    assert found.runs <= 4
    assert found.settings == {}  # what is found is said when it was seen twice
    assert found.before == found.after
    none_left = search(until=time.monotonic() - 1)
    assert (none_left.runs, none_left.settings, none_left.is_over) == (1, {}, False)


def test_what_cannot_fit_or_is_hopeless_is_not_run() -> None:
    run: list[Any] = []

    def measure(config: OffloadConfig) -> Outcome:
        run.append((config.prefill.chunk, config.replica.rung))
        return made_up(config)

    def predict(config: OffloadConfig) -> Predicted:
        rung = config.replica.rung
        return Predicted(
            fits=rung != "4k4v", seconds=20.0 if rung == "3k3v" else 11.0, band=0.15, longest=1
        )

    found = search(measure, predict=predict)
    assert {rung for _, rung in run} == {"auto", "2k2v", "2k+clusters"}
    reasons = {name.split()[-1]: why for name, why in found.skipped.items() if "rung" in name}
    assert reasons["replica.rung=4k4v"] == "it would not fit"
    assert "20.0 s are predicted" in reasons["replica.rung=3k3v"]


def test_runs_that_fail_are_no_reason_to_stop() -> None:
    def failing(config: OffloadConfig) -> Outcome:
        if config.replica.whole_layers == 2:
            raise BudgetError("A graph", requested=2, available=1, setting="memory.gpu")
        if config.replica.whole_layers == 4:
            raise RuntimeError("CUDA out of memory")
        return made_up(config)

    assert search(failing).settings == {"prefill.chunk": 2048}

    def hopeless(config: OffloadConfig) -> Outcome:
        raise BudgetError("Weights", requested=2, available=1, setting="memory.gpu")

    with pytest.raises(BudgetError):
        search(hopeless)


def test_an_unknown_error_is_not_taken_for_none() -> None:
    def clusters(config: OffloadConfig) -> Outcome:
        unknown = config.replica.rung == "2k+clusters"
        return Outcome(prefill_s=1.0 if unknown else 10.0, error=None if unknown else 0.02)

    assert search(clusters).settings == {}
    assert search(clusters, objective="fidelity").settings == {}


def test_where_nothing_is_known_of_fidelity_only_what_changes_no_token_is_changed() -> None:
    def unknown(config: OffloadConfig) -> Outcome:
        known = config.replica.rung == "2k2v"
        seconds = 5.0 if known else 8.0 if config.prefill.chunk == 2048 else 10.0
        if config.retrieval.tokens == 32:
            seconds -= 2.0
        return Outcome(prefill_s=seconds, error=0.9 if known else None)

    assert search(unknown).settings == {"prefill.chunk": 2048}
    assert search(unknown, objective="fidelity").settings == {"replica.rung": "2k2v"}
    same = search(lambda config: Outcome(prefill_s=1.0, error=None), objective="fidelity")
    assert same.settings == {}


def test_values_in_effect_are_not_tried() -> None:
    tried: list[Any] = []

    def measure(config: OffloadConfig) -> Outcome:
        tried.append((config.replica.rung, config.retrieval.tokens, config.prefill.chunk))
        effective = {"replica.rung": "4k4v", "retrieval.tokens": 64, "prefill.chunk": 4096}
        return Outcome(prefill_s=1.0, error=0.02, effective=effective)

    search(measure)
    assert not {rung for rung, _, _ in tried} & {"4k4v"}
    assert 64 not in {tokens for _, tokens, _ in tried}
    assert 4096 not in {chunk for _, _, chunk in tried}


def test_the_longest_context_is_planned_and_the_first_that_works_is_taken() -> None:
    def predict(config: OffloadConfig) -> Predicted:
        longer = {"2k2v": 300_000, "3k3v": 200_000}.get(config.replica.rung, 100_000)
        return Predicted(fits=True, longest=longer + (5 if config.prefill.chunk == 1024 else 0))

    found = search(objective="context", predict=predict)
    assert found.settings == {"replica.rung": "2k2v"}
    assert found.longest == (100_000, 300_000)
    assert found.runs == 2

    def broken(config: OffloadConfig) -> Outcome:
        if config.replica.rung == "2k2v":
            raise BudgetError("A replica", requested=2, available=1, setting="memory.gpu")
        return made_up(config)

    second = search(broken, objective="context", predict=predict)
    assert second.settings == {"replica.rung": "3k3v"}
    assert second.longest == (100_000, 200_000)
    late = search(objective="context", predict=predict, until=time.monotonic() - 1)
    assert (late.settings, late.longest) == ({}, (100_000, 100_000))
    # A value that cannot be beside what is set is none to try.
    narrow = OffloadConfig.build(None, mode="verified", window=192)
    assert search(config=narrow, objective="context", predict=predict).settings
    with pytest.raises(InputError, match="no card is known"):
        search(objective="context")


def test_a_plan_that_knows_less_than_the_runtime_stops_nothing() -> None:
    def predict(config: OffloadConfig) -> Predicted:
        return Predicted(fits=config.prefill.chunk == 2048, seconds=11.0, band=0.1)

    assert search(predict=predict).settings == {"prefill.chunk": 2048, "replica.whole_layers": 2}


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    for text in ('{"version": 1}', '{"version": 1, "fingerprint": {}, "runs": []}', "[]",
                 '{"version": 1, "fingerprint": {}, "runs": {"a": {"prefill_s": "x"}}}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match="does not hold the runs"):
            Runs(file, {})
        assert file.read_text() == text
    file.unlink()
    Runs(file, {"a": 1}).add({"x.y": 2}, Outcome(error=None))
    assert json.loads(file.read_text())["runs"]["x.y=2"]["error"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


def test_a_file_keeps_its_comments() -> None:
    base = "# mine\n[memory]\ngpu = '20GiB' # all but a bit\n\n[prefill]\nchunk = 1024\n"
    settings = {"prefill.chunk": 2048, "decode.compile": True}
    text = tuned_toml(base, settings, {"prefill.chunk": "tuned: 11 s became 7 s"})
    assert "# mine" in text
    assert "# all but a bit" in text
    assert "chunk = 2048 # tuned: 11 s became 7 s" in text
    read = OffloadConfig.from_toml(text)
    assert (read.prefill.chunk, read.decode.compile) == (2048, True)
    assert read.memory.gpu == OffloadConfig.build(None, gpu_memory="20GiB").memory.gpu
    changed = with_settings(CONFIG, settings)
    assert (changed.prefill.chunk, changed.mode) == (2048, "fast")
