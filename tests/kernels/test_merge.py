"""Parts merged in any order are one softmax, and an empty part adds nothing."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from cards import DEVICES, TOLERANCE
from hypothesis import given

from offload.kernels import reference
from offload.kernels.attend import attend
from offload.kernels.merge import RunningMerge, merge_two_torch, merge_two_triton
from offload.kernels.reference import Part

HEADS, KV_HEADS, SIZE = 6, 2, 16


def part(batch: int, queries: int, size: int, dtype: torch.dtype, device: str, seed: int) -> Part:
    random = torch.Generator().manual_seed(seed)
    out = torch.randn((batch, queries, HEADS, size), generator=random).to(device, dtype)
    lse = torch.randn((batch, HEADS, queries), generator=random).mul(3).to(device)
    lse[0, 0] = -torch.inf
    out[0, :, 0] = torch.nan  # an empty part's output may be anything
    return Part(out.transpose(1, 2), lse)


@given(
    cuts=st.lists(st.integers(0, 40), max_size=5),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
    sinks=st.booleans(),
)
def test_any_partition_of_the_keys_in_any_order_is_one_softmax(
    cuts: list[int], order: st.DataObject, seed: int, sinks: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn((2, HEADS, 3, SIZE), generator=random)
    key, value = (torch.randn((2, KV_HEADS, 40, SIZE), generator=random) for _ in range(2))
    logits = torch.randn(HEADS, generator=random) if sinks else None
    whole = attend(query, key, value, scale=0.5, sink_logits=logits)
    edges = [0, *sorted(cuts), 40]
    spans = list(itertools.pairwise(edges))
    order.shuffle(spans)  # type: ignore[attr-defined]
    merge = RunningMerge()
    parts = [
        attend(
            query,
            key[:, :, start:stop],
            value[:, :, start:stop],
            scale=0.5,
            sink_logits=logits if i == 0 else None,  # exactly one part has the sinks
        )
        for i, (start, stop) in enumerate(spans)
    ]
    for each in parts:
        merge.add(each)
    for got in (merge.result(torch.float32), reference.merge(parts)):
        torch.testing.assert_close(got.out, whole.out, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(got.lse, whole.lse, atol=2e-6, rtol=2e-5)


# In Triton's interpreter bfloat16 is garbage without an error, so it is left to the card.
KERNELS = [
    pytest.param(merge_two_torch, torch.float32, "cpu", id="torch-float32"),
    pytest.param(merge_two_triton, torch.float32, "cpu", id="interpreter-float32"),
    pytest.param(merge_two_triton, torch.float16, "cpu", id="interpreter-float16"),
    *(
        pytest.param(merge_two_triton, dtype, "cuda", id=f"triton-{dtype}", marks=pytest.mark.gpu)
        for dtype in TOLERANCE
    ),
]


@pytest.mark.parametrize(("kernel", "dtype", "device"), KERNELS)
@pytest.mark.parametrize(("queries", "size"), [(1, 64), (5, 80), (33, 128), (2, 96)])
def test_two_parts_equal_the_reference_and_nan_does_not_spread(
    kernel: object, dtype: torch.dtype, device: str, queries: int, size: int
) -> None:
    a = part(2, queries, size, dtype, device, seed=1)
    b = part(2, queries, size, dtype, device, seed=2)
    b.lse[1, 1] = -torch.inf
    b.out[1, 1] = torch.nan
    out = torch.full((2, queries, HEADS, size), torch.nan, device=device).transpose(1, 2)
    lse = torch.full((2, HEADS, queries), torch.nan, device=device)
    kernel(a, b, out, lse)  # type: ignore[operator]
    want = reference.merge([Part(p.out.float(), p.lse) for p in (a, b)])
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want.lse, atol=1e-5, rtol=1e-5)
    assert bool(lse[0, 0].isneginf().all())  # both empty
    assert bool((out[0, 0] == 0).all())
    # In place, as a running merge does it.
    sum_ = Part(out.clone(), lse.clone())
    kernel(sum_, b, sum_.out, sum_.lse)  # type: ignore[operator]
    twice = reference.merge([Part(out, lse), Part(b.out.float(), b.lse)])
    torch.testing.assert_close(sum_.out, twice.out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_running_merge_equals_the_reference(device: str) -> None:
    parts = [part(2, 3, 64, torch.float32, device, seed) for seed in range(5)]
    merge = RunningMerge()
    for each in parts:
        merge.add(each)
    want = reference.merge(parts)
    got = merge.result(torch.float32)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)


def test_a_single_part_is_returned_as_it_is() -> None:
    only = part(1, 2, 64, torch.float32, "cpu", seed=3)
    merge = RunningMerge()
    merge.add(only)
    assert merge.result(torch.float32).out is only.out


def test_a_log_sum_exp_in_half_precision_and_other_shapes_are_refused() -> None:
    good = part(1, 2, 64, torch.float32, "cpu", seed=3)
    merge = RunningMerge()
    with pytest.raises(ValueError, match="float32"):
        merge.add(Part(good.out, good.lse.half()))
    merge.add(good)
    with pytest.raises(ValueError, match="merged"):
        merge.add(part(1, 3, 64, torch.float32, "cpu", seed=3))
    with pytest.raises(ValueError, match="at least one"):
        reference.merge([])
    with pytest.raises(ValueError, match="at least one"):
        RunningMerge().result(torch.float32)
