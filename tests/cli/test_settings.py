"""Which file a command reads, and what of it variables and the command line replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload import cli
from offload.cli.settings import asked, variable_of
from offload.config import OffloadConfig
from offload.errors import ConfigError
from offload.units import GIB

MODEL = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def refused(config: Path | None = None, sets: list[str] | None = None, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        asked(config, sets, **flags)
    return [str(problem) for problem in caught.value.problems or (caught.value,)]


def test_each_layer_replaces_the_one_below(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("offload.toml").write_text(
        'mode = "exact"\n[memory]\ngpu = "1GiB"\ncpu = "1GiB"\npinned = "1GiB"\nreserve = "2GiB"\n'
    )
    for key, value in {"memory.gpu": "2GiB", "memory.cpu": "2GiB", "memory.pinned": "2GiB"}.items():
        monkeypatch.setenv(variable_of(key), value)
    found = asked(None, ["memory.cpu=3GiB", "trace.progress=false"], gpu_memory="4GiB", mode=None)
    memory = found.config.memory
    sizes = [memory.gpu.bytes, memory.cpu.bytes, memory.pinned.bytes, memory.reserve.bytes]
    assert sizes == [4 * GIB, 3 * GIB, 2 * GIB, 2 * GIB]
    origins = {s.key: tuple(found.origin(s)) for s in found.config.settings()}
    assert {key: origin for key, origin in origins.items() if origin[0] != "default"} == {
        "mode": ("file", "offload.toml"),
        "memory.gpu": ("command line", "--gpu-memory"),
        "memory.cpu": ("command line", "--set"),
        "memory.pinned": ("environment", "OFFLOAD_MEMORY__PINNED"),
        "memory.reserve": ("file", "offload.toml"),
        "trace.progress": ("command line", "--set"),
    }


def test_the_file_that_is_named_is_the_only_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("offload.toml").write_text('mode = "exact"\n[cache]\npage = 32\n')
    Path("other.toml").write_text('memory.gpu = "1GiB"\n')
    Path("third.toml").write_text("cache.sinks = 0\n")
    monkeypatch.setenv("OFFLOAD_CONFIG", "third.toml")
    found = asked(Path("other.toml"))
    assert found.config == OffloadConfig.build(gpu_memory="1GiB")
    assert found.file == Path("other.toml")
    found = asked(None)
    assert found.config == OffloadConfig.build(sinks=0)
    assert found.file == Path("third.toml")


def test_a_file_above_the_current_folder_is_shown_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("offload.toml").touch()
    assert asked(None).file == Path("offload.toml")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert asked(None).file == tmp_path / "offload.toml"


def test_every_key_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in OffloadConfig().settings():
        monkeypatch.setenv(variable_of(setting.key), str(setting.default))
    found = asked(None)
    assert found.config.to_toml() == OffloadConfig().to_toml()
    assert {found.origin(s).kind for s in found.config.settings()} == {"environment"}


def test_other_variables_of_ours_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIR", "LOG", "COMMIT"):
        monkeypatch.setenv(f"OFFLOAD_{name}", "x")
    monkeypatch.setenv("OFFLOAD_MODE", "")
    monkeypatch.setenv("NOT_OFFLOAD_MEMORY__GPU", "x")
    assert asked(None).config == OffloadConfig()


def test_a_variable_with_a_single_underscore_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OFFLOAD_MEMORY_GPU", "1GiB")
    assert asked(None).config == OffloadConfig()
    assert caplog.messages == [
        "OFFLOAD_MEMORY_GPU is not read: the variable of memory.gpu is OFFLOAD_MEMORY__GPU"
    ]


def test_all_mistakes_are_named_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.toml").write_text("cache.window = 100\n")
    monkeypatch.setenv("OFFLOAD_MEMROY__GPU", "1GiB")
    monkeypatch.setenv("OFFLOAD_MEMORY__CPU", "lots")
    monkeypatch.setenv("OFFLOAD_CACHE", "x")
    sets = ["cache.widow=1", "page", "gpu=1GiB", "rung=5k", "scheduler=1", "xyz=1", "mode=fast"]
    assert refused(Path("my.toml"), sets, mode="exact") == [
        "OFFLOAD_CACHE: a section has no value. Its keys are OFFLOAD_CACHE__PAGE, "
        "OFFLOAD_CACHE__SINKS, OFFLOAD_CACHE__WINDOW.",
        "OFFLOAD_MEMROY__GPU: unknown setting. Did you mean 'OFFLOAD_MEMORY__GPU'?",
        "--set cache.widow: unknown setting. Did you mean 'cache.window'?",
        "--set takes a key and a value (asked: page). Write --set memory.gpu=20GiB.",
        "--set gpu: unknown setting. Did you mean 'memory.gpu'?",
        "--set scheduler: a section has no value. Its keys are scheduler.recompute, scheduler.recomputed, scheduler.sparsity.",
        "--set xyz: unknown setting. offload config show lists all keys.",
        "--set mode: given a second time, beside --mode (asked: fast). Leave one of the two out.",
        "OFFLOAD_MEMORY__CPU: 'lots' is not a size. "
        'Write bytes ("20GiB", "24GB") or, for a budget, a share ("80%") or "auto".',
        "--set rung: '5k' is not one of its values. "
        'Write "auto", "4k4v", "3k3v", "2k2v", "2k+clusters" or "clusters".',
        "my.toml:1:16: cache.window: page size 64 does not divide the window of 100 tokens. "
        "Write 64 or 128.\n  1 | cache.window = 100\n    |                ^^^",
    ]


def test_config_show_names_the_file_the_variable_and_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("offload.toml").write_text('memory.gpu = "1GiB"\n')
    monkeypatch.setenv("OFFLOAD_MODE", "exact")
    assert cli.main(["config", "show", "--set", "page=32"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[:2] == ["# file: offload.toml", 'mode = "exact"            # OFFLOAD_MODE']
    assert 'gpu = "1GiB"              # offload.toml' in lines
    assert "page = 32                 # --set" in lines
    assert OffloadConfig.from_toml(printed) == OffloadConfig.build(
        OffloadConfig(), mode="exact", page=32, gpu_memory="1GiB"
    )
    assert cli.main(["config", "show", "--json", "--set", "page=32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"] == {"config": None, "set": ["page=32"]}
    assert found["file"] == "offload.toml"
    by_key = {s["key"]: (s["origin"], s["from"]) for s in found["settings"]}
    assert by_key["mode"] == ("environment", "OFFLOAD_MODE")
    assert by_key["memory.gpu"] == ("file", "offload.toml")
    assert by_key["cache.page"] == ("command line", "--set")
    assert by_key["cache.sinks"] == ("default", None)


def test_a_plan_reads_the_nearest_file_and_the_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps(MODEL))
    Path("offload.toml").write_text('memory.gpu = "20GiB"\n')
    monkeypatch.setenv("OFFLOAD_MODE", "exact")
    assert cli.main(["plan", "--model", "config.json", "--gpu", "rtx4090", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert (plan["device_budget_bytes"], plan["rung"]) == (20 * GIB, None)
    monkeypatch.setenv("OFFLOAD_CONFIG", "none")
    assert cli.main(["plan", "--model", "config.json", "--gpu", "rtx4090"]) == 2
    assert capsys.readouterr().err.startswith("error: OFFLOAD_CONFIG: There is no file 'none'.")


def test_generate_reads_the_nearest_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("offload.toml").write_text("memory.gup = 1\n")
    assert cli.main(["generate", "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: offload.toml:1:1: memory.gup: unknown key.")
