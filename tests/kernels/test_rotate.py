"""Keys rotated where they lie are those of the reference."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES

from offload.kernels import reference
from offload.kernels.rotate import rotate_


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "angled"), [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (96, 96), (80, 32), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_those_of_the_reference(
    device: str, batch: int, angled: int, size: int, rotated: int, dtype: torch.dtype
) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where a card rounds")
    random = torch.Generator().manual_seed(size + batch)
    # Rows that are wider than the keys: those of a view.
    rows = torch.randn((batch, 37, 3, size + 8), generator=random).to(device, dtype)
    keys = rows[..., :size]
    angles = torch.rand((angled, 90, rotated), generator=random).mul(6.3)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    positions = torch.randperm(90, generator=random)[:37].to(device)
    want = reference.rotate(keys, cos[:, positions], sin[:, positions])
    behind = rows[..., size:].clone()
    rotate_(keys, cos, sin, positions)
    # A compiler may leave out the rounding of a product before its sum.
    off = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(keys, want, rtol=off, atol=off)
    assert torch.equal(rows[..., size:], behind)
