"""The JSON schema of the configuration file, from which editors complete and explain its keys.

For Taplo and Even Better TOML, which read draft 7 (`#:schema ./offload.schema.json` on the first line
of the file). It allows all that `OffloadConfig` reads, and some that it refuses: how keys depend on each
other (`page` divides `window`) only `offload config check` says.
"""

from __future__ import annotations

from typing import Any

from offload.config import OffloadConfig, Setting


def schema() -> dict[str, Any]:
    """The schema, with types, units, defaults and descriptions of every key."""
    made = OffloadConfig.model_json_schema()
    settings = {setting.key: setting for setting in OffloadConfig().settings()}
    properties: dict[str, Any] = {}
    for name, given in made["properties"].items():
        if name in settings:
            properties[name] = _key(given, settings[name])
            continue
        # Written out, not referred to: draft 7 ignores what stands beside a reference.
        table = made["$defs"][given["$ref"].rpartition("/")[2]]
        keys = table.get("properties", {})
        properties[name] = {
            "type": "object",
            "description": table["description"],
            "additionalProperties": table["additionalProperties"],
            "properties": {key: _key(keys[key], settings[f"{name}.{key}"]) for key in keys},
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Configuration of offload",
        "type": "object",
        "additionalProperties": made["additionalProperties"],
        "properties": properties,
    }


def _key(made: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """What pydantic makes of a key, with the default as it stands in the file and the unit in sight."""
    kept = {name: value for name, value in made.items() if name != "title"}
    description = f"{setting.description} [{setting.unit}]"
    return kept | {"description": description, "default": setting.default}
