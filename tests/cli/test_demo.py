"""What `offload demo` asks of the runtime, what it prints, and with which exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from tiny_lm import POSITIONS, save_tiny_lm

import offload
from offload import cli, loading
from offload.cli import demo

BUDGET = 3 * 2**28  # 0.75 GiB
TEXT = "The lamp stands in the hall.\n" * 10


@dataclass
class FakeReport:
    tokens_on_device: int
    tokens_on_host: int

    summary = "the table of the report"

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": {"window": 100, "host_pinned": 300}}


@dataclass
class FakeRuntime:
    """Generates with the stock cache; says that a share of the tokens lay on the device."""

    model: Any
    gpu_memory: int | str
    share: float
    wrong_from: int | None
    calls: list[Any]
    report_: FakeReport | None = field(default=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.calls.append("detach")

    def budget_for(self, *, kv_share: float, prompt_tokens: int, new_tokens: int) -> int:
        self.calls.append(("budget_for", kv_share, prompt_tokens, new_tokens))
        return BUDGET

    def generate(self, *, streamer: Any, **arguments: Any) -> torch.Tensor:
        assert arguments["do_sample"] is False
        ids: torch.Tensor = self.model.generate(**arguments, streamer=streamer)
        n_prompt, n = arguments["input_ids"].shape[1], ids.shape[1]
        if self.wrong_from is not None:
            ids[0, n_prompt + self.wrong_from] = 5
        on_device = int(self.share * (n - 1))
        self.report_ = FakeReport(on_device, n - 1 - on_device)
        return ids

    def report(self) -> FakeReport:
        assert self.report_ is not None
        return self.report_


class FakeAttach:
    """Stands for `offload.attach` and keeps what it was asked."""

    share: ClassVar[float] = 0.3

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.progress = True
        self.wrong_from: int | None = None

    def __call__(
        self, model: Any, *, mode: str, gpu_memory: int | str, progress: bool = True
    ) -> FakeRuntime:
        self.progress = progress
        assert mode == "exact"  # its promise is the same tokens
        self.calls.append(("attach", gpu_memory))
        return FakeRuntime(model, gpu_memory, self.share, self.wrong_from, self.calls)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def document(tmp_path: Path) -> str:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(autouse=True)
def attach(monkeypatch: pytest.MonkeyPatch) -> FakeAttach:
    attach = FakeAttach()
    monkeypatch.setattr(offload, "attach", attach, raising=False)
    return attach


def ask(model: str, document: str, *more: str) -> int:
    return cli.main(
        ["demo", "--model", model, "--document", document, "--max-new-tokens", "8", *more]
    )


def test_the_answer_is_printed_with_its_tiers_speeds_and_verdict(
    model: str, document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, document, "--question", "Where is the lamp?") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith(f"Model      {Path(model).name}, float32, on cpu, loaded in ")
    assert lines[1].startswith("Document   notes.txt; ")
    assert lines[2] == "Question   Where is the lamp?"
    assert lines[3] == "Budget     0.75 GiB of device memory, for weights, work and KV cache"
    assert lines[4].startswith("Answer     ")
    assert "the table of the report" in lines
    assert " on the device, " in printed.out
    assert " per token" in printed.out
    assert lines[-1] == "same tokens as the in-memory cache: yes (8 of 8)"


def test_progress_goes_to_stderr(
    model: str, document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(model, document)
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line] == [
        f"Loading {model} (the first time takes longer) ...",
        "The same with the in-memory cache of transformers, to compare ...",
    ]


def test_quiet_leaves_the_result_alone(
    model: str, document: str, attach: FakeAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, document, "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == "same tokens as the in-memory cache: yes (8 of 8)"
    assert not attach.progress  # no bar either


def test_the_default_budget_holds_three_tenths_of_the_kv_cache(
    model: str, document: str, attach: FakeAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(model, document, "--json")
    n = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert attach.calls == [
        ("attach", "auto"),
        ("budget_for", 0.3, n, 8),
        "detach",
        ("attach", BUDGET),
        "detach",
    ]


def test_a_given_budget_is_taken_as_it_is(
    model: str, document: str, attach: FakeAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, document, "--gpu-memory", "2GiB") == 0
    assert attach.calls == [("attach", "2GiB"), "detach"]
    assert "Budget     2GiB as device memory" in capsys.readouterr().out


def test_a_budget_for_a_third_or_more_is_noted(
    model: str,
    document: str,
    attach: FakeAttach,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FakeAttach, "share", 0.5)
    assert ask(model, document) == 0
    assert "holds a third of the KV cache or more" in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(
    model: str, document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, document, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema_version"], printed["command"]) == (1, "demo")
    assert printed["inputs"] == {
        "model": model,
        "document": document,
        "question": None,
        "gpu_memory": None,
        "max_new_tokens": 8,
    }
    assert printed["question"] == demo.QUESTION_OF_ANY
    assert printed["same_tokens"] is True
    assert printed["first_difference"] is None
    assert printed["gpu_memory"] == BUDGET
    assert printed["offload"]["tokens"] == printed["in_memory"]["tokens"]
    assert len(printed["offload"]["tokens"]) == 8
    assert printed["offload"]["per_token_s"] > 0
    assert printed["report"] == {"bytes": {"window": 100, "host_pinned": 300}}
    kv_tokens = printed["prompt_tokens"] + 7  # the last token is never fed back
    assert printed["kv_tokens"] == kv_tokens
    assert printed["kv_bytes"] == kv_tokens * 2 * 2 * 16 * 4  # layers, K and V, D, float32


def test_other_tokens_are_exit_code_1_and_the_first_is_named(
    model: str, document: str, attach: FakeAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    attach.wrong_from = 2
    assert ask(model, document) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "same tokens as the in-memory cache: no, they differ from new token 3 on"
    assert ask(model, document, "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["same_tokens"], printed["first_difference"]) == (False, 2)


@pytest.mark.parametrize(
    ("ours", "stock", "where"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1], [1, 2], 1),
        ([1, 2, 3], [1, 2], 2),
        ([], [1], 0),
    ],
)
def test_the_first_difference_is_also_where_one_answer_ends(
    ours: list[int], stock: list[int], where: int | None
) -> None:
    assert demo._first_difference(ours, stock) == where


def test_a_difference_in_half_precision_comes_with_the_reason() -> None:
    run = demo.Run(tokens=[1, 2], first_s=1.0, per_token_s=None)
    outcome = demo.Outcome(
        model="m",
        dtype="float32",
        device="cpu",
        load_s=1.0,
        document="d",
        question="q",
        prompt_tokens=9,
        gpu_memory=1,
        kv_bytes=2**20,
        kv_tokens=10,
        tokens_on_device=3,
        tokens_on_host=7,
        answer="a",
        offload=run,
        in_memory=run,
        same_tokens=False,
        first_difference=1,
        seconds=1.0,
        report={},
    )
    assert demo.render(outcome).splitlines() == [
        "KV cache   1.00 MiB for 10 tokens: 3 (30%) on the device, 7 (70%) on the host",
        "Speed      offload    1.0 s to the first token",
        "           in memory  1.0 s to the first token",
        "same tokens as the in-memory cache: no, they differ from new token 2 on",
    ]
    assert "float32 has no such ties" in demo.render(replace(outcome, dtype="bfloat16"))


def test_the_default_model_is_loaded_in_float32_and_others_as_fits(
    model: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    really = loading.load

    def load(source: str | None, *, dtype: str | None) -> loading.Loaded:
        asked.append((source, dtype))
        return really(model, dtype=dtype)

    monkeypatch.setattr(loading, "load", load)
    assert ask(model, document) == 0
    assert cli.main(["demo", "--document", document, "--max-new-tokens", "1"]) == 0
    assert asked == [(model, None), (None, "float32")]


def test_a_model_without_a_chat_template_is_asked_in_plain_text(
    tmp_path: Path, document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_lm(tmp_path / "base", template=None)
    assert ask(str(base), document) == 0
    assert "no chat template" in capsys.readouterr().err


def test_a_prompt_beyond_the_models_positions_is_refused_whole(
    model: str, tmp_path: Path, attach: FakeAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("x" * POSITIONS)
    assert ask(model, str(long), "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "InputError"
    assert error["asked"] > error["there"] == POSITIONS
    assert f"{POSITIONS:,}" in error["message"]
    assert attach.calls == []


@pytest.mark.parametrize(
    ("content", "said"), [(b" \n", "is empty"), (b"ok \xff\xfe", "byte 0xff at 3")]
)
def test_a_document_that_cannot_be_read_is_refused_before_anything_is_loaded(
    content: bytes,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(loading, "load")
    file = tmp_path / "odd.txt"
    file.write_bytes(content)
    assert cli.main(["demo", "--document", str(file)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [["--document", "no-such-file.txt"], ["--max-new-tokens", "0"], ["--max-new-tokens", "many"]],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(bad: list[str], attach: FakeAttach) -> None:
    assert cli.main(["demo", *bad]) == 2
    assert attach.calls == []


def test_a_model_that_is_not_there_is_exit_code_2(
    document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("./no-such-model", document) == 2
    assert "./no-such-model" in capsys.readouterr().err


def test_the_document_that_comes_with_offload_holds_the_answer() -> None:
    title, text = demo._read(None)
    assert title == demo.DOCUMENT_TITLE
    assert text.startswith("The Constitution of the United States of America")
    assert "held in the State where the said Crimes" in " ".join(text.split())
    assert 3_000 < len(text.split()) < 4_500  # 5,000 tokens of SmolLM2
