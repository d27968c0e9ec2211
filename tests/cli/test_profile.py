"""`offload profile`: the table, the page, the trace."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_lm import save_tiny_lm

from offload import cli, hardware
from offload.cli.page import page
from offload.hardware import Card
from offload.parts import Part
from offload.profile import Profile
from offload.trace import Sample
from offload.units import GIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


def run(model: str, *more: str) -> int:
    given = ["profile", "--model", model, "--dtype", "float32", "--max-new-tokens", "6", "--steps", "3"]  # fmt: skip
    small = ["--set", "cache.sinks=64", "--set", "cache.window=256"]
    return cli.main([*given, *small, *more])


def test_a_table_says_what_was_planned_measured_and_took_time(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--prompt", "x" * 380) == 0
    shown = capsys.readouterr()
    for purpose in ("weights", "sinks, window, tail", "replica", "staging", "pages"):
        row = re.search(rf"^  {purpose} +([\d.]+ \w+|0 B) +([\d.]+ \w+|0 B)$", shown.out, re.M)
        assert row, purpose
    assert re.search(r"^  passes and states +[\d.]+ \w+ +-$", shown.out, re.M)
    assert "A CPU has no driver that counts" in shown.out
    assert re.search(r"^  matrix products +[\d.]+ ms a token$", shown.out, re.M)
    assert "Running" in shown.err
    assert "Running" not in shown.out


def test_the_page_stands_alone_and_the_trace_opens(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    html, trace = tmp_path / "run.html", tmp_path / "run.json.gz"
    more = ["--html", str(html), "--trace", str(trace), "--json"]
    assert run(model, "--prompt", "x" * 380, *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["command"]) == (1, "profile")
    assert found["inputs"]["max_new_tokens"] == 6
    assert found["planned_times"] is None  # of no card that is there
    monkeypatch.setattr(
        hardware,
        "local_card",
        lambda: Card(name="NVIDIA H100 80GB HBM3", total=80 * GIB, free=79 * GIB, driver="580"),
    )
    assert run(model, "--prompt", "x" * 380, "--json") == 0
    planned = json.loads(capsys.readouterr().out)["planned_times"]
    assert planned["token_s"] > 0
    assert planned["source"] == "calibrated"
    profile = found["profile"]
    assert profile["report"]["new_tokens"] == 6
    assert profile["bursts"][-1]["tokens"] == 6
    assert {"purpose", "planned", "measured"} == set(profile["device"][0])
    text = html.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 4
    assert "nan" not in text.lower().replace("finance", "")
    rows = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(row["name"].startswith("token ") for row in rows) == 5
    assert trace.stat().st_size < 20 * 2**20


def test_a_page_of_a_card_shows_what_is_unaccounted_and_the_plan(model: str) -> None:
    from offload.config import OffloadConfig
    from offload.loading import load
    from offload.profile import profile

    loaded = load(model, dtype="float32")
    ids = loaded.tokenizer("x" * 300, return_tensors="pt")["input_ids"]
    settings = OffloadConfig.build(None, sinks=64, window=256)
    found: Profile = profile(loaded.model, settings, ids, max_new_tokens=4, looked_at=0)
    gib = 2**30
    of_card = replace(
        found,
        device=[Part("weights & <more>", 3 * gib, 3 * gib), Part("driver", gib, gib // 2)],
        peak=4 * gib,
        unaccounted=gib // 2,
        samples=[Sample(0.0, gib, 2 * gib, 3 * gib), Sample(found.bursts[-1][0], gib, 2 * gib, 4 * gib)],
    )  # fmt: skip
    text = page("a run", of_card, planned_ms=12.0)
    assert "weights &amp; &lt;more&gt;" in text
    assert "<td>unaccounted</td><td>-</td><td>0.5 GiB</td>" in text
    assert "dashed: planned, 4.0 GiB" in text
    assert "dashed: planned, 12.0 ms" in text
    assert text.count('class="plan"') == 2
    # Steps of even length fill the height of their chart; one that is captured does not set it.
    start = of_card.bursts[0][0]
    for lengths, top in (((0.1, 0.1, 0.1), "105 ms"), ((0.1, 0.1, 9.0), "400 ms")):
        ends = [start + sum(lengths[:n]) for n in range(len(lengths) + 1)]
        even = page("a run", replace(of_card, bursts=[(at, n) for n, at in enumerate(ends, 1)]), planned_ms=None)  # fmt: skip
        assert f">{top}</text>" in even
    one = page("a run", replace(of_card, bursts=[(1.0, 1)]), planned_ms=None)
    assert "One token was made" in one


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "There is no prompt"),
        (["--prompt", "x", "--html", "no/such/folder/run.html"], "its folder is not there"),
        (["--prompt", "x", "--trace", "no/such/folder/run.gz"], "its folder is not there"),
        (["--prompt", "x", "--html", "."], "it is a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    model: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *more) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Loading" not in shown.err
