"""Scan, select, tail and rows: each equals its reference, and together they are attention over all tokens.

In Triton's interpreter they run in float32, on a card in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cards import DEVICES, card_id
from torch import Tensor

from offload.kernels import reference
from offload.kernels.combine import Partials, combine, empty_partials
from offload.kernels.gather import RowCache, attend_rows, empty_row_cache, row_slots
from offload.kernels.reference import BLOCK, Codes, Part
from offload.kernels.scan import ScanScratch, scan, scan_scratch
from offload.kernels.select import (
    VOTES,
    Selection,
    empty_selection,
    select_blocks,
    select_tokens,
)
from offload.kernels.tail import block_slots, tail, tail_of_blocks, tail_slots
from offload.kernels.window import attend_window

ON = pytest.mark.parametrize("device", DEVICES)
SCALE = 0.125


@dataclass(frozen=True, kw_only=True)
class Card:
    """A shape of the device path."""

    bits: int = 4
    size: int = 64
    kv_heads: int = 2
    groups: int = 3
    blocks: tuple[int, ...] = (5, 3)  # of each sequence
    k: int = 16


CARDS = [
    Card(),
    Card(bits=3),
    Card(bits=2),
    Card(size=128, groups=4, blocks=(7,)),
    Card(size=80, groups=1, blocks=(2, 4)),
    Card(bits=3, size=128, groups=7, kv_heads=1, blocks=(4,)),
    Card(blocks=(1,), k=64),  # as many to select as there are
    Card(blocks=(40, 21)),  # more blocks than tokens to select
    Card(blocks=(150,), kv_heads=1, groups=2, k=128),  # more votes than stay in registers
]
ALL = pytest.mark.parametrize("card", CARDS, ids=card_id)


class Case:
    """Random tokens on host pages and their replica."""

    def __init__(self, card: Card, device: str, seed: int = 0, sharpness: float = 1.5) -> None:
        self.card = card
        random = torch.Generator().manual_seed(seed)
        batch, capacity = len(card.blocks), max(card.blocks) + 1
        dtype = torch.float16 if device == "cuda" else torch.float32
        rows = torch.randn(
            (batch, capacity * BLOCK, card.kv_heads, 2 * card.size), generator=random
        )
        rows[..., : card.size] += torch.randn(card.size, generator=random) * 3  # a bias on the keys
        rows = rows.to(dtype)
        order = torch.randperm(batch * capacity, generator=random)
        self.table = order.view(batch, capacity).int().to(device)
        self.pool = torch.empty((batch * capacity, BLOCK, *rows.shape[2:]), dtype=dtype)
        self.pool[order] = rows.view(batch * capacity, BLOCK, *rows.shape[2:])
        if device == "cuda":
            self.pool = self.pool.pin_memory()
        on_device = rows.to(device)
        self.keys = reference.quantize_keys(on_device[..., : card.size], bits=card.bits)
        self.values = reference.quantize_values(on_device[..., card.size :], bits=card.bits)
        self.rows = on_device.float()
        heads = card.kv_heads * card.groups
        self.query = (torch.randn((batch, heads, card.size), generator=random) * sharpness).to(
            device, dtype
        )
        self.n_blocks = torch.tensor(card.blocks, dtype=torch.int32, device=device)
        self.heads, self.batch, self.capacity = heads, batch, capacity
        self.device = torch.device(device)

    def valid(self, b: int) -> slice:
        return slice(0, self.card.blocks[b] * BLOCK)

    def cut(self, codes: Codes, b: int) -> Codes:
        """The codes of one sequence's valid tokens."""
        n = self.card.blocks[b]
        planes = tuple(plane[b : b + 1, :, :n] for plane in codes.planes)
        return Codes(planes, codes.meta[b : b + 1, :, :n])

    def scan(self) -> ScanScratch:
        scratch = scan_scratch(
            self.batch,
            self.card.kv_heads,
            self.card.groups,
            self.capacity * BLOCK,
            self.device,
        )
        for part in scratch:
            part.fill_(torch.nan)
        scan(
            self.query,
            self.keys,
            self.n_blocks,
            scratch,
            bits=self.card.bits,
            scale=SCALE,
        )
        return scratch

    def select(self, scratch: ScanScratch) -> Selection:
        return selected(scratch, self.heads, self.n_blocks, self.card.k)

    def partials(self, slots: int) -> Partials:
        made = empty_partials(self.batch, self.heads, slots, self.card.size, self.device)
        made.out.fill_(torch.nan)
        return made

    def tail(self, scratch: ScanScratch, chosen: Selection, share: float) -> tuple[Part, Tensor]:
        slots = tail_slots(self.capacity * BLOCK, self.batch * self.card.kv_heads)
        partials = self.partials(slots + block_slots(self.card.k))
        skipped = torch.full((self.batch, self.heads, slots), torch.nan, device=self.device)
        tail_of_blocks(
            scratch,
            chosen,
            self.values,
            partials,
            first_slot=slots,
            bits=self.card.bits,
            head_size=self.card.size,
        )
        tail(
            scratch,
            chosen,
            self.values,
            self.n_blocks,
            partials,
            skipped,
            first_slot=0,
            bits=self.card.bits,
            head_size=self.card.size,
            share=share,
        )
        return merged(partials), skipped.sum(-1)

    def attend_rows(
        self, chosen: Tensor, softcap: float | None = None, cache: RowCache | None = None
    ) -> Part:
        partials = self.partials(row_slots(self.card.k))
        attend_rows(
            self.query,
            self.pool,
            self.table,
            chosen,
            partials,
            first_slot=0,
            key_dim=self.card.size,
            scale=SCALE,
            softcap=softcap,
            cache=cache,
        )
        return merged(partials)


