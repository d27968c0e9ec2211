"""`offload tune`: what it prints, writes and remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import save_tiny_lm

from offload import cli, hardware, tune
from offload.config import OffloadConfig
from offload.hardware import Card
from offload.scheduler import cost
from offload.tune import Knob, Outcome, Predicted, Runs, Tuned
from offload.units import GIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("The lamp stands in the hall. " * 14)
    monkeypatch.setattr(tune, "knobs", lambda config, prompt: [Knob("prefill.chunk", (128, 256))])
    return tmp_path


def run(model: str, *more: str) -> int:
    given = ["tune", "--model", model, "--dtype", "float32", "--prompt-file", "book.txt", "--output", "4"]  # fmt: skip
    return cli.main([*given, *more])


def test_it_writes_a_file_and_goes_on_where_it_was(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "mine.toml"
    file.write_text("# mine\n[cache]\nsinks = 64\nwindow = 256\n")
    more = ["--config", "mine.toml", "--out", "better.toml"]
    assert run(model, *more) == 0
    shown = capsys.readouterr()
    assert "wrote better.toml" in shown.out
    assert "as it is: " in shown.err
    assert "prefill.chunk=128: " in shown.err
    assert shown.err.count("without a GPU") == 1  # each run says so, and it is shown once
    text = (folder / "better.toml").read_text()
    assert text.startswith("# mine\n")
    written = OffloadConfig.from_toml(text)
    assert written.cache.window == 256
    kept = json.loads((folder / "better.toml.runs.json").read_text())
    assert set(kept["runs"]) == {"as it is", "prefill.chunk=128", "prefill.chunk=256"}
    assert run(model, *more, "--json") == 0
    shown = capsys.readouterr()
    assert "3 runs are in" in shown.err
    found = json.loads(shown.out)
    assert (found["schema_version"], found["command"]) == (1, "tune")
    assert found["runs"] == (2 if found["settings"] or "gone" in shown.err else 0)


def test_on_a_card_the_cost_model_is_asked(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Card(name="NVIDIA H100 80GB HBM3", total=80 * GIB, free=79 * GIB, driver="580")
    monkeypatch.setattr(hardware, "local_card", lambda: card)
    monkeypatch.setattr(
        cost, "times", lambda *_: cost.Times(prefill=1.0, token=1.0, parts={}, limit="")
    )
    seen: list[Predicted | None] = []

    def search(*_: Any, predict: Any, **__: Any) -> Tuned:
        seen.append(predict(OffloadConfig.build(None, sinks=64, window=256)))
        return Tuned()

    monkeypatch.setattr(tune, "tune", search)
    assert run(model) == 0
    assert seen[0] is not None
    assert seen[0].seconds == 5.0  # of a prompt and four tokens


def test_what_is_given_is_written_too(model: str, folder: Path) -> None:
    more = ["--mode", "exact", "--set", "cache.window=256", "--time", "1h"]
    assert run(model, *more) == 0
    written = OffloadConfig.from_toml(folder / "offload.tuned.toml")
    assert (written.mode, written.cache.window) == ("exact", 256)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "beauty"], "no such objective"),
        (["--time", "soon"], "--time is no time"),
        (["--time", "-3"], "--time is no time"),
        (["--out", "no/such/folder/x.toml"], "its folder is not there"),
        (["--prompt-file", "none.txt"], "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    model: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *more) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Loading" not in shown.err


def test_a_stopped_search_says_how_to_go_on(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    over: list[Outcome] = []

    def stopped(_config: object, _measure: object, runs: Runs, **_: object) -> None:
        for outcome in over:
            runs.add({}, outcome)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", stopped)
    assert run(model) == 130
    assert "the same command begins anew" in capsys.readouterr().err
    over.append(Outcome())
    assert run(model) == 130
    assert "goes on from offload.tuned.toml.runs.json" in capsys.readouterr().err


def test_the_longest_context_needs_a_card(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload import hardware

    monkeypatch.setattr(hardware, "local_card", lambda: None)
    assert run(model, "--objective", "context") == 2
    assert "no card is known here" in capsys.readouterr().err
