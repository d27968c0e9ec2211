"""How is attention over some tokens put together with attention over others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offload.index.base import Floats, Vectors


class Part(NamedTuple):
    """Attention of some queries over some tokens, by itself.

    Attributes:
        output: float32 [G, D]. Zeros where there are no tokens.
        lse: float32 [G]: natural logarithm of the sum of the exponentials of scaled scores. -inf without tokens.
    """

    output: Floats
    lse: Floats


def attend(scores: Floats, values: Vectors, scale: float) -> Part:
    """Attention over selected tokens, exactly.

    Args:
        scores: float32 [G, k]: inner products.
        values: [G, k, D].
        scale: Of scores.
    """
    return weighed(np.float32(scale) * scores, values)


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the union of disjoint sets of tokens.

    Args:
        parts: Over each set, one at least.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), section 3.1.
    """
    lse = np.stack([part.lse for part in parts])  # [parts, G]
    most = lse.max(axis=0)
    weights = np.exp(lse - np.where(most > -np.inf, most, np.float32(0)))
    total = np.maximum(
        weights.sum(axis=0), np.finfo(np.float32).tiny
    )  # of nothing: the outputs are zeros
    outputs = np.stack([part.output for part in parts])
    output = (weights / total)[..., None] * outputs  # [parts, G, D]
    return Part(output.sum(axis=0), most + np.log(total))


def weighed(logits: Floats, values: Vectors) -> Part:
    """Attention with given logits.

    Args:
        logits: float32 [G, n]: scaled scores, corrected or not. n may be 0.
        values: [G, n, D].
    """
    if not logits.shape[1]:
        return Part(*nothing((len(logits), values.shape[2])))
    most = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - most)
    total = weights.sum(axis=1)
    output = (
        np.matmul(weights[:, None], values.astype(np.float32, copy=False))[:, 0] / total[:, None]
    )
    return Part(output.astype(np.float32), (most[:, 0] + np.log(total)).astype(np.float32))


def nothing(shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Output and lse of attention over no tokens, of queries of a shape [G, D]."""
    return np.zeros(shape, np.float32), np.full(shape[0], -np.inf, np.float32)
