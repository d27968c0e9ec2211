"""How does a model's attention reach the cache? Through a registered attention function and a lazy mask.

transformers calls `attention` for every attention layer of a model whose implementation is "offload", and
`lazy_mask` for every mask. The cache's `update` leaves a handle on the key tensor it returns; `attention` finds
it there and lets the layer's store attend. A key without a handle belongs to a stock cache layer (sliding
windows, cross attention, no cache at all) and takes the stock way.

This is the one place where transformers calls us. The registered names stay for the life of the process; they
change nothing for models that do not ask for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.errors import LostHandleError, UnsupportedModelError
from offload.kernels.attend import attend

NAME = "offload"
_HANDLE = "_offload_handle"


class AttendingLayer(Protocol):
    """A cache layer that attends itself."""

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
        """Attends with the new tokens and takes them in; returns [B, Q, H_q, D_v]."""


class _Pending(threading.local):
    """The layer that was updated and whose attention has not come yet, of this thread's forward pass."""

    layer: AttendingLayer | None = None


_pending = _Pending()


def hand_over(key: Tensor, layer: AttendingLayer, *, begins_pass: bool = False) -> Tensor:
    """Marks the keys that `update` returns, so that `attention` finds the layer.

    Args:
        key: The new keys.
        layer: Their cache layer.
        begins_pass: The layer is the first of several: one that still waits belongs to a pass that an
            exception ended, which nobody told us of (a stock `generate` that was interrupted).

    Returns:
        A view of `key` with the handle.

    Raises:
        LostHandleError: The last update's attention never came: another attention function answered, and
            its tokens would be silently wrong.
    """
    if _pending.layer is not None and not (begins_pass and _pending.layer is not layer):
        _pending.layer = None
        raise LostHandleError(
            "The cache was updated twice without attention in between",
            asked=f'attention through attn_implementation="{NAME}"',
            there="another attention function answered the last layer",
            change="Attach the model with offload.attach(model) and do not change its attention "
            "implementation while it is attached.",
        )
    marked = key.view_as(key)
    setattr(marked, _HANDLE, layer)
    _pending.layer = layer
    return marked


def forget_pending() -> None:
    """Clears the detector after an exception between an update and its attention."""
    _pending.layer = None


class LazyMask:
    """The arguments of a mask, instead of the mask: O(1) memory where a dense mask is queries times keys.

    Attributes:
        arguments: What transformers passed to the mask function.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._visible: Tensor | None = None
        self._visible_known = False
        self._dense: Tensor | None = None
        self._dense_known = False

    def visible(self, length: int) -> Tensor | None:
        """Which keys are not padding, under a causal mask over all of them.

        Args:
            length: Keys, the new ones included.

        Returns:
            Boolean [B, length], or None where no key is padding. Costs one device synchronisation per
            forward pass with an attention mask.

        Raises:
            UnsupportedModelError: The mask is not causal over all keys.
        """
        from transformers.masking_utils import causal_mask_function

        local = self.arguments.get("local_size")
        whole = self.arguments.get("mask_function") is causal_mask_function
        if not whole and (local is None or local < length):
            raise UnsupportedModelError(
                "A full-attention layer with a mask that is not causal",
                model_type=str(getattr(self.arguments.get("config"), "model_type", "unknown")),
                reason="only a causal mask with padding is understood",
                change="Use the stock cache for this input.",
            )
        if not self._visible_known:
            padding = self.arguments.get("attention_mask")
            if padding is not None:
                # A model may make a mask of ones for itself. A captured step has noted its padding before.
                if padding.is_cuda and torch.cuda.is_current_stream_capturing():
                    return None
                padding = padding[:, :length].bool()
                self._visible = None if bool(padding.all()) else padding
            self._visible_known = True
        return self._visible

    def dense(self) -> Tensor | None:
        """The mask that stock SDPA would get: boolean [B, 1, Q, KV], or None where it needs none."""
        from transformers.masking_utils import sdpa_mask

        if not self._dense_known:
            self._dense = sdpa_mask(**self.arguments)
            self._dense_known = True
        return self._dense


def lazy_mask(**arguments: Any) -> LazyMask:
    """The registered mask function."""
    # transformers 5.17 passes a sliding layer's own length as a tensor, which the layer's update then changes in
    # place: by the time the mask is needed it would mean another step.
    frozen = {
        name: value.clone() if isinstance(value, Tensor) and value.dim() == 0 else value
        for name, value in arguments.items()
    }
    return LazyMask(frozen)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function; the signature is transformers'.

    Args:
        module: The attention module.
        query: [B, H_q, Q, D].
        key: [B, H_kv, KV, D]; only the new tokens (KV = Q) where the layer is offloaded.
        value: [B, H_kv, KV, D_v].
        attention_mask: What the mask function returned, or a dense mask or None on the stock way.
        dropout: Must be 0.
        scaling: Factor on the dot products; 1 / sqrt(D) by default.
        softcap: Logit cap (Gemma 2).
        s_aux: [H_q] sink logits (gpt-oss).
        **kwargs: Passed on to stock attention.

    Returns:
        [B, Q, H_q, D_v] and no weights.

    Raises:
        LostHandleError: The cache was updated, but its keys did not arrive here untouched.
        UnsupportedModelError: The layer needs what is not understood (a position bias, another mask).
    """
    layer: AttendingLayer | None = getattr(key, _HANDLE, None)
    pending, _pending.layer = _pending.layer, None
    if layer is not pending:
        raise LostHandleError(
            "The keys of an offloaded layer did not reach attention as the cache returned them",
            asked="the key tensor that update() returned",
            there=f"a tensor of shape {tuple(key.shape)} in {type(module).__name__}",
            change="This model changes keys between cache and attention; use its stock cache.",
        )
    if layer is None:
        return _stock(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs,
        ), None  # fmt: skip
    if (
        kwargs.get("position_bias") is not None
        or dropout
        or not isinstance(attention_mask, LazyMask)
    ):
        raise UnsupportedModelError(
            f"Attention of {type(module).__name__}",
            model_type=str(getattr(getattr(module, "config", None), "model_type", "unknown")),
            reason="it uses a position bias, dropout or a mask of its own",
            change="Use its stock cache.",
        )
    kv_length = int(attention_mask.arguments["kv_length"])
    return layer.attend(
        module,
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        visible=attention_mask.visible(kv_length),
        softcap=softcap,
        sink_logits=s_aux,
    ), None


def _stock(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    softcap: float | None,
    s_aux: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Attention of a stock cache layer: SDPA, or ours where SDPA would ignore a softcap or sink logits."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
    if softcap is None and s_aux is None:
        run: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return run(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
    boolean = mask is None or mask.dtype == torch.bool
    part = attend(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=mask is None and query.shape[2] > 1,
        mask=mask if boolean else None,
        bias=None if boolean else mask,
        softcap=softcap,
        sink_logits=s_aux,
    )
    return part.out.transpose(1, 2).contiguous()


def register() -> None:
    """Makes the names known to transformers. May be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)


@contextmanager
def answered_by(function: Callable[..., Any]) -> Iterator[None]:
    """Within, another function answers the attention of attached models.

    Args:
        function: With the signature of `attention`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, function)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention)


@contextmanager
def kept_out_of_compiled_code(cache: Any) -> Iterator[None]:
    """Within, torch.compile leaves our attention and a cache's `update` to Python.

    Args:
        cache: The cache that the compiled code uses.
    """
    cache.update = torch.compiler.disable(cache.update)
    try:
        with answered_by(torch.compiler.disable(attention)):
            yield
    finally:
        del cache.update
