"""Which layer takes which rung? The rungs that cost least fidelity for the bytes there are.

A layer's error is what the next token's distribution is off by while that layer alone goes by its replica. The sum over
the layers is taken for what all of them together come to.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """A rung of one layer.

    Attributes:
        nbytes: Device bytes that it takes.
        error: That it adds, of any unit.
    """

    nbytes: int
    error: float


def climb(options: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Chooses an option for every layer, so that the sum of errors is small and that of bytes is within the budget.

    A knapsack with one choice of each layer. Starting with the smallest options, what takes most error for its bytes
    is bought first; along the convex hull of each layer's options that is optimal but for what is left at the end.

    Args:
        options: Of each layer, one at least.
        budget: Bytes for all.

    Returns:
        For each layer the number of its option; None where even the smallest do not fit.
    """
    hulls = [_hull(of_layer) for of_layer in options]
    at = [0] * len(hulls)
    left = budget - sum(
        of_layer[hull[0]].nbytes for of_layer, hull in zip(options, hulls, strict=True)
    )
    if left < 0:
        return None
    waiting: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        """What the layer's next option takes of its error for a byte."""
        if at[layer] + 1 < len(hulls[layer]):
            low, high = hulls[layer][at[layer] : at[layer] + 2]
            heapq.heappush(waiting, (-_gain(options[layer], low, high), layer))

    for layer in range(len(hulls)):
        offer(layer)
    while waiting:
        _, layer = heapq.heappop(waiting)
        now, then = (options[layer][hulls[layer][at[layer] + step]] for step in (0, 1))
        if then.nbytes - now.nbytes <= left:
            left -= then.nbytes - now.nbytes
            at[layer] += 1
            offer(layer)
    chosen = [hull[i] for hull, i in zip(hulls, at, strict=True)]
    _spend(options, chosen, left)
    return chosen


def total(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    """The sum of errors of a choice."""
    return sum(of_layer[i].error for of_layer, i in zip(options, chosen, strict=True))


def _hull(options: Sequence[Option]) -> list[int]:
    """Options that are worth it at some price of a byte, the smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].error))
    hull: list[int] = []
    for i in order:
        if hull and options[i].error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _gain(options: Sequence[Option], low: int, high: int) -> float:
    """Error that the better of two options takes off, for each byte more."""
    more = options[high].nbytes - options[low].nbytes
    less = options[low].error - options[high].error
    return less / more if more else float("inf")


def _spend(options: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Spends what is left on options that are on no hull, those that take the most error first."""
    while True:
        found = [
            (options[layer][now].error - option.error, option.nbytes - options[layer][now].nbytes, layer, i)
            for layer, now in enumerate(chosen)
            for i, option in enumerate(options[layer])
            if option.error < options[layer][now].error
            and option.nbytes - options[layer][now].nbytes <= left
        ]  # fmt: skip
        if not found:
            return
        _, more, layer, i = max(found)
        chosen[layer] = i
        left -= more
