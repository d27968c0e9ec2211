"""`offload bench`: rows on stdout in four forms, everything else on stderr."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import POSITIONS, save_tiny_lm

from offload import cli
from offload.baseline import Baseline
from offload.bench import Case, Row, Sample, Subject
from offload.cli.bench import token_counts
from offload.cli.rows import Form, Result, notes_of, render
from offload.config import OffloadConfig
from offload.errors import ConfigError, InputError
from offload.runtime import Runtime

SMALL = ("-p", "40", "-n", "6", "-d", "0,300", "-r", "2")
WINDOW = ("--set", "cache.sinks=64", "--set", "cache.window=128")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


def measure(model: str, *more: str) -> int:
    return cli.main(["bench", "--model", model, "--dtype", "float32", *more])


def row(rate: float, *, mode: str = "fast", case: Case | None = None, **more: Any) -> Row:
    subject = Subject(
        name="tiny", model_type="llama", parameters=8_030_000_000, weights_bytes=3 * 2**30, dtype="bfloat16",
        device="cpu",
    )  # fmt: skip
    samples = tuple(
        Sample(tokens=128, seconds=128 / each, device_bytes=2**30, peak_bytes=3 * 2**29, host_bytes=2**28)
        for each in (rate - 1, rate + 1)
    )  # fmt: skip
    case = case or Case(generated=128, depth=32768)
    return Row(subject=subject, mode=mode, case=case, **{"samples": samples, "rung": "4k4v"} | more)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("512", [512]),
        ("0,32K,128k", [0, 32768, 131072]),
        ("0, 1M", [0, 1048576]),
        ("5-8", [5, 6, 7, 8]),
        ("0-128K+64K", [0, 65536, 131072]),
        ("0-100+64", [0, 64]),
        ("8K-64K*2", [8192, 16384, 32768, 65536]),
        ("1,8-8,2-9*3", [1, 8, 2, 6]),
    ],
)
def test_lists_and_ranges_are_those_of_llama_bench(text: str, counts: list[int]) -> None:
    assert token_counts(text) == counts


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", InputError, "neither a number"),
        ("1,,2", InputError, "neither a number"),
        ("-5", InputError, "neither a number"),
        ("1-2-3", InputError, "neither a number"),
        ("9-3", InputError, "does not go up"),
        ("1-9+0", InputError, "does not go up"),
        ("1-9*1", InputError, "does not go up"),
        ("0-9*2", InputError, "does not go up"),
        ("8K-128K", InputError, "0-128K\\+32K"),
        ("many", ConfigError, "not a number of tokens"),
        ("1.5", ConfigError, "not a number of tokens"),
        ("24GiB", ConfigError, "not a number of tokens"),
    ],
)
def test_what_is_no_list_of_tokens_is_refused(
    text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        token_counts(text)


def test_json_has_inputs_environment_and_every_sample(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(model, *SMALL, *WINDOW, "--mode", "exact,verified", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["schema_version"], found["command"]) == (1, "bench")
    assert found["inputs"] == {
        "model": Path(model).name, "dtype": "float32", "n_prompt": [40], "n_gen": [6], "n_depth": [0, 300],
        "modes": ["exact", "verified"], "repetitions": 2, "delay_s": 0.0, "seed": 0, "prompt_file": None,
        "settings": {"cache.sinks": 64, "cache.window": 128},
    }  # fmt: skip
    assert {"torch", "transformers", "driver", "card"} & set(found["environment"]) >= {"card"}
    assert [(r["mode"], r["test"]) for r in found["rows"]] == [
        (mode, test)
        for mode in ("exact", "verified")
        for test in ("pp40", "tg6", "pp40 @ d300", "tg6 @ d300")
    ]
    for each in found["rows"]:
        rates = [s["tokens"] / s["seconds"] for s in each["samples"]]
        assert len(rates) == 2
        assert each["tokens_per_s"] == pytest.approx(sum(rates) / 2)
        assert isinstance(each["device_bytes"], int)
        assert each["device_bytes"] > each["model"]["weights_bytes"] > 0
        assert (each["host_bytes"] > 0) == (each["n_depth"] == 300)
    assert found["interrupted"] is False
    assert "Loading" in printed.err
    assert "tg6 @ d300: 2 of 2" in printed.err


def test_a_text_fills_the_context_and_must_be_long_enough(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("The lamp stands in the hall. " * 8)
    seen = []
    right = Runtime.generate

    def generate(self: Runtime, inputs: Any = None, **kwargs: Any) -> Any:
        seen.append(inputs[0].tolist())
        return right(self, inputs, **kwargs)

    monkeypatch.setattr(Runtime, "generate", generate)
    more = ("--prompt-file", str(file), "-n", "6", "-r", "1", "--mode", "exact")
    assert measure(model, *more, "-p", "40", "-d", "100") == 0
    assert "random" not in capsys.readouterr().out
    alphabet = {token for ids in seen for token in ids}
    assert len(max(seen, key=len)) == 141
    assert len(alphabet) == len(set("The lamp stands in the hall. "))  # its tokens are bytes
    assert measure(model, *more, "-p", "200", "-d", "100") == 2
    error = capsys.readouterr().err
    assert "too short" in error
    assert "301 tokens" in error


def test_the_table_is_markdown_and_its_notes_say_what_is_not_timed(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(model, *SMALL, *WINDOW, "-oe", "csv") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    assert len({len(line) for line in lines[:6]}) == 1
    assert table[0][:6] == ["model", "size", "params", "mode", "rung", "test"]
    assert all(set(cell) <= {"-", ":"} for cell in table[1])
    assert [cells[5] for cells in table[2:]] == ["pp40", "tg6", "pp40 @ d300", "tg6 @ d300"]
    assert {cells[3] for cells in table[2:]} == {"fast"}
    assert "by the replica" in table[5][-1]
    assert "note: not timed: loading" in printed.out
    assert lines[-1].startswith("offload ")
    head = printed.err.splitlines().index(next(x for x in printed.err.splitlines() if x.startswith("model_name,")))  # fmt: skip
    rows = list(csv.DictReader(io.StringIO("\n".join(printed.err.splitlines()[head:]))))
    assert [each["test"] for each in rows] == ["pp40", "tg6", "pp40 @ d300", "tg6 @ d300"]
    assert {(each["repetitions"], each["model_type"]) for each in rows} == {("2", "llama")}


def test_what_every_run_would_warn_of_is_said_once(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(model, "-p", str(POSITIONS), "-n", "0", "-r", "2", "--mode", "exact") == 0
    assert capsys.readouterr().err.count(f"the model was made for {POSITIONS}") == 1


def test_json_lines_have_a_type_each(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(model, "-p", "0", "-n", "4", "-r", "1", "-o", "jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["type"] for each in found][:2] == ["run", "row"]
    assert found[1]["test"] == "tg4"
    assert len(found[1]["samples"]) == 1
    assert found[-1] == {"type": "end", "interrupted": False}


def test_an_earlier_run_is_compared_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("-n", "6", "-r", "2", "--mode", "exact")
    assert measure(model, "-p", "0", *short, "-o", "json") == 0
    first = json.loads(capsys.readouterr().out)
    for each in first["rows"][0]["samples"]:
        each["seconds"] = 1e-6
    first["environment"]["torch"] = "1.0"
    file = tmp_path / "first.json"
    file.write_text(json.dumps(first))
    assert measure(model, "-p", "30", *short, "--baseline", str(file)) == 0
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("| ")]
    assert rows[0].rstrip(" |").endswith("against first.json")
    assert rows[2].rstrip(" |").endswith("not there")
    assert rows[3].rstrip(" |").endswith(" % !")
    assert "slower than in first.json by more than two" in printed.out
    assert "not as in first.json: torch was 1.0" in printed.err
    assert measure(model, "-p", "30", *short, "--baseline", str(file), "--json") == 0
    reading, writing = json.loads(capsys.readouterr().out)["rows"]
    assert reading["baseline"] is None
    assert writing["baseline"]["slower"] is True
    assert writing["baseline"]["change"] < -0.9


def test_ctrl_c_prints_the_rows_that_are_there(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Runtime.generate

    def generate(self: Runtime, inputs: Any = None, **kwargs: Any) -> Any:
        if inputs.shape[1] == 300:
            raise KeyboardInterrupt
        return right(self, inputs, **kwargs)

    monkeypatch.setattr(Runtime, "generate", generate)
    assert measure(model, *SMALL, "--json") == 130
    found = json.loads(capsys.readouterr().out)
    assert [each["test"] for each in found["rows"]] == ["pp40", "tg6"]
    assert found["interrupted"] is True


def test_an_error_is_the_only_object_but_leaves_the_table(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Runtime.generate

    def generate(self: Runtime, inputs: Any = None, **kwargs: Any) -> Any:
        if inputs.shape[1] == 300:
            raise InputError("It broke")
        return right(self, inputs, **kwargs)

    monkeypatch.setattr(Runtime, "generate", generate)
    assert measure(model, *SMALL, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "It broke."
    assert measure(model, *SMALL) == 2
    printed = capsys.readouterr()
    assert "tg6" in printed.out
    assert "error: It broke." in printed.err


def test_exit_code_3_is_for_a_run_in_which_nothing_fits(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(model, *SMALL, "--gpu-memory", "1KiB") == 3
    printed = capsys.readouterr()
    assert printed.out.count("| does not fit |") == 4
    assert "note: does not fit: fast pp40, fast tg6" in printed.out
    assert "the budget leaves 1.0 KiB" in printed.out
    few = ("-p", "0", "-n", "6", "-d", "0,400", "-r", "1", "--mode", "exact", *WINDOW)
    assert measure(model, *few, "--cpu-memory", "1KiB", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [each["status"] for each in rows] == ["measured", "does not fit"]
    assert rows[1]["samples"] == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-p", "0", "-n", "0"], "nothing to time"),
        (["-d", "9-3"], "does not go up"),
        (["--mode", "exact,sometimes"], "mode"),
        (["--prompt-file", "nowhere.txt"], "cannot be read"),
        (["--baseline", "nowhere.json"], "no baseline"),
        (["--json", "-o", "md"], "two forms"),
        (["-o", "sql"], "'sql'"),
        (["-r", "0"], "repetitions"),
    ],
)
def test_bad_input_is_exit_code_2_before_anything_is_loaded(
    more: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(model, *more) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Loading" not in printed.err


def test_each_mode_has_a_configuration_of_its_own() -> None:
    from offload.cli.bench import _configs

    sets = ["cache.window=128"]
    found = _configs(" exact, fast,exact", None, sets, gpu_memory="1GiB", cpu_memory=None)
    assert [config.mode for config in found] == ["exact", "fast"]
    assert {str(config.memory.gpu) for config in found} == {"1GiB"}
    assert {config.cache.window for config in found} == {128}
    assert _configs(None, None, [], gpu_memory=None, cpu_memory=None) == [OffloadConfig()]


def test_the_whole_table() -> None:
    rows = [
        row(100.0),
        row(20.0, mode="exact", rung=None),
        row(0, case=Case(prompt=2048), samples=(), status="does not fit", reason="It needs 2 GiB."),
    ]
    baseline = Baseline(name="first.json", rates={("fast", "tg128 @ d32768"): [150.0, 151.0]}, inputs={}, environment={})  # fmt: skip
    environment = {
        "offload": "0.1.0", "torch": "2.13.0", "triton": None, "card": "NVIDIA GeForce RTX 4090", "driver": "580",
        "pcie_generation": 4, "pcie_width": 16, "power_limit_w": 450.0,
    }  # fmt: skip
    notes = notes_of(rows, repetitions=2, random=True)
    text = render(
        Result(inputs={}, environment=environment, rows=rows, notes=notes, baseline=baseline),
        Form.MD,
    )
    assert text == (
        "| model |    size | params | mode  | rung |           test |           t/s | ms/token |                  device |     host | fidelity | against first.json |\n"
        "| ----- | ------: | -----: | ----- | ---- | -------------: | ------------: | -------: | ----------------------: | -------: | -------- | -----------------: |\n"
        "| tiny  | 3.0 GiB | 8.03 B | fast  | 4k4v | tg128 @ d32768 | 100.00 ± 1.41 |    10.00 | 1.00 GiB, peak 1.50 GiB | 0.25 GiB | exact    |          -33.6 % ! |\n"
        "| tiny  | 3.0 GiB | 8.03 B | exact | -    | tg128 @ d32768 |  20.00 ± 1.41 |    50.13 | 1.00 GiB, peak 1.50 GiB | 0.25 GiB | exact    |          not there |\n"
        "| tiny  | 3.0 GiB | 8.03 B | fast  | 4k4v |         pp2048 |  does not fit |        - |                       - |        - | -        |                  - |\n"
        "\n"
        "! slower than in first.json by more than two standard deviations\n"
        "\n"
        "note: mean ± standard deviation of 2, after a warm-up that is not counted\n"
        "note: not timed: loading, tokenising, reading the tokens before a test, compiling and capturing\n"
        "note: does not fit: fast pp2048: It needs 2 GiB.\n"
        "offload 0.1.0, torch 2.13.0, NVIDIA GeForce RTX 4090, driver 580, PCIe 4 x16, 450 W"
    )


def test_notes_say_what_a_number_does_not_mean() -> None:
    drafted = tuple(Sample(tokens=8, seconds=1.0, capture_s=0.75, verify_passes=2, accepted_tokens=8) for _ in range(2))  # fmt: skip
    verified = row(0, mode="verified", samples=drafted, goes_back=False, notes=("a fallback",))
    notes = notes_of([verified, verified], repetitions=2, random=True)
    assert len([note for note in notes if "tokens are random" in note]) == 1
    assert len([note for note in notes if "cannot go back" in note]) == 1
    assert notes.count("a fallback") == 1
    assert notes[1].endswith("compiling and capturing (3.0 s in counted runs)")
    assert not [note for note in notes_of([verified], repetitions=2, random=False) if "random" in note]  # fmt: skip
