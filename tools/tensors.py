"""Writes what the tensors of kinds are made of whose weights `tools/weights.py` finds no sum of sizes for.

    python tools/tensors.py > offload/data/tensors.json

Layers of such kinds differ: some attend and some keep a state, some have experts. Models are built without memory (`meta`)
with sizes around the default ones. Every length of every tensor is solved for whole multiples of products of the keys that
change it, layers of one sort (`offload.counting.sort_of`) together. A key that changes the number of weights in another way
is written as fixed. A kind is only written where the weights of further models and of the default one come out exactly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

import numpy as np

from offload.counting import count_tensors, filled, flat, sorts_of, table
from offload.errors import InputError, UnsupportedModelError
from offload.kinds import REFUSED

SAMPLES, LAYERS = 48, 8
# What changes no weights, or is counted by the sorts of layers.
_NO_SIZES = re.compile(
    r"(^|\.)(_.*|dtype|model_type|transformers_version|.*_token_id|.*_token_index|use_cache|"
    r"layer_types|layers_block_type|mlp_layer_types|is_decoder|num_experts_per_tok.*|moe_k|output_.*|return_dict|"
    r"chunk_size_feed_forward|.*initializer.*|rope_.*|(attn|expert)_layer_(period|offset))$"
)
Poly = dict[str, int]


def text_of(config: Any) -> tuple[str, Any]:
    """Where the config of the part that generates is within a config ("" or "text_config."), and that config."""
    text = config.get_text_config(decoder=True)
    for name, value in vars(config).items():
        if value is text:
            return f"{name}.", text
    return "", text


def built(kind: str, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The config, as a file has it, and the model (`meta`) of the default config with changes (dotted keys)."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *where, last = key.split(".")
        at = nested
        for each in where:
            at = at.setdefault(each, {})
        at[last] = value
    config = cast(Any, CONFIG_MAPPING[kind])(**nested)
    for key, value in changes.items():  # some kinds take a key and forget it
        if flat(config.to_dict()).get(key) != value and not isinstance(value, list):
            raise ValueError(f"{key} = {value} is not kept")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_dict(), model


def _list_of_layers(model: Any, layers: int) -> str:
    """The prefix of the decoder's layers in the names of tensors."""
    sizes: Counter[str] = Counter()
    top: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        found = re.match(r"(.*?\.)(\d+)\.", name)
        if found:
            sizes[found[1]] += tensor.numel()
            top[found[1]] = max(top.get(found[1], 0), int(found[2]) + 1)
    whole = [prefix for prefix in sizes if top[prefix] == layers]
    return max(whole, key=sizes.__getitem__) if whole else ""


def tensors_of(kind: str, config: dict[str, Any], model: Any, where: str) -> dict[tuple[str, str], tuple[int, ...]]:  # fmt: skip
    """(sort, name) -> how many of these, and the lengths. Sort is "" of what is no layer of the decoder."""
    sorts = sorts_of(kind, _inner(config, where))
    prefix = _list_of_layers(model, len(sorts))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = {id(embedding.weight): "embedding"}
    if head is not None and head is not embedding:
        known.setdefault(id(head.weight), "head")
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    layers: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    others: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        at = re.match(re.escape(prefix) + r"(\d+)\.(.*)", name) if prefix else None
        if at:
            layer = layers.setdefault((sorts[int(at[1])], int(at[1])), {})
            layer[at[2]] = shape
        elif id(tensor) in known:
            found["", known[id(tensor)]] = (1, *shape)
        else:
            others[re.sub(r"\.\d+\.", ".*.", name), shape] += 1
    by_name: dict[str, int] = Counter(name for name, _ in others)
    for (name, shape), times in others.items():
        found["", name if by_name[name] == 1 else f"{name} {shape}"] = (times, *shape)
    for (sort, _), tensors in layers.items():
        mine = {name: shape for (other, name), (_, *shape) in found.items() if other == sort}
        if mine and {name: list(shape) for name, shape in tensors.items()} != mine:
            raise ValueError(f"layers of the sort {sort} differ")
        found |= {(sort, name): (1, *shape) for name, shape in tensors.items()}
    for sort in set(sorts) - {sort for sort, _ in layers}:
        found[sort, ""] = (0,)  # of layers that share what others have
    return found


