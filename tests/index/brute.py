"""What indexes are compared with: all scores, and the best of them."""

from __future__ import annotations

import numpy as np

from offload.index.base import Found, Vectors


def brute(keys: Vectors, queries: Vectors) -> Vectors:
    """Scores of all keys, [G, N]."""
    scores: Vectors = queries.astype(np.float32) @ keys.astype(np.float32).T
    return scores


def recall(found: Found, scores: Vectors) -> float:
    k = found.ids.shape[1]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    pairs = zip(found.ids, best, strict=True)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in pairs]))


def check(found: Found, scores: Vectors, k: int) -> None:
    """Whatever was found has distinct ids, their scores, in order."""
    assert found.ids.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert found.ids.shape == found.scores.shape == (scores.shape[0], k)
    assert all(len(set(row)) == k for row in found.ids.tolist())
    want = np.take_along_axis(scores, found.ids, axis=1)
    np.testing.assert_allclose(found.scores, want, rtol=1e-4, atol=1e-3)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert found.touched_bytes > 0
