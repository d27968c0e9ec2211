"""A layer over two tiers equals one softmax over all its tokens, whatever happens to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from offload.errors import CacheError
from offload.kernels.reference import attend
from offload.tiers import transfer
from offload.tiers.pinned import HostRegion, PinBudget
from offload.tiers.rows import RowShape
from offload.tiers.store import LayerStore, StoreLimits
from offload.tiers.transfer import HostReader, HostWriter, Streams, TransferCounters

PAGE, KV_HEADS, GROUPS, D = 16, 2, 3, 16
SHAPE = RowShape(kv_heads=KV_HEADS, key_dim=D, value_dim=D, dtype=torch.float32)
PAGE_BYTES = PAGE * SHAPE.token_bytes
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Layer:
    """A store and what it should hold."""

    store: LayerStore
    keys: Tensor  # [B, H_kv, N, D]
    values: Tensor


class Rig:
    """Some layers of one cache: stores on two tiers beside plain tensors."""

    def __init__(
        self,
        device: str,
        *,
        batch: int = 2,
        layers: int = 2,
        sinks: int = 1,
        window: int = 2,
        staging_pages: int = 2,
        pin_pages: int | None = None,
        host_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.random = torch.Generator().manual_seed(seed)
        self.streams = Streams(self.device)
        self.counters = TransferCounters()
        self.pins = PinBudget(limit=None if pin_pages is None else pin_pages * PAGE_BYTES)
        staging = staging_pages * batch * PAGE_BYTES
        self.reader = HostReader(self.streams, staging, self.counters)
        self.writer = HostWriter(self.streams, 3 * batch * PAGE_BYTES, self.counters)
        limits = StoreLimits(
            page=PAGE, sink_blocks=sinks, window_blocks=window, host_tokens=host_tokens, batch=8
        )
        self.limits = limits
        self.layers = []
        for _ in range(layers):
            region = HostRegion(PAGE_BYTES, 2**24, self.device, self.pins)
            store = LayerStore(
                SHAPE, limits, batch=batch, region=region, reader=self.reader, writer=self.writer
            )
            empty = torch.empty((batch, KV_HEADS, 0, D), device=self.device)
            self.layers.append(Layer(store, empty, empty))
        self.reader.reset([layer.store for layer in self.layers])

    @property
    def batch(self) -> int:
        return int(self.layers[0].keys.shape[0])

    @property
    def length(self) -> int:
        return int(self.layers[0].keys.shape[2])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.device)

    def step(self, n: int, padding: Tensor | None = None) -> None:
        """One forward pass of n tokens through all layers; compares every output."""
        for layer in self.layers:
            query = self.draw(self.batch, KV_HEADS * GROUPS, n, D)
            key, value = (self.draw(self.batch, KV_HEADS, n, D) for _ in range(2))
            layer.keys = torch.cat([layer.keys, key], dim=2)
            layer.values = torch.cat([layer.values, value], dim=2)
            visible = None
            if padding is not None:
                positions = torch.arange(self.length, device=self.device)
                visible = positions >= padding.to(self.device)[:, None]
            mask = None if visible is None else visible[:, None, None]
            want = attend(query, layer.keys, layer.values, scale=0.3, causal=True, mask=mask)
            got = layer.store.attend(query, key, value, scale=0.3, visible=visible)
            torch.testing.assert_close(got.transpose(1, 2), want.out, atol=2e-5, rtol=2e-5)
            layer.store.check()
            on_device = self.limits.device_blocks * PAGE + PAGE
            assert layer.store.device_tokens < on_device or layer.store.host_tokens == 0

    def draft(self, drafted: int, further: int, kept: int) -> None:
        """Drafts tokens, looks at the first of them with other rows while they are there, and puts some of these."""
        base = self.length
        for layer in self.layers:
            layer.store.make_way(drafted + further, base)
            before = layer.store.host_tokens
            for _ in range(drafted + further):
                row = [self.draw(self.batch, KV_HEADS, 1, D) for _ in range(2)]
                query = self.draw(self.batch, KV_HEADS * GROUPS, 1, D)
                layer.store.attend(query, *row, scale=0.3)
                layer.keys = torch.cat([layer.keys, row[0]], dim=2)
                layer.values = torch.cat([layer.values, row[1]], dim=2)
            assert layer.store.host_tokens == before
            query = self.draw(self.batch, KV_HEADS * GROUPS, drafted + 1, D)
            key, value = (self.draw(self.batch, KV_HEADS, drafted + 1, D) for _ in range(2))
            past = (layer.keys[:, :, :base], layer.values[:, :, :base])
            want = attend(
                query, torch.cat([past[0], key], 2), torch.cat([past[1], value], 2), scale=0.3, causal=True
            )  # fmt: skip
            got = layer.store.look(query, key, value, layer.store.held(base), scale=0.3)
            torch.testing.assert_close(got.transpose(1, 2), want.out, atol=2e-5, rtol=2e-5)
            layer.store.put(base, torch.cat([key, value], dim=3)[:, :, :kept].transpose(1, 2))
            behind = slice(base + kept, None)
            layer.keys = torch.cat([past[0], key[:, :, :kept], layer.keys[:, :, behind]], dim=2)
            layer.values = torch.cat([past[1], value[:, :, :kept], layer.values[:, :, behind]], 2)
            layer.store.check()

    def crop(self, length: int) -> None:
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            layer.store.crop(length)
            layer.store.check()

    def select(self, rows: list[int]) -> None:
        for layer in self.layers:
            index = torch.tensor(rows, device=self.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
            layer.store.select(index)
            layer.store.check()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.sampled_from([1, 1, 1, 2, 15, 16, 17, 33, 100])),
        st.tuples(st.just("crop"), st.floats(0, 1)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("resident"), st.integers(0, 4)),
        st.tuples(st.just("draft"), st.tuples(*[st.floats(0, 1)] * 3)),
    ),
    min_size=3,
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=ACTIONS,
    sinks=st.integers(0, 2),
    window=st.integers(1, 3),
    staging=st.integers(1, 3),
    pins=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_steps_crops_and_reorders_equals_one_softmax(
    actions: list[tuple[str, Any]],
    sinks: int,
    window: int,
    staging: int,
    pins: int | None,
    seed: int,
) -> None:
    rig = Rig(
        "cpu", sinks=sinks, window=window, staging_pages=3 * staging, pin_pages=pins, seed=seed
    )
    rig.step(90)
    for action, value in actions:
        if action == "step":
            rig.step(value)
        elif action == "crop":
            rig.crop(int(value * rig.length))
        elif action == "select":
            rig.select([row % rig.batch for row in value])
        elif action == "draft":
            most = (window - 1) * PAGE - 1  # of a page of the window some is not drafted
            drafted = int(value[0] * most)
            further = int(value[1] * (most - drafted))
            if rig.length > (sinks + 1) * PAGE and most > 0:
                rig.draft(drafted, further, int(value[2] * drafted) + 1)
        else:
            for layer in rig.layers:
                layer.store.keep_resident(value)
    rig.step(1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_draft_is_looked_at_and_mended_while_more_come_in(device: str) -> None:
    rig = Rig(device, window=5, sinks=1, layers=2, seed=4)
    rig.step(300)
    for drafted, further, kept in ((20, 24, 21), (20, 20, 7), (0, 0, 1), (9, 0, 10), (31, 32, 32)):
        rig.draft(drafted, further, kept)
        if kept <= drafted:
            rig.crop(rig.length - drafted - further + kept)
        rig.step(1)
    store = rig.layers[0].store
    with pytest.raises(CacheError, match="too small"):
        store.make_way(5 * PAGE + PAGE, rig.length)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pins", [None, 4])
def test_prefill_decode_beams_and_turns_equal_one_softmax(
    device: str, pins: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BOUNCE_BYTES", 3 * 4096)
    rig = Rig(device, batch=2, layers=3, pin_pages=pins, seed=3)
    padding = torch.tensor([0, 21])
    for n in (64, 64, 37, 1, 1, 1):
        rig.step(n, padding)
    for n in [1] * 40:
        rig.step(n, padding)
    rig.crop(rig.length - 29)
    rig.step(5, padding)
    rig.select([1, 0])
    rig.step(1, padding.flip(0))
    rig.select([0, 0, 1])
    for n in [1] * 20:
        rig.step(n)
    rig.step(70)
    assert (rig.counters.bounced_bytes > 0) == (pins is not None)


@pytest.mark.parametrize("device", DEVICES)
def test_every_host_byte_crosses_once_a_step(device: str) -> None:
    rig = Rig(device, batch=2, layers=3, staging_pages=1, host_tokens=512, seed=1)
    rig.step(200)
    rig.step(1)
    host = sum(2 * layer.store.columns * PAGE_BYTES for layer in rig.layers)
    before = rig.counters.h2d_bytes
    for _ in range(5):
        rig.step(1)
    assert rig.counters.h2d_bytes - before == 5 * host
    assert rig.counters.discarded_bytes == 0


def test_a_layer_alone_prefetches_its_first_pages_and_not_the_evicted_one() -> None:
    rig = Rig("cpu", batch=1, layers=1, sinks=0, window=1, staging_pages=8, host_tokens=512)
    rig.step(64)
    for _ in range(64):
        rig.step(1)
    assert rig.counters.discarded_bytes == 0


def test_pages_that_all_sequences_share_cross_once_for_all() -> None:
    rig = Rig("cpu", batch=1, layers=2, seed=2)
    rig.step(200)
    columns = rig.layers[0].store.columns
    rig.select([0, 0, 0, 0])
    assert all(layer.store.shared_columns == columns for layer in rig.layers)
    rig.step(1)
    before = rig.counters.h2d_bytes
    rig.step(1)
    assert rig.counters.h2d_bytes - before == len(rig.layers) * columns * PAGE_BYTES


def test_rows_of_any_tokens_are_gathered_from_their_pages() -> None:
    rig = Rig("cpu", batch=2, sinks=1, window=2, pin_pages=1)
    rig.step(150)
    rig.select([1, 0])  # pages are no longer in order
    for layer in rig.layers:
        store = layer.store
        assert not store.all_pinned
        store._pages = torch.from_numpy(store._table.ids.copy())
        tokens = torch.randint(-1, store.host_tokens, (2, KV_HEADS, 8), generator=rig.random)
        rows = torch.full((2, KV_HEADS, 8, 2 * D), torch.nan)
        store._gather(tokens.int(), rows)
        at = store.first_host_token + tokens.clamp(min=0)
        for dims, whole in ((slice(0, D), layer.keys), (slice(D, None), layer.values)):
            want = whole.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, D))
            assert torch.equal(rows[..., dims][tokens >= 0], want[tokens >= 0])


def test_reordering_beams_moves_no_host_byte() -> None:
    rig = Rig("cpu", batch=3, layers=1, seed=4)
    rig.step(150)
    written = rig.counters.d2h_bytes
    rig.select([2, 0, 0])
    assert rig.counters.d2h_bytes == written
    rig.step(1)


def slow_copies(monkeypatch: pytest.MonkeyPatch, *, to_device: int, to_host: int) -> None:
    """Lets the copy streams sleep so many clock cycles before they work, so that a missing wait shows."""
    use = Streams.use

    def delayed(self: Streams, stream: torch.cuda.Stream | None) -> Any:
        if stream is not None:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(to_device if stream is self.host_to_device else to_host)
        return use(self, stream)

    monkeypatch.setattr(Streams, "use", delayed)


def run_steps(rig: Rig) -> None:
    for n in (100, 90, *([1] * 60)):
        rig.step(n)


MILLISECOND = 2_000_000  # clock cycles, about


@pytest.mark.gpu
@pytest.mark.parametrize("delays", [(1, 0), (0, 5), (1, 1)], ids=str)
def test_delayed_copies_change_nothing(
    delays: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_device, to_host = (delay * MILLISECOND for delay in delays)
    slow_copies(monkeypatch, to_device=to_device, to_host=to_host)
    run_steps(Rig("cuda", batch=2, layers=3, seed=5))


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", ["ready", "written"])
def test_the_delay_would_show_a_missing_wait(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = 20 * MILLISECOND
    slow_copies(
        monkeypatch,
        to_device=late if left_out == "ready" else 0,
        to_host=late if left_out == "written" else 0,
    )
    wait = Streams.wait

    def forgetful(self: Streams, event: Any, stream: Any = None) -> None:
        for_compute = stream is None and left_out == "ready"
        for_reader = stream is self.host_to_device and left_out == "written"
        if not for_compute and not for_reader:
            wait(self, event, stream)

    monkeypatch.setattr(Streams, "wait", forgetful)
    with pytest.raises(AssertionError, match="not close"):
        run_steps(Rig("cuda", batch=2, layers=3, seed=5))
