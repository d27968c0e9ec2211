"""What is this model, as far as its files say without being loaded? Shape and bytes, in a fraction of a second.

A folder with a `config.json` and safetensors files, a `config.json` alone, a GGUF file, or a repository of the hub whose
config is read. Only headers are read: of safetensors the JSON at the front, of GGUF the keys and the list of tensors.
Keys that a config leaves out mean what transformers means by them (`offload/data/defaults.json`, written by
`tools/defaults.py`); what it weighs without its tensors, `offload.counting` says. What is not understood is refused by name, never guessed.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, Final

from offload.counting import Counted, by_tensors, count
from offload.demand import activation_bytes, parts_bytes
from offload.errors import InputError
from offload.kinds import FED_WHOLE, refusal
from offload.layers import (
    layers_of,
    names_of,
    own_sizes,
    state_bytes,
    takes_windows_for_all,
    unsupported,
)
from offload.loading import ask_hub, find

ITEMSIZES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
# Names of older configs.
_ALIASES: Final = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
_TORCH_FLOATS: Final = {"F64", "F32", "F16", "BF16"}
# Weights in an element of what is no float: packed 4-bit codes are the usual kind.
_PACKED: Final = {"U8": 2, "I8": 1, "I32": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_SAFETENSORS_BYTES: Final = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileRow:
    """One token of one layer, as a file says; see `offload.tiers.rows.RowShape`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class FileShape:
    """What a model's files say of it; an `offload.demand.Shape`.

    Attributes:
        name: Of the folder, the file or the repository.
        model_type: Of the part that generates text.
        dtype: In which it will be computed: bfloat16, float16 or float32.
        layers: Of all kinds.
        rows: Of each layer that keeps every token.
        heads: Query heads of each of those, and the head size of their values.
        windows: (tokens, bytes of a token) of each layer that keeps a sliding window.
        state_bytes: Of the states of one sequence, in layers that keep any.
        hidden: Size of the residual stream.
        vocabulary: Logits of one token.
        max_positions: The context length that the model was made for.
        parameters: Weights that a token is multiplied with: neither embeddings that are looked up nor experts that it
            does not meet.
        read_bytes: Bytes of them.
        weights: Bytes on the device.
        weights_are: "read" from headers, or "computed" from the config.
        quantised: How, where a checkpoint says so.
        experts_met: Share of its experts that a token meets; 1 where there are none.
        longest: Tokens at which a window would slide that was taken for full attention; None without one.
        workspace: Device bytes of a forward pass that do not depend on the number of tokens.
        workspace_per_token: Further device bytes per token, computed.
        fed_whole: Why a prompt must not be cut into chunks.
    """

    name: str
    model_type: str
    dtype: str
    layers: int
    rows: tuple[FileRow, ...]
    heads: tuple[tuple[int, int], ...]
    windows: tuple[tuple[int, int], ...]
    hidden: int
    vocabulary: int
    max_positions: int | None
    parameters: float
    read_bytes: float
    weights: int
    weights_are: str
    state_bytes: int = 0
    quantised: str | None = None
    experts_met: float = 1.0
    longest: int | None = None
    workspace: int = 0
    workspace_per_token: int = 0
    fed_whole: str | None = None

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """KV bytes of one token of one sequence, for each layer of `rows`."""
        return tuple(row.token_bytes for row in self.rows)

    def other_kv_bytes(self, tokens: int | None) -> int:
        """Device bytes of one sequence in layers that are not offloaded."""
        held = sum(size * (n if tokens is None else min(n, tokens)) for n, size in self.windows)
        return 2 * held + self.state_bytes  # transformers appends by making a second copy


@dataclass(slots=True)
class _Tensors:
    """Tensors of a checkpoint: elements of those that are floats, bytes of the others, by what they are for."""

    floats: int = 0
    others: int = 0  # bytes
    packed: int = 0  # weights in these
    embedding: int = 0  # elements of the input embedding, which is looked up
    head: int = 0  # elements of the output embedding; none where it is the input's
    experts: int = 0  # weights of experts, of which a token meets some
    expert_bytes: int = 0  # of those that are no floats

    @classmethod
    def of(cls, counted: Counted) -> _Tensors:
        """Those that a config says."""
        return cls(
            floats=counted.all,
            embedding=counted.embedding,
            head=counted.head,
            experts=counted.experts,
        )

    def add(self, name: str, shape: list[int], kind: str) -> None:
        """Counts one."""
        n = math.prod(shape)
        is_expert = ".experts." in name
        if kind in _TORCH_FLOATS:
            self.floats += n
            self.experts += n * is_expert
        else:
            size = n * _SAFETENSORS_BYTES.get(kind, 1)
            weights = n * _PACKED.get(kind, 0)
            self.others += size
            self.packed += weights
            self.experts += weights * is_expert
            self.expert_bytes += size * is_expert
        if any(part in name for part in ("embed_tokens", "wte.", "token_embd")):
            self.embedding = n
        if name.startswith(("lm_head", "output.weight")) or ".lm_head." in name:
            self.head = n


