"""`offload generate`: the answer on stdout, everything else on stderr, nothing cut."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm

import offload
from offload import cli
from offload.config import OffloadConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


def ask(model: str, *more: str) -> int:
    given = ["generate", "--model", model, "--dtype", "float32", "--max-new-tokens", "12"]
    return cli.main([*given, *more])


def stock(model: str, text: str) -> str:
    from offload.cli.text import encoded
    from offload.loading import load

    loaded = load(model, dtype="float32")
    inputs = encoded(loaded, text, chat=True)
    any_model: object = loaded.model
    ids = any_model.generate(**inputs, max_new_tokens=12, do_sample=False)  # type: ignore[attr-defined]
    tokens = ids[0, inputs["input_ids"].shape[1] :]
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))


def test_the_answer_is_the_stock_models_and_alone_on_stdout(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("The lamp stands in the hall. " * 8)
    assert ask(model, "--prompt-file", str(file), "--prompt", "Where is it?", "--stats") == 0
    printed = capsys.readouterr()
    want = stock(model, f"{file.read_text().strip()}\n\nWhere is it?")
    assert printed.out.strip() == want.strip()
    assert "mode fast" in printed.err
    assert "tokens" in printed.err


def test_quiet_keeps_the_answer_and_what_was_asked_to_be_said(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[object] = []
    attach = offload.attach

    def watched(model: Any, config: OffloadConfig, **overrides: Any) -> Any:
        bars.append(OffloadConfig.build(config, **overrides).trace.progress)
        return attach(model, config, **overrides)

    monkeypatch.setattr(offload, "attach", watched)
    assert ask(model, "--prompt", "Say anything.", "--mode", "exact", "--verify", "2") == 0
    loud = capsys.readouterr()
    assert loud.err.startswith("Loading ")
    assert ask(model, "-q", "--prompt", "Say anything.", "--mode", "exact", "--verify", "2") == 0
    quiet = capsys.readouterr()
    assert quiet.out == loud.out
    assert quiet.err == "not verified: every step was exact\n"
    assert bars == [True, False]


def test_json_has_text_tokens_report_and_how_close_it_was(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--set", "cache.sinks=64", "--set", "cache.window=256", "--verify", "6", "--json"]
    assert ask(model, "--prompt", "x" * 380, *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["command"]) == (1, "generate")
    assert 1 <= len(found["tokens"]) <= 12
    assert found["report"]["tokens_on_host"] > 0
    assert found["verified"]["steps"] == min(6, len(found["tokens"]) - 1)
    assert 0 <= found["verified"]["kl_mean"] <= found["verified"]["kl_max"]


def test_a_prompt_comes_from_standard_input_and_a_seed_repeats_an_answer(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for seed in (1, 1, 2):
        text = io.TextIOWrapper(io.BytesIO(b"Say anything."))
        monkeypatch.setattr("sys.stdin", text)
        torch.manual_seed(99)
        more = ["--prompt-file", "-", "--temperature", "1.5", "--seed", str(seed)]
        assert ask(model, *more, "--mode", "verified") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no prompt"),
        (["--prompt-file", "nowhere.txt"], "cannot be read"),
        (["--prompt", "x", "--set", "cache.window"], "key and a value"),
        (["--prompt", "x", "--mode", "sometimes"], "mode"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
    ],
)
def test_bad_input_is_exit_code_2_before_anything_is_loaded(
    more: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Loading" not in captured.err
    assert not captured.out


def test_a_budget_that_is_too_small_is_exit_code_3(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, "--prompt", "x", "--gpu-memory", "1KiB") == 3
    assert "the budget leaves 1.0 KiB" in capsys.readouterr().err
