"""What does attention of a real model look like to a kernel? Keys and queries of one, recorded, and played in another.

Queries of random weights attend to everything alike: nothing can be skipped, and every step selects other tokens.
`record` keeps keys and queries, behind their position embedding, of a real model that reads a real document; `played`
lets a model of another shape attend with them:

- KV head h of layer i is one recorded KV head, another one in each of a few layers; its G query heads are
  the first G of the recorded ones, in turn again if there are fewer;
- vectors of half the head size stand twice in a row, queries divided by the root of two: the same scores;
- a longer context repeats the middle of the recorded one; its first 64 tokens and its last 1,024 are there once;
- projections and position embedding are computed as ever, and their outcome is not used (the embedding turns by
  nothing). Values are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from offload.cache import CACHE

HEADS = 8  # recorded heads that make one layer
SETS = 3  # layers that are recorded
FIRST, LAST = 64, 1024  # tokens that are not repeated
RECORDER = "recorder"


@torch.no_grad()
def record(model: Any, ids: Tensor, context: int, *, everything: bool = False) -> dict[str, Any]:
    """Keys and queries of a model that reads a document.

    Args:
        model: With rows of keys and queries of one head size in all layers.
        ids: [1, context + steps]: the queries of `steps` tokens are kept.
        context: Tokens before them.
        everything: Values and the queries of the context are kept too.

    Returns:
        keys: float16 [heads, context + steps, D]; queries: float16 [heads, steps, G, D]; context; layers (that each
        head is from). With `everything` also values: float16 [heads, context + steps, D] and prompt_queries: float16
        [heads, context, G, D].
    """
    if context <= FIRST + LAST:
        raise SystemExit(
            f"more than {FIRST + LAST:,} tokens of context are needed, got {context:,}"
        )
    config = model.config
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    groups = config.num_attention_heads // kv_heads
    wanted = min(HEADS * SETS, layers * kv_heads // HEADS * HEADS)
    if not wanted:
        raise SystemExit(f"the model has fewer than {HEADS} KV heads in all its layers")
    # Spread over the layers, and over the heads of each.
    pairs = [(i * layers // wanted, i % kv_heads) for i in range(wanted)]
    keys: list[list[Tensor]] = [[] for _ in pairs]
    values: list[list[Tensor]] = [[] for _ in pairs]
    queries: list[list[Tensor]] = [[] for _ in pairs]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        n = query.shape[2]
        first = key.shape[2] - n
        for at, (layer, head) in enumerate(pairs):
            if layer == module.layer_idx:
                keys[at].append(key[0, head, first:].to("cpu", torch.float16))
                start = 0 if everything else max(0, context - first)
                heads = query[0, head * groups : (head + 1) * groups, start:]
                queries[at].append(heads.transpose(0, 1).to("cpu", torch.float16))
                if everything:
                    values[at].append(value[0, head, first:].to("cpu", torch.float16))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(RECORDER, attention)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)
    model.set_attn_implementation(RECORDER)
    cache = DynamicCache(config=config)
    for at in range(0, ids.shape[1], 512):
        model(input_ids=ids[:, at : at + 512], **{CACHE: cache}, logits_to_keep=1)
    kept = torch.stack([torch.cat(parts) for parts in queries])
    found = {
        "keys": torch.stack([torch.cat(parts) for parts in keys]),
        "queries": kept[:, context:] if everything else kept,
        "context": context,
        "layers": [layer for layer, _ in pairs],
    }
    if everything:
        found["values"] = torch.stack([torch.cat(parts) for parts in values])
        found["prompt_queries"] = kept[:, :context]
    return found


def places(length: int, context: int, recorded: int) -> Tensor:
    """Which recorded token stands at each position of a prompt of `length` tokens and of the answer behind it.

    Args:
        length: Tokens of the prompt, more than FIRST.
        context: Recorded tokens before the first recorded query.
        recorded: All recorded tokens.

    Returns:
        int64 [length + n]: with room for an answer of n tokens, four times those recorded, which then come again.
    """
    steps = recorded - context
    at = torch.arange(length + 4 * steps)
    middle = FIRST + (at - FIRST) % (context - LAST - FIRST)
    place = torch.where(at < FIRST, at, middle)
    last = min(LAST, length - FIRST)
    place[length - last : length] = torch.arange(context - last, context)
    place[length:] = context + torch.arange(4 * steps) % steps
    return place


class _Embedding(nn.Module):
    """Turns nothing, and notes the positions of a pass."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.positions: Any = None

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.positions = position_ids
        ones = states.new_ones((*position_ids.shape, self.head_size))
        return ones, torch.zeros_like(ones)


class Played(nn.Module):
    """A projection whose outcome is replaced by recorded vectors."""

    def __init__(
        self, projection: nn.Module, vectors: Tensor, places: Tensor, embedding: _Embedding
    ) -> None:
        """Replaces a projection.

        Args:
            projection: To one vector per head.
            vectors: [tokens, heads * D].
            places: int64: the recorded token of each position.
            embedding: Knows the positions.
        """
        super().__init__()
        self.projection = projection
        self.vectors, self.places = vectors, places
        self._embedding = [embedding]  # not a module of this one

    def forward(self, states: Tensor) -> Tensor:
        rows = self.vectors[self.places[self._embedding[0].positions]]
        out: Tensor = self.projection(states) * 0 + rows
        return out


@contextmanager
def played(model: Any, recorded: dict[str, Any], length: int) -> Iterator[None]:
    """Lets a Llama attend with recorded keys and queries.

    Args:
        model: Of eight KV heads, or as many as were recorded at least, in layers of one kind.
        recorded: Of `record`.
        length: Tokens of the prompt.
    """
    config = model.config
    kv_heads = config.num_key_value_heads
    groups, size = config.num_attention_heads // kv_heads, model.model.layers[0].self_attn.head_dim
    keys, queries = recorded["keys"], recorded["queries"]
    repeats, rest = divmod(size, keys.shape[-1])
    if rest or not repeats:
        raise SystemExit(f"vectors of {keys.shape[-1]} do not fill heads of {size}")
    sets = keys.shape[0] // kv_heads
    device, dtype = model.device, model.dtype
    at = places(length, recorded["context"], keys.shape[1]).to(device)
    steps = queries.shape[1]
    query_at = (torch.arange(at.numel()) - length).to(device) % steps

    def vectors(of: Tensor) -> Tensor:
        """[heads, tokens, n, D] as [tokens, heads * n * size]."""
        return of.repeat(1, 1, 1, repeats).transpose(0, 1).flatten(1).to(device, dtype)

    turned = model.model.rotary_emb
    embedding = _Embedding(size)
    model.model.rotary_emb = embedding
    before = []
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        if i % sets not in made:
            heads = slice(i % sets * kv_heads, (i % sets + 1) * kv_heads)
            some = torch.arange(groups) % queries.shape[2]
            made[i % sets] = (
                vectors(keys[heads].unsqueeze(2)),
                vectors(queries[heads][:, :, some].float() * repeats**-0.5),
            )
        attention = layer.self_attn
        before.append((attention, attention.k_proj, attention.q_proj))
        all_keys, all_queries = made[i % sets]
        attention.k_proj = Played(attention.k_proj, all_keys, at, embedding)
        attention.q_proj = Played(attention.q_proj, all_queries, query_at, embedding)
    try:
        yield
    finally:
        model.model.rotary_emb = turned
        for attention, k_proj, q_proj in before:
            attention.k_proj, attention.q_proj = k_proj, q_proj
