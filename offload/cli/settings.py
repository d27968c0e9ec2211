"""What commands are asked to use: one file, variables above it, and the command line above both.

The library itself reads neither variables nor a file that it was not given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from offload.errors import ConfigError

if TYPE_CHECKING:
    from offload.config import Given, OffloadConfig, Setting

log = logging.getLogger(__name__)

CONFIG_HELP = "The TOML file. Default: OFFLOAD_CONFIG, or the nearest offload.toml, or the user's."

_PREFIX = "OFFLOAD_"
_APART = "__"  # between section and key: both have single underscores, and so have other variables


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        kind: `default`, `file`, `environment` or `command line`.
        name: The file, the variable or the option. None for a default.
    """

    kind: str
    name: str | None

    def __str__(self) -> str:
        return self.name or self.kind


class Asked(NamedTuple):
    """A configuration, and where each of its values comes from.

    Attributes:
        config: The configuration.
        file: The file that was read, None if there is none.
        above: For each key that has its value not from the file: from where.
    """

    config: OffloadConfig
    file: Path | None
    above: Mapping[str, Origin]

    def origin(self, setting: Setting) -> Origin:
        """Where a setting of this configuration comes from."""
        by_file = Origin("file", str(self.file)) if setting.is_set else Origin("default", None)
        return self.above.get(setting.key, by_file)


def asked(
    config: Path | None, sets: Sequence[str] | None = None, **flags: str | int | bool | None
) -> Asked:
    """What the user asked for, by all the ways there are.

    Args:
        config: The file of --config. None: the one that `OffloadConfig.find` finds.
        sets: `key=value` of each --set. Of two for one key the later one is taken.
        **flags: Options that stand for one key each, by the name that `OffloadConfig.build` knows.
            None: not given.

    Raises:
        ConfigError: Naming everything that is wrong, in the file, the variables and the command line.
    """
    from offload.config import OffloadConfig

    file = _shown(OffloadConfig.find()) if config is None else config
    variables, wrong = _from_environment(os.environ)
    options, wrong_too = _from_command_line(sets or (), flags)
    above = {each.key: Origin("environment", each.name) for each in variables}
    above |= {each.key: Origin("command line", each.name.split()[0]) for each in options}
    given, problems = [*variables, *options], [*wrong, *wrong_too]
    return Asked(OffloadConfig.layered(file, given, problems), file, above)


def variable_of(key: str) -> str:
    """The variable that sets a key: `OFFLOAD_MEMORY__GPU`."""
    return _PREFIX + key.upper().replace(".", _APART)


def _from_environment(variables: Mapping[str, str]) -> tuple[list[Given], list[ConfigError]]:
    """Settings among the variables. One that is empty counts as not set."""
    from offload.config import Given, OffloadConfig

    given: list[Given] = []
    problems: list[ConfigError] = []
    keys = {variable_of(key): key for key in OffloadConfig.every_key()}
    for name, text in sorted(variables.items()):
        inner = name.removeprefix(_PREFIX)
        if inner == name or not text:
            continue
        if name in keys:
            given.append(Given(keys[name], _value(text), name))
        elif _APART in inner or inner.lower() in OffloadConfig.model_fields:
            problems.append(_unknown(inner.lower().replace(_APART, "."), name, variable_of))
    for name, key in keys.items():
        single = name.replace(_APART, "_")
        if single != name and variables.get(single):
            log.warning("%s is not read: the variable of %s is %s", single, key, name)
    return given, problems


def _from_command_line(
    sets: Sequence[str], flags: Mapping[str, str | int | bool | None]
) -> tuple[list[Given], list[ConfigError]]:
    from offload.config import Given, OffloadConfig

    full, keys = OffloadConfig.SHORT_NAMES, OffloadConfig.every_key()
    given = [
        Given(full.get(name, name), value, f"--{name.replace('_', '-')}")
        for name, value in flags.items()
        if value is not None
    ]
    by_flag = {each.key: each.name for each in given}
    problems: list[ConfigError] = []
    for each in sets:
        name, equals, text = (part.strip() for part in each.partition("="))
        key, option = full.get(name, name), f"--set {name}"
        if not equals:
            what, change = "--set takes a key and a value", "Write --set memory.gpu=20GiB."
            problems.append(ConfigError(what, asked=each, change=change))
        elif key not in keys:
            problems.append(_unknown(key, option, str))
        elif key in by_flag:
            what, change = (
                f"given a second time, beside {by_flag[key]}",
                "Leave one of the two out.",
            )
            problems.append(ConfigError(what, key=option, asked=text, change=change))
        else:
            given.append(Given(key, _value(text), option))
    return given, problems


def _unknown(key: str, name: str, spell: Callable[[str], str]) -> ConfigError:
    """A key that does not exist, by the name the user wrote, with what was probably meant.

    Args:
        key: As it would be in the file.
        name: What the user wrote.
        spell: How the user would write a key.
    """
    from offload.config import OffloadConfig

    if key in OffloadConfig.model_fields:
        inside = [
            spell(known) for known in OffloadConfig.every_key() if known.startswith(f"{key}.")
        ]
        change = f"Its keys are {', '.join(inside)}." if inside else "It has no keys yet."
        return ConfigError(
            "a section has no value", key=name, asked=name.split()[-1], change=change
        )
    near = OffloadConfig.nearest_key(key)
    change = f"Did you mean {spell(near)!r}?" if near else "offload config show lists all keys."
    return ConfigError("unknown setting", key=name, asked=name.split()[-1], change=change)


def _value(text: str) -> str | int | bool:
    """What TOML would have for it: a switch, a whole number, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdecimal() else text


def _shown(file: Path | None) -> Path | None:
    """The path as people write it: without the current folder."""
    here = os.path.abspath(".")
    return file.relative_to(here) if file is not None and file.is_relative_to(here) else file
