"""The command line: `offload demo`, `offload generate`, `offload plan`, `offload profile`, `offload tune`,
`offload bench`, `offload doctor`, `offload config` and `offload version`.

| file | command |
|---|---|
| `demo` | `offload demo`: a real model, a long document, a small device budget |
| `generate` | `offload generate`: one answer to one prompt, streamed |
| `plan` | `offload plan`: what fits a card and how fast it is, without loading anything |
| `profile` | `offload profile`: where every byte and millisecond of a run went, beside the plan |
| `tune` | `offload tune`: better settings, by plans and short runs |
| `page` | the HTML page of a profile |
| `bench` | `offload bench`: tokens per second at several depths and in several modes, as llama-bench has them |
| `doctor` | `offload doctor`: whether this machine is ready |
| `config` | `offload config show`, `check`, `schema` and `init` |

A command parses, calls one function of the library, and renders what comes back. stdout carries the
result and nothing else. `main` alone turns errors into a line on stderr and an exit code: 0 done,
1 failed, 2 bad usage or configuration, 3 does not fit, 130 interrupted, 141 nobody reads on.

Help is answered without torch, transformers or pydantic: what is heavy is imported by the function
that needs it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from offload.cli import bench, config, demo, doctor, generate, plan, profile, tune
from offload.cli.text import PROGRESS
from offload.errors import (
    BudgetError,
    ConfigError,
    InputError,
    OffloadError,
    UnsupportedModelError,
)

FAILED, BAD_INPUT, DOES_NOT_FIT, INTERRUPTED = 1, 2, 3, 130
# As a shell says of a program that SIGPIPE ended (128 + 13): under `set -o pipefail` a script sees that
# the output was cut off, as it does with cat or grep, and can tell it from a failure of ours.
NOBODY_READS = 141

app = typer.Typer(
    name="offload",
    help="Run Hugging Face models on contexts whose KV cache does not fit on the GPU.",
    epilog="\b\n"  # keeps the lines apart
    "Example: offload doctor\n"
    "         offload demo\n"
    "         offload plan --model ./llama-8b --context 128K --gpu rtx4090",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    short_help="Answer a question about a long text.",
    epilog='Example: offload demo --question "What is this text about?"',
)(demo.demo)
app.command(
    short_help="Answer a prompt, streamed.",
    epilog="Example: offload generate --prompt-file book.txt --prompt 'Who did it?' --stats --verify 32",
)(generate.generate)
app.command(
    short_help="Say what fits a card, how fast it is and what to set.",
    epilog="Example: offload plan --model ./llama-8b --context 128K --gpu rtx4090",
)(plan.plan)
app.command(
    short_help="Run a prompt and say where every byte and millisecond went.",
    epilog="Example: offload profile --prompt-file book.txt --html profile.html --trace run.json.gz",
)(profile.profile)
app.command(
    short_help="Find better settings by plans and short runs.",
    epilog="Example: offload tune --prompt-file book.txt --time 5m",
)(tune.tune)
app.command(
    short_help="Time reading and generating tokens at several depths.",
    epilog="Example: offload bench -p 2048 -n 128 -d 0,32K,128K --mode exact,fast -o json > first.json",
)(bench.bench)
app.command(
    short_help="Say whether this machine is ready, and what would make it faster.",
    epilog="Example: offload doctor",
)(doctor.doctor)
app.add_typer(config.app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        from offload import __version__

        print(f"offload {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and debug logs.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Leave progress and notes out of stderr.")
    ] = False,
) -> None:
    """Declares the options of every command; `main` has already acted on --debug and --quiet."""


@app.command(epilog="Example: offload version --json")
def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the versions that a bug report needs."""
    versions = _versions()
    if as_json:
        print(json.dumps({"schema_version": 1, "command": "version", "versions": versions}))
        return
    for name, installed in versions.items():
        print(f"{name} {installed or 'not installed'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: As on the command line, without the program. None: those of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here, so that they may stand before or after the command.
    debug, quiet = "--debug" in given, "--quiet" in given or "-q" in given
    given = [argument for argument in given if argument not in ("--debug", "--quiet", "-q")]
    _log_to_stderr(logging.DEBUG if debug else logging.WARNING)
    PROGRESS.setLevel(logging.WARNING if quiet else logging.INFO)
    streams = sys.stdout, sys.stderr
    try:
        code = _run(given, debug=debug)
        sys.stdout.flush()  # here: at the end of the process Python itself would complain
    except BrokenPipeError as error:
        sys.stdout, sys.stderr = streams  # Typer has wrapped them
        unread = [_give_up(stream) for stream in streams]
        return NOBODY_READS if any(unread) else _unforeseen(error, debug=debug)
    return code


def _run(given: list[str], *, debug: bool) -> int:
    """Runs one command and returns its exit code. A pipe that is closed is raised."""
    try:
        app(given, prog_name="offload")
    except SystemExit as leaving:  # how Typer ends, also in success
        if isinstance(leaving.__context__, BrokenPipeError):
            raise leaving.__context__ from None
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OffloadError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        if "--json" in given:
            print(json.dumps({"schema_version": 1, "error": _as_object(error)}))
        return _exit_code(error)
    except Exception as error:  # noqa: BLE001 (the last stop: a user gets a line, not a traceback)
        return _unforeseen(error, debug=debug)
    return 0


def _unforeseen(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    if not debug:
        print("This was not foreseen. Add --debug to see where it comes from.", file=sys.stderr)
    return FAILED


def _give_up(stream: TextIO) -> bool:
    """Whether nobody reads a stream. What is still to be written to it then goes nowhere."""
    import select

    try:
        there = stream.fileno()
    except (OSError, ValueError):  # it is no file, but what a test reads
        return False
    # Asked of the system: whether a flush still fails depends on how the stream is buffered.
    poll = select.poll()
    poll.register(there, 0)  # errors and hang-ups, which are always told
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, there)
    os.close(nowhere)
    return True


def _exit_code(error: OffloadError) -> int:
    if isinstance(error, BudgetError):
        return DOES_NOT_FIT
    refused = (ConfigError, InputError, UnsupportedModelError)
    return BAD_INPUT if isinstance(error, refused) else FAILED


def _as_object(error: OffloadError) -> dict[str, Any]:
    """The error as JSON takes it: its class, its message, and its attributes."""
    fields = {
        name: value if isinstance(value, (int, float, str, type(None))) else str(value)
        for name, value in vars(error).items()
        if name != "problems" and not name.startswith("_")
    }
    found: dict[str, Any] = {"code": type(error).__name__, "message": str(error), **fields}
    if isinstance(error, ConfigError):
        found["problems"] = [_as_object(problem) for problem in error.problems]
    return found


def _log_to_stderr(level: int) -> None:
    log = logging.getLogger("offload")
    log.setLevel(level)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # One handler, on the stderr of now: `main` may run more than once in a process.
    log.handlers = [h for h in log.handlers if type(h) is not logging.StreamHandler] + [handler]


def _versions() -> dict[str, str | None]:
    from offload.environment import versions

    return versions()