def describe(source: str | Path | None, *, dtype: str = "bfloat16") -> FileShape:
    """Reads what a model is.

    Args:
        source: A folder, a `config.json`, a GGUF file, or a repository of the hub; None for the bundled model.
        dtype: In which weights are loaded and keys are kept: bfloat16, float16 or float32.

    Raises:
        InputError: There is no such model, or a file says too little.
        UnsupportedModelError: The model is of a kind that offload refuses, or that its files do not describe.
    """
    if dtype not in ITEMSIZES:
        raise InputError(
            "The dtype is not known", asked=dtype, there=", ".join(ITEMSIZES), change="Write one of them."
        )  # fmt: skip
    path = None if source is None else Path(source)
    if path is not None and path.is_file() and path.suffix == ".json":
        return _of_config(_json(path), path.resolve().parent.name, dtype, None)
    found = find(None if source is None else str(source))
    if isinstance(found, str):
        return _of_hub(found, dtype)
    if found.is_file():
        config, tensors = _gguf(found)
        return _of_config(config, found.name, dtype, tensors)
    return _of_config(
        _json(found / "config.json"), found.resolve().name, dtype, _safetensors(found)
    )


def _of_hub(repository: str, dtype: str) -> FileShape:
    from huggingface_hub import hf_hub_download

    no_answer = ask_hub(repository)
    try:
        file = hf_hub_download(repository, "config.json", local_files_only=no_answer is not None)
    except Exception as error:
        raise InputError(
            f"{repository!r} is no folder here, and its config cannot be read from the hub",
            asked=repository,
            there=no_answer or str(error).strip().split("\n")[0],
            change="Check the name and the network, or give a folder or a config.json.",
        ) from error
    return _of_config(_json(Path(file)), repository, dtype, None)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "The model's config cannot be read",
            asked=path.name,
            there=str(error).split("\n")[0],
            change="Give a folder that transformers can load.",
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            "The model's config is no JSON object", asked=path.name, there=type(found).__name__, change=None
        )  # fmt: skip
    return found


@cache
def defaults() -> dict[str, dict[str, Any]]:
    """What keys mean that a config leaves out, by kind."""
    table = files("offload") / "data" / "defaults.json"
    found: dict[str, dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))
    return found


