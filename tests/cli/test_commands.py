"""What pages and help show of commands: outputs are what is printed, where that is the same everywhere, and examples run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny_lm import save_tiny_lm

from offload import cli

ROOT = Path(__file__).parents[2]
PAGE = "docs/commands.md"
SAME_EVERYWHERE = ("plan", "config")  # the others tell of a machine


def sessions(page: str) -> list[tuple[str, str]]:
    """Every command that a page shows behind a prompt, and all that it shows below, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(\$ .*?)^```", text, re.MULTILINE | re.DOTALL)
    parts = [re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:] for block in blocks]
    return [pair for part in parts for pair in zip(part[::2], part[1::2], strict=True)]


def arguments(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables before `offload` and the words behind it; no words where it is something else."""
    words = shlex.split(command)
    if "offload" not in words:
        return {}, []
    where = words.index("offload")
    return dict(word.split("=", 1) for word in words[:where]), words[where + 1 :]


def is_shown_as(printed: str, shown: str) -> bool:
    """Whether the two are the same, but for lines that a line `...` stands for."""
    lines = ["(.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in shown.splitlines()]
    return re.fullmatch("".join(lines), printed) is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def _a_shell_without_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("offload.hardware.local_card", lambda: None)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    monkeypatch.chdir(tmp_path)


def test_whole_outputs_are_as_the_page_shows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, compared = 0, set()
    for command, shown in [*sessions(PAGE), *readme()]:
        variables, words = arguments(command)
        if command.startswith("cat ") and not Path(command[4:]).exists():
            file = Path(command[4:])
            file.parent.mkdir(exist_ok=True)
            file.write_text(shown, encoding="utf-8")
        elif command == "echo $?":
            assert shown == f"{code}\n"
        elif words and words[0] in SAME_EVERYWHERE:
            with monkeypatch.context() as shell:
                for name, value in variables.items():
                    shell.setenv(name, value)
                code = cli.main(words)
            printed = "".join(capsys.readouterr())
            assert is_shown_as(printed, shown), f"$ {command}\n{printed}"
            compared.add(" ".join(words[: 1 + (words[0] == "config")]))
    assert compared == {"plan", "config init", "config check", "config show", "config schema"}


def readme() -> list[tuple[str, str]]:
    return [each for each in sessions("README.md") if arguments(each[0])[1][:1] == ["plan"]]


def test_every_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def below(*command: str) -> set[str]:
        cli.main([*command, "--help"])
        found = capsys.readouterr().out.partition("Commands:\n")[2].split("\n\n")[0]
        return set(re.findall(r"^  (\w+)", found, re.MULTILINE))

    shown = [arguments(command)[1] for command, _ in sessions(PAGE)]
    assert {words[0] for words in shown if words} >= below() - {"version"}
    assert {words[1] for words in shown if words[:1] == ["config"]} >= below("config")


@pytest.mark.parametrize("page", [PAGE, "README.md"])
def test_every_option_that_is_shown_is_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, _ in sessions(page):
        _, words = arguments(command)
        if not words:
            continue
        name = words[: 1 + (words[0] == "config")]
        cli.main([*name, "--help"])
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))
        assert {word for word in words if re.match("--?[a-z]", word)} <= known, command


def test_no_page_shows_a_folder_of_a_machine() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"(?<![\w.])/(tmp|home|work|root|usr)\b", page.read_text("utf-8"))


@pytest.mark.parametrize(
    ("command", "smaller"),
    [
        ("doctor", ""),
        ("version", ""),
        ("config", ""),
        ("config init", ""),
        ("config check", ""),
        ("config show", ""),
        ("config schema", ""),
        ("generate", "--max-new-tokens 4"),
        ("profile", "--max-new-tokens 2 --steps 1"),
        ("tune", "--time 1s --output 4"),
        ("bench", "-p 16 -n 2 -d 0,64 -r 1"),
    ],
)
def test_the_example_of_every_help_runs(
    command: str, smaller: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command != "config init":
        assert cli.main(["config", "init"]) == 0
    Path("book.txt").write_text("The lamp stands in the hall. " * 14)
    cli.main([*command.split(), "--help"])
    example = capsys.readouterr().out.partition("Example: ")[2].split("\n\n")[0]
    # Of what a shell would do only the first command, without where its output goes.
    first = " ".join(example.split()).split(" && ")[0].split(" > ")[0]
    words = shlex.split(first)[1:]
    if command == "config":  # writes what is there already
        words.append("--force")
    if smaller:  # of options that are given twice the later one counts
        words += [*smaller.split(), "--model", model, "--dtype", "float32"]
    assert cli.main(words) == 0, " ".join(words)
