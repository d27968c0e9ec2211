"""What do the tokens add to attention that were not selected, as far as summaries of them, or a sample, can say?

Dropping them costs more than selecting a few wrong ones. Their part is merged with that of the selected ones
(`offload.index.part`):

- `Means`: a cluster weighs as its mean key says, times its size, and adds its mean value: Chen et al., RetroInfer (arXiv
  2505.02922), section 4.3. A fourteenth of the bytes of keys and values in bfloat16.
- `Codes`: every token weighs as its key of 2 bits a channel says, and adds the mean of values like its own. A tenth.

Selected tokens are taken out of the summaries exactly: it is of the others that these tell. Where there is no room for
summaries, `offload.index.sample` needs none.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offload.errors import ConfigError, InputError
from offload.index import scan
from offload.index.base import Floats, Ids, Vectors, checked_keys
from offload.index.kmeans import clustered, means
from offload.index.part import Part, nothing

# Mean square error of a clipped code of 2 bits, in squared steps, for normal values: see `offload.index.scan`.
_NOISE = 0.1188 / 0.9957**2
_MOST = 256  # clusters of a segment, which labels of 8 bits count


class Tail(Protocol):
    """Says what tokens add that were not selected."""

    @property
    def nbytes(self) -> int:
        """Bytes of the summaries."""
        ...

    def estimate(
        self, queries: Vectors, ids: Ids, scores: Floats, values: Vectors, scale: float
    ) -> Part:
        """Attention over all tokens of the summaries but the selected ones.

        Args:
            queries: [G, D].
            ids: int64 [G, k], of distinct tokens each; k may be 0: those that are attended to exactly. As
                `offload.index.base.Found` has them.
            scores: float32 [G, k]: their inner products.
            values: [G, k, D]: their values.
            scale: Of scores, in attention.

        Raises:
            InputError: Shapes do not fit each other or the summaries, a token is not there, or the scale is none.
        """
        ...


class Means:
    """Mean keys, mean values and sizes of clusters of near keys.

    Of further tokens others are made: parts of disjoint tokens merge.
    """

    def __init__(
        self,
        keys: Vectors,
        values: Vectors,
        *,
        size: int = 16,
        segment: int = 1024,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        """Summaries of tokens.

        Args:
            keys: [N, D], float16 or float32.
            values: [N, D].
            size: Tokens of a cluster, on average.
            segment: Consecutive tokens that are clustered by themselves, at least.
            iterations: Of k-means, at most.
            seed: Of k-means.

        Raises:
            ConfigError: A number below 1, or more clusters in a segment than 8 bits count.
            InputError: See `offload.index.base.Index`; or a mean is no float16.
        """
        keys, values = _checked(keys, values)
        self._groups = _Groups(keys, size, segment, iterations, seed)
        # What all have in common would take the last bits of float16, which a cluster's size multiplies.
        self._mean = keys.mean(axis=0, dtype=np.float32)
        self._keys = _half(self._groups.mean_of(keys.astype(np.float32) - self._mean), "keys")
        self._values = _half(self._groups.mean_of(values), "values")

    @property
    def nbytes(self) -> int:
        """See `Tail`."""
        parts = (self._keys, self._values, self._mean)
        return self._groups.nbytes + sum(int(part.nbytes) for part in parts)

    def estimate(
        self, queries: Vectors, ids: Ids, scores: Floats, values: Vectors, scale: float
    ) -> Part:
        """See `Tail`."""
        count = len(self._groups.labels)
        queries, values = _checked_selection(queries, ids, scores, values, scale, count, self._keys.shape[1])  # fmt: skip
        labels, sizes = self._groups.numbered(), self._groups.sizes
        common = queries @ self._mean
        sums = queries @ self._keys.astype(np.float32).T * sizes
        of_values = self._values.astype(np.float32)
        output, lse = nothing(queries.shape)
        for g, chosen in enumerate(ids):
            taken = labels[chosen]
            left = sizes - np.bincount(taken, minlength=len(sizes))
            held = left > 0
            if not held.any():
                continue
            rest = np.maximum(left, 1).astype(np.float32)
            selected = np.bincount(taken, weights=scores[g] - common[g], minlength=len(sizes))
            mean = (sums[g] - selected) / rest + common[g]
            logits = np.where(held, scale * mean + np.log(rest), -np.inf)
            weights = np.exp(logits - logits.max()).astype(np.float32)
            total = weights.sum()
            each = weights / (rest * total)  # of one token
            output[g] = (each * sizes) @ of_values - each[taken] @ values[g]
            lse[g] = logits.max() + np.log(total)
        return Part(output, lse)


class Codes:
    """Keys by 2 bits a channel, and mean values of clusters of near values.

    Codes are clipped, and half the variance of their noise is taken off every scaled score: exponentials of noisy scores are
    too large on average, by as much. Values of a cluster are near each other, not their keys: a token's weight is known.
    Errors of the output with 3 % of the tokens exact, relative to those without a tail, 12 heads of SmolLM2 at 7,800 tokens
    and of Qwen2.5-Coder-0.5B at 8,192: .15 and .23. Noise not taken off: .18 and .30. Codes from the least to the largest value
    instead: .56 and .76, with their noise taken off .16 and .23. Clusters of near keys: .20 and .33. `Means`: .26 and .42.

    Of further tokens others are made: parts of disjoint tokens merge.
    """

    def __init__(
        self,
        keys: Vectors,
        values: Vectors,
        *,
        size: int = 16,
        segment: int = 1024,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        """Summaries of tokens; see `Means`.

        Args:
            keys: [N, D], float16 or float32.
            values: [N, D].
            size: Tokens of a cluster, on average.
            segment: Consecutive tokens that are clustered by themselves, at least.
            iterations: Of k-means, at most.
            seed: Of k-means.

        Raises:
            ConfigError: See `Means`.
            InputError: See `Means`.
        """
        keys, values = _checked(keys, values)
        self._groups = _Groups(values, size, segment, iterations, seed)
        self._values = _half(self._groups.mean_of(values), "values")
        self._mean = keys.mean(axis=0, dtype=np.float32)
        whole = len(keys) // scan.BLOCK * scan.BLOCK
        centred = keys.astype(np.float32) - self._mean
        if whole < len(keys):
            # The last block is filled up by keys of its own, which leave its channels as they are.
            last = np.resize(centred[whole:], (scan.BLOCK, keys.shape[1]))
            centred = np.concatenate([centred[:whole], last])
        self._codes, lows, steps = scan.encode(centred, 2, clipped=True)
        self._lows, self._steps = _half(lows, "keys"), _half(steps, "keys")

    @property
    def nbytes(self) -> int:
        """See `Tail`."""
        parts = (self._codes, self._lows, self._steps, self._values, self._mean)
        return self._groups.nbytes + sum(int(part.nbytes) for part in parts)

    def estimate(
        self, queries: Vectors, ids: Ids, scores: Floats, values: Vectors, scale: float
    ) -> Part:
        """See `Tail`."""
        count, blocks = len(self._groups.labels), len(self._codes)
        queries, values = _checked_selection(queries, ids, scores, values, scale, count, self._lows.shape[1])  # fmt: skip
        labels = self._groups.numbered()
        steps = self._steps.astype(np.float32)
        coded = np.empty((len(queries), blocks * scan.BLOCK), np.float32)
        scan.scan(self._codes, self._lows.astype(np.float32), steps, queries, 2, coded)
        coded += (queries @ self._mean)[:, None]
        noise = np.float32(0.5 * _NOISE * scale * scale) * ((queries * queries) @ (steps * steps).T)
        logits = np.float32(scale) * coded[:, :count] - np.repeat(noise, scan.BLOCK, axis=1)[:, :count]  # fmt: skip
        of_values, sizes = self._values.astype(np.float32), self._groups.sizes
        output, lse = nothing(queries.shape)
        if ids.shape[1] == count:
            return Part(output, lse)
        np.put_along_axis(logits, ids, -np.inf, axis=1)
        most = logits.max(axis=1)
        weights = np.exp(logits - most[:, None])
        for g, chosen in enumerate(ids):
            taken = labels[chosen]
            left = np.maximum(sizes - np.bincount(taken, minlength=len(sizes)), 1)
            shares = np.bincount(labels, weights=weights[g], minlength=len(sizes))
            total = shares.sum()
            each = (shares / (left * total)).astype(np.float32)
            output[g] = (each * sizes) @ of_values - each[taken] @ values[g]
            lse[g] = most[g] + np.log(total)
        return Part(output, lse)


class _Groups:
    """Which cluster each token is of.

    Attributes:
        labels: uint8 [N]: number of the cluster in its segment.
        sizes: int32 [C].
    """

    def __init__(self, rows: Vectors, size: int, segment: int, iterations: int, seed: int) -> None:
        """Clusters tokens by some rows [N, D] of theirs; see `Means`."""
        numbers = {"size": size, "segment": segment, "iterations": iterations}
        for key, value in numbers.items():
            if value < 1:
                raise ConfigError("at least 1 is needed", key=key, asked=value)
        if (2 * segment - 1) // size > _MOST:
            raise ConfigError(f"a segment has {_MOST} clusters at most", key="segment", asked=segment)  # fmt: skip
        segments = max(1, len(rows) // segment)
        self._edges = [len(rows) * i // segments for i in range(segments + 1)]
        labels, sizes, numbers_of = [], [], []
        for a, b in zip(self._edges, self._edges[1:], strict=False):
            found = clustered(rows[a:b], max(1, (b - a) // size), iterations=iterations, seed=seed + a)  # fmt: skip
            labels.append(found.astype(np.uint8))
            sizes.append(np.bincount(found))
            numbers_of.append(len(sizes[-1]))
        self.labels: NDArray[np.uint8] = np.concatenate(labels)
        self.sizes: NDArray[np.int32] = np.concatenate(sizes).astype(np.int32)
        self._first: Ids = np.cumsum(numbers_of) - np.array(numbers_of, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of labels and sizes; of a segment a few more, which are not counted."""
        return self.labels.nbytes + self.sizes.nbytes

    def numbered(self) -> Ids:
        """Number of each token's cluster among all, int64 [N]."""
        return np.repeat(self._first, np.diff(self._edges)) + self.labels

    def mean_of(self, rows: Vectors) -> Floats:
        """Of each cluster, float32 [C, D]."""
        return means(rows.astype(np.float32), self.numbered().astype(np.int32), len(self.sizes))


