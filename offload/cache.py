"""What does transformers see of the KV cache? A `Cache` whose full-attention layers live on two tiers.

`OffloadCache` takes the layers of the stock cache that transformers builds for a model and replaces those that
keep every token. Sliding, linear, convolution and other layers of bounded size stay stock layers.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.generation.utils import GenerationMixin

from offload.attention import forget_pending, hand_over
from offload.decisions import Choice
from offload.errors import CacheError, InputError
from offload.scheduler.layout import Layout
from offload.tiers.store import LayerStore

_PREPARE = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in _PREPARE else "past_key_values"
"""What transformers calls the argument and the output that are the cache: `cache` from 5.24 on."""


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name; None without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


class Store(Protocol):
    """What holds the tokens of a layer; `LayerStore` but while a model is being examined."""

    length: int
    busy: bool

    @property
    def batch(self) -> int:
        """Sequences."""

    def expect(self, key: Tensor, value: Tensor) -> None:
        """Raises CacheError unless these could be the next keys and values."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        visible: Tensor | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attends to all tokens and takes the new ones in; [B, Q, H_q, D_v]."""

    def settle(self) -> None:
        """Forgets that a step was under way."""

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on."""

    def select(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""


class OffloadLayer(CacheLayerMixin):
    """One full-attention layer: hands keys to `offload.attention`, keeps them in a `LayerStore`.

    `update` returns only the new keys and values; all earlier ones are in the store, which attends itself.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: OffloadCache, index: int, module: Any = None) -> None:
        """A layer without tokens.

        Args:
            cache: Whose layer this is; told at the first update, so that it builds the stores.
            index: Among the cache's offloaded layers.
            module: The attention module that this layer serves; None: the first one that asks.
        """
        CacheLayerMixin.__init__(self)
        self.store: Store | None = None
        self._module = module
        self.closed: str | None = None
        # Weak: a cycle would keep a forgotten cache's memory until the garbage collector comes.
        self._cache = weakref.ref(cache)
        self._index = index
        self._awaited = 0  # tokens between update and attend

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the stores of the whole cache, sized for this batch."""
        cache = self._cache()
        assert cache is not None
        cache.start(key_states.shape[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announces new tokens.

        Args:
            key_states: [B, H_kv, Q, D].
            value_states: [B, H_kv, Q, D_v].
            *args: Ignored, as by stock layers.
            **kwargs: Likewise.

        Returns:
            The new keys, with the handle that attention looks for, and the new values.

        Raises:
            CacheError: The cache was closed, or holds another batch or another model's heads.
            LostHandleError: The last layer's attention never came.
        """
        if self.closed is not None:
            raise CacheError(
                "This cache cannot be used", asked="update", there=self.closed, change=None
            )
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        self.store.expect(key_states, value_states)
        self._awaited = key_states.shape[2]
        return hand_over(key_states, self, begins_pass=self._begins_pass()), value_states

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        visible: Tensor | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attends and takes the announced tokens in; see `LayerStore.attend`.

        Raises:
            CacheError: The attention module is not the one that this layer was made for.
        """
        assert self.store is not None
        self._awaited = 0
        if self._module is None:
            self._module = module
        elif self._module is not module:
            raise CacheError(
                "The cache is used with another model",
                asked=type(module).__name__,
                there=f"the cache of another {type(self._module).__name__}",
                change="Use the cache with the runtime that made it.",
            )
        return self.store.attend(
            query, key, value,
            scale=scale, visible=visible, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip

    def _begins_pass(self) -> bool:
        """Whether an update of this layer can only be the begin of a forward pass."""
        cache = self._cache()
        return self._index == 0 and cache is not None and len(cache.stores) > 1

    def settle(self) -> None:
        """Forgets announced tokens whose attention will not come (an exception came instead)."""
        self._awaited = 0
        if self.store is not None:
            self.store.settle()

    def get_seq_length(self) -> int:
        """Tokens of every sequence, announced ones included."""
        return 0 if self.store is None else self.store.length + self._awaited

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for the next `query_length` tokens covers, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: unbounded, until memory ends."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens. (The stock layers' `reset` keeps their length and is wrong afterwards.)"""
        self.settle()
        if self.store is not None:
            self.store.crop(0)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forgets the newest tokens.

        Args:
            tokens_to_remove: 0, or minus the number of tokens (assisted decoding passes 0-dim tensors).
        """
        remove = int(tokens_to_remove)  # a copy: the caller's tensor may be changed in place later
        if remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {remove}")
        if remove and self.store is not None:
            self.store.crop(max(0, self.store.length + remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i the former sequence beam_idx[i]. Host pages are shared, not copied."""
        if self.store is not None:
            self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence. Host pages are shared, not copied."""
        if self.store is not None:
            self.store.select(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences; `indices` is integer or boolean."""
        if self.store is not None:
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.store.select(rows)


