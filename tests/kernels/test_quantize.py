"""Codes are half a step from their values at most, and the kernel writes those of the reference."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.kernels import quantize, reference
from offload.kernels.clusters import empty_clusters, empty_mean_keys
from offload.kernels.reference import BLOCK, GROUP, Codes
from offload.scheduler.rungs import RUNGS, Rung

BITS = [4, 3, 2]
SIZES = [64, 80, 96, 128]


def values(size: int, dtype: torch.dtype, device: str, blocks: int = 2) -> Tensor:
    """Rows with outlier channels, as keys with a bias have them: [2, blocks * 64, 3, 2 * size]."""
    random = torch.Generator().manual_seed(size)
    rows = torch.randn((2, blocks * BLOCK, 3, 2 * size), generator=random)
    rows = rows * torch.rand(2 * size, generator=random) * 4
    return (rows + torch.randn(2 * size, generator=random) * 20).to(device, dtype)


def steps(codes: Codes, *, bits: int, keys: bool, size: int) -> Tensor:
    """The step of every value, [B, H_kv, N, D]."""
    kind = reference.KEYS if keys else reference.VALUES
    slope = codes.meta.float().select(-2, 1).flatten(-2) * kind.unit(bits)
    if keys:
        return slope.repeat_interleave(BLOCK, dim=2)[..., :size]
    return slope.repeat_interleave(GROUP, dim=3).mT.flatten(2, 3)[..., :size]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_no_value_is_further_than_half_a_step_from_its_code(
    bits: int, size: int, keys: bool
) -> None:
    rows = values(size, torch.float32, "cpu")[..., :size]
    if keys:
        codes = reference.quantize_keys(rows, bits=bits)
        back = reference.dequantize_keys(codes, bits=bits, head_size=size)
    else:
        codes = reference.quantize_values(rows, bits=bits)
        back = reference.dequantize_values(codes, bits=bits, head_size=size)
    error = (back - rows.transpose(1, 2)).abs()
    assert bool((error <= steps(codes, bits=bits, keys=keys, size=size) * 0.5 + 1e-5).all())


@pytest.mark.parametrize("bits", BITS)
def test_outliers_are_not_off_to_one_side(bits: int) -> None:
    random = torch.Generator().manual_seed(5)
    rows = torch.randn((1, 40 * BLOCK, 2, 64), generator=random)
    rows[..., 7] += 8.0  # always the greatest of its group of channels
    rows[..., 40] -= 8.0  # always the least
    back = reference.dequantize_values(
        reference.quantize_values(rows, bits=bits), bits=bits, head_size=64
    )
    error = (back - rows.transpose(1, 2))[..., [7, 40]]
    mean, spread = error.mean(2), error.pow(2).mean(2).sqrt()
    # Attention takes means over many tokens: what is random in each must vanish in them.
    assert float((mean.abs() / spread).max()) < 5 / (40 * BLOCK) ** 0.5


@given(constant=st.floats(-1000, 1000, width=16), bits=st.sampled_from(BITS))
def test_a_constant_channel_comes_back_within_its_rounding(constant: float, bits: int) -> None:
    rows = torch.full((1, BLOCK, 1, 32), constant)
    codes = reference.quantize_keys(rows, bits=bits)
    back = reference.dequantize_keys(codes, bits=bits, head_size=32)
    assert bool(((back - constant).abs() <= abs(constant) * 2e-3 + 1e-6).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_the_kernel_writes_the_codes_of_the_reference_where_it_is_told(
    device: str, bits: int, size: int, keys: bool
) -> None:
    whole = values(size, torch.float32, device)
    rows = whole[..., :size] if keys else whole[..., size:]  # strided, as rows lie in a cache
    codes = quantize.empty_codes(
        2, 3, 4 * BLOCK, size, bits=bits, keys=keys, device=torch.device(device)
    )
    for plane in codes.planes:
        plane.fill_(77)
    codes.meta.fill_(torch.nan)
    first = torch.tensor(1, dtype=torch.int32, device=device)
    write = quantize.quantize_keys if keys else quantize.quantize_values
    write(rows, codes, first, bits=bits)
    want = (reference.quantize_keys if keys else reference.quantize_values)(rows, bits=bits)
    assert torch.equal(codes.meta[:, :, 1:3], want.meta)
    for plane, expected in zip(codes.planes, want.planes, strict=True):
        # Division is not exact on a card: a value in the middle between two codes may take either.
        same = plane[:, :, 1:3] == expected
        assert float(same.float().mean()) > (0.999 if device == "cuda" else 0.99999)
        assert bool((plane[:, :, :1] == 77).all())  # and nothing else
        assert bool((plane[:, :, 3:] == 77).all())


def test_parts_of_blocks_and_strided_channels_are_refused() -> None:
    codes = quantize.empty_codes(1, 1, BLOCK, 32, bits=4, keys=True, device=torch.device("cpu"))
    first = torch.tensor(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="whole blocks"):
        quantize.quantize_keys(torch.randn(1, BLOCK - 1, 1, 32), codes, first, bits=4)
    with pytest.raises(ValueError, match="stride"):
        quantize.quantize_keys(torch.randn(1, BLOCK, 1, 64)[..., ::2], codes, first, bits=4)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 96), (256, 128)], ids=str)
def test_the_planner_prices_a_token_as_it_is_kept(rung: Rung, sizes: tuple[int, int]) -> None:
    held = 4 * 8  # a page number for each block
    for size, keys in zip(sizes, (True, False), strict=True):
        cpu = torch.device("cpu")
        if rung.clustered and not keys:
            codes = empty_clusters(1, 3, 8 * BLOCK, size, cpu)
        elif not rung.bits:
            codes = empty_mean_keys(1, 3, 8 * BLOCK, size, cpu)
        else:
            codes = quantize.empty_codes(
                1, 3, 8 * BLOCK, size, bits=rung.bits, keys=keys, device=cpu
            )
        held += sum(tensor.nbytes for tensor in (*codes.planes, codes.meta))
    priced = rung.token_bytes(3, *sizes) * 8 * BLOCK
    assert held <= priced < held + 8 * BLOCK
