"""Options that commands share: keys of the configuration file on the command line."""

from __future__ import annotations

from typing import Any

from offload.errors import InputError


def merged(overrides: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """Overrides and `key=value` as keyword arguments of `OffloadConfig.build`."""
    merged: dict[str, Any] = dict(overrides)
    for each in sets:
        key, equals, text = each.partition("=")
        if not equals:
            raise InputError(
                "--set takes a key and a value",
                asked=each,
                there=None,
                change="Write --set memory.gpu=20GiB.",
            )
        value: object = {"true": True, "false": False}.get(text, text)
        if text.isdigit():
            value = int(text)
        section, _, name = key.partition(".")
        if name:
            merged.setdefault(section, {})[name] = value
        else:
            merged[section] = value
    return merged
