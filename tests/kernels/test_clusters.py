"""Clusters are tokens of similar keys, and the kernel attends to their means as the reference does."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES, card_id
from test_device_path import SCALE, Card, Case, merged, scores_of

from offload.kernels import reference
from offload.kernels.clusters import empty_clusters, tail_of_clusters
from offload.kernels.reference import BLOCK, CLUSTERS
from offload.kernels.tail import tail_slots

ON = pytest.mark.parametrize("device", DEVICES)


def grouped(blocks: int, *, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys around four centres a block, in random order, and values that are their centres' number: [1, T, 2, 64]."""
    random = torch.Generator().manual_seed(blocks)
    centres = torch.randn((blocks, 1, 2, CLUSTERS, 64), generator=random) * 3
    which = torch.randint(0, CLUSTERS, (blocks, BLOCK, 2), generator=random)
    keys = torch.gather(
        centres.expand(-1, BLOCK, -1, -1, -1), 3, which[..., None, None].expand(-1, -1, -1, 1, 64)
    ).squeeze(3)
    keys = keys + torch.randn(keys.shape, generator=random) * noise + 5.0  # a bias on the keys
    values = which.float().unsqueeze(-1).expand(-1, -1, -1, 64)
    return keys.flatten(0, 1).unsqueeze(0), values.flatten(0, 1).unsqueeze(0)


def test_means_are_those_of_the_members() -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn((2, 3 * BLOCK, 2, 80), generator=random)
    values = torch.randn((2, 3 * BLOCK, 2, 96), generator=random)
    clusters = reference.cluster_values(keys, values)
    ids, means = clusters.planes[0], clusters.meta
    assert ids.shape == (2, 2, 3, BLOCK)
    assert means.shape == (2, 2, 3, CLUSTERS, 128)
    assert int(ids.max()) < CLUSTERS
    assert bool((means[..., 96:] == 0).all())
    for block in range(3):
        for cluster in range(CLUSTERS):
            mine = ids[1, 1, block] == cluster
            if bool(mine.any()):
                want = values[1, block * BLOCK : (block + 1) * BLOCK, 1][mine].mean(0)
                torch.testing.assert_close(
                    means[1, 1, block, cluster, :96].float(), want, rtol=1e-2, atol=1e-2
                )


def test_tokens_of_similar_keys_are_found_in_any_order() -> None:
    keys, values = grouped(20, noise=0.1)
    clusters = reference.cluster_values(keys, values)
    near = clusters.planes[0].long().unsqueeze(-1)
    back = clusters.meta[..., 0].float().unsqueeze(3).expand(-1, -1, -1, BLOCK, -1)
    back = back.transpose(3, 4).gather(3, near.transpose(3, 4)).squeeze(3).flatten(2)
    wrong = (back - values[..., 0].transpose(1, 2)).abs() > 0.01
    # k-means from four given tokens may begin with two of one group.
    assert float(wrong.float().mean()) < 0.5
    neighbours = values[0, :, :, 0].unflatten(0, (-1, 16)).mean(1, keepdim=True)
    plain = (values[0, :, :, 0].unflatten(0, (-1, 16)) - neighbours).square().mean()
    assert float((back - values[..., 0].transpose(1, 2)).square().mean()) < 0.35 * float(plain)


def test_pieces_that_are_clustered_apart_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = grouped(7, noise=2.0)
    whole = reference.cluster_values(keys, values)
    monkeypatch.setattr(reference, "_CLUSTERED_NUMBERS", 3 * 2 * BLOCK * 64)
    parts = reference.cluster_values(keys, values)
    assert torch.equal(whole.planes[0], parts.planes[0])
    assert torch.equal(whole.meta, parts.meta)


@ON
@pytest.mark.parametrize(
    "card",
    [
        Card(bits=2),
        Card(bits=2, size=80, groups=1, blocks=(2, 9)),
        Card(bits=2, size=128, groups=7, kv_heads=1, blocks=(43,), k=64),
    ],
    ids=card_id,
)
def test_the_tail_of_clusters_is_the_references(card: Card, device: str) -> None:
    case = Case(card, device)
    keys, values = case.rows[..., : card.size], case.rows[..., card.size :]
    clusters = reference.cluster_values(keys, values)
    held = empty_clusters(case.batch, card.kv_heads, case.capacity * BLOCK, card.size, case.device)
    for target, made in zip(
        (*held.planes, held.meta), (*clusters.planes, clusters.meta), strict=True
    ):
        assert target.shape == made.shape
        assert target.dtype == made.dtype
    scratch = case.scan()
    before = scores_of(scratch)
    chosen = case.select(scratch)
    slots = tail_slots(case.capacity * BLOCK, case.batch * card.kv_heads)
    partials = case.partials(slots)
    tail_of_clusters(
        scratch, chosen, clusters, case.n_blocks, partials, first_slot=0, head_size=card.size
    )
    part = merged(partials)
    for b in range(case.batch):
        want = reference.tail_of_clusters(
            before[b : b + 1, :, case.valid(b)],
            chosen.tokens[b : b + 1],
            case.cut(clusters, b),
            head_size=card.size,
        )
        torch.testing.assert_close(part.lse[b], want.lse[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(part.out[b], want.out[0], atol=1e-2, rtol=1e-2)


def test_means_come_close_where_weights_depend_on_keys() -> None:
    """What a query weighs alike lies in one cluster, so the means are off by little."""
    keys, values = grouped(30, noise=0.1)
    random = torch.Generator().manual_seed(9)
    query = torch.randn((1, 4, 64), generator=random)
    scores = (query.unflatten(1, (2, 2)) @ keys[0].permute(1, 2, 0)).flatten(1, 2) * SCALE
    nothing = torch.full((1, 2, 16), -1)
    clusters = reference.cluster_values(keys, values)
    got = reference.tail_of_clusters(scores, nothing, clusters, head_size=64)
    exact = scores.softmax(-1).unflatten(1, (2, 2)) @ values[0].permute(1, 0, 2)
    assert float((got.out.flatten(1, 2) - exact.flatten(1, 2)).abs().max()) < 0.3