def _of_config(
    config: dict[str, Any], name: str, dtype: str, tensors: _Tensors | None
) -> FileShape:
    text = config.get("text_config") or config.get("llm_config") or config
    if not isinstance(text, dict):
        raise InputError(
            "The config's text_config is no object", asked=name, there=text, change=None
        )
    kind = str(text.get("model_type") or config.get("model_type") or "unknown")
    whole = str(config.get("model_type"))
    for each in {kind, whole}:
        reason = refusal(each)
        if reason is not None:
            raise unsupported(each, reason)
    known = defaults().get(kind) or defaults().get(whole)
    if known is None:
        raise unsupported(kind, "offload does not know its config")
    if kind == "hrm_text" and text is config:
        text = config = _all_cycles(config)
    values = known | {_ALIASES.get(key, key): value for key, value in text.items()}
    if values.get("kv_lora_rank") or values.get("num_kv_shared_layers"):
        raise unsupported(kind, "its cache holds compressed keys, or layers share them")
    named = text.get("layers_block_type")
    if isinstance(named, list) and "num_hidden_layers" not in text:
        values["num_hidden_layers"] = len(named)
    layers = _number(values, "num_hidden_layers", kind)
    heads = _number(values, "num_attention_heads", kind)
    hidden = _number(values, "hidden_size", kind)
    kv_heads = _optional(values, "num_key_value_heads", kind) or heads
    size = _optional(values, "head_dim", kind) or _optional(values, "attention_head_dim", kind)
    # The attention of zamba reads the residual stream and the embedding beside it.
    size = size or (2 if kind in ("zamba", "zamba2") else 1) * hidden // heads
    inner = _optional(values, "intermediate_size", kind) or 4 * hidden
    value_size = _optional(values, "v_head_dim", kind) or size
    usual = FileRow(kv_heads, size, value_size, ITEMSIZES[dtype])
    positions = _optional(values, "max_position_embeddings", kind)
    window = _optional(values, "sliding_window", kind)
    window = window or _optional(values, "attention_chunk_size", kind)
    is_all = bool(window and positions and window >= positions)
    all_layers = layers_of(kind, values, layers, window_is_all=is_all)
    names = names_of(kind, values, layers)
    all_rows = _rows_of(kind, values, names, usual)
    rows = tuple(row for row, layer in zip(all_rows, all_layers, strict=True) if layer.keeps)
    sliding = [row for row, layer in zip(all_rows, all_layers, strict=True) if layer.slides]
    states = sum(layer.state for layer in all_layers)
    if sliding and not window:
        raise unsupported(kind, "its layers slide over a window that its config does not name")
    taken = is_all and takes_windows_for_all(kind, values, layers)
    vocabulary = _optional(values, "vocab_size", kind) or 0
    itemsize = ITEMSIZES[dtype]
    if tensors is None:
        counted = _counted(config, text, kind, names)
        tensors, are, met = _Tensors.of(counted), "computed", counted.met
    else:
        are, met = "read", _met(values, kind) if tensors.experts else 1.0
        if values.get("tie_word_embeddings"):  # a copy that is not loaded
            tensors.floats -= tensors.head
            tensors.head = 0
    looked_up = tensors.embedding if tensors.head else 0
    idle = (1 - met) * tensors.experts
    parameters = tensors.floats + tensors.packed - looked_up - idle
    read: float = (tensors.floats - looked_up) * itemsize + tensors.others
    idle_floats = 0 if tensors.expert_bytes else idle
    read -= idle_floats * itemsize + (1 - met) * tensors.expert_bytes
    all_heads = tuple((heads, row.value_dim) for row in rows)
    return FileShape(
        name=name,
        model_type=kind,
        dtype=dtype,
        layers=layers,
        rows=rows,
        heads=all_heads,
        windows=tuple((int(window or 0), row.token_bytes) for row in sliding),
        state_bytes=states * state_bytes(kind, values, itemsize) if states else 0,
        hidden=hidden,
        vocabulary=vocabulary,
        max_positions=positions,
        parameters=parameters,
        read_bytes=read,
        weights=tensors.floats * itemsize
        + tensors.others
        + _position_table_bytes(kind, values, positions),
        weights_are=are,
        quantised=_quantised(config),
        experts_met=met,
        longest=window if taken else None,
        workspace_per_token=activation_bytes(hidden, inner, ITEMSIZES[dtype])
        + parts_bytes(all_heads, rows),
        fed_whole=FED_WHOLE.get(kind),
    )


def _position_table_bytes(kind: str, values: dict[str, Any], positions: int | None) -> int:
    """Bytes of a table of rotations, which is in no file; most kinds compute them."""
    if kind not in ("gptj", "codegen"):
        return 0
    return 4 * (positions or 0) * (_optional(values, "rotary_dim", kind) or 0)


def _all_cycles(config: dict[str, Any]) -> dict[str, Any]:
    """The config of an hrm_text whose file has the layers of a stack: each has a cache layer in every cycle."""
    stack = config.get("num_hidden_layers", 16)
    if "num_layers_per_stack" in config or not isinstance(stack, int):
        return config
    cycles = config.get("H_cycles", 2) * (config.get("L_cycles", 3) + 1)
    return config | {"num_layers_per_stack": stack, "num_hidden_layers": stack * cycles}


def _rows_of(kind: str, values: dict[str, Any], names: list[str], usual: FileRow) -> list[FileRow]:
    """The keys and values of each layer, whether or not it keeps any."""
    found = []
    for name, own in zip(names, own_sizes(kind, values, names), strict=True):
        row = usual
        if (
            kind == "mimo_v2_flash" and name == "sliding_attention"
        ):  # so its code has it, not its config
            row = replace(row, kv_heads=2 * row.kv_heads)
        size = own.get("head_dim", row.key_dim)
        values_too = {"value_dim": size} if row.key_dim == row.value_dim else {}
        heads = own.get("num_key_value_heads", row.kv_heads)
        found.append(replace(row, kv_heads=heads, key_dim=size, **values_too))
    return found


def _counted(config: dict[str, Any], text: dict[str, Any], kind: str, names: list[str]) -> Counted:
    """The weights that a config says, of all its parts."""
    named = text | {"layer_types": names}
    whole = str(config.get("model_type"))
    if text is not config and whole in by_tensors():
        return count(whole, config | {by_tensors()[whole]["where"][:-1]: named})
    _require_text_alone(config, text, kind)
    return count(kind, named)


def _require_text_alone(config: dict[str, Any], text: dict[str, Any], kind: str) -> None:
    """Raises InputError where a config has further parts, whose weights lie on the card too."""
    parts = [
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict) and value is not text
        and key not in ("quantization_config", "generation_config")
    ]  # fmt: skip
    if text is not config and parts:
        raise InputError(
            f"The config of a {kind} has parts whose weights have not been counted",
            asked=", ".join(parts),
            there=None,
            change="Give a folder that holds its safetensors files, or a GGUF file.",
        )


