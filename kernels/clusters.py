"""What do tokens score, and what do all the others add, where only means over clusters of them are kept?

Clusters lie within a block, so that blocks come and go as those of codes do.

Scores, where of keys too only means are kept: a token has the score of its cluster's mean key. Four clusters of four
blocks are one small product, of which each token then takes its own. A block's sum is made of its clusters' scores and
of how many tokens each has: exp is taken of four numbers, not of 64.

The tail: a token's weight goes to its cluster, a cluster's weight to its mean value, two small products for every four
blocks, and no value is decoded. It is one launch, behind the selection: selected tokens are masked, as in
`offload.kernels.tail`.

The references are `cluster_values`, `cluster_tokens`, `scan_clusters` and `tail_of_clusters` of
`offload.kernels.reference`; the first two are also what makes the clusters, since blocks leave the window seldom.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import BLOCK, CLUSTERS, KEYS, VALUES, Codes, padded
from offload.kernels.scan import ScanScratch, blocks_per_program, scaled_query
from offload.kernels.select import Selection
from offload.kernels.unpack import INTERPRETED, exp
from offload.kernels.window import capped

TOGETHER = 4  # blocks: their clusters are the least that a product sums over, and the fewest rows that it has
WARPS = 4
SCAN_WARPS = 1  # twice as many from heads of 256 on


def empty_clusters(
    batch: int, kv_heads: int, n_tokens: int, head_size: int, device: torch.device
) -> Codes:
    """Room for the clusters of a layer's values.

    Args:
        batch: Sequences.
        kv_heads: KV heads.
        n_tokens: Tokens, a multiple of BLOCK.
        head_size: D_v.
        device: Where.
    """
    blocks = (batch, kv_heads, n_tokens // BLOCK)
    ids = torch.zeros((*blocks, BLOCK), dtype=torch.uint8, device=device)
    shape = (*blocks, CLUSTERS, padded(head_size))
    return Codes((ids,), torch.zeros(shape, dtype=VALUES.dtype, device=device))


def empty_mean_keys(
    batch: int, kv_heads: int, n_tokens: int, head_size: int, device: torch.device
) -> Codes:
    """Room for the mean keys of clusters beside those of a layer's values; arguments as `empty_clusters`, D for D_v."""
    shape = (batch, kv_heads, n_tokens // BLOCK, CLUSTERS, padded(head_size))
    return Codes((), torch.zeros(shape, dtype=KEYS.dtype, device=device))


def scan_clusters(
    query: Tensor,
    keys: Codes,
    clusters: Codes,
    n_blocks: Tensor,
    scratch: ScanScratch,
    *,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Scores every query head against the mean keys of the first blocks; all tokens of a cluster have one score.

    Args:
        query: [B, H_q, D], last stride 1. Rounded to float16 after scaling.
        keys: Of `cluster_tokens`, of up to N tokens.
        clusters: The values beside them; only which cluster a token is of is read.
        n_blocks: int32 [B] on the device: blocks that are valid; what lies behind is not touched.
        scratch: Written, as by `scan`.
        scale: Factor on the dot products.
        padding: As in `scan`. Means are over padding too.
        softcap: As in `scan`.
    """
    batch, heads, head_size = query.shape
    kv_heads, capacity = keys.meta.shape[1], keys.n_blocks
    groups, width = heads // kv_heads, padded(head_size)
    each = blocks_per_program(capacity, batch * kv_heads)
    _scan_clusters_kernel[(triton.cdiv(capacity, each), batch * kv_heads)](
        query, keys.meta, clusters.planes[0], n_blocks, n_blocks if padding is None else padding, *scratch,
        kv_heads, capacity, scale, 1.0 if softcap is None else softcap, query.stride(0), query.stride(1),
        G=groups, G_P=max(8, triton.next_power_of_2(groups)), D=head_size, D_P=width,
        BLOCK=BLOCK, CLUSTERS=CLUSTERS, TOGETHER=TOGETHER, BLOCKS_PER_PROGRAM=each,
        PADDED=padding is not None, CAPPED=softcap is not None, PLAIN=INTERPRETED,
        num_warps=SCAN_WARPS if width <= 128 else 2 * SCAN_WARPS,
    )  # fmt: skip


def tail_of_clusters(
    scores: ScanScratch,
    selection: Selection,
    clusters: Codes,
    n_blocks: Tensor,
    partials: Partials,
    *,
    first_slot: int,
    head_size: int,
) -> None:
    """Attends to all tokens that are not selected.

    Args:
        scores: Of `scan`, after `select_tokens` took the selected ones out.
        selection: Of `select_blocks`; only its `lse` is read.
        clusters: Of `cluster_values`, of up to N tokens.
        n_blocks: int32 [B] on the device: valid blocks.
        partials: `tail_slots(N, B * H_kv)` slots are written.
        first_slot: The first slot.
        head_size: D_v.
    """
    batch, kv_heads, capacity = clusters.meta.shape[:3]
    groups = scores.top.shape[3]
    each = blocks_per_program(capacity, batch * kv_heads)
    _clusters_kernel[(triton.cdiv(capacity, each), batch * kv_heads)](
        scores.scores, scores.top, selection.lse, n_blocks, clusters.planes[0], clusters.meta, *partials,
        kv_heads, capacity, partials.lse.shape[2], first_slot,
        G=groups, G_P=max(8, triton.next_power_of_2(groups)), DV=head_size, D_P=clusters.meta.shape[4],
        BLOCK=BLOCK, CLUSTERS=CLUSTERS, TOGETHER=TOGETHER, BLOCKS_PER_PROGRAM=each, PLAIN=INTERPRETED,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _scan_clusters_kernel(
    q_ptr,
    means_ptr,
    ids_ptr,
    n_blocks_ptr,
    padding_ptr,
    scores_ptr,
    top_ptr,
    total_ptr,
    kv_heads,
    capacity_blocks,
    sm_scale,
    softcap,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    G: tl.constexpr,
    G_P: tl.constexpr,
    D: tl.constexpr,
    D_P: tl.constexpr,
    BLOCK: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    ROWS: tl.constexpr = TOGETHER * CLUSTERS
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    i_batch, i_kv = i_row // kv_heads, i_row % kv_heads
    n_blocks = tl.load(n_blocks_ptr + i_batch)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, TOGETHER * BLOCK)
    i_c = tl.arange(0, ROWS)
    i_b = tl.arange(0, TOGETHER)
    i_4 = tl.arange(0, CLUSTERS)
    i_d = tl.arange(0, D_P)
    q_ptr += i_batch * stride_qb + i_kv * G * stride_qh
    q = scaled_query(q_ptr, i_g, stride_qh, 0, sm_scale, G, D, D_P, PLAIN)
    hidden = 0
    if PADDED:
        hidden = tl.load(padding_ptr + i_batch)
    first = tl.program_id(0) * BLOCKS_PER_PROGRAM
    end = tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)
    for i_block in range(first, end, TOGETHER):
        o_block = i_row * capacity_blocks + i_block
        m_t = i_block + i_t // BLOCK < end
        m_c = i_block + i_c // CLUSTERS < end
        o_mean = i_c[:, None] * D_P + i_d[None, :]
        m_mean = m_c[:, None] & (i_d >= 0)[None, :]
        mean = tl.load(means_ptr + o_block * CLUSTERS * D_P + o_mean, mask=m_mean, other=0.0)
        mean = mean.to(tl.float32) if PLAIN else mean
        score = tl.dot(mean, q, input_precision="ieee")
        if CAPPED:
            score = capped(score, softcap)
        cluster = tl.load(ids_ptr + o_block * BLOCK + i_t, mask=m_t, other=0).to(tl.int32)
        seen = m_t
        if PADDED:
            seen = m_t & (i_block * BLOCK + i_t >= hidden)
        # How many tokens that are seen each cluster has: four counts of up to 64, of eight bits each.
        counts = tl.where(seen, 1 << (8 * cluster), 0)
        counts = tl.sum(tl.reshape(counts, (TOGETHER, BLOCK)), axis=1)
        n = (counts[:, None] >> (8 * i_4)[None, :]) & 0xFF
        # A cluster without a token that is seen has no say in what is the best of its block.
        score = tl.reshape(score, (TOGETHER, CLUSTERS, G_P))
        score = tl.where((n > 0)[:, :, None], score, float("-inf"))
        top = tl.max(score, axis=1)
        # A block of padding alone: sum 0, not NaN.
        score -= tl.where(top == float("-inf"), 0.0, top)[:, None, :]
        total = tl.sum(n.to(tl.float32)[:, :, None] * exp(score, PLAIN), axis=1)
        score = tl.reshape(score, (ROWS, G_P))
        mine = (i_t // BLOCK * CLUSTERS + cluster)[:, None]
        of_token = tl.gather(score, tl.broadcast_to(mine, (TOGETHER * BLOCK, G_P)), axis=0)
        of_token = tl.where(seen[:, None], of_token, float("-inf"))
        # 64-bit numbers are added once: of each token's address only the last bits are its own.
        o_score = i_t[:, None] * G + i_g[None, :]
        m_score = m_t[:, None] & m_g[None, :]
        tl.store(scores_ptr + o_block * BLOCK * G + o_score, of_token.to(tl.float16), mask=m_score)
        o_stat = i_b[:, None] * G + i_g[None, :]
        m_stat = (i_block + i_b < end)[:, None] & m_g[None, :]
        tl.store(top_ptr + o_block * G + o_stat, top, mask=m_stat)
        tl.store(total_ptr + o_block * G + o_stat, total, mask=m_stat)


@triton.jit
def _clusters_kernel(
    scores_ptr,
    top_ptr,
    lse_ptr,
    n_blocks_ptr,
    ids_ptr,
    means_ptr,
    out_ptr,
    out_lse_ptr,
    kv_heads,
    capacity_blocks,
    slots,
    first_slot,
    G: tl.constexpr,
    G_P: tl.constexpr,
    DV: tl.constexpr,
    D_P: tl.constexpr,
    BLOCK: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    PLAIN: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)  # sequence and KV head
    n_blocks = tl.load(n_blocks_ptr + i_row // kv_heads)
    i_g = tl.arange(0, G_P)
    m_g = i_g < G
    i_t = tl.arange(0, TOGETHER * BLOCK)
    i_c = tl.arange(0, TOGETHER * CLUSTERS)
    i_d = tl.arange(0, D_P)
    o_head = i_row * G + i_g
    lse = tl.load(lse_ptr + o_head, mask=m_g, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc = tl.zeros((D_P, G_P), dtype=tl.float32)
    total = tl.zeros((G_P,), dtype=tl.float32)
    first = i_split * BLOCKS_PER_PROGRAM
    end = tl.minimum(first + BLOCKS_PER_PROGRAM, n_blocks)
    for i_block in range(first, end, TOGETHER):
        o_block = i_row * capacity_blocks + i_block
        m_t = i_block + i_t // BLOCK < end
        m_c = i_block + i_c // CLUSTERS < end
        o_stat = (o_block + i_t // BLOCK)[:, None] * G + i_g[None, :]
        m_stat = m_t[:, None] & m_g[None, :]
        peak = tl.load(top_ptr + o_stat, mask=m_stat, other=float("-inf")) - lse[None, :]
        o_score = (o_block * BLOCK + i_t)[:, None] * G + i_g[None, :]
        score = tl.load(scores_ptr + o_score, mask=m_stat, other=float("-inf")).to(tl.float32)
        weights = exp(score + peak, PLAIN)
        total += tl.sum(weights, axis=0)
        cluster = tl.load(ids_ptr + o_block * BLOCK + i_t, mask=m_t, other=0).to(tl.int32)
        mine = i_c[:, None] == (i_t // BLOCK * CLUSTERS + cluster)[None, :]
        o_mean = (o_block * CLUSTERS + i_c)[None, :] * D_P + i_d[:, None]
        mean = tl.load(means_ptr + o_mean, mask=m_c[None, :] & (i_d >= 0)[:, None], other=0.0)
        if PLAIN:
            of_cluster = tl.dot(mine.to(tl.float32), weights, input_precision="ieee")
            acc = tl.dot(mean.to(tl.float32), of_cluster, acc, input_precision="ieee")
        else:
            of_cluster = tl.dot(mine.to(tl.bfloat16), weights.to(tl.bfloat16))
            acc = tl.dot(mean, of_cluster.to(tl.bfloat16), acc)
    full = total > 0.0
    out = acc * tl.where(full, 1.0 / tl.where(full, total, 1.0), 0.0)[None, :]
    slot = o_head * slots + first_slot + i_split
    m_out = (i_d < DV)[:, None] & m_g[None, :]
    tl.store(out_ptr + slot[None, :] * DV + i_d[:, None], out, mask=m_out)
    out_lse = tl.where(full, lse + tl.log(tl.where(full, total, 1.0)), float("-inf"))
    tl.store(out_lse_ptr + slot, out_lse, mask=m_g)
