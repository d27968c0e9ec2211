"""Clusters are tokens of similar keys, and the kernels score and attend to their means as the references do."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES, card_id
from test_device_path import SCALE, Card, Case, by_head, merged, scores_of
from torch import Tensor

from offload.kernels import reference
from offload.kernels.clusters import (
    empty_clusters,
    empty_mean_keys,
    scan_clusters,
    tail_of_clusters,
)
from offload.kernels.reference import BLOCK, CLUSTERS, Codes
from offload.kernels.scan import ScanScratch, scan_scratch
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


def member_means(ids: Tensor, rows: Tensor) -> Tensor:
    """Each token's mean over its cluster, plainly: float32 [B, T, H_kv, width]."""
    means = torch.empty_like(rows)
    for b, head, block in torch.cartesian_prod(*map(torch.arange, ids.shape[:3])).tolist():
        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
        mine = rows[b, tokens, head]
        for cluster in ids[b, head, block].unique():
            members = ids[b, head, block] == cluster
            means[b, tokens, head][members] = mine[members].mean(0)
    return means


def test_keys_and_values_have_means_over_the_same_clusters() -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn((2, 3 * BLOCK, 2, 80), generator=random) + 20.0
    values = torch.randn((2, 3 * BLOCK, 2, 96), generator=random)
    means, clusters = reference.cluster_tokens(keys, values)
    alone = reference.cluster_values(keys, values)
    assert torch.equal(clusters.planes[0], alone.planes[0])
    assert torch.equal(clusters.meta, alone.meta)
    assert means.planes == ()
    assert (means.meta.shape, means.meta.dtype) == ((2, 2, 3, CLUSTERS, 128), torch.float16)
    assert bool((means.meta[..., 80:] == 0).all())
    want = member_means(clusters.planes[0], keys).transpose(1, 2)
    ids = clusters.planes[0].long().flatten(2)  # [B, H_kv, T]
    block = torch.arange(3 * BLOCK) // BLOCK
    for b in range(2):
        for head in range(2):
            got = means.meta[b, head, block, ids[b, head], :80].float()
            torch.testing.assert_close(got, want[b, head], rtol=5e-4, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("pads", [(0, 0), (0, 70)], ids=str)
def test_scores_and_tail_of_clusters_are_attention_over_their_means(
    pads: tuple[int, int], softcap: float | None
) -> None:
    random = torch.Generator().manual_seed(1)
    keys = torch.randn((2, 3 * BLOCK, 2, 80), generator=random)
    values = torch.randn((2, 3 * BLOCK, 2, 96), generator=random)
    query = torch.randn((2, 6, 80), generator=random) * 2
    means, clusters = reference.cluster_tokens(keys, values)
    padding = torch.tensor(pads, dtype=torch.int32)
    scores = reference.scan_clusters(
        query, means, clusters, scale=SCALE, padding=padding, softcap=softcap
    )
    nothing = torch.full((2, 2, 16), -1)
    got = reference.tail_of_clusters(scores, nothing, clusters, head_size=96)
    ids = clusters.planes[0]
    seen = torch.arange(3 * BLOCK) >= padding[:, None]
    want = reference.attend(
        query.unsqueeze(2),
        member_means(ids, keys).transpose(1, 2),
        member_means(ids, values).transpose(1, 2),
        scale=SCALE,
        softcap=softcap,
        mask=seen[:, None, None],
    )
    torch.testing.assert_close(got.out, want.out, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-3, rtol=2e-3)


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


CARDS = [
    Card(bits=2),
    Card(bits=2, size=80, groups=1, blocks=(2, 9)),
    Card(bits=2, size=96, groups=4, blocks=(7,)),
    Card(bits=2, size=128, groups=7, kv_heads=1, blocks=(43,), k=64),
    Card(bits=2, size=256, groups=8, kv_heads=1, blocks=(3, 1)),
    Card(bits=2, groups=16, kv_heads=1, blocks=(5,)),
]


class Clustered(Case):
    """A case of which only means over clusters are kept."""

    def __init__(self, card: Card, device: str) -> None:
        super().__init__(card, device)
        self.means, self.clusters = reference.cluster_tokens(
            self.rows[..., : card.size], self.rows[..., card.size :]
        )

    def scan_clusters(
        self, padding: Tensor | None = None, softcap: float | None = None
    ) -> ScanScratch:
        card = self.card
        scratch = scan_scratch(
            self.batch, card.kv_heads, card.groups, self.capacity * BLOCK, self.device
        )
        for part in scratch:
            part.fill_(torch.nan)
        scan_clusters(
            self.query, self.means, self.clusters, self.n_blocks, scratch,
            scale=SCALE, padding=padding, softcap=softcap,
        )  # fmt: skip
        return scratch

    def want(self, b: int, padding: Tensor | None = None, softcap: float | None = None) -> Tensor:
        """Scores of the reference: [1, H_q, N]."""
        return reference.scan_clusters(
            self.query[b : b + 1], self.cut(self.means, b), self.cut(self.clusters, b),
            scale=SCALE, padding=None if padding is None else padding[b : b + 1], softcap=softcap,
        )  # fmt: skip


def assert_scanned(
    case: Clustered, scratch: ScanScratch, padding: Tensor | None, softcap: float | None
) -> None:
    """The scratch holds what the reference says of all valid tokens, and nothing else was written."""
    for b in range(case.batch):
        n = case.card.blocks[b]
        want = case.want(b, padding, softcap)[0]
        got = scores_of(scratch)[b, :, case.valid(b)]
        # The scaled query is rounded to float16: 2^-11 of products that add up to about 30.
        torch.testing.assert_close(got, want, atol=1e-2, rtol=2e-3)
        blocks = want.unflatten(-1, (-1, BLOCK))
        top = blocks.amax(-1)
        torch.testing.assert_close(by_head(scratch.top)[b, :, :n], top, atol=1e-2, rtol=2e-3)
        lower = blocks - top.masked_fill(top.isneginf(), 0.0).unsqueeze(-1)
        total = by_head(scratch.total)[b, :, :n]
        torch.testing.assert_close(total, lower.exp().sum(-1), atol=1e-3, rtol=2e-2)
        for part in scratch:
            behind = n * part.shape[2] // case.capacity
            assert bool(part[b, :, behind:].isnan().all())
            assert not bool(part[b, :, :behind].isnan().any())


@ON
@pytest.mark.parametrize("card", CARDS, ids=card_id)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_scan_of_clusters_is_the_references(
    card: Card, softcap: float | None, device: str
) -> None:
    case = Clustered(card, device)
    assert_scanned(case, case.scan_clusters(softcap=softcap), None, softcap)


@ON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_of_any_dtype_score_clusters(dtype: torch.dtype, device: str) -> None:
    case = Clustered(Card(bits=2, size=128, groups=4, blocks=(5,)), device)
    case.query = case.query.to(dtype)
    assert_scanned(case, case.scan_clusters(), None, None)


@ON
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_padding_is_no_part_of_any_cluster_that_is_scored(
    softcap: float | None, device: str
) -> None:
    case = Clustered(Card(bits=2, blocks=(4, 6, 3)), device)
    # None; a whole block and a part; all but the last token.
    padding = torch.tensor([0, 70, 3 * BLOCK - 1], dtype=torch.int32, device=device)
    scratch = case.scan_clusters(padding, softcap)
    assert_scanned(case, scratch, padding, softcap)
    assert bool(scratch.top[2, :, :2].isneginf().all())
    assert bool((scratch.total[2, :, :2] == 0).all())
    assert bool((scratch.total[2, :, 2] == 1).all())


@ON
def test_clusters_without_tokens_are_not_the_best_of_their_block(device: str) -> None:
    case = Clustered(Card(bits=2, groups=2, blocks=(5,)), device)
    keys = torch.ones_like(case.rows[..., :64])  # alike: one cluster has them all
    case.means, case.clusters = reference.cluster_tokens(keys, case.rows[..., 64:])
    case.query = -case.query.abs()  # and means of zeros would score more
    scratch = case.scan_clusters()
    assert_scanned(case, scratch, None, None)
    assert bool((scratch.top[:, :, :5] < -1).all())
    assert bool((scratch.total[:, :, :5] == BLOCK).all())


@ON
def test_whole_clusters_are_selected_and_the_last_is_cut_behind_its_first_tokens(
    device: str,
) -> None:
    card = Card(bits=2, groups=2, blocks=(9,), k=64)
    case = Clustered(card, device)
    scratch = case.scan_clusters()
    scores = scores_of(scratch)[:, :, case.valid(0)]
    votes = (scores - scores.logsumexp(-1, keepdim=True)).unflatten(1, (2, -1)).amax(2)[0]
    chosen = case.select(scratch).tokens[0].long()
    cut = 0
    for head in range(2):
        taken = torch.zeros(9 * BLOCK, dtype=torch.bool, device=device)
        taken[chosen[head]] = True
        assert int(taken.sum()) == 64
        place = torch.arange(9 * BLOCK, device=device) // BLOCK * CLUSTERS
        place += case.clusters.planes[0][0, head, :9].flatten()
        least = float(votes[head][taken].min())
        for cluster in place.unique():
            members = taken[place == cluster]
            vote = float(votes[head][place == cluster][0])
            if vote > least + 2 / 128:
                assert bool(members.all())
            elif vote < least - 2 / 128:
                assert not bool(members.any())
            n = int(members.sum())
            assert members.tolist() == [True] * n + [False] * (members.numel() - n)
            cut += 0 < n < members.numel()
    assert cut >= 1


@ON
def test_a_step_over_clusters_is_the_references(device: str) -> None:
    """Scan, selection and tail together: what each leaves is what the next one takes."""
    card = Card(bits=2, size=128, groups=4, blocks=(11, 6), k=16)
    case = Clustered(card, device)
    padding = torch.tensor([0, 70], dtype=torch.int32, device=device)
    scratch = case.scan_clusters(padding)
    chosen = case.select(scratch)
    partials = case.partials(tail_slots(case.capacity * BLOCK, case.batch * card.kv_heads))
    tail_of_clusters(
        scratch, chosen, case.clusters, case.n_blocks, partials, first_slot=0, head_size=card.size
    )
    part = merged(partials)
    for b in range(2):
        scores = case.want(b, padding)
        rest = reference.tail_of_clusters(
            scores, chosen.tokens[b : b + 1], case.cut(case.clusters, b), head_size=card.size
        )
        torch.testing.assert_close(part.lse[b], rest.lse[0], atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(part.out[b], rest.out[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(chosen.lse[b], scores[0].logsumexp(-1), atol=5e-3, rtol=1e-3)


def test_there_is_room_for_what_is_made() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn((2, 3 * BLOCK, 2, 80 + 96), generator=random)
    made = reference.cluster_tokens(rows[..., :80], rows[..., 80:])
    cpu = torch.device("cpu")
    held: tuple[Codes, Codes] = (
        empty_mean_keys(2, 2, 3 * BLOCK, 80, cpu),
        empty_clusters(2, 2, 3 * BLOCK, 96, cpu),
    )
    for target, codes in zip(held, made, strict=True):
        assert len(target.planes) == len(codes.planes)
        for mine, theirs in zip(
            (*target.planes, target.meta), (*codes.planes, codes.meta), strict=True
        ):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
