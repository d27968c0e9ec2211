"""How close are a model's fast steps to exact ones, on this text? The same tokens fed twice, both ways."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.cache import CACHE, OffloadCache
from offload.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two ways to make the same steps come to.

    Attributes:
        steps: Steps compared.
        same_top: Of these, those with the same most likely token.
        kl_mean: Kullback-Leibler divergence of the next token's distribution, fast from exact, in nats; mean.
        kl_max: The largest.
    """

    steps: int
    same_top: int
    kl_mean: float
    kl_max: float


@torch.no_grad()
def compare(model: Any, cache: OffloadCache, ids: Tensor, steps: int) -> Comparison:
    """Feeds the last tokens of a sequence one by one, by the device path and with every token streamed.

    Args:
        model: Attached.
        cache: Holds at least all tokens but the last `steps` + 1, and nothing else; holds all but the last one
            afterwards.
        ids: The sequence [1, N].
        steps: Tokens to feed.

    Raises:
        InputError: The cache cannot go back so far, or the sequence is too short.
    """
    first = ids.shape[1] - 1 - steps
    held = cache.get_seq_length()
    if steps < 1 or first < 1 or held < first or not cache.can_go_back(max(0, held - first)):
        raise InputError(
            "These steps cannot be repeated",
            asked=f"{steps:,} steps",
            there=f"{ids.shape[1]:,} tokens, in a cache that holds {held:,}",
            change="Compare fewer. Models with recurrent states cannot go back.",
        )
    mask = torch.ones_like(ids)

    def logits() -> Tensor:
        """float32 [steps, V]."""
        cache.crop(first - cache.get_seq_length())
        rows = []
        for at in range(first, first + steps):
            inputs = model.prepare_inputs_for_generation(
                ids[:, at : at + 1],
                use_cache=True,
                is_first_iteration=False,
                attention_mask=mask[:, : at + 1],
                **{CACHE: cache},
            )
            rows.append(model(**inputs, return_dict=True).logits[0, -1].float())
        return torch.stack(rows)

    found = []
    for streams in (False, True):
        with cache.streaming(streams) if cache.decodes_fast else nullcontext():
            found.append(torch.log_softmax(logits(), dim=-1))
    fast, exact = found
    kl = (exact.exp() * (exact - fast)).sum(-1)
    return Comparison(
        steps=steps,
        same_top=int((fast.argmax(-1) == exact.argmax(-1)).sum()),
        kl_mean=max(0.0, float(kl.mean())),
        kl_max=max(0.0, float(kl.max())),
    )
