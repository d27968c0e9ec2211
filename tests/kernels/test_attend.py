"""Every way of computing a part of attention equals the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cards import ATTEND, DEVICES, TOLERANCE, AttendCard, card_id

from offload.kernels import attend as attend_module
from offload.kernels import reference
from offload.kernels.attend import Backend, attend, backend_for
from offload.kernels.reference import Part

CARDS = pytest.mark.parametrize("card", ATTEND, ids=card_id)
ON = pytest.mark.parametrize("device", DEVICES)
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def exact(card: AttendCard, device: str, dtype: torch.dtype, **options: Any) -> Part:
    """The reference in float64 on the same rounded inputs."""
    query, key, value = (t.cpu().double() for t in card.inputs(device, dtype))
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    float_before = torch.Tensor.float
    try:
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
        return reference.attend(query, key, value, scale=0.125, **options)
    finally:
        torch.Tensor.float = float_before  # type: ignore[method-assign]


def check(card: AttendCard, device: str, dtype: torch.dtype, **options: Any) -> None:
    query, key, value = card.inputs(device, dtype)
    got = attend(query, key, value, scale=0.125, **options)
    want = exact(card, device, dtype, **options)
    assert got.out.dtype == dtype
    assert got.lse.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.out.cpu().double(), want.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.cpu().double(), want.lse, atol=1e-3, rtol=1e-3)


@ON
@CARDS
@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_attend_equals_the_reference(
    card: AttendCard, device: str, dtype: torch.dtype, causal: bool
) -> None:
    check(card, device, dtype, causal=causal)


@ON
@CARDS
def test_masks_may_leave_a_query_without_keys(card: AttendCard, device: str) -> None:
    random = torch.Generator().manual_seed(7)
    mask = torch.rand((card.batch, 1, 1, card.keys), generator=random) > 0.4
    mask[0] = False  # the first sequence sees nothing
    check(card, device, torch.float32, mask=mask.to(device))
    query, key, value = card.inputs(device, torch.float32)
    part = attend(query, key, value, scale=0.125, mask=mask.to(device))
    assert bool(part.lse[0].isneginf().all())
    assert bool((part.out[0] == 0).all())


@ON
@CARDS
def test_a_mask_and_causality_hold_together(card: AttendCard, device: str) -> None:
    random = torch.Generator().manual_seed(8)
    mask = torch.rand((card.batch, 1, 1, card.keys), generator=random) > 0.3
    check(card, device, torch.float32, causal=True, mask=mask.to(device))


@ON
@pytest.mark.parametrize("length", [2, 5, 17, 64])
def test_a_query_whose_visible_keys_are_all_padding_is_empty(device: str, length: int) -> None:
    card = AttendCard(queries=length, keys=length)
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
    mask[..., 0] = False  # left padding of one token: the first query sees nothing
    check(card, device, torch.float32, causal=True, mask=mask)
    query, key, value = card.inputs(device, torch.float32)
    part = attend(query, key, value, scale=0.125, causal=True, mask=mask)
    assert bool(part.lse[..., 0].isneginf().all())


@ON
def test_a_bias_may_leave_a_query_without_keys(device: str) -> None:
    query, key, value = ATTEND[0].inputs(device, torch.float32)
    bias = torch.full((1, 1, 1, key.shape[2]), -torch.inf, device=device)
    part = attend(query, key, value, scale=0.125, bias=bias)
    assert bool(part.lse.isneginf().all())
    assert bool((part.out == 0).all())


@ON
@CARDS
def test_a_bias_is_added_to_the_logits(card: AttendCard, device: str) -> None:
    bias = torch.arange(card.keys, device=device).float().mul(0.01).view(1, 1, 1, -1)
    check(card, device, torch.float32, bias=bias)


@ON
@CARDS
@pytest.mark.parametrize("causal", [False, True])
def test_a_softcap_goes_through_the_blocked_reference(
    card: AttendCard, device: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend_module, "_BLOCK_BYTES", 4 * 1024)  # many blocks
    check(card, device, torch.float32, softcap=2.0, causal=causal)


@ON
def test_sink_logits_take_their_share_and_have_no_value(device: str) -> None:
    card = ATTEND[0]
    sinks = torch.linspace(-2, 4, card.kv_heads * card.groups, device=device)
    check(card, device, torch.float32, sink_logits=sinks)


def test_no_keys_give_an_empty_part() -> None:
    query = torch.randn(2, 4, 3, 16)
    none = torch.empty(2, 2, 0, 16)
    part = attend(query, none, none, scale=1.0)
    assert bool(part.lse.isneginf().all())
    assert bool((part.out == 0).all())
    with_sinks = attend(query, none, none, scale=1.0, sink_logits=torch.ones(4))
    assert bool((with_sinks.lse == 1).all())


def test_heads_that_do_not_divide_and_mixed_dtypes_are_refused() -> None:
    query, key = torch.randn(1, 5, 1, 16), torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="divide"):
        attend(query, key, key, scale=1.0)
    with pytest.raises(ValueError, match="differ"):
        attend(query[:, :4], key.half(), key.half(), scale=1.0)


@pytest.mark.gpu
def test_half_precision_without_masks_takes_the_flash_kernel() -> None:
    query, key, value = ATTEND[0].inputs("cuda", torch.bfloat16)
    assert backend_for(query, key, value, masked=False, softcap=None) is Backend.FLASH
    assert backend_for(query, key, value, masked=True, softcap=None) is Backend.EFFICIENT
    assert backend_for(query, key, value, masked=False, softcap=1.0) is Backend.BLOCKED