def selected(scratch: ScanScratch, heads: int, n_blocks: Tensor, k: int) -> Selection:
    """Both steps of a selection."""
    batch, kv_heads, n_tokens, _ = scratch.scores.shape
    chosen = empty_selection(batch, heads, kv_heads, n_tokens, k, n_blocks.device)
    for part in chosen:
        part.fill_(2**20)  # nothing may rest on what was there
    select_blocks(scratch, n_blocks, chosen)
    select_tokens(scratch, chosen)
    return chosen


def fill(scratch: ScanScratch, scores: Tensor) -> None:
    """What a scan would have left of float32 scores [B, H_kv, N, G]."""
    blocks = scores.unflatten(2, (-1, BLOCK))
    top = blocks.amax(3, keepdim=True)
    relative = blocks - top.masked_fill(top.isneginf(), 0.0)
    scratch.scores.copy_(relative.flatten(2, 3))
    scratch.top.copy_(top.squeeze(3))
    scratch.total.copy_(relative.exp().sum(3))


def scores_of(scratch: ScanScratch) -> Tensor:
    """float32 [B, H_q, N]: all scores of a scan."""
    return by_head(scratch.scores.float() + scratch.top.repeat_interleave(BLOCK, dim=2))


def assert_selected(tokens: Tensor, scores: Tensor, card: Card) -> None:
    """The reference's tokens, but for votes that differ by less than a step: two sums round differently."""
    want = reference.select(scores, kv_heads=card.kv_heads, k=card.k)
    assert tokens.shape == want.shape
    votes = (scores - scores.logsumexp(-1, keepdim=True)).unflatten(1, (card.kv_heads, -1)).amax(2)
    for mine, theirs, vote in zip(tokens[0], want[0], votes[0], strict=True):
        assert mine[mine >= 0].tolist() == sorted(set(mine[mine >= 0].tolist()))
        assert int((mine >= 0).sum()) == int((theirs >= 0).sum())
        strangers = set(mine.tolist()) ^ set(theirs.tolist())
        least = float(vote[theirs[theirs >= 0].long()].min())
        assert all(abs(float(vote[token]) - least) < 2 / 128 for token in strangers)
        assert len(strangers) <= 4


def by_head(memory: Tensor) -> Tensor:
    """[B, H_kv, N, G] of a scan's scratch as a new [B, H_q, N]."""
    return memory.transpose(2, 3).flatten(1, 2).clone()


def merged(partials: Partials) -> Part:
    """What all slots stand for."""
    slots = partials.lse.shape[2]
    return reference.merge(
        [Part(partials.out[:, :, i : i + 1], partials.lse[:, :, i : i + 1]) for i in range(slots)]
    )


