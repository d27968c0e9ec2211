"""`offload config`: what is in effect, whether a file is right, its schema, and a file to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from offload.cli.settings import CONFIG_HELP, asked
from offload.cli.text import progress
from offload.errors import InputError

app = typer.Typer(
    help="Show, check and write the configuration file.",
    epilog="Example: offload config init && offload config check offload.toml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="Example: offload config show --set memory.gpu=20GiB")
def show(
    config: Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP)] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the file: --set replica.rung=4k4v."),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Print every value and where it comes from: the file, a variable, the command line, or nowhere.

    As TOML, which can be saved as a file.
    """
    found = asked(config, sets)
    settings = found.config.settings()
    if not as_json:
        print(f"# file: {found.file or 'none'}")
        origins = {setting.key: str(found.origin(setting)) for setting in settings}
        print(found.config.to_toml(origins=origins), end="")
        return
    shown = [
        {
            **setting._asdict(),
            "origin": found.origin(setting).kind,
            "from": found.origin(setting).name,
        }
        for setting in settings
    ]
    inputs = {"config": None if config is None else str(config), "set": sets or []}
    file = None if found.file is None else str(found.file)
    print(_object("config show", inputs=inputs, file=file, settings=shown))


@app.command(epilog="Example: offload config check offload.toml")
def check(
    file: Annotated[Path, typer.Argument(help="The TOML file.")],
    as_json: _AsJson = False,
) -> None:
    """Say whether a file can be used.

    If not, everything that is wrong with it is listed, and the exit code is 2.
    """
    from offload.config import OffloadConfig

    OffloadConfig.from_toml(file).require_usable()
    print(
        _object("config check", inputs={"file": str(file)}, ok=True) if as_json else f"{file}: ok"
    )


@app.command(epilog="Example: offload config schema > offload.schema.json")
def schema() -> None:
    """Print the JSON schema of the file, from which editors complete and explain its keys."""
    print(_schema_text(), end="")


@app.command(epilog="Example: offload config init offload.toml")
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("offload.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    with_schema: Annotated[
        bool,
        typer.Option("--schema/--no-schema", help="And its JSON schema beside it, for editors."),
    ] = True,
) -> None:
    """Write a file to start from.

    Every key is in it, commented out, with what it does, its unit and its default. Its first line names
    its JSON schema, which is written beside it: an editor needs no network to complete its keys.
    """
    from offload.config import OffloadConfig

    beside = file.with_suffix(".schema.json")
    texts = {file: OffloadConfig.template(schema=f"./{beside.name}" if with_schema else None)}
    if with_schema:
        texts[beside] = _schema_text()
    for path in texts:
        if path.exists() and not force:
            raise InputError(
                f"{path} is already there",
                asked=str(path),
                change="Give another name, or --force to replace it.",
            )
    for path, text in texts.items():
        _write(path, text)
    progress(f"wrote {' and '.join(map(str, texts))}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}",
            asked=str(path),
            change="Give a path in a folder that exists and can be written.",
        ) from error


def _schema_text() -> str:
    from offload.schema import schema

    return json.dumps(schema(), indent=2) + "\n"


def _object(command: str, **fields: object) -> str:
    return json.dumps({"schema_version": 1, "command": command, **fields}, indent=2)
