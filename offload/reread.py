"""How do the oldest tokens, whose keys and values are kept nowhere, get them again? Read from their ids, layer by layer.

Keys and values of a causal prefix depend on nothing else, so the model's own forward over its ids makes them again. Those of
all layers together would take the memory that they were dropped to save: so that forward runs in a thread, and waits in
every layer until the pass that needs its keys and values has attended to them. Activations of all tokens would be as large:
so they go in pieces, a thread each, one layer after the other. Never do two threads run: each waits for another, and all
launch on one stream. What is held at a time is one layer's keys and values, and the inputs of a layer.

Source: Zhao et al., ALISA (ISCA 2024, arXiv 2403.17312), algorithm 2, whose recomputation is made exact here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from offload.cache import CACHE, stock_layers
from offload.errors import CacheError, UnsupportedModelError
from offload.model import ModelShape, text_config
from offload.scheduler.layout import REREAD_TOKENS

_CHANGE = 'Write scheduler.recompute = "off", or raise memory.cpu.'


class _Over(BaseException):
    """Ends a forward pass whose last keys and values were taken; nobody but us sees it."""


class _Tap(DynamicLayer):
    """A stock layer that shows its keys and values before they are attended to, and keeps nothing."""

    def __init__(self, piece: _Piece) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._piece = piece

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Shows [B, H_kv, n, D] and [B, H_kv, n, D_v]; returns those of all tokens up to them."""
        return self._piece.show(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens before those of the piece."""
        return self._piece.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for the piece covers, and its offset."""
        return self._piece.start + query_length, 0


class _Piece:
    """Some tokens of the prefix on their way through the model, in a thread that waits in every layer.

    Attributes:
        start: Tokens before them.
        stop: Tokens up to their last.
    """

    def __init__(self, start: int, stop: int, run: Callable[[_Piece], None]) -> None:
        """Before its first layer.

        Args:
            start: As above.
            stop: Likewise.
            run: Feeds the piece to the model.
        """
        self.start, self.stop = start, stop
        self._ready, self._resume = threading.Semaphore(0), threading.Semaphore(0)
        self._shown: tuple[Tensor, Tensor] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._error: BaseException | None = None
        self._over = False

        def until_over() -> None:
            try:
                run(self)
            except _Over:
                return
            except BaseException as error:  # noqa: BLE001 - it is raised where the keys are waited for
                self._error = error
            self._ready.release()

        self._thread = threading.Thread(target=until_over, name="offload-reread", daemon=True)

    def advance(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H_kv, n, D] and values [B, H_kv, n, D_v] of its tokens in the next layer."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resume.release()
        self._ready.acquire()
        if self._error is not None:
            # Not held here: a traceback that holds this piece would keep its activations until the garbage collector comes.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        shown, self._shown = self._shown, None
        assert shown is not None, "the model has fewer layers"
        return shown

    def let_see(self, keys: Tensor, values: Tensor) -> None:
        """Tells what its tokens attend to when they go on: all tokens up to them, in the layer that was shown."""
        self._seen = keys[:, :, : self.stop], values[:, :, : self.stop]

    def show(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Called by its own thread, which then waits to go on."""
        self._shown = keys, values
        self._ready.release()
        self._resume.acquire()
        if self._over:
            raise _Over
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def end(self) -> None:
        """Ends its thread, wherever it waits."""
        if self._thread.ident is not None:
            self._over = True
            self._resume.release()
            self._thread.join()


class Rereader:
    """Reads the first tokens of one cache again, as often as passes need them.

    Its threads live no longer than the pass that they serve: `stop` ends them.
    """

    def __init__(self, model: Any, shape: ModelShape, ids: Callable[[int], Tensor | None]) -> None:
        """For one cache.

        Args:
            model: With our attention.
            shape: Of the model.
            ids: Gives the ids [B, n] of a cache's first tokens, -1 for padding; None where they are not known.
        """
        self._model, self._shape, self._ids = model, shape, ids
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._pieces: list[_Piece] = []
        self._next = 0

    def take(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H_kv, N, D] and values [B, H_kv, N, D_v] of the first tokens, in one layer.

        Layers are asked for in the order of the model; the first one begins a pass.

        Args:
            layer: Among those that keep every token.
            tokens: N, the same for all layers of a pass.

        Raises:
            CacheError: The ids of the tokens are not known, or a layer was left out.
        """
        if layer == 0:
            self.stop()
            self._begin(tokens)
        elif not self._pieces or layer != self._next:
            raise CacheError(
                "The oldest tokens are read again layer by layer",
                asked=f"layer {layer}",
                there=f"layer {self._next} comes next",
                change=_CHANGE,
            )
        self._next = layer + 1
        try:
            shown = [piece.advance() for piece in self._pieces]
        except BaseException:
            self.stop()
            raise
        keys, values = (torch.cat(part, dim=2) for part in zip(*shown, strict=True))
        for piece in self._pieces:
            piece.let_see(keys, values)
        return keys, values

    def stop(self) -> None:
        """Ends the reading that is under way, if any. May be repeated."""
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            piece.end()
        self._next = 0

    def _begin(self, tokens: int) -> None:
        ids = self._ids(tokens)
        if ids is None:
            raise CacheError(
                "The ids of the oldest tokens are not known, from which they are to be read again",
                asked=f"{tokens:,} tokens",
                there="a prompt of embeddings, or a mask that is not one of padding",
                change=_CHANGE,
            )
        device = self._shape.device
        # What the caller launches next waits for this stream, which is its own.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        ids = ids.to(device)
        each = tokens if self._shape.other_kv_bytes(1) else REREAD_TOKENS
        run = partial(self._run, ids, stream)
        self._pieces = [_Piece(at, min(at + each, tokens), run) for at in range(0, tokens, each)]

    @torch.no_grad()
    def _run(self, ids: Tensor, stream: torch.cuda.Stream | None, piece: _Piece) -> None:
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
        with on_stream:
            mask = (ids[:, : piece.stop] >= 0).long()
            ids = ids.clamp(min=0)
            more: dict[str, Any] = {"attention_mask": mask, CACHE: self._taps(piece)}
            if self._takes_positions:
                positions = self._model._prepare_position_ids_for_generation(
                    ids[:, : piece.stop], {"attention_mask": mask}
                )
                more["position_ids"] = positions[..., piece.start :]
            inputs = self._model.prepare_inputs_for_generation(
                ids[:, piece.start : piece.stop], use_cache=True, is_first_iteration=False, **more
            )
            if self._shape.keeps_logits:
                inputs["logits_to_keep"] = 1
            self._model(**inputs, return_dict=True)

    def _taps(self, piece: _Piece) -> DynamicCache:
        cache = DynamicCache(config=text_config(self._model))
        for index in self._shape.offloaded:
            cache.layers[index] = _Tap(piece)
        return cache


def require_rereadable(model: Any, shape: ModelShape, rope_types: Sequence[str]) -> None:
    """Raises UnsupportedModelError where tokens that are read again would not be what they were.

    Args:
        model: Of transformers.
        shape: Of it.
        rope_types: Kinds of its position embedding.
    """
    stock = stock_layers(text_config(model))
    strange = {type(stock[i]).__name__ for i in shape.offloaded if type(stock[i]) not in (DynamicLayer, DynamicSlidingWindowLayer)}  # fmt: skip
    turns = sorted({"dynamic", "longrope"} & set(rope_types))
    reason = None
    if strange:
        reason = f"its layers keep states beside keys ({', '.join(sorted(strange))})"
    elif turns:
        reason = f"its positions are turned by how long the sequence is ({', '.join(turns)})"
    if reason is not None:
        raise UnsupportedModelError(
            "Reading the oldest tokens again",
            model_type=shape.model_type,
            reason=reason,
            change='Write scheduler.recompute = "off".',
        )
