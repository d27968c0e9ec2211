"""The JSON schema of the file: it describes every key, takes what we read and finds what is broken."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from offload.config import OffloadConfig
from offload.errors import ConfigError
from offload.schema import schema

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float),
}  # fmt: skip
KNOWN = {"properties", "additionalProperties", "$schema", "title", "description", "default", "unit"}


def mistakes(value: Any, rule: dict[str, Any], key: str = "") -> list[str]:
    """The keys at which a value breaks a schema. Raises on a keyword that it does not know."""
    if not all(_holds(keyword, value, wanted) for keyword, wanted in rule.items()):
        return [key]
    found: list[str] = []
    if "properties" in rule:
        assert rule["additionalProperties"] is False
        for name, below in value.items():
            full = f"{key}.{name}".strip(".")
            rules = rule["properties"].get(name)
            found += [full] if rules is None else mistakes(below, rules, full)
    return found


def _holds(keyword: str, value: Any, wanted: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match keyword:
        case "type" if wanted in ("integer", "number"):
            return is_number and isinstance(value, KINDS[wanted])
        case "type":
            return isinstance(value, KINDS[wanted])
        case "anyOf":
            return any(not mistakes(value, rule) for rule in wanted)
        case "pattern":
            return not isinstance(value, str) or re.search(wanted, value, re.ASCII) is not None
        case "minimum":
            return not is_number or value >= wanted
        case "exclusiveMinimum":
            return not is_number or value > wanted
        case "maximum":
            return not is_number or value <= wanted
        case "exclusiveMaximum":
            return not is_number or value < wanted
        case "const":
            return bool(value == wanted)
        case "enum":
            return value in wanted
        case _:
            assert keyword in KNOWN, keyword
            return True


def broken(text: str) -> list[str]:
    return mistakes(tomllib.loads(text), schema())


def test_it_describes_every_key_as_the_configuration_does() -> None:
    described: dict[str, dict[str, Any]] = {}
    for name, rule in schema()["properties"].items():
        keys = {f"{name}.{key}": below for key, below in rule.get("properties", {}).items()}
        assert rule["description"]
        described |= keys if rule.get("type") == "object" else {name: rule}
    settings = {setting.key: setting for setting in OffloadConfig().settings()}
    assert list(described) == list(settings)
    for key, setting in settings.items():
        rule = described[key]
        assert rule["default"] == setting.default
        assert type(rule["default"]) is type(setting.default)
        assert rule["description"] == f"{setting.description} [{setting.unit}]"
        assert {"type", "anyOf", "enum"} & rule.keys(), key


def test_the_default_file_is_valid() -> None:
    assert broken(OffloadConfig().to_toml()) == []
    assert broken(OffloadConfig.template(schema="./x.json")) == []


def test_a_broken_file_is_found_at_every_key() -> None:
    text = """\
mode = "quick"
page = 64
[memory]
gpu = "24 gigs"
gup = "24GiB"
cpu = "80 %"
pinned = "24Gb"
reserve = "auto"
[cache]
page = 0
window = true
[retreival]
[retrieval]
tokens = "many"
[replica]
rung = "5k"
skipped_mass = 1.0
[decode]
staging = "10%"
capture = "yes"
compile = 1
draft = 1.5
[scheduler]
any = 1
"""
    assert set(broken(text)) == {
        "mode", "page", "memory.gpu", "memory.gup", "memory.pinned", "memory.reserve", "cache.page",
        "cache.window", "retreival", "retrieval.tokens", "replica.rung", "replica.skipped_mass",
        "decode.staging", "decode.capture", "decode.compile", "decode.draft", "scheduler.any",
    }  # fmt: skip
    # And none of it can be used.
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_toml(text)
    assert {problem.key for problem in caught.value.problems} == set(broken(text))


def test_whatever_is_read_is_valid() -> None:
    sizes = [
        1, 2**40, 1e9, "auto", " Auto ", "24GiB", "24gib", "24gb", "24 GB", "+1.5TiB", ".5 GiB", "1e9",
        "100B", "100b", "1GIb", "3 kB", "5 KB", "80%", "0.5 %", "2E1GiB", "24Gb", "24Gib", "10", "x",
    ]  # fmt: skip
    lengths = [0, 1, 64, 4096, "auto", "AUTO", "4K", "4k", " 1M ", "0.25K", "+64", "1e3", "4KiB", "-1"]  # fmt: skip
    switches = [True, False, "auto", "yes"]
    read = 0
    for setting in OffloadConfig().settings():
        section, _, name = setting.key.rpartition(".")
        for value in (*sizes, *lengths, *switches):
            data = {section: {name: value}} if section else {name: value}
            try:
                OffloadConfig(**data)
            except ConfigError:
                continue
            if setting.key in {"replica.skipped_mass", "retrieval.recall"} and isinstance(
                value, str
            ):
                continue  # read for the sake of variables; in a file a number needs no quotes
            read += 1
            assert mistakes(data, schema()) == [], (setting.key, value)
    assert read > 200


def test_it_stands_by_itself() -> None:
    assert "$ref" not in str(schema())
    assert schema()["$schema"] == "http://json-schema.org/draft-07/schema#"
