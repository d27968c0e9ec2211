"""Which layers of a model keep tokens, which a window of them, and which a state? By its config alone.

The names are those of transformers' configs. A state is the inputs of a short convolution, in the model's dtype, and what a
linear recurrence carries on, in float32. What is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from offload.errors import InputError, UnsupportedModelError

_SLIDING: Final = frozenset({"sliding_attention", "chunked_attention"})
_TOKENS: Final = frozenset({"full_attention", "attention", "hybrid"})
_STATES: Final = frozenset({"linear_attention", "mamba", "conv", "hybrid"})
_NEITHER: Final = frozenset({"mlp", "moe"})
# Of a pattern of letters, as the first files of nemotron_h have it.
_LETTERS: Final = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
# What the number of channels and the length of a convolution, and the parts of a recurrence, are called.
_GROUPS: Final = ("mamba_n_groups", "mamba_ngroups", "n_groups")
_STATE: Final = ("mamba_d_state", "ssm_state_size")
_KERNEL: Final = ("mamba_d_conv", "conv_kernel")
_HEADS: Final = ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
_HEAD: Final = ("mamba_d_head", "mamba_headdim", "mamba_head_dim")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        keeps: Keys and values of every token.
        slides: Keys and values of a window of them.
        state: A state of constant size.
    """

    keeps: bool = False
    slides: bool = False
    state: bool = False


def names_of(kind: str, values: Mapping[str, Any], layers: int) -> list[str]:
    """The type of each layer, as transformers' configs name it.

    Args:
        kind: The model type.
        values: The config, defaults filled in.
        layers: How many.

    Raises:
        UnsupportedModelError: The config does not say.
        InputError: The config is malformed.
    """
    for key in ("layer_types", "layers_block_type"):
        types = values.get(key)
        if types:
            if not isinstance(types, list):
                raise InputError(
                    f"The config of a {kind} needs a list", asked=key, there=types, change=None
                )
            return [str(each) for each in types][:layers]
    letters = values.get("hybrid_override_pattern")
    if isinstance(letters, str):
        return [_LETTERS.get(letter, letter) for letter in letters]
    every = values.get("full_attention_interval")
    if isinstance(every, int) and every > 0:
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if kind == "falcon_h1":
        return ["hybrid"] * layers
    if "attn_layer_indices" in values:
        full = set(values["attn_layer_indices"] or ())
        return ["full_attention" if i in full else "mamba" for i in range(layers)]
    if kind == "jamba":
        period, offset = values.get("attn_layer_period", 8), values.get("attn_layer_offset", 4)
        return ["mamba" if (i - offset) % period else "full_attention" for i in range(layers)]
    if kind in ("nemotron_h", "zamba", "zamba2"):
        raise unsupported(kind, "its config does not name its layers (layers_block_type)")
    return _sliding_types(kind, values, layers)


def layers_of(kind: str, values: Mapping[str, Any], layers: int, *, window_is_all: bool) -> list[Layer]:  # fmt: skip
    """What each layer keeps, as transformers' cache does.

    Args:
        kind: The model type.
        values: The config, defaults filled in.
        layers: How many.
        window_is_all: A window is as long as the model's positions, so that nothing leaves it.

    Raises:
        UnsupportedModelError: Layers of a type that is not known.
        InputError: The config is malformed.
    """
    types = names_of(kind, values, layers)
    strange = sorted(set(types) - _SLIDING - _TOKENS - _STATES - _NEITHER)
    if strange or len(types) != layers:
        what = ", ".join(strange) or f"{len(types)} of {layers} layers are named"
        raise unsupported(kind, f"a file does not say what its other layers hold ({what})")
    found = []
    for name in types:
        slides = name in _SLIDING and not window_is_all
        keeps = name in _TOKENS or (name in _SLIDING and window_is_all)
        found.append(Layer(keeps=keeps, slides=slides, state=name in _STATES))
    return found


def takes_windows_for_all(kind: str, values: Mapping[str, Any], layers: int) -> bool:
    """Whether there are layers that would slide."""
    return not _SLIDING.isdisjoint(names_of(kind, values, layers))


def own_sizes(kind: str, values: Mapping[str, Any], names: list[str]) -> list[dict[str, int]]:
    """What each layer has otherwise than the config says for all: head_dim, num_key_value_heads.

    Args:
        kind: The model type.
        values: The config, defaults filled in.
        names: The type of each layer.
    """
    written = values.get("per_layer_config")
    if isinstance(written, Mapping):
        by_layer = {int(layer): dict(own) for layer, own in written.items()}
        return [by_layer.get(layer, {}) for layer in range(len(names))]
    if kind in ("gemma4_text", "gemma4_unified_text"):
        own = {"head_dim": int(values.get("global_head_dim") or 512)}
        heads = values.get("num_global_key_value_heads")
        if heads and values.get("attention_k_eq_v", kind != "gemma4_text"):
            own["num_key_value_heads"] = int(heads)
        return [own if name == "full_attention" else {} for name in names]
    return [{} for _ in names]


def state_bytes(kind: str, values: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of the state of one layer and sequence.

    Args:
        kind: The model type.
        values: The config, defaults filled in.
        itemsize: Bytes of a number of the model's dtype.

    Raises:
        UnsupportedModelError: The config has no sizes that are known.
    """
    hidden = int(values["hidden_size"])
    if "linear_num_value_heads" in values:
        keys = values["linear_num_key_heads"] * values["linear_key_head_dim"]
        sums = values["linear_num_value_heads"] * values["linear_value_head_dim"]
        conv = (2 * keys + sums) * values["linear_conv_kernel_dim"]
        return int(itemsize * conv + 4 * sums * values["linear_key_head_dim"])
    if "conv_L_cache" in values:
        return int(itemsize * hidden * values["conv_L_cache"])
    state, kernel = _first(values, _STATE), _first(values, _KERNEL)
    if state is None or kernel is None:
        raise unsupported(kind, "its config does not say how large the state of its layers is")
    heads, head = _first(values, _HEADS), _first(values, _HEAD)
    if heads is None or head is None:  # a recurrence of channels, without heads
        channels = int(values.get("mamba_expand", 2)) * hidden
        return itemsize * channels * kernel + 4 * channels * state
    channels = heads * head
    groups = _first(values, _GROUPS) or 1
    return itemsize * (channels + 2 * groups * state) * kernel + 4 * channels * state


def unsupported(kind: str, reason: str) -> UnsupportedModelError:
    """A refusal."""
    return UnsupportedModelError(
        "This model cannot be planned", model_type=kind, reason=reason, change="Use the stock cache."
    )  # fmt: skip


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((int(values[name]) for name in names if isinstance(values.get(name), int)), None)


def _sliding_types(kind: str, values: Mapping[str, Any], layers: int) -> list[str]:
    """Of models whose layers all attend, some of them to a window."""
    every = values.get("sliding_window_pattern")
    switch = values.get("use_sliding_window")
    if switch is False:
        return ["full_attention"] * layers
    if switch:
        if kind not in ("qwen2", "qwen2_moe", "qwen3"):
            raise unsupported(kind, "its config does not name the layers that slide (layer_types)")
        first = values.get("max_window_layers") or 0
        return ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if isinstance(every, int) and every > 0:
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if values.get("layer_pattern"):
        pattern = values["layer_pattern"]
        return [pattern[i % len(pattern)] for i in range(layers)]
    return ["sliding_attention" if values.get("sliding_window") else "full_attention"] * layers
