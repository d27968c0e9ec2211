"""What is attention over all tokens, judged by a few, where there is no room for summaries of the others?

Instead of the best tokens those are taken that are best with some noise added, and each weighs as much as it makes up for
those that were as likely and were not taken. Duffield, Lund and Thorup, Priority sampling for estimation of arbitrary
subset sums (JACM 54, 2007). The noise is a channel of the keys, so any index finds them.
"""

from __future__ import annotations

import numpy as np

from offload.errors import InputError
from offload.index.base import Floats, Ids, Vectors, checked_keys
from offload.index.part import Part, weighed


def noised(keys: Vectors, scale: float, *, seed: int, first: int = 0) -> Vectors:
    """Keys with a further channel of noise, of which an index is built; queries get a one there.

    Args:
        keys: [n, D], float16 or float32.
        scale: Of scores, in attention.
        seed: Of the noise. A token's is the same in every search.
        first: Number of the first of these keys in the index: further ones get other noise.

    Returns:
        [n, D + 1] of the same dtype: the last channel is -log(u) / scale, u uniform between 0 and 1.
    """
    keys = checked_keys(keys, None)
    uniform = 1 - np.random.default_rng([seed, first]).random(len(keys))  # never zero
    noise = (-np.log(uniform) / scale).astype(keys.dtype)
    return np.concatenate([keys, noise[:, None]], axis=1)


def sampled(ids: Ids, scores: Floats, noise: Vectors, values: Vectors, scale: float) -> Part:
    """Attention over all tokens of an index of `noised` keys, by those of them that a search found.

    The exponential of `lse`, and `output` times that, are right on average over seeds, whatever the scores are, if
    the search found the best. What was found last says only how likely the others were to be found. Not to be
    combined with summaries: it stands for the selected tokens and for the tail.

    Args:
        ids: int64 [G, n], n at least 2: best first.
        scores: float32 [G, n]: of keys with noise.
        noise: [N]: the last channel of all keys of the index.
        values: [G, n, D].
        scale: That of `noised`.

    Raises:
        InputError: Fewer than two tokens of several.
    """
    plain = np.float32(scale) * (scores - noise[ids].astype(np.float32))
    if ids.shape[1] == len(noise):
        return weighed(plain, values)  # all that there are
    if ids.shape[1] < 2:
        raise InputError("A sample has two tokens or more", asked=ids.shape[1], there=len(noise), change="Search for more.")  # fmt: skip
    bar = np.float32(scale) * scores[:, -1:]
    return weighed(np.maximum(plain[:, :-1], bar), values[:, :-1])
