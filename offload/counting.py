"""How many weights does a model have, by its config alone? Counted by a table of what each kind is made of.

The table (`offload/data/weights.json`) is written by `tools/weights.py`, which builds small models of every kind and solves
for sums of products of sizes. Kinds whose layers are of several sorts are in another one (`offload/data/tensors.json`, by
`tools/tensors.py`), which says of each sort what its tensors are made of. A kind that neither gives exactly is in none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

from offload.errors import InputError
from offload.layers import names_of, own_sizes

# Products of expert sizes with these are weights of experts, of which a token meets some; others are routers.
_OF_EXPERTS = frozenset("mi")
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_STATE = "linear_attention"
# Objects in a config that say nothing of further weights.
_NO_PARTS = ("quantization_config", "generation_config", "per_layer_config")


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


@cache
def by_tensors() -> dict[str, dict[str, Any]]:
    """What the tensors of kinds are made of that are not in `table`."""
    file = files("offload") / "data" / "tensors.json"
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
    if entry is None and kind in by_tensors():
        return count_tensors(by_tensors()[kind], kind, config)
    if entry is None:
        raise InputError(
            f"The config of a {kind} does not say how many weights it has",
            asked="its weights, of which there is no safetensors file",
            there=f"{len(table()) + len(by_tensors())} other kinds, which are counted",
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


def count_tensors(entry: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> Counted:
    """As `count`, by an entry of the other table.

    Args:
        entry: Products of keys, of what there is once and of the layers of each sort.
        kind: The model type.
        config: As the file has it, with the parts that it is made of.
    """
    given, where = flat(config), str(entry["where"])
    text = config.get(where[:-1]) if where else config
    if not isinstance(text, Mapping):
        raise _uncounted(kind, where[:-1], None, "an object")
    for key, value in entry["fixed"].items():
        if given.get(key, value) != value:
            raise _uncounted(kind, key, given[key], value)
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping) and key not in (*entry["parts"], *_NO_PARTS):  # fmt: skip
            raise _uncounted(kind, key, value, None)
    sizes: dict[str, int] = {}
    usual = {key: value for key, value in entry["keys"].items() if value is not None}
    known = filled(usual | given, where) if entry["fills"] else usual | given
    for key in entry["keys"]:
        value = known.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _uncounted(kind, key, value, "a number")
        sizes[key] = value
    sorts = sorts_of(kind, text)
    strange = sorted(set(sorts) - set(entry["layers"]))
    if strange:
        raise _uncounted(kind, "layers", ", ".join(strange), ", ".join(entry["layers"]))
    layers = sum(_sum(entry["layers"][sort], sizes) for sort in sorts)
    experts = sum(_sum(entry["experts"].get(sort, {}), sizes) for sort in sorts)
    embedding, head = _sum(entry["embedding"], sizes), _sum(entry["head"], sizes)
    tied = text.get("tie_word_embeddings", entry["tied"])
    if tied != entry["tied"]:
        head = 0 if tied else embedding
    met = 1.0
    if "top" in entry:
        few, usual, many, all_usual = entry["top"]
        inner = flat(text)
        met = min(1.0, (inner.get(few) or usual) / (inner.get(many) or all_usual))
    return Counted(
        all=_sum(entry["once"], sizes) + embedding + head + layers + experts,
        experts=experts,
        embedding=embedding,
        head=head,
        met=met,
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of a config, those of its parts with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def filled(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a config (`flat`), and what follows from them where it is not given: head size and KV heads."""
    found = flat(config)
    for hidden, heads in (("hidden_size", "num_attention_heads"), ("n_embd", "n_head")):
        width, many = found.get(where + hidden), found.get(where + heads)
        if isinstance(width, int) and isinstance(many, int) and many > 0:
            for key, value in (("head_dim", width // many), ("num_key_value_heads", many)):
                if found.get(where + key) is None:
                    found[where + key] = value
    return found


def sorts_of(kind: str, text: Mapping[str, Any]) -> list[str]:
    """Of each layer what it attends or keeps, and whether it has experts: layers of one sort weigh the same."""
    named = text.get("layers_block_type")
    layers = text.get("num_hidden_layers", text.get("n_layer", text.get("n_layers")))
    if not isinstance(layers, int) and isinstance(named, list):
        layers = len(named)
    if not isinstance(layers, int):
        raise _uncounted(kind, "num_hidden_layers", layers, "a number")
    names = names_of(kind, text, layers)
    found = []
    for i, own in enumerate(own_sizes(kind, text, names)):
        further = [f"{key}={value}" for key, value in sorted(own.items())]
        found.append(" ".join([names[i], _inner(text, i, layers), *further]))
    return found


def _inner(text: Mapping[str, Any], layer: int, layers: int) -> str:
    """Whether a layer has experts, by whichever way its kind says so."""
    types = text.get("mlp_layer_types")
    if isinstance(types, list) and len(types) > layer:
        return str(types[layer])
    if isinstance(text.get("moe_layers"), list):
        return "sparse" if layer in text["moe_layers"] else "dense"
    if "moe_layer_interval" in text:
        first, last = text.get("moe_layer_start_index", 0), text.get("moe_layer_end_index", -1)
        is_in = first <= layer <= (layers - 1 if last < 0 else last)
        return "sparse" if is_in and (layer + 1) % text["moe_layer_interval"] == 0 else "dense"
    if "expert_layer_period" in text:
        offset = text.get("expert_layer_offset", 0)
        return "dense" if (layer - offset) % text["expert_layer_period"] else "sparse"
    if "mlp_only_layers" in text:
        step = text.get("decoder_sparse_step") or 1
        is_dense = layer in (text["mlp_only_layers"] or ()) or (layer + 1) % step
        return "dense" if is_dense else "sparse"
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(text.get(key), int):
            return "dense" if layer < text[key] else "sparse"
    return "dense"


def _sum(products: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    return sum(
        times * prod(sizes[key] for key in product.split("*") if key)
        for product, times in products.items()
    )


def _uncounted(kind: str, key: str, asked: Any, there: Any) -> InputError:
    return InputError(
        f"The weights of a {kind} have not been counted with {key}",
        asked=f"{key} = {asked}",
        there=f"{key} = {there}",
        change="Give a folder that holds its safetensors files, or a GGUF file.",
    )
