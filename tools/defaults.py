"""Writes what a model's config means where its file leaves keys out: transformers' own defaults, for each kind.

    python tools/defaults.py > offload/data/defaults.json

`offload plan` reads the table instead of transformers, whose import takes seconds. A test says when it is stale.
"""

from __future__ import annotations

import json
from typing import Any, cast

KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern",
    "layer_types", "attention_bias", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_embd", "n_layer", "n_head",
    "n_positions", "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim",
    "linear_conv_kernel_dim", "conv_L_cache", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_n_heads",
    "mamba_d_head", "mamba_n_groups", "v_head_dim", "attention_chunk_size", "rotary_dim",
)  # fmt: skip


def defaults() -> dict[str, dict[str, Any]]:
    """The plain defaults of every kind of model that generates text; what follows from other keys is left out."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            text = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
        except Exception:  # noqa: BLE001, S112 - a kind without defaults is one that the table does not know
            continue
        values = {}
        for key in KEYS:
            try:
                value = getattr(text, key, None)
            except Exception:  # noqa: BLE001, S112 - some kinds refuse to say one number for all layers
                continue
            if value is None or not isinstance(value, (bool, int, list)):
                continue
            values[key] = value
        values.pop("layer_types", None)  # of so many layers
        pattern = _pattern(type(text))
        if pattern:
            values["layer_pattern"] = pattern
        try:
            other = cast(Any, type(text))(num_attention_heads=2 * text.num_attention_heads)
        except Exception:  # noqa: BLE001 - it has no such key
            other = text
        for key in ("num_key_value_heads", "head_dim"):
            if key in values and getattr(other, key, None) != values[key]:
                values.pop(key)
        found[kind] = values
    return found


def _pattern(kind: Any) -> list[str]:
    """What the types of layers repeat; empty where they do not."""
    try:
        types = list(kind(num_hidden_layers=48).layer_types)
    except Exception:  # noqa: BLE001 - it has none, or they are not of the number of layers
        return []
    for n in range(1, 13):
        if len(types) == 48 and types == (types[:n] * 48)[:48]:
            return types[:n]
    return []


if __name__ == "__main__":
    print("{")
    print(",\n".join(f"{json.dumps(kind)}: {json.dumps(row)}" for kind, row in defaults().items()))
    print("}")
