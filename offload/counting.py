"""How many weights does a model have, by its config alone? Counted by a table of what each kind is made of.

The table (`offload/data/weights.json`) is written by `tools/weights.py`, which builds small models of every kind and solves
for sums of products of sizes; a kind whose weights no such sum gives exactly is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from offload.errors import InputError

# Products of expert sizes with these are weights of experts, of which a token meets some; others are routers.
_OF_EXPERTS = frozenset("mi")
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_STATE = "linear_attention"


@dataclass(frozen=True, slots=True)
class Counted:
    """Weights of a model.

    Attributes:
        all: Together; what is shared, once.
        experts: Of these, of experts that a token may meet or not.
        embedding: Of the input embedding.
        head: Of the output embedding; 0 where it is the input's.
        met: Share of its experts that a token meets; 1 where there are none.
    """

    all: int
    experts: int
    embedding: int
    head: int
    met: float


@cache
def table() -> dict[str, dict[str, Any]]:
    """What each kind is made of."""
    file = files("offload") / "data" / "weights.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def count(kind: str, config: Mapping[str, Any]) -> Counted:
    """Counts.

    Args:
        kind: The model type.
        config: As the file has it.

    Raises:
        InputError: The kind is not in the table, or the config says too little, or something that was not counted.
    """
    entry = table().get(kind)
    if entry is None:
        raise InputError(
            f"The config of a {kind} does not say how many weights it has",
            asked="its weights, of which there is no safetensors file",
            there=f"{len(table())} other kinds, which are counted",
            change="Give a folder that holds its safetensors files, or a GGUF file.",
        )
    return count_by(entry, kind, config)


def count_by(entry: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> Counted:
    """As `count`, by an entry of the table."""
    sizes = _sizes(kind, entry, config)
    layers = "states" if "state" in entry else "attention alone"
    for key, value in {"layer_types": layers, **entry["fixed"]}.items():
        if not _is_usual(key, value, config, sizes):
            raise InputError(
                f"The weights of a {kind} have not been counted with {key}",
                asked=f"{key} = {config[key]}",
                there=f"{key} = {value}",
                change="Give a folder that holds its safetensors files, or a GGUF file.",
            )
    parts = [entry]
    for key, switch in entry["switches"].items():
        if bool(config.get(key, switch["default"])) != switch["default"]:
            parts.append(switch)
    terms = [
        (product, times * _value(part, product, sizes))
        for one in parts
        for part in ("once", "layer", "dense", "state")
        for product, times in one.get(part, {}).items()
    ]
    met = 1.0
    if "top" in entry:
        key, value = entry["top"]
        met = min(1.0, (config.get(key) or value or sizes["E"]) / sizes["E"])
    embedding = sizes["v"] * sizes["h"]
    return Counted(
        all=sum(n for _, n in terms),
        experts=sum(n for product, n in terms if "E" in product and _OF_EXPERTS & set(product)),
        embedding=embedding,
        head=sum(n for product, n in terms if product == "vh") - embedding,
        met=met,
    )


def _is_usual(key: str, usual: Any, config: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether a key that changes the number of weights is as it was when they were counted."""
    if key not in config:
        return True
    value = config[key]
    if key == "layer_types":  # which tokens a layer sees is no matter of weights
        known = _ATTENTION | ({_STATE} if usual == "states" else set())
        return not isinstance(value, list) or known.issuperset(map(str, value))
    if key == "mlp_layer_types" and isinstance(value, list) and isinstance(usual, list):
        return set(value) <= set(usual)
    return bool(value == (sizes["h"] if usual == "hidden_size" else usual))


def _sizes(kind: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    found = {"1": 1}
    missing: dict[str, str] = {}
    for name, (keys, default) in entry["sizes"].items():
        given = [config[key] for key in keys if config.get(key) is not None]
        value = given[0] if given else default
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            found[name] = value
        else:
            missing[name] = keys[0]
    for name in set(missing) - {"K", "d"}:
        raise InputError(
            f"The config of a {kind} needs {missing[name]}",
            asked=missing[name],
            there=config.get(missing[name]),
            change="Give a config.json that transformers can load.",
        )
    found.setdefault("K", found["H"])
    found.setdefault("d", found["h"] // max(1, found["H"]))
    types = config.get("mlp_layer_types")
    if isinstance(types, list):
        found["k"] = types.count("dense")
    found["k"] = min(found.get("k", 0), found["L"])
    layers = config.get("layer_types")
    if isinstance(layers, list):
        found["S"] = layers.count(_STATE)
    elif "state" in entry:
        raise InputError(
            f"The config of a {kind} does not name its layers", asked="layer_types", there=None,
            change="Give a config.json that transformers has written.",
        )  # fmt: skip
    return found


def _value(part: str, product: str, sizes: Mapping[str, int]) -> int:
    value = {"once": 1, "layer": sizes["L"], "dense": sizes["k"], "state": sizes.get("S", 0)}[part]
    for letter in product:
        value *= sizes[letter]
    return value
