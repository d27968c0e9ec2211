"""A layer that attends to some of its tokens: a second implementation keeps all of them and follows the rule token by token."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.scheduler.window import (
    SparseWindow,
    learned,
    staged_rows,
    state_bytes,
    step_bytes,
    token_bytes,
)
from offload.tiers.path import StepMemory
from offload.tiers.pinned import HostRegion, PinBudget
from offload.tiers.rows import RowShape
from offload.tiers.sparse import SparsePath, SparseSettings, _in_place, _Staging
from offload.tiers.store import LayerStore, StoreLimits
from offload.tiers.transfer import HostReader, HostWriter, Streams, TransferCounters

PAGE, D, SCALE, DECAY = 16, 64, 0.3, 0.9
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by the kernels, in Triton's interpreter. Without a card its streams are none: launches run in program order."""
    monkeypatch.setattr(SparsePath, "has_kernels", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _NoStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    made = StepMemory.__init__

    def with_streams(self: StepMemory, device: torch.device) -> None:
        made(self, device)
        streams: list[Any] = [_NoStream(), _NoStream()]
        self.beside = streams

    monkeypatch.setattr(StepMemory, "__init__", with_streams)


class _NoStream:
    def wait_stream(self, other: object) -> None:
        """Nothing runs beside."""

    def wait_event(self, event: object) -> None:
        """Likewise."""


class Layer:
    """A store, and all that it was given."""

    def __init__(
        self, device: str, *, share: float = 0.5, near: int = 1_000_000, batch: int = 2, kv: int = 2, groups: int = 2,
        sinks: int = 1, window: int = 4, blocks: int = 40, softcap: float | None = None, pin_pages: int | None = None,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.random = torch.Generator().manual_seed(7)
        self.batch, self.kv, self.groups, self.softcap = batch, kv, groups, softcap
        self.padding: Tensor | None = None
        shape = RowShape(kv_heads=kv, key_dim=D, value_dim=D, dtype=torch.float32)
        self.set = SparseWindow(share, (sinks + window + 1) * PAGE)
        most = self.set.most((blocks + sinks + window + 1) * PAGE)
        self.path = SparsePath(
            shape, SparseSettings(window=self.set, most=most, near=min(near, most), staged=16, decay=DECAY), StepMemory(self.device),
            batch=batch, blocks=blocks, slots=sinks + window + 1, page=PAGE, device=self.device,
        )  # fmt: skip
        page_bytes, streams = PAGE * shape.token_bytes, Streams(self.device)
        counters = TransferCounters()
        reader = HostReader(streams, 2 * batch * page_bytes, counters)
        pins = PinBudget(limit=None if pin_pages is None else pin_pages * page_bytes)
        self.store = LayerStore(
            shape,
            StoreLimits(page=PAGE, sink_blocks=sinks, window_blocks=window, host_tokens=0, batch=8),
            batch=batch, region=HostRegion(page_bytes, 2**24, self.device, pins), reader=reader,
            writer=HostWriter(streams, 3 * batch * page_bytes, counters), path=self.path,
        )  # fmt: skip
        reader.reset([self.store])
        self.keys = torch.empty((batch, kv, 0, D), dtype=torch.float64)
        self.values = self.keys.clone()
        self.sums = torch.zeros((batch, kv, 0), dtype=torch.float64)
        self.forget()
        self.columns = 0
        self.asked: list[tuple[int, Tensor]] = []  # position and query [B, H_kv, G, D], of prompts

    def forget(self) -> None:
        self.chosen: list[list[set[int]]] = [[set()] * self.kv for _ in range(self.batch)]
        self.near: list[list[set[int]]] = [[set()] * self.kv for _ in range(self.batch)]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def weights(self, query: Tensor, seen: Tensor) -> Tensor:
        """Softmax [B, H_kv, G, N] of queries [B, H_kv, G, D] over the tokens that they see, boolean [B, H_kv, N]."""
        logits = query.double() @ self.keys.transpose(2, 3) * SCALE
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        shares: Tensor = logits.masked_fill(~seen[:, :, None], -math.inf).softmax(-1)
        return shares.nan_to_num(0.0)  # of padding

    def visible(self, length: int) -> Tensor:
        places = torch.arange(self.keys.shape[2])
        seen: Tensor = (places < length).expand(self.batch, self.kv, -1)
        if self.padding is not None:
            seen = seen & (places >= self.padding[:, None])[:, None]
        return seen

    def mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        places = torch.arange(self.keys.shape[2])
        return (places >= self.padding[:, None]).to(self.device)

    def feed(self, n: int) -> Tensor:
        """Attends with n tokens and takes them in: [B, H_kv, n, G, D_v]."""
        query = self.draw(self.batch, self.kv * self.groups, n, D)
        key, value = self.draw(self.batch, self.kv, n, D), self.draw(self.batch, self.kv, n, D)
        self.keys = torch.cat([self.keys, key.double()], 2)
        self.values = torch.cat([self.values, value.double()], 2)
        self.sums = torch.cat([self.sums, torch.zeros((self.batch, self.kv, n))], 2)
        given = [x.to(self.device) for x in (query, key, value)]
        got = self.store.attend(*given, scale=SCALE, visible=self.mask(), softcap=self.softcap)
        self.store.check()
        self.query = query.unflatten(1, (self.kv, self.groups))
        by_head: Tensor = got.cpu().unflatten(2, (self.kv, self.groups)).transpose(1, 2)
        return by_head

    def crop(self, keep: int) -> None:
        """Forgets tokens; what was chosen is chosen anew where the host lost some."""
        columns = self.store.columns
        self.store.crop(keep)
        self.keys, self.values = self.keys[:, :, :keep], self.values[:, :, :keep]
        self.sums = self.sums[:, :, :keep]
        if self.store.columns != columns:
            self.columns = -1

    def prompt(self, n: int) -> None:
        """Reads tokens: every one is attended to."""
        past = self.keys.shape[2]
        got = self.feed(n)
        for i in range(n):
            of_query = self.query[:, :, :, i]
            shares = self.weights(of_query, self.visible(past + i + 1))
            want = shares @ self.values
            assert (got[:, :, i] - want).abs().max() < 2e-5
            self.asked.append((past + i, of_query))
        self.sums *= DECAY**n

    def choose(self) -> None:
        """The rule, where the host holds other blocks than before or a prompt was read."""
        columns = self.store.columns
        for at, query in self.asked[-max(1, min(16, 64 // self.batch)) :]:
            self.sums += self.weights(query, self.visible(at + 1)).sum(2)
        if columns and (columns != self.columns or self.asked):
            first = self.store.first_host_token
            n, length = columns * PAGE, self.keys.shape[2]
            k = min(self.set.chosen(length), n)
            for b in range(self.batch):
                hidden = 0 if self.padding is None else int(self.padding[b])
                for h in range(self.kv):
                    here = [(float(self.sums[b, h, t]), t) for t in range(max(first, hidden), first + n)]  # fmt: skip
                    best = [t - first for _, t in sorted(here, reverse=True)[:k]]
                    self.chosen[b][h] = set(best)
                    self.near[b][h] = set(best[: self.path.settings.near])
        self.columns = columns
        self.asked = []

    def step(self) -> None:
        """One token, attended with by the rule."""
        self.choose()
        first, n = self.store.first_host_token, self.store.columns * PAGE
        attended = torch.ones((self.batch, self.kv, self.keys.shape[2] + 1), dtype=torch.bool)
        attended[..., first : first + n] = False
        for b in range(self.batch):
            for h in range(self.kv):
                for token in self.chosen[b][h]:
                    attended[b, h, first + token] = True
        got = self.feed(1)[:, :, 0]
        attended &= self.visible(self.keys.shape[2])
        shares = self.weights(self.query[:, :, :, 0], attended)
        assert (got - shares @ self.values).abs().max() < 2e-5
        self.sums = self.sums * DECAY + shares.sum(2)
        near = self.path.settings.near
        ids = self.path.chosen.cpu()
        for b in range(self.batch):
            for h in range(self.kv):
                mine = [int(t) for t in ids[b, h] if t >= 0]
                assert len(mine) == len(set(mine))
                assert set(mine) == self.chosen[b][h], (self.keys.shape[2], b, h)
                kept = {t for t in ids[b, h, :near].tolist() if t >= 0}
                assert kept == self.near[b][h]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"near": 32},
        {"near": 0, "groups": 1},
        {"batch": 1, "kv": 3, "groups": 1, "softcap": 3.0, "sinks": 0},
        {"share": 0.8, "window": 2, "near": 16},
    ],
)
def test_steps_follow_the_rule_token_by_token(how: dict[str, Any], device: str) -> None:
    layer = Layer(device, **how)
    for n in (70, 1, 90, 7):
        if n == 1:
            layer.step()
        else:
            layer.prompt(n)
    for _ in range(150):
        layer.step()
    assert layer.path.steps == 151
    assert layer.path.chosen.max() >= 0
    assert 0.0 < layer.path.left_out() < 1.0
    # Another turn.
    layer.prompt(40)
    for _ in range(40):
        layer.step()


def test_padding_is_never_chosen(device: str) -> None:
    layer = Layer(device, share=0.9)
    layer.padding = torch.tensor([0, 75])
    layer.prompt(160)
    for _ in range(60):
        layer.step()
    least = 75 - layer.store.first_host_token
    ids = layer.path.chosen[1]
    assert int(ids[ids >= 0].min()) >= least


def test_tokens_that_are_taken_back_leave_nothing_behind(device: str) -> None:
    layer = Layer(device, near=32)
    layer.prompt(200)
    for _ in range(30):
        layer.step()
    for keep in (layer.keys.shape[2] - 3, 100, 10):
        layer.crop(keep)
        if layer.store.columns == 0:  # nothing is left of what was chosen
            layer.forget()
            layer.columns = 0
        for _ in range(70):
            layer.step()


def test_a_prompt_behind_tokens_that_were_taken_back_begins_anew(device: str) -> None:
    layer = Layer(device)
    layer.prompt(300)
    layer.crop(200)
    layer.asked = [asked for asked in layer.asked if asked[0] < 200]
    layer.prompt(160)
    layer.step()  # no weight of the first 300 counts for the tokens that came in their place
    layer.crop(350)
    layer.prompt(3)  # whose queries do not lie behind those of the prompt before
    for _ in range(20):
        layer.step()


def test_sequences_take_their_sums_along(device: str) -> None:
    layer = Layer(device)
    layer.prompt(150)
    for _ in range(40):
        layer.step()
    rows = torch.tensor([1, 0])
    for rows in (torch.tensor([1, 0]), torch.tensor([0, 0, 1])):
        layer.store.select(rows)
        layer.keys, layer.values, layer.sums = (t[rows] for t in (layer.keys, layer.values, layer.sums))  # fmt: skip
        layer.batch, layer.columns = len(rows), -1
        layer.forget()
        for _ in range(40):
            layer.step()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("near", [16, 0])
def test_kernels_leave_nothing_of_an_earlier_step(near: int) -> None:
    layer = Layer(
        "cpu", near=near, batch=1, kv=1, groups=2, sinks=0, window=2, blocks=12, share=0.9
    )
    layer.prompt(120)
    for _ in range(3):
        layer.step()
    assert layer.path.chosen.max() >= 0
    layer.crop(10)  # now no token is on the host
    layer.forget()
    layer.columns = 0
    for _ in range(2):
        layer.step()


@pytest.mark.gpu
def test_rows_that_cannot_be_pinned_come_by_way_of_the_host() -> None:
    layer = Layer("cuda", near=16, pin_pages=2)
    layer.prompt(200)
    for _ in range(60):
        layer.step()
    assert not layer.store.all_pinned


def test_what_is_there_stays_where_it_is() -> None:
    before = torch.tensor([[[3, 7, -1, 5, 2]]])
    for wanted, found in (
        ([3, 7, 5, 2, 9], [3, 7, 9, 5, 2]),
        ([9, 8, 7, 6, 4], [9, 7, 8, 6, 4]),
        ([5, -1, -1, -1, -1], [-1, -1, -1, 5, -1]),
        ([2, 5, 7, 3, -1], [3, 7, -1, 5, 2]),
        ([10, 3, -1, -1, -1], [3, 10, -1, -1, -1]),
    ):
        assert _in_place(before, torch.tensor([[wanted]]), 11).tolist() == [[found]]


def test_a_set_fills_the_share_up_and_forgets_as_fast_as_the_window_of_the_paper() -> None:
    chosen = SparseWindow(0.2, 64)
    assert [chosen.chosen(n) for n in (100, 320, 325, 640)] == [0, 0, 1, 64]
    assert chosen.most(650) == 80
    assert chosen.near(650) == [80, 64, 48, 32, 16, 0]
    assert chosen.decay(640) ** 64 == pytest.approx(1 / math.e, rel=0.01)


@pytest.mark.parametrize(
    ("batch", "kv", "groups", "tokens", "share"),
    [
        (64, 32, 1, 640, 0.2),
        (1, 8, 4, 131_072, 0.2),
        (16, 8, 4, 32_768, 0.3),
        (5, 1, 14, 4096, 0.5),
    ],
)
def test_no_step_takes_more_than_was_planned(
    batch: int, kv: int, groups: int, tokens: int, share: float
) -> None:
    meta, page, slots = torch.device("meta"), 16, 4
    shape = RowShape(kv_heads=kv, key_dim=128, value_dim=128, dtype=torch.bfloat16)
    chosen = SparseWindow(share, slots * page)
    most, memory = chosen.most(tokens), StepMemory(meta)
    staged = staged_rows(most, batch, shape.token_bytes)
    scratch: dict[int, Any] = {}
    for near in chosen.near(tokens):  # layers differ in how many they keep, and share the rest
        path = SparsePath(
            shape, SparseSettings(window=chosen, most=most, near=near, staged=staged, decay=0.9), memory,
            batch=batch, blocks=tokens // page, slots=slots, page=page, device=meta,
        )  # fmt: skip
        made = path._scratch(batch, kv * groups)
        scratch[id(made)] = made
        queries = learned(batch) * kv * groups * (128 * 4 + 4)
        of_rows = state_bytes(
            chosen.held, most, near, kv, kv * groups, 128, shape.token_bytes, batch
        )
        assert path.row_cache_nbytes == batch * (of_rows - queries)
        assert path.nbytes <= batch * tokens * token_bytes(kv, page)
    (made,) = scratch.values()
    pieces = _Staging(batch, shape, staged, meta).rows
    taken = sum(t.nbytes for t in (*made.partials, made.scores, *pieces))
    planned = step_bytes(kv * groups, 128, kv, shape.token_bytes, chosen.held, most, batch)
    assert taken <= batch * planned
    assert taken > 0.5 * batch * planned
