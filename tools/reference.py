"""Writes the reference of the configuration file: every key with its unit, default, variable and description.

    python tools/reference.py > docs/config.md

All of it comes from the models of `offload/config.py`. A test says when the page is stale.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator

from offload.cli.settings import variable_of
from offload.config import OffloadConfig, Setting
from offload.schema import schema

_HEAD = """\
# Configuration

<!-- Written by tools/reference.py from offload/config.py. Change it there, then run:
     python tools/reference.py > docs/config.md -->

Every key of the configuration file `offload.toml`. `offload config init` writes a file with all of them, commented out;
`offload config check` says what is wrong with one, `offload config show` what is in effect and where it comes from.

Commands read the file of `--config`, else the one that `OFFLOAD_CONFIG` names, else the nearest `offload.toml` in the current
folder or above it, else `offload.toml` in your config folder. The environment variable of a key stands above the file, and
`--set memory.gpu=20GiB` above both. The name in Python is the keyword argument of `offload.attach`.

Bytes are text with a unit, `"20GiB"`, `"24GB"` or `"512MiB"`, or a number of bytes. Tokens are a number, or text with `K` (1,024)
or `M` (1,048,576): `"128K"`. `auto` is decided for the model and the machine. Nothing else is ever changed: what does not fit is an
error that says so.
"""


def reference() -> str:
    """The page, as Markdown."""
    described = schema()["properties"]
    python = {key: name for name, key in OffloadConfig.SHORT_NAMES.items()} | {"mode": "mode"}
    settings = OffloadConfig().settings()
    lines = _HEAD.splitlines()
    for name, rule in described.items():
        if rule.get("type") == "object":  # a section
            lines += ["", f"## [{name}]", "", *_wrapped(rule["description"])]
        for setting in settings:
            if setting.key == name or setting.key.startswith(f"{name}."):
                lines += _entry(setting, python.get(setting.key))
    return "\n".join(lines) + "\n"


def _entry(setting: Setting, name: str | None) -> Iterator[str]:
    # `mode` stands outside the sections, and has their rank.
    yield from ("", f"{'###' if '.' in setting.key else '##'} {setting.key}", "")
    yield from _wrapped(setting.description)
    yield ""
    yield f"- value: {setting.unit}"
    yield f"- default: `{json.dumps(setting.default)}`"
    yield f"- variable: `{variable_of(setting.key)}`"
    if name is not None:
        yield f"- in Python: `{name}`"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 125, break_on_hyphens=False)


if __name__ == "__main__":
    print(reference(), end="")
