"""What every kernel test shares: one card per operation, one tolerance per dtype, odd shapes on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute error of outputs of size about one, against float64 on the same rounded inputs."""


@dataclass(frozen=True, kw_only=True)
class AttendCard:
    """A shape of `attend`.

    Axes: query [batch, groups * kv_heads, queries, size], key and value [batch, kv_heads, keys, size].
    """

    batch: int = 1
    kv_heads: int = 2
    groups: int = 3
    queries: int = 1
    keys: int = 64
    size: int = 64
    layout: str = (
        "rows"  # "planar", "rows" (K and V of a token side by side) or "shared" (batch stride 0)
    )

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value; the same for the same card."""
        random = torch.Generator().manual_seed(self.keys * 1000 + self.queries)
        heads = self.groups * self.kv_heads

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device, dtype)

        query = draw(self.batch, self.queries, heads, self.size).transpose(1, 2)
        if self.layout == "planar":
            key = draw(self.batch, self.kv_heads, self.keys, self.size)
            return query, key, draw(self.batch, self.kv_heads, self.keys, self.size)
        batch = 1 if self.layout == "shared" else self.batch
        rows = draw(batch, self.keys, self.kv_heads, 2 * self.size).transpose(1, 2)
        rows = rows.expand(self.batch, -1, -1, -1)
        return query, rows[..., : self.size], rows[..., self.size :]


ATTEND = [
    AttendCard(),
    AttendCard(keys=1),
    AttendCard(keys=63, groups=1),
    AttendCard(keys=65, groups=7, kv_heads=1),
    AttendCard(keys=997, batch=3, layout="shared"),
    AttendCard(queries=5, keys=5),
    AttendCard(queries=7, keys=131, size=128),
    AttendCard(queries=33, keys=257, size=80, layout="planar"),
    AttendCard(queries=2, keys=31, size=96, batch=2),
    AttendCard(queries=3, keys=64, size=16, groups=1),
]


def card_id(card: Any) -> str:
    """The fields of a card that are not the default."""
    default = type(card)()
    changed = {k: v for k, v in vars(card).items() if v != getattr(default, k)}
    return "-".join(f"{k}{v}" for k, v in changed.items()) or "default"
