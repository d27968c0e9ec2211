"""The progress bar shows rate and length on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TIERS, prompts
from tiny_lm import save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import offload
from offload.prefill import Progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(20_000, wanted=True) as show:
        assert show is not None
        for processed in (0, 5_000, 10_000):
            seconds = processed / 2_000
            show(Progress(total=20_000, cached=0, processed=processed, seconds=seconds))
    shown = terminal.getvalue()
    assert "20,000 tokens" in shown
    assert "2,000 tokens/s" in shown


@pytest.mark.parametrize("wanted", [True, False])
def test_elsewhere_there_is_no_bar(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO() if wanted else Terminal())
    with progress_bar(20_000, wanted=wanted) as show:
        assert show is None


def test_the_bar_comes_with_prompts_of_the_set_length_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = FAMILIES["llama"].build()
    settings = TIERS | {"chunk": 100}
    for length, bar in ((250, True), (150, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with offload.attach(model, progress_from=200, **settings) as runtime:
            runtime.generate(prompts(1, length), max_new_tokens=2, do_sample=False)
        assert ("reading the prompt" in terminal.getvalue()) == bar


def test_stop_strings_and_a_text_streamer_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_lm(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(3)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # livelier
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "a long story " * 20}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    call: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    free = model.generate(ids, **call)
    text = tokenizer.decode(free[0, ids.shape[1] :])
    stop = text[5:8]
    want = model.generate(ids, **call, stop_strings=[stop], tokenizer=tokenizer)
    assert want.shape[1] < free.shape[1]
    with offload.attach(model, **TIERS, chunk=100) as runtime:
        got = runtime.generate(
            ids,
            **call,
            stop_strings=[stop],
            tokenizer=tokenizer,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
        assert runtime.report().tokens_on_host > 100
    assert torch.equal(got, want)
    said = tokenizer.decode(got[0, ids.shape[1] :])
    assert len(set(said)) > 3
    assert capsys.readouterr().out == said + "\n"
