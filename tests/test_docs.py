"""What README.md, ARCHITECTURE.md and the pages under docs/ say is so."""

from __future__ import annotations

import json
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from tiny_lm import save_tiny_lm

from offload import cli, loading
from offload.cli.settings import variable_of
from offload.config import OffloadConfig
from offload.index import BACKENDS
from offload.kinds import REFUSED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
LINKED = {"index", "scheduler", "kernels"}


def code_block(language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"README.md has {len(blocks)} blocks of {language}"
    return str(blocks[0])


def tables(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def commands() -> list[str]:
    """Every `offload ...` in README.md, without its arguments."""
    found = set()
    for line in re.findall(r"(?:`|^\$ )offload ([^`\n]+)", README, re.MULTILINE):
        words: list[str] = []
        for word in line.split():
            if not re.fullmatch("[a-z]+", word):
                break
            words.append(word)
        found.add(" ".join(words))
    return sorted(found)


def modules() -> set[str]:
    found = set()
    for top in ("offload", *sorted(LINKED), "tools"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if not (parts[0] == "offload" and parts[1] in LINKED):
                found.add("/".join(parts))
    return found


def test_the_python_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_lm(tmp_path / "model")
    monkeypatch.setattr(loading, "load", partial(loading.load, str(folder)))
    # The tiny model's tokens are bytes: more than the window of the example, and few.
    (tmp_path / "LICENSE").write_text("Permission is granted to everyone. " * 50)
    monkeypatch.chdir(tmp_path)
    exec(compile(code_block("python"), "README.md", "exec"), {})
    on_host = re.search(r"on the device, ([\d,]+) on the host", capsys.readouterr().out)
    assert on_host is not None
    assert int(on_host[1].replace(",", "")) > 0


def test_the_toml_of_the_readme_is_a_configuration(tmp_path: Path) -> None:
    text = code_block("toml")
    given = {setting.key for setting in OffloadConfig.from_toml(text).settings() if setting.is_set}
    assert "memory.gpu" in given
    file = tmp_path / "offload.toml"
    file.write_text(text)
    assert cli.main(["config", "check", str(file)]) == 0


def test_the_readme_shows_commands() -> None:
    assert {"demo", "config check", "config init", "config schema", "config show"} <= set(
        commands()
    )


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_there(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: offload {command}")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_is_named_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named <= set(targets)


def test_the_readme_names_the_families_that_are_tested() -> None:
    section = re.search(r"\*\*Families\*\*.*?:(.*?)\. Other", README, re.DOTALL)
    assert section is not None
    named = {name.strip() for name in re.sub(r"\(.*?\)|^.*?:", "", section[1]).split(",")}
    assert named == {name.removesuffix("_sliding") for name in FAMILIES}


def test_the_readme_names_every_refused_model_type_and_its_reason() -> None:
    named = {name: row[0] for row in tables(README) if len(row) == 2 for name in row[1].split(", ")}
    assert {name: named.get(name) for name in REFUSED} == REFUSED


def test_the_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    file = ROOT / "benchmarks" / "generate.json"
    if not file.is_file():
        pytest.skip("benchmarks/generate.json is not in this checkout")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows, bars = {row["what"]: row for row in record["rows"]}, record["bars"]
    ours, dense = rows["ours exact"], rows["dense, all KV on the card"]
    stock, steps = rows["transformers offloaded"], ours["compared_steps"]
    measured = {
        "time per token": [
            ours["ms_per_token"],
            stock["ms_per_token"],
            bars["exact_vs_hf_offloaded_131072"],
        ],
        "reading the prompt": [ours["prefill_s"], dense["prefill_s"]],
        "KV from RAM per token": [
            ours["h2d_bytes_per_token"] / 2**30,
            100 * bars["exact_h2d_share"],
        ],
        "tokens on the device": [ours["tokens_on_device"], ours["tokens_on_host"]],
        "peak device memory": [
            bars["peak_gib_131072"],
            record["settings"]["cap_bytes"] / 2**30,
        ],
        "error of the logits": [ours["logit_error"], steps * ours["same_top"], steps],
    }
    shown = {row[0]: " ".join(row[1:]) for row in tables(README) if row[0] in measured}
    assert shown.keys() == measured.keys()
    for what, values in measured.items():
        numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", shown[what])
        assert len(numbers) == len(values), (what, numbers, values)
        for number, value in zip(numbers, values, strict=True):
            digits = len(number.partition(".")[2])
            rounding = 0.5 * 10.0**-digits + 1e-9
            assert abs(float(number.replace(",", "")) - value) <= rounding, (what, number, value)


def test_the_figures_of_mode_fast_are_those_of_the_benchmark() -> None:
    file = ROOT / "benchmarks" / "decode.json"
    if not file.is_file():
        pytest.skip("benchmarks/decode.json is not in this checkout")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in record["rows"]}
    predict = runpy.run_path(str(ROOT / "tools" / "bench" / "predict.py"))
    shown = [row for row in tables(README) if row[-1].endswith(" ms") and len(row) == 5]
    lengths = [what.removeprefix("ours ") for what in rows if what.startswith("ours ")]
    assert sorted(row[0].replace(",", "") for row in shown) == sorted(lengths)
    for context, copy, ours, full, predicted in shown:
        length = context.replace(",", "")
        row = rows[f"ours {length}"]
        assert copy.startswith("none" if row["rung"] is None else f"{row['rung'][0]} bits")
        assert ours == f"{row['ms_per_token']:.1f} ms"
        assert full == f"{rows[f'full {length}']['ms_per_token']:.1f} ms"
        rate = rows["kernels"]["device_bytes_per_s"]
        card = predict["CARDS"]["RTX 4090"]
        assert predicted == f"{predict['step_ms'](row, rate, card):.0f} ms"
    error = rows["ours 131072"]["logit_error"]
    assert f"off by {error:.2f} of their standard deviation" in README.replace("\n", " ")


def test_the_figures_of_the_three_modes_are_those_of_the_benchmarks() -> None:
    file = ROOT / "benchmarks" / "verified.json"
    if not file.is_file():
        pytest.skip("benchmarks/verified.json is not in this checkout")
    rows = {r["what"]: r for r in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    exact = json.loads((ROOT / "benchmarks" / "generate.json").read_text(encoding="utf-8"))
    ours = next(row for row in exact["rows"] if row["what"] == "ours exact")
    verified = rows["verified 131072"]
    shown = {row[0].strip("`"): row[2:] for row in tables(README) if row[0] in ("`fast`", "`verified`", "`exact`")}  # fmt: skip
    streamed = verified["decode_h2d_bytes"] / verified["new_tokens"] / 2**30
    assert shown["fast"][0] == f"{rows['fast 131072']['ms_per_token']:.1f} ms"
    assert shown["verified"] == [f"{verified['ms_per_token']:.1f} ms", f"{streamed:.2f} GiB"]
    assert shown["exact"][0] == f"{ours['ms_per_token']:.1f} ms"
    text = " ".join(README.split())
    draft, wait = verified["draft_ms_per_token"], verified["wait_ms_per_token"]
    assert f"{draft:.1f} ms a token to draft and {wait:.1f} ms more to wait for passes" in text
    assert f"over {verified['new_tokens']:,} tokens" in text
    found = rows["agreement q.gguf"]
    assert f"{found['share']:.2%} of {found['compared']:,} tokens".replace("%", " %") in text
    assert f"{100 * found['low']:.2f} to {100 * found['high']:.2f} %" in text
    flips = rows["flips q.gguf"]
    assert f"of {flips['tokens']:,} tokens {flips['flips']} were not" in text
    assert f"by {flips['largest_margin']:.3f} at most" in text
    itself = flips["flips_of_the_stock_cache_by_itself"]
    assert f"move by {flips['tau']:.3f} and its best token in {itself}." in text


def test_as_many_kinds_are_planned_as_were_measured() -> None:
    file = ROOT / "benchmarks" / "cli.json"
    if not file.is_file():
        pytest.skip("the record is not in this checkout")
    record = json.loads(file.read_text(encoding="utf-8"))
    found = next(row for row in record["rows"] if row["what"] == "families")
    said = f"{len(found['planned'])} of the {found['decoders']} kinds of decoders"
    assert said in " ".join(README.split())
    assert f"of {len(found['weights_same'])} that were built" in " ".join(README.split())
    assert not found["weights_differ"]
    assert not found["crashed"]
    assert record["bars"]["help_s"] <= 0.35
    assert record["bars"]["plan_s"] <= 1.0


def test_plans_are_as_near_as_was_measured() -> None:
    file = ROOT / "benchmarks" / "cli_card.json"
    if not file.is_file():
        pytest.skip("the record is not in this checkout")
    bars = json.loads(file.read_text(encoding="utf-8"))["bars"]
    text = " ".join(README.split())
    assert f"to {bars['plan_bytes_error_max']:.1%} less memory".replace("%", " %") in text
    assert f"up to {bars['plan_ms_error_max']:.0%} slower than predicted".replace("%", " %") in text
    assert bars["plan_bytes_under"] == 0
    assert bars["unaccounted_share"] <= 0.01
    assert bars["largest_context_share"] >= 0.97


def test_no_token_was_another() -> None:
    file = ROOT / "benchmarks" / "verified.json"
    if not file.is_file():
        pytest.skip("the record is not in this checkout")
    record = json.loads(file.read_text(encoding="utf-8"))
    compared = [row for row in record["rows"] if "different" in row]
    assert len([row for row in compared if row["what"].startswith("seeded")]) == 5
    greedy = [row for row in compared if row["what"].startswith("greedy")]
    assert [(row["prompts"], row["context"], row["tokens"]) for row in greedy] == [
        (16, 3072, 256)
    ] * 2
    assert not any(row["different"] for row in compared)
    assert record["bars"]["greedy_mismatches_fp32"] == 0
    assert record["bars"]["seeded_mismatches_fp32"] == 0
    assert "16 prompts of 3,072 tokens, 256 tokens each, gave no other token" in " ".join(
        README.split()
    )


def test_what_mode_verified_takes_elsewhere_is_what_is_predicted() -> None:
    files = [ROOT / "benchmarks" / name for name in ("verified.json", "decode.json")]
    if not all(file.is_file() for file in files):
        pytest.skip("a record is not in this checkout")
    verified, decode = (
        {row["what"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
        for file in files
    )
    predict = runpy.run_path(str(ROOT / "tools" / "bench" / "predict.py"))
    shown = [row[1:] for row in tables(README) if row[0].startswith(("PCIe", "held back", "RTX"))]
    ways = predict["measured_and_predicted"](verified)
    want = [[f"{ms:.1f} ms" for ms in pair] for pair in ways.values()]
    row = verified["verified 131072"]
    for card in predict["CARDS"].values():
        step = predict["step_ms"](
            decode["ours 131072"], decode["kernels"]["device_bytes_per_s"], card
        )
        streamed = row["decode_h2d_bytes"] / row["verify_passes"]
        best = predict["best_verified_ms"](step, streamed, row["forced_agreement"], card)
        want.append(["not run", f"{best:.0f} ms"])
    assert shown == want


def test_the_fidelity_table_of_the_readme_is_that_of_the_benchmark() -> None:
    file = ROOT / "benchmarks" / "fidelity.json"
    if not file.is_file():
        pytest.skip("benchmarks/fidelity.json is not in this checkout")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in record["rows"]}
    models = [what.partition(":")[0] for what in rows if what.endswith(": dense")]
    shown = [row for row in tables(README) if re.match(r"\**\d bits, \d+", row[0])]
    settings = [what.partition(": ")[2] for what in rows if what.startswith(f"{models[0]}: ")]
    assert len(shown) == len(settings) - 1  # without `dense`
    for name, _, *cells in shown:
        bits, tokens = re.findall(r"\d+", name)
        for model, cell in zip(models, cells, strict=True):
            row = rows[f"{model}: {bits}k{bits}v:{tokens}"]
            mean, worst, same = cell.removesuffix(" %").split(", ")
            assert f"{row['kl_mean']:.1e}".replace("e-0", "e-") == mean
            assert f"{row['kl_999']:.1e}".replace("e-0", "e-") == worst
            assert abs(100 * row["same_top"] - float(same)) < 0.05


def test_the_fidelity_table_of_the_host_path_is_that_of_the_benchmark() -> None:
    file = ROOT / "benchmarks" / "fidelity_host.json"
    if not file.is_file():
        pytest.skip("benchmarks/fidelity_host.json is not in this checkout")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in record["rows"] if "kl_mean" in row}
    models = list(dict.fromkeys(what.partition(": ")[0] for what in rows))
    settings = list(dict.fromkeys(what.partition(": ")[2] for what in rows))
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    start = page.index("## How faithful the host path is")
    shown = tables(page[start : page.index("\n## ", start + 1)])[1:]
    assert len(shown) == len(settings)
    assert len(models) == 2
    for (name, *cells), setting in zip(shown, settings, strict=True):
        index = setting.split(":")[2] if setting.count(":") == 2 else "the card"
        assert index in name
        for model, cell in zip(models, cells, strict=True):
            row = rows[f"{model}: {setting}"]
            same = f"{100 * row['same_top']:.1f} %"
            assert cell == f"{row['kl_mean']:.2g}, {row['kl_999']:.2g}, {same}"


def test_the_reference_of_the_configuration_is_what_its_models_say() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "reference.py"))["reference"]()
    shown = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert shown == made, "run: python tools/reference.py > docs/config.md"


def test_the_reference_has_every_key_with_all_that_there_is_to_say() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^###? ([\w.]+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(entries) == OffloadConfig.every_key()
    for setting in OffloadConfig().settings():
        entry = entries[setting.key]
        assert setting.description in " ".join(entry.split())
        for line in (
            f"- value: {setting.unit}",
            f"- default: `{json.dumps(setting.default)}`",
            f"- variable: `{variable_of(setting.key)}`",
        ):
            assert line in entry.splitlines()


def test_the_page_of_indexes_shows_what_was_measured() -> None:
    file = ROOT / "benchmarks" / "index.json"
    if not file.is_file():
        pytest.skip("benchmarks/index.json is not in this checkout")
    record = json.loads(file.read_text(encoding="utf-8"))
    plot = runpy.run_path(str(ROOT / "tools" / "plot_index.py"))
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert plot["page"](record, page) == page, "run: python tools/plot_index.py"
    shown = (ROOT / "docs" / "index.svg").read_text(encoding="utf-8")
    assert shown == plot["figure"](record), "run: python tools/plot_index.py"
    rows = {row[0]: row for row in tables(page) if row[0].startswith("`")}
    assert [name.strip("`") for name in rows] == list(BACKENDS)
    # Every sweep is in the figure: a mark at each setting, dropped and estimated, and a line at each of the nine.
    panels = plot["panels"](record)
    sweeps = [plot["sweep"](panel, name) for panel in panels for name, _, _ in plot["SERIES"]]
    assert all(len(sweep) >= 4 for sweep in sweeps)
    marks = 2 * sum(map(len, sweeps)) + 2 * (len(plot["SERIES"]) + 2)
    assert shown.count("<circle") == marks


def test_the_times_of_the_host_path_are_those_of_the_benchmark() -> None:
    file = ROOT / "benchmarks" / "host.json"
    if not file.is_file():
        pytest.skip("benchmarks/host.json is not in this checkout")
    bars = json.loads(file.read_text(encoding="utf-8"))["bars"]
    short, long = (bars[f"host_ms_{tokens}"] for tokens in (131072, 524288))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    wanted = (
        f"{short:.0f} ms a token for the 8B shape at 131,072 tokens and {long:.0f} ms at 524,288"
    )
    assert wanted in readme
    changes = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert f"8B shape takes {short:.0f} ms a token at 131,072 tokens" in changes
    assert f"and {long:.0f} ms at 524,288" in changes


def test_every_module_has_its_line_in_the_architecture_and_every_line_its_file() -> None:
    lines = [row[0].strip("`") for row in tables(ARCHITECTURE) if "/" in row[0]]
    named = [name for name in lines if re.fullmatch(r"[\w/]+\.\w+", name)]
    assert len(named) == len(set(named))
    assert {name for name in named if name.endswith(".py")} == modules()
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_file_that_the_architecture_names_is_there() -> None:
    named = set(re.findall(r"`(\w+\.md|[\w.]+/[\w./]+\.\w+)", ARCHITECTURE))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_test_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ARCHITECTURE)
    assert named
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^ *def {test}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []
