"""What is this model made of, as far as its KV cache goes? Found by asking it, once, at attach.

A short forward pass with recording layers tells the KV heads, head sizes, dtype and device of every layer of
any architecture, and proves that what the cache returns reaches our attention function untouched. Models in
which it does not, or in which the cached keys are not what attention reads, are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offload.attention import NAME, forget_pending, register
from offload.cache import CACHE, OffloadCache, keeps_every_token, stock_layers
from offload.demand import activation_bytes, parts_bytes
from offload.errors import InputError, OffloadError, UnsupportedModelError
from offload.kernels.attend import attend
from offload.kinds import FED_WHOLE, KNOWN_LAYERS, LATENT, OWN_ATTENTION, SHARED, refusal
from offload.tiers.rows import RowShape


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the runtime knows of a model.

    Attributes:
        model_type: config.model_type.
        offloaded: Indices of the cache layers that keep every token.
        rows: The shape of each of those.
        heads: Query heads of each of those, and the head size of their values.
        modules: The attention module of each of those.
        device: Where their keys are computed.
        max_positions: The context length that the model was made for, if it says so.
        weights: Device bytes of parameters and buffers.
        workspace: Device bytes of a forward pass that do not depend on the number of tokens.
        workspace_per_token: Further device bytes per token.
        keeps_logits: Whether forward takes logits_to_keep.
        fed_whole: Why a prompt must not be cut into chunks, or None.
        windows: (tokens, bytes of a token) of each layer that keeps a sliding window.
        state_bytes: Bytes of recurrent and convolution states of one sequence.
        longest: Tokens at which a sliding window would begin to slide that was taken for full attention because
            it is as long as the model's positions; None without one.
        vocabulary: Logits of one token.
        hidden: Size of the residual stream.
    """

    model_type: str
    offloaded: tuple[int, ...]
    rows: tuple[RowShape, ...]
    heads: tuple[tuple[int, int], ...]
    modules: tuple[Any, ...]
    device: torch.device
    max_positions: int | None
    weights: int
    workspace: int
    workspace_per_token: int
    keeps_logits: bool
    fed_whole: str | None = None
    windows: tuple[tuple[int, int], ...] = ()
    state_bytes: int = 0
    longest: int | None = None
    vocabulary: int = 0
    hidden: int = 0

    def other_kv_bytes(self, tokens: int | None) -> int:
        """Device bytes of one sequence in layers that are not offloaded.

        Args:
            tokens: Of the sequence; None for any number.
        """
        held = sum(size * (n if tokens is None else min(n, tokens)) for n, size in self.windows)
        return 2 * held + self.state_bytes  # transformers appends by making a second copy

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """KV bytes of one token of one sequence, for each offloaded layer."""
        return tuple(row.token_bytes for row in self.rows)


class _RecordingStore:
    """Stands in for a layer's store while the model is examined: keeps all keys, notes their shape."""

    def __init__(self) -> None:
        self.length = 0
        self.busy = False
        self.shape: RowShape | None = None
        self.device: torch.device | None = None
        self.query_heads = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        return 1

    def expect(self, key: Tensor, value: Tensor) -> None:
        """Notes the shape."""
        self.shape = RowShape(
            kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            dtype=key.dtype,
        )
        self.device = key.device

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attends to the new tokens alone; the examination feeds all tokens at once."""
        self.length += key.shape[2]
        self.query_heads = query.shape[1]
        part = attend(query, key, value, causal=True, mask=None, **kwargs)
        return part.out.transpose(1, 2).contiguous()

    def settle(self) -> None:
        """Never asked for."""

    def crop(self, length: int) -> None:
        """Never asked for."""

    def select(self, rows: Tensor) -> None:
        """Never asked for."""


def refuse_unsupported(model: Any) -> None:
    """Raises unless the model is a decoder in evaluation mode whose kind is not refused.

    Raises:
        UnsupportedModelError: An encoder-decoder, a refused kind, or a model that generates without a cache.
        InputError: Not a transformers model, already attached, or in training mode.
    """
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise InputError(
            "attach needs a transformers model that can generate",
            asked=type(model).__name__,
            there=None,
            change="Load one with AutoModelForCausalLM.from_pretrained(...).",
        )
    config = model.config
    types = [str(getattr(config, "model_type", "unknown"))]
    types.append(str(getattr(text_config(model), "model_type", "unknown")))
    if getattr(config, "is_encoder_decoder", False):
        _raise_if("it is an encoder-decoder; only decoders are supported", types[0])
    for name in types:
        _raise_if(refusal(name), name)
    text = text_config(model)
    if getattr(text, "kv_lora_rank", None):
        _raise_if(LATENT, types[1])
    if getattr(text, "num_kv_shared_layers", None):
        _raise_if(SHARED, types[1])
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        _raise_if(f"its layers of type {', '.join(strange)} are not understood", types[1])
    if model.training:
        raise InputError(
            "The model is in training mode",
            asked="attach",
            there="dropout and gradients, which generation must not have",
            change="Call model.eval() first.",
        )


def _raise_if(reason: str | None, model_type: str) -> None:
    if reason is not None:
        raise UnsupportedModelError(
            "This model cannot be attached",
            model_type=model_type,
            reason=reason,
            change="Use the stock cache.",
        )


def text_config(model: Any) -> Any:
    """The config of the part that generates text."""
    return model.config.get_text_config(decoder=True)


@contextmanager
def our_attention(model: Any) -> Iterator[None]:
    """Gives the model our attention; takes it back if the block raises.

    What `set_attn_implementation` changes is remembered per config object by `restore_attention`.
    """
    register()
    before = attention_names(model)
    try:
        model.set_attn_implementation(NAME)
        # For a model that cannot change its attention this does nothing and says nothing.
        text = text_config(model)
        if text._attn_implementation != NAME:
            _raise_if(OWN_ATTENTION, str(getattr(text, "model_type", "unknown")))
        yield
    except BaseException:
        restore_attention(model, before)
        raise


def attention_names(model: Any) -> list[tuple[Any, str | None]]:
    """The attention implementation of every config object in the model."""
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs.append(config)
    unique = {id(config): config for config in configs}
    return [(config, config._attn_implementation) for config in unique.values()]


def restore_attention(model: Any, before: list[tuple[Any, str | None]]) -> None:
    """Gives every config object the implementation that `attention_names` saw."""
    for config, name in before:
        config._attn_implementation = name


def examine(model: Any) -> ModelShape:
    """Runs three short forward passes and reads off the shape. The model must have our attention already.

    Raises:
        UnsupportedModelError: Keys do not reach attention as the cache returned them, or the layers are on
            several devices.
    """
    config = text_config(model)
    model_type = str(getattr(config, "model_type", "unknown"))
    max_positions = getattr(config, "max_position_embeddings", None)
    try:
        layers = stock_layers(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            "This model cannot be attached",
            model_type=model_type,
            reason=f"transformers' own cache cannot be built for it ({error})",
            change="Use model.generate without offload.",
        ) from error
    offloaded = tuple(
        index for index, layer in enumerate(layers) if keeps_every_token(layer, max_positions)
    )
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    device = next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )

    def run(n_tokens: int) -> _Pass:
        return _recorded_pass(
            model,
            stock_layers(config),
            offloaded,
            n_tokens,
            device=device,
            keeps_logits=keeps_logits,
        )

    few, many = _examined_lengths(max_positions)
    try:
        run(few)  # lazily allocated workspaces (cuBLAS, bitsandbytes) are not the pass's own
        small_peak = run(few).peak
        recorders, cache, large_peak = run(many)
    except OffloadError as error:
        raise UnsupportedModelError(
            "This model cannot be attached",
            model_type=model_type,
            reason=str(error),
            change="Use the stock cache.",
        ) from error
    finally:
        forget_pending()
    silent = [index for index, store in zip(offloaded, recorders, strict=True) if store.length == 0]
    _raise_if(f"its layers {silent} never updated the cache" if silent else None, model_type)
    devices = {store.device for store in recorders}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        _raise_if(f"its layers are on several devices ({names}); load it on one GPU", model_type)
    rows = tuple(store.shape for store in recorders if store.shape is not None)
    per_token = max(0, large_peak - small_peak) // (many - few)
    fixed = max(0, small_peak - few * per_token)
    if device.type != "cuda":
        per_token, fixed = _estimated_workspace(config, rows), 0
    heads = tuple(
        (store.query_heads, row.value_dim) for store, row in zip(recorders, rows, strict=True)
    )
    per_token += parts_bytes(heads, rows)
    return ModelShape(
        model_type=model_type,
        offloaded=offloaded,
        rows=rows,
        heads=heads,
        modules=tuple(cache.modules),
        device=next(iter(devices), device) or device,
        max_positions=max_positions,
        weights=weight_bytes(model, device),
        workspace=fixed,
        workspace_per_token=per_token,
        keeps_logits=keeps_logits,
        fed_whole=FED_WHOLE.get(model_type),
        windows=_windows(cache),
        state_bytes=_state_bytes(cache),
        longest=_longest(layers, offloaded),
        vocabulary=int(getattr(config, "vocab_size", 0) or 0),
        hidden=int(getattr(config, "hidden_size", 0) or 0),
    )


def _longest(layers: list[Any], offloaded: tuple[int, ...]) -> int | None:
    """The shortest sliding window among the layers that are taken for full attention."""
    windows = [getattr(layers[index], "sliding_window", None) for index in offloaded]
    return min((window for window in windows if window is not None), default=None)


class _Pass(NamedTuple):
    """What a recorded forward pass showed."""

    recorders: list[_RecordingStore]
    cache: OffloadCache
    peak: int  # device bytes beyond those held before


def _recorded_pass(
    model: Any,
    layers: list[Any],
    offloaded: tuple[int, ...],
    n_tokens: int,
    *,
    device: torch.device,
    keeps_logits: bool,
) -> _Pass:
    """Feeds n tokens through a cache whose full-attention layers only record."""
    recorders = [_RecordingStore() for _ in offloaded]
    cache = OffloadCache(layers, offloaded, lambda sequences, copies: (None, recorders))
    ids = torch.zeros((1, n_tokens), dtype=torch.long, device=device)
    keep = {"logits_to_keep": 1} if keeps_logits else {}
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    base = torch.cuda.memory_allocated(device) if on_card else 0
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{CACHE: cache}, **keep)
    peak = torch.cuda.max_memory_allocated(device) - base if on_card else 0
    return _Pass(recorders, cache, peak)


def _examined_lengths(max_positions: int | None) -> tuple[int, int]:
    """Tokens of the two passes; learned positions end somewhere."""
    many = 272 if max_positions is None else max(2, min(272, max_positions))
    return min(16, many // 2), many


def _windows(cache: OffloadCache) -> tuple[tuple[int, int], ...]:
    """(tokens, bytes of a token) of the cache's sliding layers."""
    windows = []
    for layer in cache.layers:
        window, keys = getattr(layer, "sliding_window", None), getattr(layer, "keys", None)
        if window is not None and keys is not None:
            token = (keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes) // keys.shape[0]
            windows.append((int(window), token))
    return tuple(windows)


def _state_bytes(cache: OffloadCache) -> int:
    """Bytes of the linear layers' states in a cache of one sequence."""
    states: list[Tensor | None] = []
    for layer in cache.layers:
        states += [*getattr(layer, "conv_states", {}).values()]
        states += [*getattr(layer, "recurrent_states", {}).values()]
    return sum(state.nbytes for state in states if state is not None)


def _estimated_workspace(config: Any, rows: tuple[RowShape, ...]) -> int:
    """Bytes of activations per token where no allocator can be asked."""
    hidden = getattr(config, "hidden_size", 0) or 0
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return activation_bytes(hidden, inner, rows[0].dtype.itemsize if rows else 4)


def weight_bytes(model: Any, device: torch.device) -> int:
    """Bytes of parameters and buffers on a device, each storage counted once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
