"""Chosen rows and the window, scores and weights: each equals its reference. In Triton's interpreter in float32, on a card in float16."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES, TOLERANCE
from torch import Tensor

from offload.kernels import reference
from offload.kernels.chosen import TILE, attend_chosen, fetch_rows, place, weigh
from offload.kernels.combine import combine, empty_partials
from offload.kernels.window import attend_window
from offload.tiers.sparse import _in_place

ON = pytest.mark.parametrize("device", DEVICES)
SCALE, PAGE = 0.125, 16


class Case:
    """Tokens on host pages, of which some are chosen, and a window in shuffled slots."""

    def __init__(
        self, device: str, *, groups: int, size: int, k: int, near: int, splits: tuple[int, int]
    ) -> None:
        self.random = torch.Generator().manual_seed(k + size)
        self.device, self.near, self.k, self.splits = torch.device(device), near, k, splits
        self.dtype = torch.float16 if device == "cuda" else torch.float32
        self.batch, self.kv, self.size = 2, 2, size
        self.heads, blocks, slots = self.kv * groups, 9, 3
        self.rows = self.draw(self.batch, blocks * PAGE, self.kv, 2 * size).cpu()
        order = torch.randperm(self.batch * blocks, generator=self.random)
        self.table = order.view(self.batch, blocks).int().to(device)
        self.pool = torch.empty((self.batch * blocks, PAGE, self.kv, 2 * size), dtype=self.dtype)
        self.pool[order] = self.rows.view(self.batch * blocks, PAGE, self.kv, 2 * size)
        if device == "cuda":
            self.pool = self.pool.pin_memory()
        self.ids = torch.stack([self.some(blocks * PAGE) for _ in range(self.batch * self.kv)])
        self.ids = self.ids.view(self.batch, self.kv, k).to(device)
        self.ids[0, 0, near // 2 :: 5] = -1  # holes, near and far
        self.window = self.draw(self.batch, slots, PAGE, self.kv, 2 * size)
        self.starts = torch.tensor([256, 224, 240], dtype=torch.int32, device=device)
        self.query = self.draw(self.batch, self.heads, size)
        self.key, self.value = (self.draw(self.batch, self.kv, size) for _ in range(2))
        self.n_rows = torch.tensor([37], dtype=torch.int32, device=device)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.device, self.dtype)

    def some(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.random)[: self.k].int()

    def fetched(self) -> Tensor:
        """Rows of the chosen tokens, [B, H_kv, k, 2 size]."""
        return reference.gather(self.pool, self.table.cpu(), self.ids.cpu()).to(self.device)


@ON
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("groups", "size", "k", "near", "splits"),
    [(1, 64, 48, 16, (1, 2)), (3, 80, 96, 96, (4, 1)), (2, 128, 32, 0, (1, 1))],
)
def test_a_step_is_attention_over_window_and_choice_and_says_what_each_token_weighed(
    groups: int, size: int, k: int, near: int, splits: tuple[int, int], padded: bool, sinks: bool, softcap: float | None,
    device: str,
) -> None:  # fmt: skip
    case = Case(device, groups=groups, size=size, k=k, near=near, splits=splits)
    rows, far = case.window.shape[1] * PAGE, k - near
    partials = empty_partials(case.batch, case.heads, 2 + sum(splits), size, case.device)
    partials.out.fill_(torch.nan)
    scores = torch.full((case.batch, case.heads, rows + k), torch.nan, device=device)
    padding = torch.tensor([0, 230], dtype=torch.int32, device=device) if padded else None
    sink = torch.randn(case.heads, generator=case.random).to(device) if sinks else None
    attend_window(
        case.query, case.key, case.value, case.window, case.n_rows, partials,
        scale=SCALE, splits=2, softcap=softcap, padding=padding, starts=case.starts, scores=scores,
    )  # fmt: skip
    fetched = case.fetched()
    if near:
        attend_chosen(
            case.query, fetched[:, :, :near].contiguous(), case.ids, partials, scores, first=0,
            count=near, first_slot=2, splits=splits[0], first_score=rows,
            key_dim=size, scale=SCALE, softcap=softcap,
        )  # fmt: skip
    if far:
        attend_chosen(
            case.query, fetched[:, :, near:], case.ids, partials, scores, first=near,
            count=far, first_slot=2 + splits[0], splits=splits[1], first_score=rows + near,
            key_dim=size, scale=SCALE, softcap=softcap,
        )  # fmt: skip
    n = int(case.n_rows) + 1
    held = case.window.flatten(1, 2)[:, :n].transpose(1, 2)
    assert torch.equal(held[:, :, -1], torch.cat([case.key, case.value], -1))
    everything = torch.cat([held, fetched], 2).float()
    places = (case.starts[:, None] + torch.arange(PAGE, device=device)).flatten()[:n]
    seen = torch.ones((case.batch, case.kv, n), dtype=torch.bool, device=device)
    if padding is not None:
        seen = seen & (places >= padding[:, None])[:, None]
    mask = torch.cat([seen, case.ids >= 0], 2).repeat_interleave(groups, 1).unsqueeze(2)
    wanted = reference.attend(
        case.query.unsqueeze(2).float(), everything[..., :size], everything[..., size:],
        scale=SCALE, softcap=softcap, sink_logits=sink, mask=mask,
    )  # fmt: skip

    sums = torch.rand((case.batch, case.kv, 300), generator=case.random).to(device)
    expected, first, decay = sums.clone(), 7, 0.75
    weigh(
        partials, scores, sums, window_rows=rows, n_rows=case.n_rows, starts=case.starts, page=PAGE,
        ids=case.ids, places=torch.tensor([first, 35], dtype=torch.int32, device=device), decay=decay, sink_logits=sink,
    )  # fmt: skip
    out = torch.empty_like(case.query)
    combine(partials, out, sink_logits=sink)
    tolerance = TOLERANCE[case.dtype]
    assert (out.float() - wanted.out[:, :, 0]).abs().max() < tolerance

    logits = case.query.unsqueeze(2).float() @ everything[..., :size].repeat_interleave(groups, 1).transpose(2, 3)  # fmt: skip
    logits = logits * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    added = reference.weights(logits.masked_fill(~mask, -torch.inf), wanted.lse, kv_heads=case.kv)
    added = added / decay**3  # the third step since
    expected[:, :, places] += added[..., :n]
    for b in range(case.batch):
        for h in range(case.kv):
            for i, token in enumerate(case.ids[b, h].tolist()):
                if token >= 0:
                    at = token + first
                    expected[b, h, at] += added[b, h, n + i]
    assert (sums - expected).abs().max() < tolerance


@ON
def test_rows_are_fetched_where_another_token_has_come(device: str) -> None:
    case = Case(device, groups=1, size=64, k=48, near=32, splits=(1, 1))
    before = case.ids.clone()
    before[:, :, 3::4] = 200
    rows = torch.full((case.batch, case.kv, 32, 128), 5.0, dtype=case.dtype, device=device)
    fetch_rows(rows, case.pool, case.table, case.ids, first=0, count=32, before=before)
    new = ((case.ids != before) & (case.ids >= 0))[:, :, :32, None]
    assert new.any()
    assert not new.all()
    wanted = torch.where(new, case.fetched()[:, :, :32], torch.full_like(rows, 5.0))
    assert torch.equal(rows, wanted)
    rest = torch.full((case.batch, case.kv, 16, 128), 5.0, dtype=case.dtype, device=device)
    fetch_rows(rest, case.pool, case.table, case.ids, first=32, count=16)
    there = (case.ids >= 0)[:, :, 32:, None]
    assert torch.equal(
        rest, torch.where(there, case.fetched()[:, :, 32:], torch.full_like(rest, 5.0))
    )


@ON
@pytest.mark.parametrize("count", [1, 16, 48, 100])
def test_tokens_that_had_a_place_keep_it(count: int, device: str) -> None:
    random = torch.Generator().manual_seed(count)
    some = [torch.randperm(150, generator=random)[: count + 8].int() for _ in range(12)]
    before, wanted = torch.stack(some).view(2, 2, 3, -1).to(device).unbind(0)
    for ids, every in ((before, 7), (wanted, 5)):
        ids[..., ::every] = -1
    ids = wanted.clone()
    place(ids, before.contiguous(), count=count)
    found = _in_place(before[..., :count], wanted[..., :count], 150)
    assert torch.equal(ids[..., :count], found)
    assert torch.equal(ids[..., count:], wanted[..., count:])


def test_tiles_are_those_that_the_planner_counts_in() -> None:
    from offload.scheduler.rungs import ROWS

    assert TILE == ROWS