def _half(rows: Floats, what: str) -> NDArray[np.float16]:
    """Rows as float16.

    Raises:
        InputError: One of them is too large.
    """
    if np.abs(rows).max() > np.finfo(np.float16).max:
        change = "Such keys and values cannot be summarised; look at what made them."
        raise InputError(f"Means of the {what} are too large for float16", asked=float(np.abs(rows).max()), there=float(np.finfo(np.float16).max), change=change)  # fmt: skip
    return rows.astype(np.float16)


def _checked(keys: Vectors, values: Vectors) -> tuple[Vectors, Vectors]:
    """Keys and values as summaries are made of them."""
    keys = checked_keys(keys, None)
    values = checked_keys(values, keys.shape[1], what="values")
    if len(keys) != len(values):
        raise InputError("Each key has one value", asked=len(keys), there=len(values), change="Pass both of the same tokens.")  # fmt: skip
    return keys, values


def _checked_selection(
    queries: Vectors,
    ids: Ids,
    scores: Floats,
    values: Vectors,
    scale: float,
    count: int,
    dimension: int,
) -> tuple[Floats, Floats]:
    """Queries and values of a call of `Tail.estimate`, as float32."""
    queries = checked_keys(queries, dimension, what="queries").astype(np.float32, copy=False)
    shape = (len(queries), ids.shape[1] if ids.ndim == 2 else 0)
    shapes = (ids.shape, scores.shape, values.shape)
    if shapes != (shape, shape, (*shape, dimension)):
        raise InputError("Ids, scores and values are not of the same tokens", asked=shapes, there=(*shape, dimension), change="Pass [G, k], [G, k] and [G, k, D].")  # fmt: skip
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise InputError("A selected token is not there", asked=int(ids.max()), there=count, change="Select from the tokens of the summaries.")  # fmt: skip
    if not 0 < scale < float("inf"):
        raise InputError("A scale is a positive number", asked=scale, change="Pass that of attention.")  # fmt: skip
    return queries, values.astype(np.float32, copy=False)