def _met(values: dict[str, Any], kind: str) -> float:
    """Share of its experts that a token meets."""
    there = _optional(values, "num_experts", kind) or _optional(values, "num_local_experts", kind)
    if not there:
        return 1.0
    return min(1.0, (_optional(values, "num_experts_per_tok", kind) or there) / there)


def _number(values: dict[str, Any], key: str, kind: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"The config of a {kind} needs {key}",
            asked=key,
            there=value,
            change="Give a config.json that transformers can load.",
        )
    return value


def _optional(values: dict[str, Any], key: str, kind: str) -> int | None:
    """As `_number`, where a config may leave it out or take it away."""
    value = values.get(key)
    return None if value is None or value == 0 else _number(values, key, kind)


def _quantised(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method", "quantised")) if isinstance(found, dict) else None


def _safetensors(folder: Path) -> _Tensors | None:
    """The tensors of a folder's safetensors files; None without any."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        parts = [folder / name for name in names]
    elif (folder / "model.safetensors").is_file():
        parts = [folder / "model.safetensors"]
    else:
        parts = sorted(folder.glob("*.safetensors"))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(
            "Files of the model are missing",
            asked=", ".join(missing[:3]),
            there=f"{len(parts) - len(missing)} of {len(parts)}",
            change="Download it again.",
        )
    if not parts:
        return None
    tensors = _Tensors()
    for part in parts:
        with part.open("rb") as file:
            front = file.read(8)
            length = struct.unpack("<Q", front)[0] if len(front) == 8 else 0
            try:
                header = json.loads(file.read(min(length, part.stat().st_size)))
                entries = [
                    (n, e["shape"], e["dtype"]) for n, e in header.items() if n != "__metadata__"
                ]
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise InputError(
                    "A safetensors file is damaged", asked=part.name, there="no header", change="Download it again."
                ) from error  # fmt: skip
        for entry in entries:
            tensors.add(*entry)
    return tensors


# Of GGUF: which type of value has how many bytes, and how it is unpacked.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_GGUF_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
_GGUF_KINDS: Final = {"gemma3": "gemma3_text", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(slots=True)
class _Gguf:
    """Reads values of a GGUF file in turn."""

    file: BinaryIO
    values: dict[str, Any] = field(default_factory=dict)

    def number(self, form: str) -> Any:
        """The next number."""
        size = struct.calcsize("<" + form)
        read = self.file.read(size)
        if len(read) < size:
            raise ValueError("it ends early")
        return struct.unpack("<" + form, read)[0]

    def text(self) -> str:
        """The next string."""
        return self.file.read(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value; of arrays only how long they are."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        of, count = self.number("I"), self.number("Q")
        if of == _STRING:
            for _ in range(count):
                self.file.seek(self.number("Q"), 1)
        elif of == _ARRAY:
            raise ValueError("arrays of arrays are not understood")
        else:
            self.file.seek(count * struct.calcsize("<" + _SCALARS[of]), 1)
        return count


def _gguf(path: Path) -> tuple[dict[str, Any], _Tensors]:
    """A GGUF file's config, in transformers' words, and its tensors, which are loaded as floats."""
    tensors = _Tensors()
    try:
        with path.open("rb") as file:
            reader = _Gguf(file)
            if file.read(4) != b"GGUF" or reader.number("I") not in (2, 3):
                raise ValueError("it is no GGUF file of version 2 or 3")
            count, keys = reader.number("Q"), reader.number("Q")
            for _ in range(keys):
                name = reader.text()
                reader.values[name] = reader.value(reader.number("I"))
            embedding: list[int] = []
            for _ in range(count):
                name = reader.text()
                shape = [reader.number("Q") for _ in range(reader.number("I"))]
                reader.number("I"), reader.number("Q")  # type and offset
                tensors.add(name, shape, "F32")
                if name == "token_embd.weight":
                    embedding = shape
    except (ValueError, KeyError, OSError, struct.error) as error:
        raise InputError(
            "The GGUF file cannot be read", asked=path.name, there=str(error), change="Download it again."
        ) from error  # fmt: skip
    architecture = str(reader.values.get("general.architecture"))
    config: dict[str, Any] = {"model_type": _GGUF_KINDS.get(architecture, architecture)}
    for key, name in _GGUF_KEYS.items():
        value = reader.values.get(f"{architecture}.{key}")
        if value is not None:
            config[name] = value
    if embedding:
        config["vocab_size"] = embedding[-1]
    config["tie_word_embeddings"] = not tensors.head
    config.setdefault("sliding_window", None)
    return config, tensors
