"""Writes how many weights each kind of model has, as sums of products of keys of its config.

    python tools/weights.py > offload/data/weights.json

`offload plan` counts with it where there is a config and no file of weights. Small models of every kind are built without
memory (`meta`), with random sizes; the number of their weights is solved for whole multiples of the products below. A kind
is only written where those give every weight of further models that were not solved with, which no guess survives. Keys
that change the number besides, and are no switch, are written as fixed: a config that sets them otherwise is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

import numpy as np

from offload.counting import count_by
from offload.errors import InputError
from offload.kinds import REFUSED

SAMPLES, HELD_OUT = 80, 12
# What a size is called, the first key that a kind has.
NAMES = {
    "h": ("hidden_size", "n_embd"),
    "i": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "H": ("num_attention_heads", "n_head"),
    "K": ("num_key_value_heads",),
    "d": ("head_dim",),
    "v": ("vocab_size",),
    "p": ("max_position_embeddings", "n_positions"),
    "L": ("num_hidden_layers", "n_layer"),
    "E": (
        "n_routed_experts",
        "num_local_experts",
        "num_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "m": ("moe_intermediate_size",),
    "s": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "n": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "k": ("first_k_dense_replace", "num_dense_layers", "n_dense_layers"),
    # Of a linear recurrence: heads and head size of keys, of values, and the length of the convolution.
    "a": ("linear_num_key_heads",),
    "b": ("linear_key_head_dim",),
    "c": ("linear_num_value_heads",),
    "e": ("linear_value_head_dim",),
    "f": ("linear_conv_kernel_dim",),
}
TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk")
ONCE = ("1", "v", "h", "vh", "ph", "hh")
LAYER = (
    "1", "h", "i", "d", "H", "hi", "hh", "hHd", "hKd", "Hd", "Kd", "hH", "hK",
    "E", "Eh", "Ehm", "Ehi", "Em", "Ei", "hm", "m", "hs", "s", "nhm", "nm",
)  # fmt: skip
# Of layers that keep a state: what they have, and what of the others they have not.
STATE = (
    "1", "h", "d", "H", "hHd", "hKd", "Hd", "Kd", "hab", "hce", "hc", "ha", "abf", "cef", "ab", "ce", "a", "c", "e", "b", "hh",
)  # fmt: skip
DENSE = ("1", "h", "i", "hi", "E", "Eh", "Ehm", "Em", "hm", "m", "hs", "nhm", "nm")


def _key(config: Any, name: str) -> str | None:
    """What a file calls a size; an attribute may have further names."""
    written = config.to_dict()
    there = [key for key in NAMES[name] if key in written and _int(config, key) is not None]
    return there[0] if there else None


def _spellings(config: Any, name: str, key: str) -> list[str]:
    """The key, and others that a file may have for it."""
    found = [key]
    for other in NAMES[name]:
        value = 2 * (_int(config, key) or 8)
        try:
            changed = cast(Any, type(config))(**{other: value})
        except Exception:  # noqa: BLE001, S112 - no such key, or not with the others
            continue
        if other != key and _int(changed, key) == value:
            found.append(other)
    return found


def _default(config: Any, key: str, names: dict[str, str]) -> int | None:
    """What a size is that a file leaves out; None where it follows from others."""
    other = {names[name]: 2 * (_int(config, names[name]) or 1) for name in "hH"}
    try:
        changed = cast(Any, type(config))(**other)
    except Exception:  # noqa: BLE001 - these do not go together
        return None
    return _int(config, key) if _int(changed, key) == _int(config, key) else None


def _int(config: Any, key: str) -> int | None:
    try:
        value = getattr(config, key, None)
    except Exception:  # noqa: BLE001 - some kinds refuse to say one number for all layers
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _random(names: dict[str, str], pick: random.Random) -> dict[str, int]:
    """Sizes that most kinds take: heads divide, head sizes are even."""
    heads, size = pick.choice((4, 8, 12, 16)), 8 * pick.randint(1, 4)
    sizes = {
        "h": heads * 8 * pick.randint(1, 5),
        "i": 8 * pick.randint(3, 30),
        "H": heads,
        "K": heads // pick.choice((1, 2, 4)),
        "d": size,
        "v": pick.randint(150, 900),
        "p": pick.choice((64, 128, 192, 256)),
        "L": pick.randint(3, 6),
        "E": 8 * pick.randint(1, 3),
        "m": 8 * pick.randint(2, 12),
        "s": 8 * pick.randint(2, 12),
        "n": pick.randint(1, 3),
        "k": pick.randint(0, 2),
        "a": pick.choice((2, 4)),
        "b": 8 * pick.randint(1, 3),
        "c": pick.choice((4, 8)),
        "e": 8 * pick.randint(1, 4),
        "f": pick.randint(2, 5),
    }
    return {key: sizes[name] for name, key in names.items()}


def _varied(names: dict[str, str], pick: random.Random) -> dict[str, Any]:
    """As `_random`; of models with states also which layers keep one."""
    sizes: dict[str, Any] = _random(names, pick)
    if "a" in names:
        states = ["linear_attention", "full_attention"]
        rest = [pick.choice(states) for _ in range(sizes[names["L"]] - 2)]
        sizes["layer_types"] = [*states, *rest]
    return sizes


def _built(kind: type, given: dict[str, Any]) -> tuple[Any, int]:
    """The config of a model of `meta`, and the number of its weights, those that are shared once."""
    import torch
    from transformers import AutoModelForCausalLM

    config = kind(**given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, sum(p.numel() for p in model.parameters())


def sizes_of(config: Any, names: dict[str, str]) -> dict[str, int]:
    """The sizes that products are made of."""
    found = {name: int(_int(config, key) or 0) for name, key in names.items()}
    found["1"] = 1
    found.setdefault("K", found["H"])
    found.setdefault("d", found["h"] // max(1, found["H"]))
    types = getattr(config, "mlp_layer_types", None)
    if isinstance(types, list):
        found["k"] = types.count("dense")
    found["k"] = min(found.get("k", 0), found["L"])
    layers = getattr(config, "layer_types", None)
    found["S"] = list(layers).count("linear_attention") if isinstance(layers, list) else 0
    return found


def _columns(names: dict[str, str], *, dense: bool) -> list[tuple[str, str]]:
    """(part, product) of what a number of weights may be a sum of."""
    there = {*names, "1", "K", "d"}
    whole_heads = "d" not in names  # then H * d is h

    def usable(product: str) -> bool:
        if whole_heads and ("Hd" in product or product == "d"):
            return False
        if "K" not in names and "K" in product:
            return False
        return all(letter in there for letter in product)

    found = [("once", each) for each in ONCE if usable(each)]
    found += [("layer", each) for each in LAYER if usable(each)]
    if "a" in names:
        found += [("state", each) for each in STATE if usable(each)]
    return found + [("dense", each) for each in DENSE if dense and usable(each)]


def _value(part: str, product: str, sizes: dict[str, int]) -> int:
    value = {"once": 1, "layer": sizes["L"], "dense": sizes["k"], "state": sizes["S"]}[part]
    for letter in product:
        value *= sizes[letter]
    return value


def _solve(samples: list[tuple[dict[str, int], int]], columns: list[tuple[str, str]]) -> dict[str, dict[str, int]] | None:  # fmt: skip
    """Whole multiples; None where there are none that give every sample."""
    table = np.array([[_value(*c, sizes) for c in columns] for sizes, _ in samples], dtype=float)
    want = np.array([count for _, count in samples], dtype=float)
    kept = [at for at in range(table.shape[1]) if table[:, at].any()]
    while kept:
        scale = np.abs(table[:, kept]).max(axis=0)
        weight = 1 / want.clip(min=1)
        found, *_ = np.linalg.lstsq(
            table[:, kept] / scale * weight[:, None], want * weight, rcond=1e-13
        )
        exact = found / scale
        rounded = np.round(exact)
        if np.array_equal(table[:, kept] @ rounded, want):
            terms: dict[str, dict[str, int]] = {}
            for at, times in zip(kept, rounded.astype(int).tolist(), strict=True):
                if times:
                    part, product = columns[at]
                    terms.setdefault(part, {})[product] = times
            return terms
        # What counts for nothing is left out, and the rest solved again.
        share = np.abs(exact) * np.abs(table[:, kept]).mean(axis=0)
        small = [at for at, one in zip(kept, np.abs(exact), strict=True) if one < 0.3]
        if not small:
            return None
        worst = min(small, key=lambda at: share[kept.index(at)])
        kept.remove(worst)
    return None


def counted(terms: dict[str, dict[str, int]], sizes: dict[str, int]) -> int:
    """Weights of such sizes."""
    return sum(
        times * _value(part, product, sizes)
        for part, products in terms.items()
        for product, times in products.items()
    )


def weights_of(kind: str) -> dict[str, Any] | str:
    """The entry of a kind, or why there is none."""
    # Most models ask for head_dim whether or not their configs have it by default; some refuse it.
    asked = [_entry(kind, heads=True)]
    if isinstance(asked[0], str):
        asked.append(_entry(kind, heads=False))
    return next((entry for entry in asked if not isinstance(entry, str)), asked[0])


def _entry(kind: str, *, heads: bool) -> dict[str, Any] | str:
    """The entry of a kind, or why there is none.

    Args:
        kind: The model type.
        heads: Whether head_dim is set beside whatever the default config has.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    try:
        default = CONFIG_MAPPING[kind]()
    except Exception as error:  # noqa: BLE001 - a kind without defaults is one that the table does not know
        return f"no default config: {error}"
    text = default.get_text_config(decoder=True)
    if type(text) is not type(default) or getattr(default, "is_encoder_decoder", False):
        return "is more than a decoder"
    names = {name: key for name in NAMES if (key := _key(default, name)) is not None}
    if heads:
        names.setdefault("d", "head_dim")
    types = set(getattr(text, "layer_types", None) or ()) | set(
        getattr(text, "layers_block_type", None) or ()
    )
    usual = {"sliding_attention", "chunked_attention"} | (
        {"linear_attention"} if "a" in names else set()
    )
    if types - usual - {"full_attention", "attention"} or len(types - usual) > 1:
        return f"has layers of several kinds: {sorted(types)}"
    if not {"h", "H", "v", "L"} <= set(names):
        return f"sizes are missing: {names}"
    given: dict[str, Any] = {"use_cache": True}
    written = default.to_dict()
    top = next((key for key in TOP if key in written and _int(default, key) is not None), None)
    if top is not None:
        given[top] = 2
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given[key] = 1
    if getattr(default, "is_decoder", None) is False:
        given["is_decoder"] = True
    pick = random.Random(kind)
    samples: list[tuple[dict[str, int], int]] = []
    failed = ""
    for _ in range(3 * SAMPLES):
        try:
            config, count = _built(type(default), given | _varied(names, pick))
            samples.append((sizes_of(config, names), count))
        except Exception as error:  # noqa: BLE001 - sizes that do not go together
            failed = f"{type(error).__name__}: {error}"[:200]
        if len(samples) == SAMPLES + HELD_OUT or (not samples and _ == 20):
            break
    if len(samples) < SAMPLES // 2:
        return f"cannot be built: {failed}"
    dense = any(sizes["k"] for sizes, _ in samples)
    terms = _solve(samples[:-HELD_OUT], _columns(names, dense=dense))
    if terms is None:
        return "no whole multiples give its weights"
    if any(counted(terms, sizes) != count for sizes, count in samples[-HELD_OUT:]):
        return "what was solved for does not hold"
    sizes: dict[str, list[Any]] = {
        n: [_spellings(default, n, key), None if n in "hHL" else _default(default, key, names)]
        for n, key in names.items()
    }
    for name in "hHL":
        sizes[name][1] = _int(default, names[name])
    entry: dict[str, Any] = {"sizes": sizes, **terms}
    if top is not None and "E" in names:
        entry["top"] = [top, _int(default, top)]
    switches, fixed = _other_keys(default, given, names, terms, pick, dense=dense)
    if isinstance(switches, str):
        return switches
    entry |= {"switches": switches, "fixed": fixed}
    if not _holds(entry, kind, default, given, names, pick):
        return "what a file says is not all that its weights depend on"
    return entry


