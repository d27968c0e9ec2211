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


def weights(scores: Tensor, lse: Tensor, *, kv_heads: int) -> Tensor:
    """What each key weighs, summed over queries and the heads of a group.

    Args:
        scores: float32 [B, H_q, Q, N]: scaled logits, -inf where a key is not seen.
        lse: float32 [B, H_q, Q]: over all keys, those of other parts too; -inf where a query sees none.
        kv_heads: H_kv.

    Returns:
        float32 [B, H_kv, N].
    """
    safe = lse.masked_fill(lse.isneginf(), torch.inf)
    each: Tensor = torch.exp(scores - safe.unsqueeze(-1)).sum(2)
    of_group: Tensor = each.unflatten(1, (kv_heads, -1)).sum(2)
    return of_group


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


# The low-bit replica. A code c stands for zero + scale * c; `offload.kernels.quantize` says how codes are packed.

BLOCK = 64
"""Tokens that share the zero and scale of a key channel."""

GROUP = 32
"""Channels that share the zero and scale of a token's values."""

CLUSTERS = 4
"""Clusters of the tokens of a block, where only means over them are kept."""

_CLUSTER_PASSES = 6
_CLUSTERED_NUMBERS = 2**20  # that are clustered at once

PLANES = {4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code -> bits of each of its planes, low bits first."""


class Kind(NamedTuple):
    """What codes of keys or of values become.

    Attributes:
        dtype: The 16-bit float.
        base: The power of two with a one in its last bit's place: the float whose low bits can be set at will.
        top: Where the highest bit of a code is set.
    """

    dtype: torch.dtype
    base: float
    top: int

    def unit(self, bits: int) -> int:
        """How much one more in a code adds."""
        return 1 << (self.top + 1 - bits)


KEYS = Kind(torch.float16, 1024.0, 7)
VALUES = Kind(torch.bfloat16, 128.0, 6)


class Codes(NamedTuple):
    """Packed codes of the keys or values of one layer, block by block.

    Keys are coded along their channels, values along the tokens of their block: what a product sums over lies side by
    side. L is the length of the coded axis: D_p, the padded head size, for keys; BLOCK for values.

    A code c stands for offset + slope * (base + unit * c), where base + unit * c is what a kernel gets when it sets the
    bits of c into those of a 16-bit float (`offload.kernels.unpack`). Offsets and slopes of four neighbours lie side by
    side: eight 16-bit numbers are four words, each a pair that one instruction takes.

    Attributes:
        planes: uint8 for each plane. Keys: [B, H_kv, N / BLOCK, BLOCK, L * bits / 8]. Values:
            [B, H_kv, N / BLOCK, D_p, L * bits / 8].
        meta: Offsets, then slopes, of four neighbours each. Keys: float16 [B, H_kv, N / BLOCK, D_p / 4, 2, 4]. Values:
            bfloat16 [B, H_kv, N / BLOCK, D_p / GROUP, BLOCK / 4, 2, 4].

    Values of which only means are kept (`cluster_values`) have the cluster of each token in the one plane, uint8
    [B, H_kv, N / BLOCK, BLOCK], and the clusters' means in `meta`, bfloat16 [B, H_kv, N / BLOCK, CLUSTERS, D_p]. Keys of
    which only means are kept (`cluster_tokens`) have no plane, since their clusters are those of the values, and their
    means in `meta`, float16 of the same shape.
    """

    planes: tuple[Tensor, ...]
    meta: Tensor

    @property
    def n_blocks(self) -> int:
        """Blocks that there is room for."""
        return int(self.meta.shape[2])


def padded(head_size: int) -> int:
    """The head size of codes in memory: the next power of two, at least 64."""
    return max(64, 1 << (head_size - 1).bit_length())


def quantize_keys(keys: Tensor, *, bits: int) -> Codes:
    """Codes of keys, per channel over blocks of 64 tokens.

    Args:
        keys: [B, N, H_kv, D], floating; N a multiple of BLOCK.
        bits: 4, 3 or 2.

    Returns:
        The codes. No value is further than half a step from its code.
    """
    blocks = _in_blocks(keys)  # [B, H_kv, N / BLOCK, BLOCK, D_p]
    offset, slope = _line(blocks.amin(3), blocks.amax(3), bits, KEYS)
    codes = _codes(blocks, offset.unsqueeze(3), slope.unsqueeze(3), bits, KEYS)
    return Codes(_pack(codes, bits), _in_fours(offset, slope).to(KEYS.dtype))


def quantize_values(values: Tensor, *, bits: int) -> Codes:
    """Codes of values, per token over groups of 32 channels; arguments as `quantize_keys`."""
    blocks = _in_blocks(values).mT.unflatten(3, (-1, GROUP))  # [.., D_p / GROUP, GROUP, BLOCK]
    offset, slope = _line(blocks.amin(4), blocks.amax(4), bits, VALUES)
    codes = _codes(blocks, offset.unsqueeze(4), slope.unsqueeze(4), bits, VALUES).flatten(3, 4)
    return Codes(_pack(codes, bits), _in_fours(offset, slope).to(VALUES.dtype))


def dequantize_keys(codes: Codes, *, bits: int, head_size: int) -> Tensor:
    """The keys that codes stand for: float32 [B, H_kv, N, D]."""
    offset, slope = codes.meta.float().unbind(4)  # [.., D_p / 4, 4]
    numbers = _numbers(_unpack(codes.planes, bits), bits, KEYS)
    keys = offset.flatten(3).unsqueeze(3) + slope.flatten(3).unsqueeze(3) * numbers
    return keys.flatten(2, 3)[..., :head_size]


def dequantize_values(codes: Codes, *, bits: int, head_size: int) -> Tensor:
    """The values that codes stand for: float32 [B, H_kv, N, D_v]."""
    offset, slope = codes.meta.float().repeat_interleave(GROUP, dim=3).unbind(5)
    numbers = _numbers(_unpack(codes.planes, bits), bits, VALUES)
    values = offset.flatten(4) + slope.flatten(4) * numbers  # [.., D_p, BLOCK]
    return values.mT.flatten(2, 3)[..., :head_size]


def cluster_values(keys: Tensor, values: Tensor) -> Codes:
    """Means of values over tokens of similar keys: what a query weighs alike may lie in one number.

    k-means of the keys of each block of BLOCK tokens, less their mean, from CLUSTERS tokens an even way apart, in
    float32. A cluster that loses all its tokens keeps its centre, and has a mean of zeros.

    Args:
        keys: [B, T, H_kv, D], T a multiple of BLOCK.
        values: [B, T, H_kv, D_v].

    Returns:
        Clusters of T tokens: see `Codes`.
    """
    ids, (means,) = _clustered(keys, (values, VALUES.dtype))
    return Codes((ids,), means)


def cluster_tokens(keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
    """Means of keys and of values over the clusters of `cluster_values`, all that is kept of T tokens.

    Args:
        keys: As in `cluster_values`.
        values: Likewise.

    Returns:
        The keys and the values: see `Codes`.

    Source: Chen et al., RetroInfer (arXiv 2505.02922), the wave index: a cluster's tokens are estimated by its mean key
        and mean value. Theirs span 8,192 tokens, ours a block.
    """
    ids, (mean_keys, mean_values) = _clustered(keys, (keys, KEYS.dtype), (values, VALUES.dtype))
    return Codes((), mean_keys), Codes((ids,), mean_values)


def _clustered(keys: Tensor, *kept: tuple[Tensor, torch.dtype]) -> tuple[Tensor, list[Tensor]]:
    """The cluster of each token, and means over clusters of rows [B, T, H_kv, width], each in a dtype of its own."""
    batch, n_tokens, kv_heads, key_dim = keys.shape
    blocks = n_tokens // BLOCK
    widths = [padded(rows.shape[-1]) for rows, _ in kept]
    ids = keys.new_empty((batch, kv_heads, blocks, BLOCK), dtype=torch.uint8)
    means = [
        keys.new_zeros((batch, kv_heads, blocks, CLUSTERS, width), dtype=dtype)
        for width, (_, dtype) in zip(widths, kept, strict=True)
    ]
    together = max(1, _CLUSTERED_NUMBERS // (batch * kv_heads * BLOCK * max(key_dim, *widths)))
    for first in range(0, blocks, together):  # so that they take little memory
        part = slice(first, first + together)
        tokens = slice(first * BLOCK, (first + together) * BLOCK)
        near = _clusters(keys[:, tokens].transpose(1, 2).unflatten(2, (-1, BLOCK)).float())
        members = torch.nn.functional.one_hot(near, CLUSTERS).float().mT  # [.., CLUSTERS, BLOCK]
        n = members.sum(-1, keepdim=True).clamp(min=1)
        ids[:, :, part] = near.to(torch.uint8)
        for mean, (rows, dtype) in zip(means, kept, strict=True):
            sums = members @ rows[:, tokens].transpose(1, 2).unflatten(2, (-1, BLOCK)).float()
            mean[:, :, part, :, : rows.shape[-1]] = (sums / n).to(dtype)
    return ids, means


def _of_clusters(ids: Tensor, means: Tensor, head_size: int) -> Tensor:
    """Each token's mean: float32 [B, H_kv, N, head_size]."""
    near = ids.long().unsqueeze(-1).expand(-1, -1, -1, -1, head_size)
    return means[..., :head_size].float().gather(3, near).flatten(2, 3)


def _clusters(keys: Tensor) -> Tensor:
    """Which of CLUSTERS each key of a block belongs to: int64 [.., BLOCK], from float32 [.., BLOCK, D]."""
    keys = keys - keys.mean(-2, keepdim=True)
    every = BLOCK // CLUSTERS
    centres = keys[..., every // 2 :: every, :]
    for _ in range(_CLUSTER_PASSES):
        near = _nearest(keys, centres)
        members = torch.nn.functional.one_hot(near, CLUSTERS).float().mT
        n = members.sum(-1, keepdim=True)
        centres = torch.where(n > 0, members @ keys / n.clamp(min=1), centres)
    return _nearest(keys, centres)


def _nearest(keys: Tensor, centres: Tensor) -> Tensor:
    distance = centres.square().sum(-1).unsqueeze(-2) - 2 * keys @ centres.mT
    return distance.argmin(-1)


def scan(
    query: Tensor,
    keys: Codes,
    *,
    bits: int,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores of every query head against all low-bit keys.

    Args:
        query: [B, H_q, D].
        keys: Codes of N tokens.
        bits: Of the codes.
        scale: Factor on the dot products.
        padding: int [B]: so many first tokens are padding and get -inf; None for none.
        softcap: Scores become softcap * tanh(scores / softcap).

    Returns:
        float32 [B, H_q, N].
    """
    low = dequantize_keys(keys, bits=bits, head_size=query.shape[-1])
    return _scan(query, low, scale, padding, softcap)


def scan_clusters(
    query: Tensor,
    keys: Codes,
    clusters: Codes,
    *,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores of every query head against the mean key of each token's cluster.

    Args:
        query: [B, H_q, D].
        keys: Of `cluster_tokens`, of N tokens.
        clusters: The values beside them, which say which cluster a token is of.
        scale: As in `scan`.
        padding: As in `scan`. Means are over padding too.
        softcap: As in `scan`.

    Returns:
        As `scan`; all tokens of a cluster have one score.
    """
    low = _of_clusters(clusters.planes[0], keys.meta, query.shape[-1])
    return _scan(query, low, scale, padding, softcap)


def _scan(
    query: Tensor, low: Tensor, scale: float, padding: Tensor | None, softcap: float | None
) -> Tensor:
    """Scores against keys float32 [B, H_kv, N, D]."""
    groups = query.shape[1] // low.shape[1]
    scores = query.float().unsqueeze(2) @ low.repeat_interleave(groups, dim=1).mT
    scores = scores.squeeze(2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if padding is None:
        return scores
    hidden = torch.arange(scores.shape[-1], device=scores.device) < padding.view(-1, 1, 1)
    return scores.masked_fill(hidden, -torch.inf)


def select(scores: Tensor, *, kv_heads: int, k: int) -> Tensor:
    """The k tokens per KV head that its query heads vote for: the maximum over the group of softmaxed scores.

    Args:
        scores: [B, H_q, N]; -inf where a token must not be selected.
        kv_heads: H_kv.
        k: Tokens per KV head.

    Returns:
        int32 [B, H_kv, k], ascending; -1 in slots that no token is left for. Votes are compared in steps of 1/128
        of their logarithm, down to -32; of equal ones the lower token wins.
    """
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    votes = scores - lse.masked_fill(lse.isneginf(), 0.0)
    votes = votes.unflatten(1, (kv_heads, -1)).amax(2)  # [B, H_kv, N]
    steps = (votes * 128 + 4094).clamp(0, 4094).floor()
    order = torch.argsort(
        steps.masked_fill(votes.isneginf(), -1), dim=-1, descending=True, stable=True
    )[..., :k]
    usable = votes.gather(-1, order) > -torch.inf
    chosen = torch.where(usable, order, votes.shape[-1]).sort(dim=-1).values
    chosen = torch.where(chosen == votes.shape[-1], -1, chosen).int()
    return torch.nn.functional.pad(chosen, (0, k - chosen.shape[-1]), value=-1)


def tail(scores: Tensor, selected: Tensor, values: Codes, *, bits: int, head_size: int) -> Part:
    """Attention over all tokens that are not selected, with low-bit values.

    Args:
        scores: float32 [B, H_q, N], of `scan`; -inf where a token is not visible.
        selected: int [B, H_kv, k], -1 for none; left out by masking, not by subtraction.
        values: Codes of N tokens.
        bits: Of the codes.
        head_size: D_v.

    Returns:
        `out` float32 [B, H_q, 1, D_v], `lse` [B, H_q, 1].
    """
    return _tail(scores, selected, dequantize_values(values, bits=bits, head_size=head_size))


def _tail(scores: Tensor, selected: Tensor, low: Tensor) -> Part:
    """Attention over all tokens that are not selected, with values float32 [B, H_kv, N, D_v]."""
    groups = scores.shape[1] // low.shape[1]
    rest = unselected(scores, selected)
    lse = torch.logsumexp(rest, dim=-1, keepdim=True)
    weights = torch.exp(rest - lse).masked_fill(lse.isneginf(), 0.0).unsqueeze(2)
    return Part(weights @ low.repeat_interleave(groups, dim=1), lse)


def unselected(scores: Tensor, selected: Tensor) -> Tensor:
    """Scores [B, H_q, N] with -inf for the tokens [B, H_kv, k] that are selected, -1 for none."""
    n = scores.shape[-1]
    taken = torch.zeros((*selected.shape[:2], n + 1), dtype=torch.bool, device=scores.device)
    taken.scatter_(2, torch.where(selected < 0, n, selected).long(), True)
    groups = scores.shape[1] // selected.shape[1]
    return scores.masked_fill(taken[..., :-1].repeat_interleave(groups, dim=1), -torch.inf)


def tail_of_clusters(scores: Tensor, selected: Tensor, clusters: Codes, *, head_size: int) -> Part:
    """Attention over all tokens that are not selected, each with the mean value of its cluster.

    Args:
        scores: As in `tail`; of `scan_clusters` too.
        selected: As in `tail`. Means are over selected tokens too.
        clusters: Of `cluster_values`, of N tokens.
        head_size: D_v.

    Returns:
        As `tail`.
    """
    return _tail(scores, selected, _of_clusters(clusters.planes[0], clusters.meta, head_size))


def gather(pool: Tensor, table: Tensor, selected: Tensor) -> Tensor:
    """Rows of selected tokens from host pages.

    Args:
        pool: [pages, P, H_kv, W].
        table: int [B, columns]: the page of each block of P tokens.
        selected: int [B, H_kv, k], -1 for none.

    Returns:
        [B, H_kv, k, W]; zeros for none.
    """
    page_tokens = pool.shape[1]
    tokens = selected.clamp(min=0).long()
    pages = (
        table.long().unsqueeze(1).expand(-1, tokens.shape[1], -1).gather(2, tokens // page_tokens)
    )
    heads = torch.arange(tokens.shape[1], device=pool.device).view(1, -1, 1)
    rows = pool[pages.to(pool.device), (tokens % page_tokens).to(pool.device), heads]
    return rows.masked_fill((selected < 0).unsqueeze(-1).to(pool.device), 0)


def _in_blocks(rows: Tensor) -> Tensor:
    """[B, N, H_kv, D] as float32 [B, H_kv, N / BLOCK, BLOCK, D_p], zeros behind the head."""
    extra = padded(rows.shape[-1]) - rows.shape[-1]
    heads_first = torch.nn.functional.pad(rows.float(), (0, extra)).transpose(1, 2)
    blocks: Tensor = heads_first.unflatten(2, (-1, BLOCK))
    return blocks


def _numbers(codes: Tensor, bits: int, kind: Kind) -> Tensor:
    return kind.base + kind.unit(bits) * codes.float()


def _line(low: Tensor, high: Tensor, bits: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Offset and slope of ranges as 16-bit numbers in float32.

    Rounded to the nearest, not outwards: a channel that is always the least or the greatest of its group would be off
    by the same in every token, which no mean over tokens takes away. Only where a range lies far from zero, so that
    rounding the offset alone could move it by more than an eighth of a step, it is made wider by what that may be.
    """
    eps, levels, unit = torch.finfo(kind.dtype).eps, 2**bits - 1, kind.unit(bits)
    wide = (eps * low.abs() - 0.25 * ((high - low) * (1.0 / levels))).clamp(min=0.0)
    slope = ((high - low + wide) * (1.0 / (levels * unit))).to(kind.dtype).float()
    return (low - 0.5 * wide - kind.base * slope).to(kind.dtype).float(), slope


def _in_fours(offset: Tensor, slope: Tensor) -> Tensor:
    """[.., L] twice as [.., L / 4, 2, 4]."""
    return torch.stack([offset.unflatten(-1, (-1, 4)), slope.unflatten(-1, (-1, 4))], dim=-2)


def _codes(values: Tensor, offset: Tensor, slope: Tensor, bits: int, kind: Kind) -> Tensor:
    zero, scale = offset + kind.base * slope, slope * kind.unit(bits)
    inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
    return torch.floor((values - zero) * inverse + 0.5).clamp(0, 2**bits - 1).to(torch.int32)


def _pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes of the last axis: byte u of a plane of p bits holds entries u + j * L * p / 8 at bits p * j."""
    planes, shift = [], 0
    for plane in PLANES[bits]:
        part = ((codes >> shift) & (2**plane - 1)).unflatten(-1, (8 // plane, -1))
        shifts = torch.arange(8 // plane, device=codes.device).view(-1, 1) * plane
        planes.append((part << shifts).sum(-2).to(torch.uint8))
        shift += plane
    return tuple(planes)


def _unpack(planes: Sequence[Tensor], bits: int) -> Tensor:
    total: Tensor | None = None
    shift = 0
    for packed, plane in zip(planes, PLANES[bits], strict=True):
        shifts = torch.arange(8 // plane, device=packed.device).view(-1, 1) * plane
        part = (packed.to(torch.int32).unsqueeze(-2) >> shifts) & (2**plane - 1)
        part = part.flatten(-2) << shift
        total = part if total is None else total + part
        shift += plane
    assert total is not None
    return total.float()


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys with their positions: channel i turned together with channel i + R/2, further ones as they are.

    Args:
        keys: [B, T, H, D].
        cos: [B or 1, T, R].
        sin: Likewise.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turning, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, still], dim=-1)
