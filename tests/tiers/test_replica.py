"""What a step takes is what was planned, and what the device path may read is what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.config import FAST_PAGE
from offload.kernels import clusters, gather, reference, tail
from offload.kernels.noise import key_noise, value_noise
from offload.kernels.scan import blocks_per_program
from offload.scheduler import rungs
from offload.scheduler.rungs import (
    RUNGS,
    Rung,
    cached_rows,
    row_cache_bytes,
    scratch_bytes,
    scratch_token_bytes,
)
from offload.tiers import replica
from offload.tiers.path import StepMemory, splits
from offload.tiers.replica import DevicePath, PathSettings
from offload.tiers.rows import RowShape

META = torch.device("meta")


def nbytes(memory: Any) -> int:
    if isinstance(memory, Tensor):
        return memory.nbytes
    return sum(map(nbytes, memory)) if isinstance(memory, Iterable) else 0


def path_on_cpu(settings: PathSettings, *, batch: int = 1, kv_heads: int = 1) -> DevicePath:
    """Of four blocks."""
    cpu = torch.device("cpu")
    return DevicePath(
        RowShape(kv_heads=kv_heads, key_dim=64, value_dim=64, dtype=torch.float32),
        settings,
        StepMemory(cpu),
        batch=batch,
        blocks=4,
        slots=3,
        page=64,
        device=cpu,
    )


def test_the_planner_cuts_a_step_as_the_kernels_do() -> None:
    assert gather.TILE == rungs.ROWS
    least = min(blocks_per_program(2**i, 8) for i in range(16))
    assert least * rungs.BLOCK == rungs.TAIL_TOKENS
    assert tail.SELECTED_PER_SPLIT == rungs.SELECTED_BLOCKS
    assert reference.CLUSTERS == rungs._CLUSTERS
    assert reference.BLOCK == FAST_PAGE == rungs.BLOCK
    assert least % clusters.TOGETHER == 0
    assert max(splits(rows, 1) for rows in (64, 640, 8192, 2**20)) == rungs.WINDOW_PARTS


@given(
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    groups=st.integers(1, 8),
    size=st.sampled_from([64, 80, 96, 128, 256]),
    batch=st.integers(1, 8),
    blocks=st.integers(0, 3000),
    slots=st.integers(2, 200),
    rung=st.sampled_from(RUNGS),
    tokens=st.sampled_from([0, 16, 64, 256, 1024, 4096]),
    asked=st.sampled_from(["auto", 0, 16, 1024]),
)
def test_no_step_takes_more_than_was_planned(
    kv_heads: int,
    groups: int,
    size: int,
    batch: int,
    blocks: int,
    slots: int,
    rung: Rung,
    tokens: int,
    asked: int | str,
) -> None:
    row = RowShape(kv_heads=kv_heads, key_dim=size, value_dim=size, dtype=torch.bfloat16)
    cached = cached_rows(tokens, asked)
    path = DevicePath(
        row,
        PathSettings(
            bits=rung.bits,
            tokens=tokens,
            skipped_mass=0.0,
            cached_rows=cached,
            clustered=rung.clustered,
        ),
        StepMemory(META),
        batch=batch,
        blocks=blocks,
        slots=slots,
        page=64,
        device=META,
    )
    heads = kv_heads * groups
    memory = path._scratch(batch, heads, blocks)
    taken = nbytes([memory.partials, memory.scan, memory.selection, memory.skipped])
    each = scratch_bytes(heads, size, tokens) + 64 * blocks * scratch_token_bytes(heads, size)
    assert taken <= batch * each
    if blocks:
        assert path.nbytes <= batch * 64 * blocks * rung.token_bytes(kv_heads, size, size)
        assert path.row_cache_nbytes == batch * row_cache_bytes(cached, kv_heads, row.token_bytes)


def test_rows_are_cached_where_reading_them_takes_longer_than_the_replica() -> None:
    automatic = {k: cached_rows(k, "auto") for k in (0, 16, 64, 256, 1024, 4096)}
    assert automatic == {0: 0, 16: 0, 64: 0, 256: 2048, 1024: 4096, 4096: 4096}
    assert [cached_rows(k, 512) for k in (0, 16, 1024)] == [0, 512, 512]


def test_cached_rows_are_forgotten_when_tokens_may_mean_other_rows() -> None:
    path = path_on_cpu(
        PathSettings(bits=4, tokens=16, skipped_mass=0.0, cached_rows=32), batch=3, kv_heads=2
    )
    changes: tuple[Callable[[], None], ...] = (
        partial(path.forget_table, 4),
        partial(path.select_sequences, torch.tensor([2, 0, 1])),
    )
    for change in changes:
        assert path._near is not None
        path._near.tokens.fill_(7)
        change()
        assert bool((path._near.tokens == -1).all())
    path.select_sequences(torch.tensor([1, 1]))
    assert path._near is not None
    assert path._near.tokens.shape == (2, 2, 32)
    assert bool((path._near.tokens == -1).all())


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_a_replica_follows_its_sequences_and_says_which_block_is_bad(rung: Rung) -> None:
    settings = PathSettings(bits=rung.bits, tokens=16, skipped_mass=0.0, clustered=rung.clustered)

    def tensors(path: DevicePath) -> list[Tensor]:
        held = [codes for codes in (path._keys, path._values) if codes is not None]
        return [tensor for codes in held for tensor in (*codes.planes, codes.meta)]

    path = path_on_cpu(settings, batch=3, kv_heads=2)
    rows = torch.randn(3, 4 * 64, 2, 128, generator=torch.Generator().manual_seed(0))
    path.append(rows, 0)
    assert path.nbytes == sum(tensor.nbytes for tensor in tensors(path)) + path._table.nbytes
    for order in ([2, 0, 1], [1, 1]):  # in place, and into others
        rows = rows[order]
        path.select_sequences(torch.tensor(order))
        fresh = path_on_cpu(settings, batch=len(order), kv_heads=2)
        fresh.append(rows, 0)
        assert [mine.shape for mine in tensors(path)] == [theirs.shape for theirs in tensors(fresh)]
        assert all(map(torch.equal, tensors(path), tensors(fresh)))
    assert path.bad_block(4) is None
    for part in (0, 64):  # of a key, of a value
        rows[1, 130, 1, part] = torch.inf
        path.append(rows[:, 128:], 2)
        assert path.bad_block(4) == 2
        rows[1, 130, 1, part] = 0.0
        path.append(rows[:, 128:], 2)
        assert path.bad_block(4) is None


@pytest.mark.parametrize("together", [2, 512])
def test_the_noise_is_that_of_the_published_blocks(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "AVERAGED_TOGETHER", together)
    settings = PathSettings(bits=2, tokens=16, skipped_mass=0.0)
    path = path_on_cpu(settings, batch=2, kv_heads=3)
    random = torch.Generator().manual_seed(4)
    held = torch.randn(2, 4 * 64, 3, 128, generator=random) * torch.arange(1, 257).view(1, -1, 1, 1)
    noise = path._noise
    assert noise is not None

    def publish(blocks: int) -> None:
        pages = np.zeros((path.lengths.numel() - 1, blocks), dtype=np.int64)
        path.publish(n_rows=0, blocks=blocks, first_token=0, pages=pages, starts=[], written=None)

    def assert_noise_of(rows: Tensor) -> None:
        assert path._noise is not None
        keys, values = rows[..., :64], rows[..., 64:]
        of_keys = key_noise(reference.quantize_keys(keys, bits=2), bits=2)
        of_values = value_noise(reference.quantize_values(values, bits=2), bits=2, head_size=64)
        torch.testing.assert_close(path._noise.keys, of_keys.mean(2))
        torch.testing.assert_close(path._noise.values, of_values.mean(2))

    path.append(held[:, :192], 0)
    publish(1)
    assert_noise_of(held[:, :64])  # what a step may not read yet does not count
    publish(3)
    path.append(held[:, 192:], 3)
    publish(4)
    assert_noise_of(held)
    path.forget_table(2)  # a crop
    publish(1)
    assert_noise_of(held[:, :64])
    path.append(held[:, 64:128] * 3, 1)  # and other tokens behind it
    publish(2)
    other = torch.cat([held[:, :64], held[:, 64:128] * 3], dim=1)
    assert_noise_of(other)
    path.select_sequences(torch.tensor([1, 0]))
    publish(2)
    assert_noise_of(other[[1, 0]])
    assert path._noise is noise  # a graph has kept its addresses
    epoch = path.epoch
    path.select_sequences(torch.tensor([1, 0, 0]))
    publish(2)
    assert_noise_of(other[[0, 1, 1]])
    assert path.epoch > epoch


@pytest.mark.parametrize(
    ("visible", "left", "padding"),
    [
        ([[1, 1, 1], [0, 0, 1]], True, [0, 2]),
        ([[1, 1, 1], [1, 0, 1]], False, [0, 1]),
        ([[0, 1, 1], [0, 1, 1]], True, [1, 1]),
    ],
)
def test_padding_is_noted_once_and_holes_in_it_are_seen(
    visible: list[list[int]], left: bool, padding: list[int]
) -> None:
    memory = StepMemory(torch.device("cpu"))
    mask = torch.tensor(visible).bool()
    assert memory.take_padding(mask) is left
    assert memory.padding is not None
    assert memory.padding.tolist() == padding
    version, address = memory.version, memory.padding.data_ptr()
    assert memory.take_padding(mask.clone()) is left
    assert (memory.version, memory.padding.data_ptr()) == (version, address)
    assert memory.take_padding(None)
    assert memory.version > version
    assert getattr(memory, "padding") is None  # noqa: B009 - mypy takes it for a tensor still
