"""How much does each layer mind low bits? Measured on a prompt, one layer and one rung at a time.

The beginning of the prompt is read with attention over everything; behind it a few of its tokens are read again and again,
each time with another layer's middle tokens as a replica of some rung holds them, and what the next tokens' distributions
are off by is that layer's error: KL in nats. Nothing here needs a device path: keys and values are put in, and whatever
attention the model has answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from offload import attention as attending
from offload.cache import CACHE
from offload.kernels import reference
from offload.scheduler.rungs import BLOCK, Rung

READ = 4096  # tokens of the prompt that are read, at most
LEAST_READ = 1024  # of fewer too little is in the middle
_PIECE = 1024  # tokens that are read together
_QUERIES = 32  # tokens whose distributions are compared
_FIRST, _LAST = 64, 256  # tokens that stay exact, as on the device path


class _Probe:
    """Answers the attention of one module with a replica of its middle tokens.

    Attributes:
        module: The attention module; None for none.
        rung: What its replica is.
    """

    def __init__(self) -> None:
        self.module: Any = None
        self.rung: Rung | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        """As `offload.attention.attention`, over a stock cache."""
        rung, queries, tokens = self.rung, query.shape[2], key.shape[2]
        stop = _FIRST + (tokens - queries - _LAST - _FIRST) // BLOCK * BLOCK
        if module is not self.module or rung is None or stop <= _FIRST:
            return attending.attention(module, query, key, value, mask, **more)
        low_keys, low_values = _replica(key[:, :, _FIRST:stop], value[:, :, _FIRST:stop], rung)
        scale = more.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        rows = _selected(query * scale, low_keys, rung.tokens)  # [B, H_kv, Q, K]
        dense = _dense(mask, queries, tokens, query.device)
        answers = []
        for i in range(queries):
            keys, values = key.clone(), value.clone()
            for whole, low in ((keys, low_keys), (values, low_values)):
                exact = rows[:, :, i, :, None].expand(-1, -1, -1, whole.shape[-1])
                middle = whole[:, :, _FIRST:stop]
                low = low.scatter(2, exact, middle.gather(2, exact))
                middle.copy_(low)
            one = attending.attention(
                module, query[:, :, i : i + 1], keys, values, dense[:, :, i : i + 1], **more
            )
            answers.append(one[0])
        return torch.cat(answers, dim=1), None


@torch.no_grad()
def layer_errors(
    model: Any, modules: Sequence[Any], ids: Tensor, rungs: Sequence[Rung]
) -> list[tuple[float, ...]]:
    """What each layer's replica moves the next token's distribution by.

    Args:
        model: Attached, and in evaluation mode.
        modules: The attention module of each layer to look at.
        ids: The prompt, [1, N]; `LEAST_READ` tokens at least.
        rungs: Of replicas; those of clusters are not known here.

    Returns:
        For each rung the error of each layer alone: mean KL of 32 tokens, in nats.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    read = min(int(ids.shape[1]), READ) - _QUERIES
    cache = DynamicCache(config=model.config)
    for start in range(0, read, _PIECE):
        piece = ids[:, start : min(start + _PIECE, read)]
        model(input_ids=piece, **{CACHE: cache}, use_cache=True, logits_to_keep=1)

    # Sliding windows and recurrent states cannot be cut back: they are put back.
    layers: list[Any] = cache.layers
    kept = {i: deepcopy(one) for i, one in enumerate(layers) if type(one) is not DynamicLayer}

    def distribution() -> Tensor:
        piece = ids[:, read : read + _QUERIES]
        logits: Tensor = model(input_ids=piece, **{CACHE: cache}, use_cache=True).logits[0]
        for i, layer in enumerate(layers):
            if i in kept:
                layers[i] = deepcopy(kept[i])
            else:
                layer.crop(-_QUERIES)
        return logits.double().log_softmax(-1)

    probe = _Probe()
    with attending.answered_by(probe):
        exact = distribution()
        found = []
        for rung in rungs:
            errors = []
            for module in modules:
                probe.module, probe.rung = module, rung
                errors.append(_divergence(exact, distribution()))
            found.append(tuple(errors))
    return found


def _divergence(exact: Tensor, other: Tensor) -> float:
    """KL(exact || other) of logarithms of probabilities [N, V], the mean; NaN stays NaN."""
    chances = exact.exp()
    terms = torch.where(chances > 0, chances * (exact - other), 0.0)  # tokens that can never come
    return max(float(terms.sum(-1).mean()), 0.0)


def _replica(keys: Tensor, values: Tensor, rung: Rung) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, N, D] as a replica holds them."""
    bits = rung.bits
    codes = reference.quantize_keys(keys.transpose(1, 2).contiguous(), bits=bits)
    low_keys = reference.dequantize_keys(codes, bits=bits, head_size=keys.shape[-1])
    codes = reference.quantize_values(values.transpose(1, 2).contiguous(), bits=bits)
    low_values = reference.dequantize_values(codes, bits=bits, head_size=values.shape[-1])
    return low_keys.to(keys.dtype), low_values.to(values.dtype)


def _selected(query: Tensor, keys: Tensor, tokens: int) -> Tensor:
    """Tokens [B, H_kv, Q, K] that any query head of a KV head wants most, by the replica's scores.

    Args:
        query: [B, H_q, Q, D], scaled.
        keys: [B, H_kv, N, D].
        tokens: How many.
    """
    heads = keys.shape[1]
    grouped = query.unflatten(1, (heads, -1)).float()  # [B, H_kv, G, Q, D]
    scores = grouped @ keys.float().unsqueeze(2).mT
    best = (scores - scores.logsumexp(-1, keepdim=True)).amax(2)
    found: Tensor = best.topk(min(tokens, best.shape[-1]), dim=-1).indices
    return found


def _dense(mask: Any, queries: int, tokens: int, device: torch.device) -> Tensor:
    """A boolean mask [B, 1, Q, N]."""
    dense: Tensor | None = mask.dense() if isinstance(mask, attending.LazyMask) else mask
    if dense is not None:
        return dense
    reach = torch.arange(tokens, device=device) - (tokens - queries)
    return (reach <= torch.arange(queries, device=device)[:, None])[None, None]
