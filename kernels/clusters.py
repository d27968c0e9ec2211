"""What do all the other tokens add, where of their values only the means of clusters are kept?

A token's weight goes to its cluster, a cluster's weight to its mean: two small products for every four blocks, and no
value is decoded. Clusters lie within a block, so that blocks come and go as those of codes do.

One launch, behind the selection: selected tokens are masked, as in `offload.kernels.tail`.

The references are `cluster_values` and `tail_of_clusters` of `offload.kernels.reference`; the first one is also what
makes the clusters, since blocks leave the window seldom.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.combine import Partials
from offload.kernels.reference import BLOCK, CLUSTERS, Codes, padded
from offload.kernels.scan import ScanScratch, blocks_per_program
from offload.kernels.select import Selection
from offload.kernels.unpack import INTERPRETED, exp

TOGETHER = 4  # blocks: their clusters are the least that a product sums over
WARPS = 4


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
    return Codes((ids,), torch.zeros(shape, dtype=torch.bfloat16, device=device))


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