def _inner(config: dict[str, Any], where: str) -> dict[str, Any]:
    return cast(dict[str, Any], config[where[:-1]]) if where else config


def _value(product: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[key] for key in product.split("*")) if product else 1


def _solve(keys: list[str], samples: Sequence[tuple[Mapping[str, int], int]]) -> Poly | None:
    """Whole multiples of products of keys; the fewest factors that do."""
    values = [value for _, value in samples]
    if len(set(values)) == 1:
        return {"": values[0]} if values[0] else {}
    for degree, squares in ((1, False), (2, False), (2, True), (3, False)):
        products = [""]
        for n in range(1, degree + 1):
            choose = itertools.combinations_with_replacement if squares else itertools.combinations
            products += ["*".join(each) for each in choose(keys, n)]
        if len(products) > len(samples) - 4:
            return None
        kept = list(products)
        while kept:
            rows = np.array([[_value(p, sizes) for p in kept] for sizes, _ in samples], dtype=float)
            scale = np.abs(rows).max(axis=0).clip(min=1)
            answer, *_ = np.linalg.lstsq(rows / scale, np.array(values, dtype=float), rcond=1e-12)
            exact = answer / scale
            rounded = np.round(exact).astype(np.int64)
            poly = {p: int(n) for p, n in zip(kept, rounded, strict=True) if n}
            if all(_sum(poly, sizes) == value for sizes, value in samples):
                return poly
            small = [p for p, x in zip(kept, exact, strict=True) if abs(x) < 0.3]
            if not small:
                break
            kept.remove(small[-1])
    return None


def _sum(poly: Poly, sizes: Mapping[str, int]) -> int:
    return sum(n * _value(product, sizes) for product, n in poly.items())


def _times(a: Poly, b: Poly) -> Poly:
    found: Poly = Counter()
    for (p, n), (q, m) in itertools.product(a.items(), b.items()):
        product = "*".join(sorted(each for each in (*p.split("*"), *q.split("*")) if each))
        found[product] += n * m
    return dict(found)


class _Kind:
    """A kind, its default config made small, and how it changes."""

    def __init__(self, name: str) -> None:
        from transformers import CONFIG_MAPPING

        self.name = name
        config = cast(Any, CONFIG_MAPPING[name])()
        self.where, _ = text_of(config)
        self.default = config.to_dict()
        self.few: dict[str, Any] = {}
        self.fills = self.builds = True
        try:
            built(name, {})
        except Exception:  # noqa: BLE001 - by default it does not know its head size
            self.fills = self.builds = False
            self.few = {"head_dim": config.hidden_size // config.num_attention_heads}
            if config.num_key_value_heads is None:
                self.few["num_key_value_heads"] = config.num_attention_heads
            if self.default.get("layer_types", 0) is None:
                self.fills = True
                self.few = {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}
        key = f"{self.where}num_hidden_layers"
        for layers in (LAYERS, 12):
            try:
                built(name, self.few | {key: layers})
            except Exception:  # noqa: BLE001, S112 - its lists of layers are of another length
                continue
            self.few[key] = layers
            break
        if self.default.get("attn_layer_indices", 0) is None:  # by default no layer attends
            self.few["attn_layer_indices"] = [1]
        self.base = self.made({})

    def made(self, changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, str], tuple[int, ...]]]:  # fmt: skip
        config, model = built(self.name, self.few | dict(changes))
        return config, tensors_of(self.name, config, model, self.where)

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        return {
            key: value for key, value in filled(config, self.where).items()
            if isinstance(value, int) and not isinstance(value, bool)
        }  # fmt: skip


def entry_of(name: str) -> dict[str, Any] | str:
    """The entry of a kind, or why there is none."""
    import transformers
    from transformers import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    try:
        config = cast(Any, CONFIG_MAPPING[name])()
        if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
            return "is more than a decoder"
        return _entry(name)
    except Exception as error:  # noqa: BLE001 - whatever its config or its code minds
        return f"{type(error).__name__}: {error}"[:200]


