"""What is one token of one layer in memory? A row per KV head: its key and its value side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """The rows of one layer.

    Attributes:
        kv_heads: KV heads, H_kv.
        key_dim: Head size of the keys, D.
        value_dim: Head size of the values, D_v.
        dtype: Of keys and values.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Values of one row: D + D_v."""
        return self.key_dim + self.value_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""
        return self.kv_heads * self.width * self.dtype.itemsize
