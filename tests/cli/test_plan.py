"""`offload plan`: what it prints, with which exit code, and what it does not load."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from offload import cli
from offload.hardware import Card

CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-8b").mkdir()
    file = tmp_path / "llama-8b" / "config.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


def test_it_says_what_fits_where_every_byte_goes_and_what_to_set(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^fits$", shown, re.MULTILINE)
    assert "experts" not in shown
    for word in (
        "weights",
        "replica",
        "4k4v",
        "pages",
        "overhead",
        "a token",
        "longest",
        "gpu = ",
    ):
        assert word in shown
    total = re.search(r"^device \[.*\] ([\d.]+) GiB", shown, re.MULTILINE)
    assert total is not None
    parts = re.findall(r"^  \w [a-z ]+?\s+([\d.]+) (GiB|MiB)", shown.partition("\nhost")[0], re.M)
    summed = sum(float(n) * (1 if unit == "GiB" else 1 / 1024) for n, unit in parts)
    assert summed == pytest.approx(float(total[1]), abs=0.3)


def test_what_does_not_fit_ends_with_3_and_says_what_would(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", model, "--gpu", "rtx4090", "--gpu-memory", "12GiB", "--context"]
    assert cli.main([*arguments, "128K"]) == 3
    shown = capsys.readouterr().out
    assert re.search(r"^does not fit: \d\.\d GiB short on the device$", shown, re.MULTILINE)
    assert "largest context at this budget: none" in shown
    assert re.search(r"--gpu-memory \d+\.\d+GiB: fits", shown)
    assert cli.main([*arguments, "128K", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)["plans"][0]
    assert found["verdict"] == "does not fit"
    assert found["missing"]["setting"] == "memory.gpu"
    assert found["suggestions"]


@pytest.mark.parametrize(
    "given",
    [
        ["--context", "256K", "--set", "replica.rung=4k4v", "--set", "cache.window=8192"],
        ["--context", "128K", "--gpu-memory", "12GiB"],
        ["--context", "1M", "--gpu-memory", "12GiB"],
        ["--context", "128K", "--cpu-memory", "8GiB"],
        ["--context", "512K"],
        ["--context", "64K", "--mode", "exact", "--gpu-memory", "19GiB", "--cpu-memory", "5GiB"],
        ["--context", "256K", "--batch", "4"],
    ],
    ids=lambda given: " ".join(given),
)
def test_each_suggestion_fits_when_it_is_followed(
    given: list[str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", model, "--gpu", "rtx4090", *given]
    assert cli.main([*arguments, "--json"]) == 3
    suggestions = json.loads(capsys.readouterr().out)["plans"][0]["suggestions"]
    assert 1 <= len(suggestions) <= 3
    for suggestion in suggestions:
        change, _, without = suggestion["change"].partition(" without ")
        kept = list(arguments)
        for option in re.findall(r"--[a-z-]+", without):
            if option in kept:
                del kept[kept.index(option) : kept.index(option) + 2]
        assert cli.main([*kept, *change.split()]) == 0, suggestion
        capsys.readouterr()


def test_further_cards_are_suggested_until_there_are_three_changes(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", model, "--gpu", "rtx4090", "--gpu-memory", "12GiB", "--json"]
    assert cli.main(arguments) == 3
    suggestions = json.loads(capsys.readouterr().out)["plans"][0]["suggestions"]
    assert [each["change"].split()[:2] for each in suggestions] == [
        ["--gpu-memory", "15.94GiB"],
        ["--gpu", "rtx5090"],
        ["--gpu", "a100"],
    ]


def test_more_memory_than_the_card_has_is_refused(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu", "rtx4090", "--gpu-memory", "40GiB"]) == 3
    assert "The rtx4090 has no more: lower memory.gpu" in capsys.readouterr().err


def test_json_has_every_byte(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["plan", "--model", model, "--gpu", "h100", "--mode", "verified", "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema_version"], printed["command"]) == (1, "plan")
    assert printed["model"]["kv_bytes_per_token"] == 128 * 1024
    assert printed["inputs"]["output"] == 512
    (found,) = printed["plans"]
    assert found["device_bytes"]["weights"] == printed["model"]["weights_bytes"]
    assert sum(found["device_bytes"].values()) <= found["device_budget_bytes"]
    assert found["token_s"] > 0


def test_the_phases_are_those_of_the_layout(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    exact = ["plan", "--model", model, "--gpu", "rtx4090", "--mode", "exact", "--context"]
    assert cli.main([*exact, "128K", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    said = found["phases"]
    # The tail holds a page less a token beyond what sinks and window do.
    window = found["device_bytes"]["sinks and window"] // (128 * 1024)
    assert said["p1"] == window + 63
    assert said["p2"] is None
    assert said["host_share"] == pytest.approx(found["host_tokens"] / found["context"], abs=1e-3)
    assert (said["rebuilt_share"], said["dropped_share"]) == (0, 0)
    assert cli.main([*exact, "128K"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"phases       I up to {said['p1']:,} tokens; then II, at the end 60.9% on the host"
        in shown
    )
    assert cli.main([*exact, "8K"]) == 0
    assert "phases       I to the end, all on the device" in capsys.readouterr().out


def test_what_the_host_has_no_room_for_is_read_again(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "--model", model, "--gpu", "rtx4090", "--mode", "exact", "--context", "64K"]
    given += ["--gpu-memory", "19GiB", "--cpu-memory", "5GiB", "--set", "scheduler.recompute=prefix"]  # fmt: skip
    assert cli.main([*given, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    tokens = (found["device_tokens"], found["host_tokens"], found["dropped_tokens"])
    assert sum(tokens) == 65_536
    assert min(tokens) > 0
    said = found["phases"]
    assert said["p2"] == said["p1"] + found["host_tokens"]
    assert said["dropped_share"] == pytest.approx(found["dropped_tokens"] / 65_536, abs=1e-3)
    assert found["device_bytes"]["reading again"] > 0
    assert cli.main(given) == 0
    shown = capsys.readouterr().out
    assert f"from {said['p2'] + 1:,} on III, at the end 13.4% read again" in shown


def test_cards_and_lengths_are_compared_in_one_table(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", model, "--compare", "rtx3090, rtx5090", "--sweep", "context", "--context", "64K"]  # fmt: skip
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("rtx3090", "rtx5090"))]
    assert len(rows) == 8
    assert [row.split()[1] for row in rows[:4]] == ["8,192", "16,384", "32,768", "65,536"]
    assert lines[0].endswith("128 KiB of KV a token")  # in the unit of a single plan


def test_a_card_is_compared_with_further_ones(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu", "l4", "--compare", "rtx3090,l4"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["l4", "rtx3090"]


def test_host_memory_that_is_short_is_told_as_such(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu", "rtx4090", "--cpu-memory", "1GiB"]) == 3
    assert "does not fit: 15.0 GiB short of host memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "voodoo2"], "rtx4090"),
        (["--gpu", "rtx4090", "--context", "many"], "many"),
        (["--gpu", "rtx4090", "--set", "memory.gpu"], "key and a value"),
        (["--gpu", "rtx4090", "--set", "retreival.tokens=4"], "retrieval"),
        (["--gpu", "rtx4090", "--output", "200000"], "no room"),
        (["--gpu", "rtx4090", "--output", "-5"], "-5"),
        (["--gpu", "rtx4090", "--batch", "0"], "batch"),
        (["--gpu", "rtx4090", "--dtype", "int3"], "bfloat16"),
    ],
)
def test_bad_input_is_said_in_one_line(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_without_a_card_one_has_to_be_named(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.hardware.local_card", lambda: None)
    assert cli.main(["plan", "--model", model]) == 2
    assert "--gpu rtx4090" in capsys.readouterr().err
    monkeypatch.setattr(
        "offload.hardware.local_card",
        lambda: Card(name="NVIDIA GeForce RTX 3090", total=24 * 2**30, free=2**34, driver="580"),
    )
    assert cli.main(["plan", "--model", model]) == 0
    assert "rtx3090" in capsys.readouterr().out


def test_the_example_of_its_help_works_and_nothing_heavy_is_loaded(model: str) -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "offload", "plan", "--help"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    example = help_text.partition("Example: offload ")[2].split("\n\n")[0]
    arguments = [
        model if word == "./llama-8b" else word for word in shlex.split(example.replace("\n", " "))
    ]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "offload", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fits" in done.stdout
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert not {"torch", "transformers", "numba", "faiss"} & loaded


def test_it_says_how_close_the_tokens_are_and_where_each_number_is_from(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*more: str) -> str:
        assert cli.main(["plan", "--model", model, "--gpu", "rtx4090", *more]) == 0
        return capsys.readouterr().out

    assert "fidelity     the most likely token is the same in 99.8% of steps, KL 2.6e-05" in shown()
    assert "fidelity     the tokens of the stock cache" in shown("--mode", "verified")
    for less in (
        "retrieval.tokens=16",
        "replica.skipped_mass=0.3",
        "cache.sinks=0",
        "cache.window=128",
    ):
        assert "fidelity     not measured" in shown("--set", less)
    (found,) = json.loads(shown("--json"))["plans"]
    assert found["fidelity"] == {"kl": 2.6e-5, "same_top": 0.998, "source": "measured"}
    assert found["sources"] == {"device_bytes": "computed", "host_bytes": "computed", "times": "data_sheet"}  # fmt: skip
    assert {rate["source"] for rate in found["rates"].values()} == {"data_sheet"}
    assert found["rates"]["pcie"]["value"] == 25e9


@pytest.mark.parametrize(("card", "change"), [("rtx4900", "Did you mean rtx4090?"), ("voodoo2", "Name one of these")])  # fmt: skip
def test_a_card_that_nobody_knows_is_refused_with_the_nearest(
    model: str, card: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", model, "--gpu", card]) == 2
    assert change in capsys.readouterr().err
