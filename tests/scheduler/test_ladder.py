"""Layers get the rungs that cost least fidelity for the bytes there are."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.ladder import Option, climb, total

OPTIONS = st.lists(
    st.lists(
        st.builds(Option, st.integers(1, 40), st.floats(0, 1, allow_subnormal=False)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


def nbytes(options: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> int:
    return sum(of_layer[i].nbytes for of_layer, i in zip(options, chosen, strict=True))


def fitting(options: list[list[Option]], budget: int) -> list[tuple[int, ...]]:
    every = product(*(range(len(of_layer)) for of_layer in options))
    return [chosen for chosen in every if nbytes(options, chosen) <= budget]


@given(options=OPTIONS, budget=st.integers(0, 200))
def test_what_is_chosen_fits_where_anything_does(options: list[list[Option]], budget: int) -> None:
    chosen = climb(options, budget)
    if chosen is None:
        assert not fitting(options, budget)
    else:
        assert nbytes(options, chosen) <= budget


@given(options=OPTIONS, budget=st.integers(0, 200))
def test_the_error_is_near_the_least_there_is(options: list[list[Option]], budget: int) -> None:
    chosen, there = climb(options, budget), fitting(options, budget)
    if chosen is None:
        return
    least = min(total(options, one) for one in there)
    # A knapsack by gain for a byte loses less than what one step of one layer takes off.
    steps = [
        max(o.error for o in of_layer) - min(o.error for o in of_layer) for of_layer in options
    ]
    assert least - 1e-9 <= total(options, chosen) <= least + max(steps) + 1e-9


@given(
    errors=st.lists(
        st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3), st.floats(0, 1e-3)),
        min_size=2,
        max_size=48,
    )
)
def test_no_uniform_choice_of_as_many_bytes_has_less_error(
    errors: list[tuple[float, float, float]],
) -> None:
    sizes = (300, 230, 170)
    options = [[Option(n, e) for n, e in zip(sizes, row, strict=True)] for row in errors]
    for i, size in enumerate(sizes):
        chosen = climb(options, size * len(options))
        assert chosen is not None
        uniform = total(options, [i] * len(options))
        step = max(max(row) - min(row) for row in errors)
        assert total(options, chosen) <= uniform + step


def test_layers_that_low_bits_hurt_get_most_of_them() -> None:
    sizes, hurt = (300, 230, 170), {0, 5}
    rows = [(4e-6, 2e-5, 1e-4) if layer in hurt else (1e-8, 7e-8, 2e-7) for layer in range(8)]
    options = [[Option(n, e) for n, e in zip(sizes, row, strict=True)] for row in rows]
    chosen = climb(options, 2 * 300 + 6 * 170)
    assert chosen == [0 if layer in hurt else 2 for layer in range(8)]
    assert climb(options, 8 * 170 - 1) is None
