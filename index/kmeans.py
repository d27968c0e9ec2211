"""Which keys lie near each other? k-means in segments of consecutive tokens.

Segments are clustered each by itself, as in Chen et al., RetroInfer (arXiv 2505.02922), section 4.2: new tokens never move
old ones from their clusters, and the work is in proportion to the tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offload.index.base import Floats, Vectors

Labels = NDArray[np.int32]


def clustered(rows: Vectors, clusters: int, *, iterations: int, seed: int) -> Labels:
    """Groups the rows of one segment.

    Plain k-means by Euclidean distance, begun at rows chosen at random. The mean of the rows is taken off first: it moves no
    distance, but the largest channels would take the last bits of all others.

    Args:
        rows: float16 or float32 [n, D].
        clusters: Of which some may be left out, where rows are equal: at least 1, at most n.
        iterations: Moves of the centroids, at most: it ends when no row changes.
        seed: Of the first centroids.

    Returns:
        int32 [n]: the cluster of each row, numbered from zero without gaps.
    """
    values = rows.astype(np.float32)
    values -= values.mean(axis=0)
    largest = np.abs(values).max()
    if largest > 1e15:
        values /= largest  # squares of such numbers, summed, are no floats
    chosen = np.random.default_rng(seed).choice(len(values), clusters, replace=False)
    centroids = values[np.sort(chosen)]
    labels = _nearest(values, centroids)
    for _ in range(iterations):
        centroids = means(values, labels, clusters, otherwise=centroids)
        moved = _nearest(values, centroids)
        if (moved == labels).all():
            break
        labels = moved
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def means(values: Floats, labels: Labels, clusters: int, *, otherwise: Floats | None = None) -> Floats:  # fmt: skip
    """The mean of each cluster.

    Args:
        values: float32 [n, D].
        labels: int32 [n], below `clusters`.
        clusters: Number of them.
        otherwise: float32 [clusters, D]: for those without rows; zeros if left out.

    Returns:
        float32 [clusters, D].
    """
    counts = np.bincount(labels, minlength=clusters)
    held = np.flatnonzero(counts)
    found = np.zeros((clusters, values.shape[1]), np.float32) if otherwise is None else otherwise.copy()  # fmt: skip
    starts = np.cumsum(counts[held]) - counts[held]
    sums = np.add.reduceat(values[np.argsort(labels, kind="stable")], starts, axis=0)
    found[held] = sums / counts[held, None].astype(np.float32)
    return found


def _nearest(values: Floats, centroids: Floats) -> Labels:
    """The nearest centroid of each row; of equal ones the first."""
    nearness = values @ centroids.T
    nearness -= 0.5 * (centroids * centroids).sum(axis=1)
    found: Labels = nearness.argmax(axis=1).astype(np.int32)
    return found
