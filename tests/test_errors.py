"""Errors are values: a program reads attributes, a person reads one message."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import offload.errors
from offload.errors import (
    BudgetError,
    CacheError,
    ConfigError,
    InputError,
    LostHandleError,
    OffloadError,
    UnsupportedModelError,
)
from offload.units import GIB

BUILTINS = {
    ConfigError: ValueError,
    BudgetError: MemoryError,
    UnsupportedModelError: NotImplementedError,
    InputError: ValueError,
    CacheError: RuntimeError,
    LostHandleError: RuntimeError,
}


def budget_error(requested: int = 4 * GIB, available: int = 3 * GIB) -> BudgetError:
    return BudgetError(
        "The KV window",
        requested=requested,
        available=available,
        setting="memory.gpu",
        change='Set memory.gpu = "26GiB".',
    )


def model_error() -> UnsupportedModelError:
    return UnsupportedModelError(
        "The model cannot be attached.",
        model_type="deepseek_v3",
        reason="its attention keeps one latent vector for all heads (MLA)",
        change="Use the stock cache.",
    )


EXAMPLES = [
    ConfigError("'x' is not a size", key="memory.gpu", asked="x", change='Write "20GiB"'),
    budget_error(),
    model_error(),
    InputError("The prompt is empty", asked="generate", there="0 tokens", change="Give a token."),
    CacheError("The cache belongs to another model"),
    LostHandleError("Layer 3 was attended by another function", there="sdpa"),
]


def test_the_tree_is_the_one_drawn_in_the_docstring() -> None:
    classes = {c for _, c in inspect.getmembers(offload.errors, inspect.isclass)}
    ours = {c for c in classes if issubclass(c, OffloadError)} - {OffloadError}
    assert ours == set(BUILTINS)
    drawn = offload.errors.__doc__ or ""
    for error, builtin in BUILTINS.items():
        assert error.__bases__ == (OffloadError, builtin)
        assert f"── {error.__name__}({builtin.__name__})" in drawn


def test_budget_error_says_needs_leaves_and_change() -> None:
    error = budget_error(requested=int(4.3 * GIB), available=int(3.1 * GIB))
    assert str(error) == (
        'The KV window needs 4.3 GiB, the budget leaves 3.1 GiB. Set memory.gpu = "26GiB".'
    )
    assert (error.requested, error.available, error.setting) == (
        int(4.3 * GIB),
        int(3.1 * GIB),
        "memory.gpu",
    )
    assert (error.asked, error.there) == (error.requested, error.available)
    assert error.change == 'Set memory.gpu = "26GiB".'


def test_budget_error_without_advice_names_the_setting() -> None:
    error = BudgetError("The pool", requested=2 * GIB, available=GIB, setting="memory.cpu")
    assert str(error) == "The pool needs 2.0 GiB, the budget leaves 1.0 GiB. Raise memory.cpu."


def test_budget_error_shows_amounts_apart_when_they_are_close() -> None:
    assert "needs 4.002 GiB, the budget leaves 4.000 GiB" in str(
        budget_error(requested=4 * GIB + 2 * 1024**2, available=4 * GIB)
    )
    assert "needs 4,294,967,297 B, the budget leaves 4,294,967,296 B" in str(
        budget_error(requested=4 * GIB + 1, available=4 * GIB)
    )


def test_an_overdrawn_budget_leaves_nothing() -> None:
    error = budget_error(available=-GIB)
    assert "the budget leaves 0 B" in str(error)
    assert error.available == -GIB


def test_unsupported_model_names_type_and_reason() -> None:
    assert str(model_error()) == (
        "The model cannot be attached (model type 'deepseek_v3'): its attention keeps one latent "
        "vector for all heads (MLA). Use the stock cache."
    )
    assert model_error().asked == "deepseek_v3"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OffloadError("It failed."), "It failed."),
        (OffloadError("It failed", change="Try again"), "It failed. Try again."),
        (OffloadError("It failed", change="Did you try?"), "It failed. Did you try?"),
        (OffloadError("It failed", asked=8, there=7), "It failed (asked: 8; there: 7)."),
        (OffloadError("8 do not fit into 7", asked=8, there=7), "8 do not fit into 7."),
        (OffloadError("64 do not fit", asked=6, there=None), "64 do not fit (asked: 6)."),
    ],
)
def test_the_message_names_each_fact_once(error: OffloadError, message: str) -> None:
    assert str(error) == message


def test_config_error_lists_its_problems_under_their_keys() -> None:
    first = ConfigError("'x' is not a size", asked="x", change='Write "20GiB".').under("memory.gpu")
    second = ConfigError("unknown key", key="pgae", asked="pgae", change="Did you mean 'page'?")
    error = ConfigError("2 settings cannot be used", problems=[first, second.under("cache.pgae")])
    assert str(error) == (
        "2 settings cannot be used.\n"
        "  memory.gpu: 'x' is not a size. Write \"20GiB\".\n"
        "  cache.pgae: unknown key. Did you mean 'page'?"
    )
    assert [p.key for p in error.problems] == ["memory.gpu", "cache.pgae"]
    assert second.key == "pgae"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_errors_survive_pickle_and_copy(error: OffloadError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)