class HybridOffloadLayer(LinearAttentionLayer, OffloadLayer):  # type: ignore[override]
    """A layer with linear-attention states and full attention in one (Falcon-H1, Zamba 2)."""

    is_compileable = False

    def __init__(self, cache: OffloadCache, index: int, module: Any = None, **kwargs: Any) -> None:
        OffloadLayer.__init__(self, cache, index, module)
        LinearAttentionLayer.__init__(self, **kwargs)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come as two positional arguments, linear states by keyword (as in the stock class)."""
        if args:
            OffloadLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forgets all tokens and states."""
        LinearAttentionLayer.reset(self)
        OffloadLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders states and tokens."""
        LinearAttentionLayer.reorder_cache(self, cast(Any, beam_idx))
        OffloadLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats states and tokens of every sequence."""
        rows = torch.arange(0 if self.store is None else self.store.batch)
        LinearAttentionLayer.reorder_cache(self, cast(Any, rows.repeat_interleave(repeats)))
        OffloadLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the states and tokens of some sequences."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        LinearAttentionLayer.reorder_cache(self, cast(Any, rows))
        OffloadLayer.batch_select_indices(self, indices)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Crops states (where they were recorded) and tokens."""
        LinearAttentionLayer.crop(self, int(tokens_to_remove))
        OffloadLayer.crop(self, tokens_to_remove)


def stock_layers(config: Any) -> list[Any]:
    """The layers that transformers' own cache has for a model.

    Args:
        config: The model's config, or that of its text part.

    Returns:
        One layer object per cache layer.
    """
    return list(DynamicCache(config=config).layers)


def keeps_every_token(layer: Any, max_positions: int | None) -> bool:
    """Whether a stock layer holds all tokens, so that ours takes its place.

    Args:
        layer: A stock layer.
        max_positions: The model's context length. A sliding window as long as this never slides.
    """
    if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return True
    window = getattr(layer, "sliding_window", None)
    never_slides = window is not None and max_positions is not None and window >= max_positions
    return type(layer) is DynamicSlidingWindowLayer and never_slides


def _has_attention(layer: Any) -> bool:
    return isinstance(layer, (HybridOffloadLayer, LinearAttentionAndFullAttentionLayer))


class OffloadCache(Cache):
    """A transformers cache over two tiers. Made by `Runtime.new_cache()`.

    One forward pass at a time. It works wherever transformers takes a cache for the model it was
    made for: `generate`, beams, assisted decoding, several turns.
    """

    layers: list[Any]  # stock layers of several kinds, and ours

    def __init__(
        self,
        layers: Sequence[Any],
        offloaded: Sequence[int],
        build: Callable[[int, int], tuple[Layout | None, Sequence[Store]]],
        *,
        on_settle: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
        modules: Sequence[Any] | None = None,
    ) -> None:
        """Takes the place of a stock cache.

        Args:
            layers: The stock layers.
            offloaded: Indices of those to replace.
            build: Called as build(sequences, copies) at the first use; makes a layout and one store per
                replaced layer.
            on_settle: Called after an exception: copies that were under way must end or be forgotten.
            on_close: Called once, when the cache's memory is given back.
            modules: The attention module of each replaced layer; None where they are not known yet.
        """
        self._build = build
        self._on_settle = on_settle
        self._on_close = on_close
        self._closed: str | None = None
        self.layout: Layout | None = None  # of the stores
        self.decisions: list[Choice] = []  # that made it
        self.on_end_pass: Callable[[], None] | None = None
        self._fed: list[Tensor] | None = []  # token ids of every pass, [B, Q] each; None: not known
        self._capturing = False
        self._in_pass = False  # a forward pass began and has not ended: layers may differ
        mine: list[Any] = list(layers)
        known_modules = modules or [None] * len(offloaded)
        for at, (index, module) in enumerate(zip(offloaded, known_modules, strict=True)):
            stock = layers[index]
            if isinstance(stock, LinearAttentionLayer):
                states = getattr(stock, "number_of_states", None)
                known = {} if states is None else {"number_of_states": states}
                mine[index] = HybridOffloadLayer(self, at, module, **known)
            else:
                mine[index] = OffloadLayer(self, at, module)
        self._offloaded = [mine[index] for index in offloaded]
        super().__init__(layers=mine)

    def start(self, sequences: int, copies: int = 1) -> None:
        """Takes the memory for a batch, unless that was done already.

        Args:
            sequences: That come first.
            copies: How often each of them will be repeated (beams, returned sequences).

        Raises:
            BudgetError: It does not fit.
        """
        self.require_open()
        if self.layout is not None or any(layer.store is not None for layer in self._offloaded):
            return
        self.layout, stores = self._build(sequences, copies)
        for layer, store in zip(self._offloaded, stores, strict=True):
            layer.store = store
            layer.is_initialized = True

    @property
    def modules(self) -> list[Any]:
        """The attention module of each offloaded layer, as far as they are known."""
        return [layer._module for layer in self._offloaded]

    @property
    def stores(self) -> list[Store]:
        """The stores of the offloaded layers; empty before the first update."""
        return [layer.store for layer in self._offloaded if layer.store is not None]

    @property
    def layer_stores(self) -> list[LayerStore]:
        """The stores on two tiers; empty before the first use."""
        return [store for store in self.stores if isinstance(store, LayerStore)]

    @property
    def is_open(self) -> bool:
        """Whether the cache can be used."""
        return self._closed is None

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have only linear-attention states. (The stock property knows stock classes only.)"""
        return [
            isinstance(layer, LinearAttentionLayer) and not _has_attention(layer)
            for layer in self.layers
        ]

    # Which tokens are held. What changes the sequences changes what is known of them.

    def begin_pass(self, ids: Tensor | None, mask: Any) -> None:
        """Told of every forward pass over this cache before it begins.

        Args:
            ids: Its token ids [B, Q], or None if it has none.
            mask: Its attention mask, [B, past + Q] where it is one of padding.

        Raises:
            CacheError: The pass before was interrupted and nobody said so (a stock `generate`). Whoever calls
                has counted tokens that some layers do not hold.
        """
        if self._capturing:
            return
        if self._in_pass:
            length = self.get_seq_length()
            self.settle()
            if self.is_open and self.get_seq_length() != length:
                raise CacheError(
                    "An exception had left this cache in the middle of a step; it is mended now",
                    asked=f"tokens behind {length:,}",
                    there=f"{self.get_seq_length():,} tokens",
                    change="Call again: it goes on from there.",
                )
        self.require_open()
        self._in_pass = True
        if ids is None or ids.dim() != 2 or not _is_of_padding(mask, ids):
            self._fed = None
        elif self._fed is not None:
            self._fed.append(unpadded(ids.detach(), mask))

    def end_pass(self) -> None:
        """Told of every forward pass that ended without an exception."""
        if not self._capturing:
            self._in_pass = False
        if self.on_end_pass is not None:
            self.on_end_pass()

    def first_ids(self, tokens: int) -> Tensor | None:
        """The first tokens' ids [B, tokens], -1 for padding; None where they are not known."""
        known = self._known()
        return None if known is None or known.shape[1] < tokens else known[:, :tokens]

    def forget_pass(self) -> None:
        """Takes back a pass that began and then did not run at all."""
        self._in_pass = False
        if self._fed:
            self._fed.pop()

    @property
    def decodes_fast(self) -> bool:
        """Whether steps of one token go through the device path."""
        stores = self.layer_stores
        return bool(stores) and all(store.path is not None for store in stores)

    def reset_stats(self) -> None:
        """Begins anew to add up what steps on the device path do."""
        for store in self.layer_stores:
            if store.path is not None:
                store.path.reset_stats()

    @contextmanager
    def streaming(self, wanted: bool) -> Iterator[None]:
        """Within, every token is streamed even where there is a replica (beams), or is not, as wanted."""
        paths = [store.path for store in self.layer_stores if store.path is not None]
        before = [path.suspend(wanted) for path in paths]
        try:
            yield
        finally:
            # In reverse, since they may share it.
            for path, was in zip(reversed(paths), reversed(before), strict=True):
                path.suspend(was)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within, a forward pass makes the launches of a step and changes nothing that Python knows of."""
        self._capturing = True
        for store in self.layer_stores:
            store.capturing = True
        try:
            yield
        finally:
            self._capturing = False
            for store in self.layer_stores:
                store.capturing = False
            for layer in self._offloaded:
                layer.settle()
            forget_pending()

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens that the cache holds, [B, length] on the CPU, -1 for padding; None if not known."""
        known, length = self._known(), self.get_seq_length()
        if known is None or known.shape[1] < length:
            return None
        return known[:, :length].cpu()  # the last pass may not have been taken in

    def relabel(self, ids: Tensor) -> None:
        """Takes over from a prompt which of the tokens held are padding.

        Args:
            ids: [B, length], the tokens held, -1 for padding.
        """
        known = self._known()
        if known is not None:
            self._fed = [ids.to(known.device)]

    def _known(self) -> Tensor | None:
        if not self._fed:
            return None
        if len({len(step) for step in self._fed}) > 1:
            self._fed = None
            return None
        if len(self._fed) > 1:
            self._fed = [torch.cat(self._fed, dim=1)]
        return self._fed[0]

    def _rows_become(self, rows: Tensor) -> None:
        known = self._known()
        if known is not None:
            self._fed = [known.index_select(0, rows.to(known.device))]

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forgets the newest tokens; see the layers' `crop`."""
        remove, length = int(tokens_to_remove), self.get_seq_length()
        super().crop(remove)
        known = self._known() if remove else None
        if known is not None:
            self._fed = [known[:, : max(0, length + remove)]]

    def reset(self) -> None:
        """Forgets all tokens."""
        self.require_open()
        for layer in self.layers:
            # Stock windows keep zeros as if they were tokens (transformers 5.17).
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()  # type: ignore[no-untyped-call]
        self._fed, self._in_pass = [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i the former sequence beam_idx[i]."""
        super().reorder_cache(cast(Any, beam_idx))
        self._rows_become(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences."""
        super().batch_select_indices(indices)
        self._rows_become(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence, in stock linear layers too, which know only how to reorder."""
        known = self._known()
        if known is not None:
            self._fed = [known.repeat_interleave(repeats, dim=0)]
        for layer in self.layers:
            if hasattr(layer, "batch_repeat_interleave"):
                layer.batch_repeat_interleave(repeats)
                continue
            held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            sizes = {state.shape[0] for state in held if state is not None}
            for size in sizes:  # one size, or none in a layer that never held a state
                layer.reorder_cache(torch.arange(size).repeat_interleave(repeats))

    def make_way(self, tokens: int, keep: int) -> None:
        """Evicts, so that no token leaves the window while further ones come in.

        Args:
            tokens: That will come, at most.
            keep: The position from which on none may leave.
        """
        for store in self.layer_stores:
            store.make_way(tokens, keep)

    def put(self, first: int, rows: Sequence[Tensor], ids: Tensor) -> None:
        """Writes rows of tokens that are in the window, or come next.

        Args:
            first: The position of the first of them.
            rows: [B, n, H_kv, D + D_v] for each layer, every one of which is ours.
            ids: The tokens [B, n].

        Raises:
            BudgetError: No more host memory.
        """
        known = self._known()
        self._in_pass = True
        for store, of_layer in zip(self.layer_stores, rows, strict=True):
            store.put(first, of_layer)
        self._in_pass = False
        if known is not None:
            behind = known[:, first + ids.shape[1] :]
            self._fed = [torch.cat([known[:, :first], ids.to(known.device), behind], dim=1)]

    def croppable(self, length: int) -> int:
        """The most tokens up to `length` that `crop` can keep, as far as those are concerned that were dropped."""
        return min((store.croppable(length) for store in self.layer_stores), default=length)

    def can_go_back(self, tokens: int = 1) -> bool:
        """Whether `crop` can forget so many tokens: not into a full window, a recurrent state, or what was dropped."""
        kept = self.get_seq_length() - tokens
        if self.croppable(kept) < kept:
            return False
        for layer in self.layers:
            recording = getattr(layer, "record_past", False)
            if isinstance(layer, LinearAttentionLayer) and not (recording and layer.is_croppable):
                return False
            window = getattr(layer, "sliding_window", None)
            if window is not None and layer.get_seq_length() >= window:
                spare = 0 if layer.keys is None else layer.keys.shape[-2] - (window - 1)
                if not recording or spare < tokens:
                    return False
        return True

    def stop_recording(self) -> None:
        """Lets stock layers forget again what lies behind their windows. (Assisted decoding leaves them recording.)"""
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                states = [getattr(layer, "keys", None), *getattr(layer, "conv_states", {}).values()]
                if any(state is not None for state in states):
                    layer.crop(0)
                layer.record_past = False

    def settle(self) -> None:
        """Makes the cache usable after an exception in the middle of a forward pass, or closes it. Never raises.

        Layers before the exception hold the step's tokens, layers behind it do not: all go back to the
        shortest. Where a layer cannot go back, or what it holds is not known, the cache is closed.
        """
        forget_pending()
        try:
            if self._on_settle is not None:
                self._on_settle()
            for layer in self._offloaded:
                layer.settle()
            reason = self._unsettled()
            self._in_pass = False
            self._forget_unheld()
        except Exception as error:  # noqa: BLE001 - whatever it is, no cache may stay half changed
            reason = f"an exception interrupted it and it could not be mended ({error})"
        if reason is not None:
            self.close(reason)

    def _forget_unheld(self) -> None:
        """Forgets the ids of a pass that was interrupted: later ones would be taken for those of other positions."""
        known, length = self._known(), self.get_seq_length()
        if known is not None:
            self._fed = [known[:, :length]] if length else []

    def _unsettled(self) -> str | None:
        """Brings all layers to one length; says why that cannot be done."""
        for store in self.layer_stores:
            if store.damaged:
                return "an exception came while a layer was taking tokens in"
            store.check()
        attending = [layer for layer in self.layers if hasattr(layer, "get_seq_length")]
        lengths = [layer.get_seq_length() for layer in attending]
        # A state does not say how many tokens it has seen: some may lie behind the attention of a broken pass.
        stateful = self._in_pass and any(isinstance(x, LinearAttentionLayer) for x in self.layers)
        if len(set(lengths)) <= 1 and not stateful:
            return None
        if not self.can_go_back(max(lengths) - min(lengths)):
            return "an exception left it in the middle of a step, and its states cannot go back"
        for layer, length in zip(attending, lengths, strict=True):
            if length > min(lengths):  # stock layers without tokens cannot even crop none
                layer.crop(min(lengths) - length)
        return None

    def close(self, reason: str = "it was closed") -> None:
        """Gives the memory of both tiers back. The cache cannot be used afterwards."""
        if self._closed is not None:
            return
        self._closed = reason
        # First the copies that are under way end: they write into buffers that the stores keep alive.
        if self._on_close is not None:
            self._on_close()
        for layer in self._offloaded:
            layer.closed = reason
            layer.store = None
        self.layout = None

    def require_open(self) -> None:
        """Raises CacheError if the cache was closed."""
        if self._closed is not None:
            raise CacheError(
                "This cache cannot be used",
                asked="tokens",
                there=self._closed,
                change="Make a new one: runtime.new_cache().",
            )

    def __copy__(self) -> OffloadCache:
        raise CacheError(
            "An offload cache cannot be copied: its host pages have one owner",
            asked="copy",
            there=None,
            change="Make a second one with runtime.new_cache() and read the prompt into it.",
        )

    def __deepcopy__(self, memo: Any) -> OffloadCache:
        return self.__copy__()

    def __del__(self) -> None:
        if getattr(self, "_closed", "never built") is None and not sys.is_finalizing():
            self.close("it was deleted")


def _is_of_padding(mask: Any, ids: Tensor) -> bool:
    """Whether a mask says which tokens are padding, and nothing else (models take masks of other kinds too)."""
    if not isinstance(mask, Tensor):
        return mask is None
    return mask.dim() == 2 and mask.shape[0] == ids.shape[0] and mask.shape[1] >= ids.shape[1]


def unpadded(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Token ids with -1 where they are padding: other ids there mean the same, another mask does not."""
    if mask is None:
        return ids
    return ids.masked_fill(mask[:, -ids.shape[1] :].to(ids.device) == 0, -1)


def require_ours(cache: Any) -> OffloadCache:
    """The cache that a user passed, if it is one of ours.

    Raises:
        InputError: It is a stock cache.
        CacheError: It was closed.
    """
    if not isinstance(cache, OffloadCache):
        raise InputError(
            "The cache is not an offload cache",
            asked=type(cache).__name__,
            there="OffloadCache",
            change="Pass runtime.new_cache(), or leave it out; for a stock cache call model.generate.",
        )
    cache.require_open()
    return cache