@ON
@ALL
def test_scan_scores_every_valid_token_and_nothing_else(card: Card, device: str) -> None:
    case = Case(card, device)
    scratch = case.scan()
    for b in range(case.batch):
        keys = case.cut(case.keys, b)
        want = reference.scan(case.query[b : b + 1], keys, bits=card.bits, scale=SCALE)[0]
        got = scores_of(scratch)[b, :, case.valid(b)]
        # The scaled query is rounded to float16: 2^-11 of products that add up to about 30.
        torch.testing.assert_close(got, want, atol=1e-2, rtol=2e-3)
        blocks = got.unflatten(-1, (-1, BLOCK))
        n = card.blocks[b]
        torch.testing.assert_close(by_head(scratch.top)[b, :, :n], blocks.amax(-1))
        # A stored score is rounded to 2^-12 of what it lies below the best of its block.
        total = (blocks - blocks.amax(-1, keepdim=True)).exp().sum(-1)
        torch.testing.assert_close(by_head(scratch.total)[b, :, :n], total, atol=1e-4, rtol=5e-4)
        assert bool(scratch.scores[b, :, n * BLOCK :].isnan().all())


@ON
def test_padding_and_a_softcap_reach_scores_selection_and_tail(device: str) -> None:
    card = Card(blocks=(4, 3), groups=2)
    case = Case(card, device)
    padding = torch.tensor([0, 70], dtype=torch.int32, device=device)  # a whole block and a part
    scratch = scan_scratch(2, card.kv_heads, card.groups, case.capacity * BLOCK, case.device)
    for memory in scratch:
        memory.fill_(torch.nan)
    options: dict[str, Any] = {"bits": 4, "scale": SCALE, "padding": padding, "softcap": 3.0}
    scan(case.query, case.keys, case.n_blocks, scratch, **options)
    scores = scores_of(scratch)
    chosen = case.select(scratch)
    part, _ = case.tail(scratch, chosen, share=0.0)
    for b in range(2):
        options["padding"] = padding[b : b + 1]
        want = reference.scan(case.query[b : b + 1], case.cut(case.keys, b), **options)
        got = scores[b : b + 1, :, case.valid(b)]
        torch.testing.assert_close(got, want, atol=1e-2, rtol=2e-3)
        assert_selected(chosen.tokens[b : b + 1], got, card)
        rest = reference.tail(
            got,
            chosen.tokens[b : b + 1],
            case.cut(case.values, b),
            bits=4,
            head_size=card.size,
        )
        torch.testing.assert_close(part.out[b], rest.out[0], atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(part.lse[b], rest.lse[0], atol=1e-3, rtol=1e-3)
    assert bool((chosen.tokens[1] >= 70).all())


@ON
@ALL
def test_select_takes_the_tokens_of_the_reference_out_of_the_scores(
    card: Card, device: str
) -> None:
    case = Case(card, device)
    scratch = case.scan()
    before = scores_of(scratch)
    chosen = case.select(scratch)
    for b in range(case.batch):
        scores = before[b : b + 1, :, case.valid(b)]
        assert_selected(chosen.tokens[b : b + 1], scores, card)
        torch.testing.assert_close(chosen.lse[b], scores[0].logsumexp(-1), atol=5e-4, rtol=1e-4)
        gone = by_head(scratch.scores)[b, :, case.valid(b)].isneginf()
        for head in range(case.heads):
            taken = chosen.tokens[b, head // card.groups]
            assert gone[head].nonzero().flatten().tolist() == taken[taken >= 0].tolist()


@ON
def test_equal_votes_go_to_the_lower_token_and_empty_slots_are_marked(device: str) -> None:
    scratch = scan_scratch(1, 1, 2, 3 * BLOCK, torch.device(device))
    n_blocks = torch.tensor([3], dtype=torch.int32, device=device)
    scores = torch.ones((1, 1, 3 * BLOCK, 2), device=device)
    fill(scratch, scores)
    assert selected(scratch, 2, n_blocks, 16).tokens.flatten().tolist() == list(range(16))
    # Only ten tokens are left to choose from.
    scores.fill_(-torch.inf)
    scores[:, :, 100:110] = 2.0
    fill(scratch, scores)
    chosen = selected(scratch, 2, n_blocks, 16)
    assert chosen.tokens.flatten().tolist() == [*range(100, 110), *[-1] * 6]
    assert chosen.blocks.flatten().tolist() == [1, *[-1] * 15]


@ON
@pytest.mark.parametrize("spread", [0.001, 0.3, 100.0], ids="spread{}".format)
@pytest.mark.parametrize("blocks", [40, VOTES + 30])
def test_votes_that_lie_close_together_or_far_apart_are_told_apart(
    spread: float, blocks: int, device: str
) -> None:
    card = Card(kv_heads=2, groups=2, blocks=(blocks,), k=16)
    random = torch.Generator().manual_seed(3)
    scratch = scan_scratch(1, 2, 2, blocks * BLOCK, torch.device(device))
    fill(scratch, torch.randn(scratch.scores.shape, generator=random).to(device) * spread)
    scores = scores_of(scratch)
    n_blocks = torch.tensor([blocks], dtype=torch.int32, device=device)
    chosen = selected(scratch, 4, n_blocks, 16)
    assert_selected(chosen.tokens, scores, card)


@ON
@ALL
def test_the_tail_is_attention_over_what_was_not_selected(card: Card, device: str) -> None:
    case = Case(card, device)
    scratch = case.scan()
    scores = scores_of(scratch)
    chosen = case.select(scratch)
    part, skipped = case.tail(scratch, chosen, share=0.0)
    for b in range(case.batch):
        values = case.cut(case.values, b)
        want = reference.tail(
            scores[b : b + 1, :, case.valid(b)],
            chosen.tokens[b : b + 1],
            values,
            bits=card.bits,
            head_size=card.size,
        )
        torch.testing.assert_close(part.lse[b], want.lse[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(part.out[b], want.out[0], atol=5e-3, rtol=5e-3)
    assert bool((skipped == 0).all())


@ON
def test_skipped_blocks_weigh_less_than_the_share_and_are_counted(device: str) -> None:
    case = Case(Card(size=128, blocks=(40,), groups=2), device, sharpness=8.0)
    scratch = case.scan()
    chosen = case.select(scratch)
    exact, _ = case.tail(scratch, chosen, share=0.0)
    part, skipped = case.tail(scratch, chosen, share=0.05)
    assert 0 < float(skipped.max()) < 0.05
    missing = exact.lse.exp() - part.lse.exp()
    everything = chosen.lse.exp().unsqueeze(-1)
    torch.testing.assert_close(missing / everything, skipped.unsqueeze(-1), atol=1e-3, rtol=0.0)


@ON
def test_a_selected_token_with_nearly_all_the_mass_costs_the_tail_no_precision(
    device: str,
) -> None:
    case = Case(Card(blocks=(3,), groups=1), device)
    scratch = case.scan()
    scores = scratch.scores.float() + scratch.top.repeat_interleave(BLOCK, dim=2)
    scores[:, :, 70] += 60.0  # e^60 times the rest
    fill(scratch, scores)
    scores = scores_of(scratch)
    chosen = case.select(scratch)
    part, _ = case.tail(scratch, chosen, share=0.0)
    want = reference.tail(
        scores[..., : 3 * BLOCK],
        chosen.tokens,
        case.cut(case.values, 0),
        bits=4,
        head_size=64,
    )
    assert bool(torch.isfinite(part.out).all())
    torch.testing.assert_close(part.out, want.out, atol=5e-3, rtol=5e-3)


@ON
@ALL
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_are_read_from_their_pages_and_attended_to_exactly(
    card: Card, device: str, softcap: float | None
) -> None:
    case = Case(card, device)
    chosen = case.select(case.scan())
    chosen.tokens[:, :, -3:] = -1  # empty slots
    part = case.attend_rows(chosen.tokens, softcap)
    rows = reference.gather(case.pool, case.table.cpu(), chosen.tokens.cpu()).float()
    rows = rows.to(device)
    mask = (chosen.tokens >= 0).repeat_interleave(card.groups, dim=1).unsqueeze(2)
    want = reference.attend(
        case.query.unsqueeze(2).float(),
        rows[..., : card.size],
        rows[..., card.size :],
        scale=SCALE,
        mask=mask,
        softcap=softcap,
    )
    torch.testing.assert_close(part.lse, want.lse, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(part.out, want.out, atol=5e-3, rtol=5e-3)


def cache_after(held: list[int], chosen: list[int]) -> int:
    """What the slots of a row cache hold after a step, in place, and how many rows came from the host."""
    slots, before = len(held), list(held)
    for token in reversed(chosen):  # the first of those that share a slot comes last
        if before[token % slots] not in chosen:
            held[token % slots] = token
    return sum(before[token % slots] != token for token in chosen)


@ON
@pytest.mark.parametrize("slots", [16, 64])
@pytest.mark.parametrize(
    "card",
    [Card(), Card(size=80, groups=1, k=32), Card(size=128, blocks=(9,), k=512)],
    ids=card_id,
)
def test_cached_rows_change_nothing_and_are_read_where_they_are(
    card: Card, slots: int, device: str
) -> None:
    case = Case(card, device)
    cache = empty_row_cache(
        case.batch, card.kv_heads, slots, 2 * card.size, case.pool.dtype, case.device
    )
    held = [[[-1] * slots for _ in range(card.kv_heads)] for _ in range(case.batch)]
    random = torch.Generator().manual_seed(1)
    fetched = 0
    tokens = torch.full((case.batch, card.kv_heads, card.k), -1, dtype=torch.int32)
    for step in range(5):
        tokens.fill_(-1)
        for b, heads in enumerate(held):
            for h, tags in enumerate(heads):
                n = card.blocks[b] * BLOCK
                some = torch.randperm(min(n, 2 * card.k), generator=random)[: card.k - step]
                tokens[b, h, : some.numel()] = some.sort().values
                fetched += cache_after(tags, tokens[b, h, : some.numel()].tolist())
        on_device = tokens.to(device)
        with_cache = case.attend_rows(on_device, cache=cache)
        without = case.attend_rows(on_device)
        assert torch.equal(with_cache.out, without.out)
        assert torch.equal(with_cache.lse, without.lse)
        assert cache.tokens.tolist() == held
        assert int(cache.fetched) == fetched
    there = cache.tokens.cpu()
    rows = reference.gather(case.pool, case.table.cpu(), there)
    assert torch.equal(cache.rows.cpu()[there >= 0], rows[there >= 0])
    # Only what is there is asked for, and the host has nothing any more.
    best = there.sort(-1, descending=True).values[:, :, : min(slots, card.k)]
    tokens.fill_(-1)
    tokens[:, :, : best.shape[2]] = best
    without = case.attend_rows(tokens.to(device))
    want = without.out.cpu()  # the device has read the host by then
    case.pool.fill_(torch.nan)
    with_cache = case.attend_rows(tokens.to(device), cache=cache)
    assert torch.equal(with_cache.out.cpu(), want)
    assert int(cache.fetched) == fetched


def test_a_row_cache_of_odd_size_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        empty_row_cache(1, 1, 48, 128, torch.float32, torch.device("cpu"))


@ON
def test_selected_rows_and_tail_together_are_close_to_attention_over_all_tokens(
    device: str,
) -> None:
    case = Case(Card(size=128, groups=4, blocks=(12,), k=64), device, sharpness=4.0)
    scratch = case.scan()
    scores = scores_of(scratch)[:, :, case.valid(0)]
    chosen = case.select(scratch)
    exact = case.attend_rows(chosen.tokens)
    rest, _ = case.tail(scratch, chosen, share=0.0)
    got = reference.merge([exact, rest])
    rows = case.rows[:, case.valid(0)].transpose(1, 2)
    want = reference.attend(
        case.query.unsqueeze(2).float(), rows[..., :128], rows[..., 128:], scale=SCALE
    )
    # What a plain 4-bit cache without exact tokens gives.
    nothing = torch.full_like(chosen.tokens, -1)
    plain = reference.tail(scores, nothing, case.cut(case.values, 0), bits=4, head_size=128)
    error = (got.out - want.out).norm() / want.out.norm()
    plain_error = (plain.out - want.out).norm() / want.out.norm()
    assert float(error) < 0.02
    assert float(error) < 0.5 * float(plain_error)


@dataclass(frozen=True, kw_only=True)
class WindowCard:
    """A shape of `attend_window`."""

    size: int = 64
    kv_heads: int = 2
    groups: int = 3
    batch: int = 2
    page: int = 64
    rows: int = 200
    splits: int = 4
    softcap: float | None = None
    padding: tuple[int, ...] | None = None


WINDOWS = [
    WindowCard(),
    WindowCard(rows=0),
    WindowCard(rows=1, groups=1, size=80),
    WindowCard(rows=64, splits=1, groups=7),
    WindowCard(size=128, groups=4, rows=319, splits=8),
    WindowCard(size=256, rows=70, batch=1),
    WindowCard(page=16, rows=77, softcap=3.0, splits=2),
    WindowCard(padding=(0, 150)),
    WindowCard(rows=100, padding=(100, 3), splits=1),
]


@ON
@pytest.mark.parametrize("card", WINDOWS, ids=card_id)
def test_the_window_and_the_new_token_are_attended_to_and_its_row_is_kept(
    card: WindowCard, device: str
) -> None:
    random = torch.Generator().manual_seed(1)
    dtype = torch.float16 if device == "cuda" else torch.float32
    slots = -(-card.rows // card.page) + 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    window = draw(card.batch, slots, card.page, card.kv_heads, 2 * card.size)
    rows = window.flatten(1, 2)  # a view
    rows[:, card.rows :] = torch.nan
    key, value = draw(2, card.batch, card.kv_heads, card.size).unbind(0)
    heads = card.kv_heads * card.groups
    query = draw(card.batch, 1, heads, card.size).transpose(1, 2)
    # The slots hold the blocks in reverse order, but for the last one, which is being filled.
    order = [*range(slots - 2, -1, -1), slots - 1]
    starts = torch.tensor([i * card.page for i in order], dtype=torch.int32, device=device)
    padding = None
    mask = None
    if card.padding is not None:
        padding = torch.tensor(card.padding, dtype=torch.int32, device=device)
        places = (starts[:, None] + torch.arange(card.page, device=device)).flatten()
        mask = places[: card.rows + 1] >= padding[:, None]
        mask[:, -1] = True
        mask = mask[:, None, None]
    partials = empty_partials(card.batch, heads, card.splits + 2, card.size, torch.device(device))
    partials.out.fill_(torch.nan)
    n_rows = torch.tensor([card.rows], dtype=torch.int32, device=device)
    attend_window(
        query[:, :, 0],
        key,
        value,
        window,
        n_rows,
        partials,
        scale=SCALE,
        splits=card.splits,
        softcap=card.softcap,
        padding=padding,
        starts=starts,
    )
    got = torch.empty((card.batch, heads, card.size), device=device)
    combine(partials, got)
    assert torch.equal(rows[:, card.rows, :, : card.size], key)
    assert torch.equal(rows[:, card.rows, :, card.size :], value)
    assert bool(rows[:, card.rows + 1 :].isnan().all())
    held = rows[:, : card.rows + 1].transpose(1, 2).float()
    want = reference.attend(
        query.float(),
        held[..., : card.size],
        held[..., card.size :],
        scale=SCALE,
        softcap=card.softcap,
        mask=mask,
    )
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, want.out[:, :, 0], atol=tolerance, rtol=tolerance)
    lse = partials.lse.logsumexp(-1)
    torch.testing.assert_close(lse, want.lse[..., 0], atol=tolerance, rtol=tolerance)


@ON
@pytest.mark.parametrize("sinks", [False, True])
def test_combine_is_the_merge_of_all_slots(device: str, sinks: bool) -> None:
    random = torch.Generator().manual_seed(2)
    partials = empty_partials(2, 3, 37, 80, torch.device(device))
    partials.out.copy_(torch.randn(partials.out.shape, generator=random))
    partials.lse.copy_(torch.randn(partials.lse.shape, generator=random) * 4)
    empty = torch.rand(partials.lse.shape, generator=random) < 0.3
    empty[1, 2] = True  # a head that sees nothing
    partials.lse[empty] = -torch.inf
    partials.out[empty] = torch.nan
    logits = torch.randn(3, generator=random).to(device) if sinks else None
    out = torch.full((2, 3, 80), torch.nan, device=device)
    combine(partials, out, sink_logits=logits)
    want = merged(partials)
    if logits is not None:
        want = reference.with_sink_logits(want, logits)
    torch.testing.assert_close(out, want.out[:, :, 0], atol=1e-5, rtol=1e-5)
