"""What should every kernel compute? Each one written in plain torch, for reading and for testing against.

`attend` and `merge` are the whole algebra of the project: attention over any partition of the keys, joined
by log-sum-exp, equals attention over all of them (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1).

Dimensions: B batch, H_q query heads, H_kv KV heads, G = H_q / H_kv, Q queries, N keys, D head size of keys,
D_v head size of values. The KV head of query head h is h // G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Attention over a set of keys.

    Attributes:
        out: [B, H_q, Q, D_v], floating: the softmax-weighted mean of the values.
        lse: [B, H_q, Q], float32, natural logarithm of the sum of the exponentiated logits. -inf for a set
            without visible keys; `out` is zero there.
    """

    out: Tensor
    lse: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Part:
    """Attends with every query to every visible key of one set.

    Args:
        query: [B, H_q, Q, D], floating.
        key: [B, H_kv, N, D], the dtype of `query`; any strides.
        value: [B, H_kv, N, D_v].
        scale: Factor on the dot products.
        causal: Query i sees keys up to i + N - Q (the last query sees all of them).
        mask: Boolean, broadcastable to [B, 1, Q, N]; True where a key is visible.
        bias: Floating, broadcastable to [B, H_q, Q, N]; added to the scaled (and capped) logits, for
            instance the logarithm of a cluster's size.
        softcap: Logits become softcap * tanh(logits / softcap) before bias and mask.
        sink_logits: [H_q], floating: one logit per head without a value (gpt-oss). In a merge exactly one
            part may have them.

    Returns:
        The part, `out` in the dtype of `query`.
    """
    groups = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(groups, dim=1)
    values = value.float().repeat_interleave(groups, dim=1)
    logits = query.float() @ keys.mT * scale  # [B, H_q, Q, N]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float()
    n_queries, n_keys = logits.shape[-2:]
    if causal:
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        logits = logits.masked_fill(~seen.tril(n_keys - n_queries), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    # exp(-inf - -inf) is NaN: a query without visible keys has weight 0 on all of them.
    weights = torch.exp(logits - lse.unsqueeze(-1)).masked_fill(lse.isneginf().unsqueeze(-1), 0.0)
    part = Part((weights @ values).to(query.dtype), lse)
    return part if sink_logits is None else with_sink_logits(part, sink_logits)


def with_sink_logits(part: Part, sink_logits: Tensor) -> Part:
    """Adds one logit without a value to every query of a part.

    Args:
        part: Attention over some keys.
        sink_logits: [H_q], floating.

    Returns:
        The part over the keys and the sink: lse grows, `out` shrinks by the sink's share.
    """
    lse = torch.logaddexp(part.lse, sink_logits.float().view(1, -1, 1))
    return Part(
        (part.out.float() * torch.exp(part.lse - lse).unsqueeze(-1)).to(part.out.dtype), lse
    )


def merge(parts: Sequence[Part]) -> Part:
    """Joins attention over disjoint sets of keys into attention over their union.

    Args:
        parts: At least one. A part without visible keys has lse = -inf, and its `out` is not read.

    Returns:
        `out` in the dtype of the first part, accumulated in float32; `lse` in float32. If every part is
        empty: zeros and -inf.

    Raises:
        ValueError: No parts, or an lse that is not float32 (it is never cast silently).
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    if any(part.lse.dtype != torch.float32 for part in parts):
        raise ValueError(f"lse must be float32, got {[part.lse.dtype for part in parts]}")
    all_lse = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(all_lse, dim=0)
    total = torch.zeros_like(parts[0].out, dtype=torch.float32)
    for part, part_lse in zip(parts, all_lse, strict=True):
        weight = torch.exp(part_lse - lse).masked_fill(part_lse.isneginf(), 0.0).unsqueeze(-1)
        total += torch.where(weight > 0, part.out.float() * weight, 0.0)
    return Part(total.to(parts[0].out.dtype), lse)
