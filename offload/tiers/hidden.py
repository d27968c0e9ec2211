"""How does a host page hold fewer bytes than its keys and values? Some of its tokens as what these are projected from.

A page of P tokens, where the first n of every block are kept as inputs of the attention module:

    | inputs of n tokens, E values each | rows of P - n tokens, H_kv (D + D_v) values each |

With as many KV heads as query heads inputs are half as large as keys and values. What PCIe brings less, matrix products
have to rebuild: every page has the same mix, so that both end together in every chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload.scheduler.layout import hidden_page_bytes
from offload.tiers.rows import RowShape


class Source(Protocol):
    """Knows the inputs of one layer's new tokens, and how keys and values come of them."""

    def take(self) -> tuple[Tensor, Callable[[int], None]]:
        """The inputs [B, Q, E] of the tokens that are attended with now, and what is to be told where they are.

        Returns:
            The inputs; and to be called with the position of the first of them in the sequences, before any is rebuilt.
        """

    def rebuild(
        self, inputs: Tensor, positions: Tensor, sequence: int | None
    ) -> tuple[Tensor, Tensor]:
        """Keys [B, H_kv, T, D] and values [B, H_kv, T, D_v].

        Args:
            inputs: [B, T, E].
            positions: Integers [T], on the device: of the tokens in the sequences.
            sequence: The one that they are of; None for all.
        """

    def select(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where lies what rebuilding reads besides inputs and weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenForm:
    """The mix of a layer's pages.

    Attributes:
        width: Values of a token's input, E.
        tokens: Of a block, its first ones, that are kept so: n.
        source: Of the inputs.
    """

    width: int
    tokens: int
    source: Source

    def heads(self, shape: RowShape) -> int:
        """Rows of as many heads that a token's input takes on the device, behind its keys and values."""
        return -(-self.width // shape.width)

    def page_bytes(self, shape: RowShape, page: int) -> int:
        """Bytes of a page."""
        return hidden_page_bytes(
            self.width, self.tokens, shape.token_bytes, shape.dtype.itemsize, page
        )

    def pack(self, buffer: Tensor, blocks: Tensor, shape: RowShape) -> None:
        """Writes pages.

        Args:
            buffer: uint8 [B, n, bytes of a page].
            blocks: [B, n, P, H_kv + heads, W].
            shape: Of the rows.
        """
        inputs, rows = self._parts(buffer, shape, blocks.shape[2])
        inputs.copy_(blocks[:, :, : self.tokens, shape.kv_heads :].flatten(3)[..., : self.width])
        rows.copy_(blocks[:, :, self.tokens :, : shape.kv_heads])

    def read(
        self, pages: Tensor, shape: RowShape, page: int, first: int, sequence: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and positions of a few pages, in parts of any order; each is made when it is asked for.

        Args:
            pages: uint8 [B, n, bytes of a page] on the device.
            shape: Of the rows.
            page: Tokens of a page.
            first: The position of the first token.
            sequence: The one that they are of; None for all.

        Yields:
            [B, H_kv, T, D], [B, H_kv, T, D_v] and integers [T] of each part.
        """
        inputs, rows = self._parts(pages, shape, page)
        positions = first + torch.arange(pages.shape[1] * page, device=pages.device).view(-1, page)
        if self.tokens:
            at = positions[:, : self.tokens].flatten()
            yield *self.source.rebuild(inputs.flatten(1, 2), at, sequence), at
        if self.tokens < page:
            heads_first = rows.flatten(1, 2).transpose(1, 2)
            keys, values = heads_first.split([shape.key_dim, shape.value_dim], dim=-1)
            del heads_first
            yield keys, values, positions[:, self.tokens :].flatten()

    def blocks(
        self, pages: Tensor, shape: RowShape, page: int, first: int, sequence: int | None
    ) -> Tensor:
        """Pages as rows on the device, inputs included where pages have them; arguments as of `read`.

        Returns:
            [B, n, P, H_kv + heads, W].
        """
        batch, n = pages.shape[:2]
        heads = shape.kv_heads + self.heads(shape)
        found: Tensor = torch.zeros(
            (batch, n * page, heads, shape.width), dtype=shape.dtype, device=pages.device
        )
        for keys, values, positions in self.read(pages, shape, page, first, sequence):
            rows = torch.cat([keys, values], dim=-1).transpose(1, 2)
            found[:, positions - first, : shape.kv_heads] = rows
        found = found.unflatten(1, (n, page))
        inputs, _ = self._parts(pages, shape, page)
        found[:, :, : self.tokens, shape.kv_heads :].view(batch, n, self.tokens, -1)[
            ..., : self.width
        ] = inputs
        return found

    def _parts(self, pages: Tensor, shape: RowShape, page: int) -> tuple[Tensor, Tensor]:
        """Views [B, n, tokens, E] and [B, n, P - tokens, H_kv, W] of pages [B, n, bytes]."""
        edge = self.tokens * self.width * shape.dtype.itemsize
        inputs = pages[..., :edge].view(shape.dtype).unflatten(-1, (self.tokens, self.width))
        rows = pages[..., edge:].view(shape.dtype)
        return inputs, rows.unflatten(-1, (page - self.tokens, shape.kv_heads, shape.width))
