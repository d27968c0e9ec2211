"""What a command prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import offload
from offload import cli
from offload.config import OffloadConfig
from offload.errors import BudgetError, CacheError, InputError, OffloadError
from offload.schema import schema

NO_SUCH_FILE = "error: none.toml: No such file. Write one with: offload config init.\n"


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offload", *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False, env=os.environ)


def run_unread(arguments: list[str], unbuffered: str, *, stderr: int) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "offload", *arguments]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(
            command, stdout=writes, stderr=stderr, text=True, check=False, env=env
        )
    finally:
        os.close(writes)
    return done.returncode, done.stderr or ""


def raise_from_version(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> dict[str, str | None]:
        raise error

    monkeypatch.setattr(cli, "_versions", fail)


def test_version_is_printed_to_stdout() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"offload {offload.__version__}\n",
        "",
    )


def test_version_names_what_offload_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:4] == ["offload", "python", "torch", "transformers"]
    assert cli.main(["version", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema_version"], printed["command"]) == (1, "version")
    assert list(printed["versions"]) == names


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["generate"],
        ["plan"],
        ["profile"],
        ["tune"],
        ["bench"],
        ["doctor"],
        ["version"],
        ["config"],
        ["config", "show"],
        ["config", "check"],
        ["config", "schema"],
        ["config", "init"],
    ],
    ids=" ".join,
)
def test_every_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Usage: {' '.join(['offload', *command])} ")
    assert f"Example: {' '.join(['offload', *command])}" in " ".join(printed.out.split())
    assert printed.err == ""


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    commands = capsys.readouterr().out.partition("Commands:\n")[2].split("\n\n")[0]
    assert [line.split()[0] for line in commands.splitlines() if line[2] != " "] == [
        "demo",
        "generate",
        "plan",
        "profile",
        "tune",
        "bench",
        "doctor",
        "version",
        "config",
    ]


def test_help_says_what_to_try_next(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    lines = capsys.readouterr().out.partition("Example: ")[2].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["offload", "doctor"],
        ["offload", "demo"],
        ["offload", "plan"],
    ]


def test_a_misspelt_command_is_bad_usage_and_is_answered_with_the_nearest() -> None:
    done = run("confg")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'config'?" in done.stderr


def test_config_show_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show"]) == 0
    printed = capsys.readouterr()
    origins = dict.fromkeys(OffloadConfig.every_key(), "default")
    assert printed.out == "# file: none\n" + OffloadConfig().to_toml(origins=origins)
    assert printed.err == ""


def test_config_show_says_where_each_value_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text('[memory]\ngpu = "24gb"\n[cache]\nwindow = "4K"\n')
    assert cli.main(["config", "show", "--config", "my.toml"]) == 0
    assert capsys.readouterr().out == (
        "# file: my.toml\n"
        'mode = "fast"             # default\n'
        "\n"
        "[memory]\n"
        'gpu = "24GB"              # my.toml\n'
        'cpu = "auto"              # default\n'
        'pinned = "auto"           # default\n'
        'reserve = "1GiB"          # default\n'
        "\n"
        "[cache]\n"
        "page = 64                 # default\n"
        "sinks = 64                # default\n"
        "window = 4096             # my.toml\n"
        "\n"
        "[retrieval]\n"
        'tokens = "auto"           # default\n'
        'row_cache = "auto"        # default\n'
        'index = "replica"         # default\n'
        "recall = 0.95             # default\n"
        'threads = "auto"          # default\n'
        "\n"
        "[replica]\n"
        'rung = "auto"             # default\n'
        "ladder = false            # default\n"
        "whole_layers = 0          # default\n"
        "skipped_mass = 0.001      # default\n"
        "\n"
        "[scheduler]\n"
        'recompute = "off"         # default\n'
        'recomputed = "auto"       # default\n'
        "sparsity = 0.0            # default\n"
        "\n"
        "[prefill]\n"
        'chunk = "auto"            # default\n'
        "\n"
        "[decode]\n"
        'staging = "auto"          # default\n'
        "capture = true            # default\n"
        'compile = "auto"          # default\n'
        'draft = "auto"            # default\n'
        'look_ahead = "auto"       # default\n'
        "\n"
        "[trace]\n"
        "progress = true           # default\n"
        "progress_from = 8192      # default\n"
    )


def test_config_show_as_json_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text('memory.gpu = "24GB"\n')
    assert cli.main(["config", "show", "--config", "my.toml", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema_version"], printed["command"]) == (1, "config show")
    assert printed["inputs"] == {"config": "my.toml", "set": []}
    assert printed["file"] == "my.toml"
    by_key = {setting.pop("key"): setting for setting in printed["settings"]}
    assert list(by_key) == [setting.key for setting in OffloadConfig().settings()]
    gpu = by_key["memory.gpu"]
    assert (gpu["value"], gpu["default"]) == ("24GB", "auto")
    assert (gpu["origin"], gpu["from"]) == ("file", "my.toml")
    assert (by_key["cache.page"]["origin"], by_key["cache.page"]["from"]) == ("default", None)


def test_config_check_accepts_a_good_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text('[memory]\ngpu = "20GiB"\n')
    assert cli.main(["config", "check", "my.toml"]) == 0
    assert capsys.readouterr() == ("my.toml: ok\n", "")
    assert cli.main(["config", "check", "my.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_config_check_lists_everything_that_is_wrong() -> None:
    Path("my.toml").write_text('[memory]\ngpu = "24 gigs"\n[retreival]\n[cache]\nwindow = 100\n')
    done = run("config", "check", "my.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: 3 settings cannot be used.\n"
        "  my.toml:2:7: memory.gpu: 'gigs' in '24 gigs' is not a unit of memory. Write \"24GiB\" "
        '(1 GiB = 1024^3 bytes) or "24GB" (1 GB = 1000^3).\n'
        '    2 | gpu = "24 gigs"\n'
        "      |       ^^^^^^^^^\n"
        "  my.toml:3:2: retreival: unknown section. Did you mean 'retrieval'?\n"
        "    3 | [retreival]\n"
        "      |  ^^^^^^^^^\n"
        "  my.toml:5:10: cache.window: page size 64 does not divide the window of 100 tokens. "
        "Write 64 or 128.\n"
        "    5 | window = 100\n"
        "      |          ^^^\n"
    )


def test_config_check_reads_on_behind_a_line_that_is_not_toml() -> None:
    Path("my.toml").write_text('[memory]\ngpu = 24GiB"\ncpu = 8GiB\n[retreival]\ntokens = 4\n')
    done = run("config", "check", "my.toml")
    assert (done.returncode, done.stdout) == (2, "")
    quotes = 'Write one value, text between two quotes, for example gpu = "20GiB".\n'
    assert done.stderr == (
        "error: 3 settings cannot be used.\n"
        f"  my.toml:2:9: This is not TOML: a quote is missing. {quotes}"
        '    2 | gpu = 24GiB"\n'
        "      |         ^\n"
        "  my.toml:3:8: This is not TOML: Expected newline or end of document after a statement. "
        f"{quotes}"
        "    3 | cpu = 8GiB\n"
        "      |        ^\n"
        "  my.toml:4:2: retreival: unknown section. Did you mean 'retrieval'?\n"
        "    4 | [retreival]\n"
        "      |  ^^^^^^^^^\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[memory\ngpu = 24 gigs\n",  # a header: whose key is it?
        "[cache]\nwindow = [64,\npage = 64\nsinks = 64\n",  # nothing is wrong with the line of the place
        'mode = """fast\n[memory]\ngup = 1\n',
    ],
)
def test_config_check_takes_nothing_wrong_for_more_than_it_is(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.toml").write_text(text)
    assert cli.main(["config", "check", "my.toml"]) == 2
    said = capsys.readouterr().err
    assert said.count("This is not TOML") == 1
    assert said.startswith("error: my.toml:")


def test_config_check_finds_keys_that_exclude_each_other() -> None:
    Path("my.toml").write_text("[cache]\npage = 32\n")
    done = run("config", "check", "my.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pages of 64 tokens" in done.stderr
    Path("my.toml").write_text('mode = "exact"\n[cache]\npage = 32\n')
    assert run("config", "check", "my.toml").returncode == 0


def test_an_error_with_json_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text("[cache]\nwindow = 100\npgae = 3\n")
    assert cli.main(["config", "check", "my.toml", "--json"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["code"] == "ConfigError"
    assert [(p["key"], p["place"], p["asked"], p["there"]) for p in error["problems"]] == [
        ("cache.window", "my.toml:2:10", 100, 64),
        ("cache.pgae", "my.toml:3:1", "pgae", None),
    ]
    assert printed.err.startswith("error: 2 settings cannot be used.")


def test_config_init_writes_a_file_that_means_the_defaults_and_its_schema() -> None:
    done = run("config", "init")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "wrote offload.toml and offload.schema.json\n"
    text = Path("offload.toml").read_text()
    assert text == OffloadConfig.template(schema="./offload.schema.json")
    assert text.splitlines()[0] == "#:schema ./offload.schema.json"
    assert Path("offload.schema.json").read_text() == run("config", "schema").stdout
    assert cli.main(["config", "check", "offload.toml"]) == 0


def test_config_init_without_a_schema_writes_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "init", "my.toml", "--no-schema"]) == 0
    assert capsys.readouterr().err == "wrote my.toml\n"
    assert Path("my.toml").read_text() == OffloadConfig.template()
    assert not Path("my.schema.json").exists()


@pytest.mark.parametrize("there", ["my.toml", "my.schema.json"])
def test_config_init_replaces_a_file_only_when_forced(
    there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(there).write_text("mine")
    assert cli.main(["config", "init", "my.toml"]) == 2
    assert capsys.readouterr().err == (
        f"error: {there} is already there. Give another name, or --force to replace it.\n"
    )
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [(there, "mine")]
    assert cli.main(["config", "init", "my.toml", "--force"]) == 0
    assert Path("my.toml").read_text() == OffloadConfig.template(schema="./my.schema.json")
    assert json.loads(Path("my.schema.json").read_text()) == schema()
    assert cli.main(["config", "init", "no/such/folder.toml"]) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError("The pool", requested=2, available=1, setting="memory.cpu"), 3),
        (InputError("The document is empty"), 2),
        (CacheError("The cache is closed"), 1),
        (OffloadError("It failed"), 1),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raise_from_version(monkeypatch, error)
    assert cli.main(["version"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["--debug", "version"], ["version", "--debug"]])
def test_a_traceback_is_shown_only_with_debug(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_from_version(monkeypatch, CacheError("The cache is closed"))
    assert cli.main(arguments) == 1
    assert "Traceback (most recent call last):" in capsys.readouterr().err


def test_warnings_of_the_library_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    cli.main(["--version"])
    import logging

    logging.getLogger("offload.cache").warning("pinned less than asked")
    assert capsys.readouterr().err == "WARNING: pinned less than asked\n"


@pytest.mark.parametrize(
    "arguments", [["-q", "config", "init"], ["config", "init", "--quiet"]], ids=" ".join
)
def test_quiet_leaves_progress_out_wherever_it_stands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["config", "init", "--force"]) == 0  # the next run is not quiet
    assert capsys.readouterr().err == "wrote offload.toml and offload.schema.json\n"


def test_quiet_keeps_results_warnings_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_MEMORY_GPU", "1GiB")
    assert cli.main(["config", "show"]) == 0
    loud = capsys.readouterr()
    assert cli.main(["config", "show", "-q"]) == 0
    assert capsys.readouterr() == loud
    assert loud.err.startswith("WARNING: OFFLOAD_MEMORY_GPU is not read")
    assert cli.main(["config", "check", "none.toml", "-q"]) == 2
    assert capsys.readouterr().err.startswith("error: none.toml: No such file.")


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGPIPE")
@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "show"],  # fits the buffer of stdout: found when that is flushed
        ["config", "schema"],  # does not: found while the command prints
        ["config", "check", "none.toml", "--json"],  # an error, printed by main
        ["--help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_a_command_without_a_word(arguments: list[str], unbuffered: str) -> None:
    code, said = run_unread(arguments, unbuffered, stderr=subprocess.PIPE)
    assert (code, said.removeprefix(NO_SUCH_FILE)) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGPIPE")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stderr_may_be_closed_too(unbuffered: str) -> None:
    assert run_unread(["config", "init"], unbuffered, stderr=subprocess.STDOUT) == (141, "")


def test_another_pipe_that_breaks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_from_version(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    assert cli.main(["version"]) == 1
    assert capsys.readouterr().err.startswith("error: BrokenPipeError: [Errno 32] Broken pipe")