def _entry(name: str) -> dict[str, Any] | str:
    kind = _Kind(name)
    config, base = kind.base
    sizes, plain = kind.sizes(config), flat(config)
    changing: dict[str, set[tuple[str, str]]] = {}
    steps: dict[str, list[dict[str, int]]] = {}
    for key, value in sizes.items():
        if _NO_SIZES.search(key) or not value:
            continue
        for other in (2 * value, 3 * value, 4 * value, max(1, value // 2), value + 1):
            step = {key: other}
            for _ in range(2):  # alone, and with what follows it held
                try:
                    given, found = kind.made(step)
                except Exception:  # noqa: BLE001 - not that value
                    break
                changed = {t for t in base.keys() & found.keys() if base[t] != found[t]}
                if changed:
                    changing[key] = changing.get(key, set()) | changed
                    steps.setdefault(key, []).append(step)
                moved = {k: sizes[k] for k, v in kind.sizes(given).items() if plain.get(k) is not None and k != key and v != sizes[k]}  # fmt: skip
                step = {**moved, key: other}
                for each in moved:
                    changing[each] = changing.get(each, set()) | changed
            if len(steps.get(key, ())) >= 3:
                break
    dropped: set[str] = set()
    reason = ""
    for _ in range(6):
        outcome = _tensors(kind, {k: v for k, v in steps.items() if k not in dropped}, changing)
        if isinstance(outcome, dict):
            break
        reason, blamed = outcome
        if not blamed - dropped:
            return reason
        dropped |= blamed
    else:
        return reason
    entry = _written(kind, outcome)
    entry["fixed"] = _fixed(kind, entry)
    full, model = built(name, {} if kind.builds else kind.few)
    try:
        said = count_tensors(entry, name, full).all
    except (InputError, UnsupportedModelError) as error:
        return f"by default: {error}"
    weights = sum(p.numel() for p in model.parameters())
    return entry if said == weights else f"{said} weights instead of {weights} by default"


def _tensors(kind: _Kind, steps: Mapping[str, list[dict[str, int]]], changing: Mapping[str, set[tuple[str, str]]]) -> dict[tuple[str, str], list[Poly]] | tuple[str, set[str]]:  # fmt: skip
    """The lengths of every tensor; or why not, and the keys that this is to be tried again without."""
    pick = random.Random(kind.name)
    samples = [(kind.sizes(kind.base[0]), kind.base[1])]
    failed = ""
    given = flat(kind.base[0])
    for alone in steps.values():
        samples += _sampled(kind, alone)
    for _ in range(3 * SAMPLES):
        if len(samples) >= SAMPLES + 1 + 3 * len(steps):
            break
        few = pick.sample(sorted(steps), k=min(len(steps), pick.randint(2, 5)))
        changes: dict[str, int] = {}
        for key in few:
            changes |= {k: v for k, v in pick.choice(steps[key]).items() if k not in changes}
        samples += _sampled(kind, [changes])
    outcome: dict[tuple[str, str], list[Poly]] = {}
    sorts = {sort for sort, _ in kind.base[1]} | {""}
    for tensor in sorted({t for _, found in samples for t in found if t[0] in sorts}):
        # A key that follows another one is told from it where both were given.
        keys = sorted(key for key, tensors in changing.items() if tensor in tensors)
        having = [(s, found[tensor]) for s, found in samples if tensor in found]
        lengths = {len(shape) for _, shape in having}
        if len(lengths) > 1:
            return f"{tensor} is of several ranks", set()
        polys = []
        for at in range(lengths.pop()):
            values = [(s, shape[at]) for s, shape in having]
            told = [k for k in keys if k in steps or k not in given]
            told = [k for k in told if all(k in s for s, _ in having)]
            poly = _solve(told, values)
            if poly is None:
                failed = f"no whole multiples give {tensor} ({', '.join(keys)})"
                blamed = {min(told, key=lambda k: len(changing[k]))} if told else set()
                return failed, blamed & set(steps)
            polys.append(poly)
        outcome[tensor] = polys
    return outcome


def _sampled(kind: _Kind, all_changes: list[dict[str, int]]) -> list[tuple[dict[str, int], dict[tuple[str, str], tuple[int, ...]]]]:  # fmt: skip
    found = []
    for changes in all_changes:
        try:
            config, tensors = kind.made(changes)
        except Exception:  # noqa: BLE001, S112 - sizes that do not go together
            continue
        found.append((kind.sizes(config), tensors))
    return found


def _written(kind: _Kind, tensors: Mapping[tuple[str, str], list[Poly]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"where": kind.where, "embedding": {}, "head": {}, "once": {}, "layers": {}, "experts": {}}  # fmt: skip
    for (sort, name), polys in tensors.items():
        whole: Poly = {"": 1}
        for poly in polys:
            whole = _times(whole, poly)
        if sort:
            at = entry["experts" if ".experts." in f".{name}" else "layers"].setdefault(sort, {})
        else:
            at = entry[name if name in ("embedding", "head") else "once"]
        for product, n in whole.items():
            at[product] = at.get(product, 0) + n
    for sort in entry["experts"]:
        entry["layers"].setdefault(sort, {})
    used = {
        key for part in ("embedding", "head", "once") for product in entry[part] for key in product.split("*")
    } | {
        key for part in ("layers", "experts") for one in entry[part].values() for product in one
        for key in product.split("*")
    }  # fmt: skip
    default = filled(kind.default, kind.where) if kind.fills else flat(kind.default)
    entry["fills"] = kind.fills
    entry["parts"] = [
        key
        for key, value in kind.default.items()
        if key.endswith("_config") and isinstance(value, dict)
    ]
    entry["keys"] = {
        key: None if key in ("head_dim", "num_key_value_heads") and flat(kind.default).get(key) is None else default.get(key)
        for key in sorted(used - {""})
    }  # fmt: skip
    tie = flat(kind.default).get(f"{kind.where}tie_word_embeddings")
    entry["tied"] = not entry["head"] if tie is None else bool(tie)
    text = _inner(kind.default, kind.where)
    for many in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts"):  # fmt: skip
        for few in ("num_experts_per_tok", "moe_k", "moe_topk", "ffn_config.moe_top_k"):
            there = flat(text)
            if isinstance(there.get(many), int) and isinstance(there.get(few), int):
                entry["top"] = [few, there[few], many, there[many]]
    return entry


def _fixed(kind: _Kind, entry: dict[str, Any]) -> dict[str, Any]:
    """Keys whose other values change the weights in a way that is not counted."""
    fixed: dict[str, Any] = {}
    for key, value in sorted(flat(kind.default).items()):
        if key.endswith(".model_type"):  # other parts are made of other tensors
            fixed[key] = value
        if _NO_SIZES.search(key):
            continue
        others: list[Any] = [8, [0]]
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [2 * value, value + 1, value + 8, max(1, value // 2)]
        elif isinstance(value, float):
            others = [2 * value, value / 2]
        elif isinstance(value, str) or (isinstance(value, list) and value):
            continue
        for other in others:
            try:
                config, model = built(kind.name, kind.few | {key: other})
            except Exception:  # noqa: BLE001, S112 - not that value
                continue
            weights = sum(p.numel() for p in model.parameters())
            try:
                same = count_tensors({**entry, "fixed": {}}, kind.name, config).all == weights
            except (InputError, UnsupportedModelError):
                same = True  # it is refused for another reason
            if not same:
                fixed[key] = value
                break
    return fixed


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", help="Default: all that tools/weights.py does not count."
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    kinds = args.kinds or sorted(
        set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(REFUSED) - set(table())
    )
    lines = []
    with ProcessPoolExecutor(args.workers) as pool:
        for kind, entry in zip(kinds, pool.map(entry_of, kinds), strict=True):
            print(f"{kind}: {entry if isinstance(entry, str) else 'counted'}", file=sys.stderr, flush=True)  # fmt: skip
            if not isinstance(entry, str):
                lines.append(f"{json.dumps(kind)}: {json.dumps(entry)}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