def _follows(config: Any, key: str, names: dict[str, str]) -> bool:
    """Whether a key is the hidden size where it is left out."""
    hidden = names["h"]
    if getattr(config, key) != getattr(config, hidden):
        return False
    try:
        changed = cast(Any, type(config))(**{hidden: 2 * getattr(config, hidden)})
    except Exception:  # noqa: BLE001 - not that size
        return False
    return bool(getattr(changed, key) == getattr(changed, hidden))


def _holds(entry: dict[str, Any], kind: str, default: Any, given: dict[str, Any], names: dict[str, str], pick: random.Random) -> bool:  # fmt: skip
    """Whether `offload.counting` counts the weights of a further model, and of one as large as it is by default.

    Small sizes alone would not show what is rounded to a multiple.
    """
    try:
        config, weights = _built(type(default), {})
        if count_by(entry, kind, config.to_dict()).all != weights:
            return False
    except Exception:  # noqa: BLE001 - nobody can build that one
        return False
    for _ in range(20):
        try:
            config, weights = _built(type(default), given | _varied(names, pick))
        except Exception:  # noqa: BLE001, S112 - sizes that do not go together
            continue
        try:
            return count_by(entry, kind, config.to_dict()).all == weights
        except InputError:
            return False
    return False


def _other_keys(
    default: Any, given: dict[str, Any], names: dict[str, str], terms: dict[str, dict[str, int]], pick: random.Random,
    *, dense: bool,
) -> tuple[dict[str, Any] | str, dict[str, Any]]:  # fmt: skip
    """Switches with what they add, and keys that must stay as they are."""
    switches: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    taken = {*names.values(), *given} - {"is_decoder"}
    for key, value in sorted(default.to_dict().items()):
        if key in taken or key.startswith("_") or key in ("is_decoder", "dtype", "model_type"):
            continue
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [value + 8, max(1, value // 2)]
        elif key == "mlp_layer_types":
            others = [["dense", "sparse", "sparse"]]
        elif value is None or value == []:
            others = [[0], 8]
        for other in others:
            changed: list[tuple[dict[str, int], int]] = []
            for _ in range(40 if isinstance(value, bool) else 3):
                try:
                    sizes: dict[str, Any] = _varied(names, pick)
                    if key == "mlp_layer_types":
                        sizes[names["L"]] = len(other)
                    config, count = _built(type(default), given | sizes | {key: other})
                except Exception:  # noqa: BLE001 - not that value
                    if not changed and _ > 2:
                        break
                    continue
                found = sizes_of(config, names)
                changed.append((found, count - counted(terms, found)))
            if not any(more for _, more in changed):
                continue
            added = _solve(changed, _columns(names, dense=dense)) if isinstance(value, bool) and len(changed) > 30 else None  # fmt: skip
            if added is None:
                fixed[key] = "hidden_size" if _follows(default, key, names) else value
            else:
                switches[key] = {"default": value, **added}
    return switches, fixed


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="Default: all.")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    kinds = args.kinds or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(REFUSED))
    lines = []
    with ProcessPoolExecutor(args.workers) as pool:
        for kind, entry in zip(kinds, pool.map(weights_of, kinds), strict=True):
            if isinstance(entry, str):
                print(f"{kind}: {entry}", file=sys.stderr, flush=True)
                continue
            lines.append(f"{json.dumps(kind)}: {json.dumps(entry)}")
            print(f"{kind}: counted", file=sys.stderr, flush=True)
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
