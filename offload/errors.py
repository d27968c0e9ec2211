"""Which errors offload raises on purpose, and what each of them carries.

    OffloadError(Exception)
    ├── ConfigError(ValueError)                    a setting: unknown, unreadable, contradictory
    ├── BudgetError(MemoryError)                   it does not fit, or memory was refused
    ├── UnsupportedModelError(NotImplementedError) a model that would come out wrong
    ├── InputError(ValueError)                     a prompt, mask, or document that cannot be used
    ├── CacheError(RuntimeError)                   a cache used where or when it may not be
    └── LostHandleError(RuntimeError)              our attention was bypassed: tokens would be wrong

`except OffloadError` catches all of these and nothing else. Each class is also the builtin that it
refines. The message says what was asked, what is there, and what to change; the same three are the
attributes `asked`, `there` and `change`, so a program reads values and not prose.

The module imports nothing heavy, and nothing of ours when it is imported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="OffloadError")


class OffloadError(Exception):
    """Root of everything that offload raises on purpose.

    Args:
        what: What went wrong: one sentence, with or without its full stop.
        asked: What was asked for. None where the question makes no sense.
        there: What there is instead.
        change: What to do about it: whole sentences.

    Attributes:
        asked: As given.
        there: As given.
        change: As given.
    """

    def __init__(
        self,
        what: str,
        *,
        asked: object = None,
        there: object = None,
        change: str | None = None,
    ) -> None:
        super().__init__(_compose(what, asked=asked, there=there, change=change))
        self.asked = asked
        self.there = there
        self.change = change

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The default calls `cls(message)`, which lacks the required keywords and would compose the
        # message a second time. Errors cross processes (pytest-xdist, worker pools).
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(OffloadError, ValueError):
    """A setting cannot be used: unknown, unreadable, out of range, or at odds with another.

    Args:
        what: What is wrong with it: one sentence.
        key: The setting, as the user wrote it (`memory.gpu`, `gpu_memory`). None if unknown.
        asked: The value that was given.
        there: What it is at odds with.
        change: What to write instead.
        problems: Where several settings are wrong, one error for each; the message lists them all.

    Attributes:
        key: As given.
        place: Where it stands: the file, its line and column (`offload.toml:4:7`), or as much of this
            as is known. None if it comes from no file.
        problems: As given, a tuple. Empty where this error is itself the problem.
    """

    def __init__(
        self,
        what: str,
        *,
        key: str | None = None,
        asked: object = None,
        there: object = None,
        change: str | None = None,
        problems: Sequence[ConfigError] = (),
    ) -> None:
        named = what if key is None else f"{key}: {what}"
        super().__init__(named, asked=asked, there=there, change=change)
        self.key = key
        self.place: str | None = None
        self.problems = tuple(problems)
        listed = [str(problem).replace("\n", "\n  ") for problem in self.problems]
        self.args = ("\n  ".join([str(self.args[0]), *listed]),)

    def under(self, key: str) -> ConfigError:
        """The same problem under another name, for example a key seen from the whole file."""
        other = copy.copy(self)
        message = str(self)
        if self.key is not None:
            message = message.removeprefix(f"{self.key}: ")
        other.key = key
        other.args = (f"{key}: {message}",)
        return other

    def at(self, place: str, excerpt: str = "") -> ConfigError:
        """The same problem with where it stands.

        Args:
            place: The attribute.
            excerpt: Lines of the file, for below the message.
        """
        other = copy.copy(self)
        other.place = place
        message = f"{place}: {self}"
        other.args = (f"{message}\n{excerpt}" if excerpt else message,)
        return other


class BudgetError(OffloadError, MemoryError):
    """Something needs more memory than its budget leaves, or than the machine gave.

    Args:
        what: What needs the memory: a noun phrase, the subject of "... needs 4.3 GiB".
        requested: Bytes needed.
        available: Bytes that the budget leaves. Negative where the budget is already overdrawn.
        setting: The setting that decides, for example `memory.gpu`.
        asked: `requested`, unless something else is meant.
        there: `available`, unless something else is meant.
        change: What to do about it. Without it: raise `setting`.

    Attributes:
        requested: As given.
        available: As given.
        setting: As given.
    """

    def __init__(
        self,
        what: str,
        *,
        requested: int,
        available: int,
        setting: str,
        asked: object = None,
        there: object = None,
        change: str | None = None,
    ) -> None:
        # Late, because units raises ConfigError.
        from offload.units import gib_apart

        needs, leaves = gib_apart(requested, max(available, 0))
        change = change or f"Raise {setting}."
        super().__init__(f"{what} needs {needs}, the budget leaves {leaves}", change=change)
        self.requested = requested
        self.available = available
        self.setting = setting
        self.asked = requested if asked is None else asked
        self.there = available if there is None else there


class UnsupportedModelError(OffloadError, NotImplementedError):
    """The model is of a kind that offload refuses, because its tokens would come out wrong.

    Args:
        what: What cannot be done: one sentence.
        model_type: `config.model_type` of the model.
        reason: Why this kind is refused: what differs in it.
        asked: `model_type`, unless something else is meant.
        there: `reason`, unless something else is meant.
        change: What to do instead.

    Attributes:
        model_type: As given.
        reason: As given.
    """

    def __init__(
        self,
        what: str,
        *,
        model_type: str,
        reason: str,
        asked: object = None,
        there: object = None,
        change: str | None = None,
    ) -> None:
        what = f"{what.rstrip('.')} (model type {model_type!r}): {reason}"
        super().__init__(what, change=change)
        self.model_type = model_type
        self.reason = reason
        self.asked = model_type if asked is None else asked
        self.there = reason if there is None else there


class InputError(OffloadError, ValueError):
    """A prompt, a mask, a document or an argument of `generate` cannot be used."""


class CacheError(OffloadError, RuntimeError):
    """A cache is used with another model, after `detach`, or out of order."""


class LostHandleError(OffloadError, RuntimeError):
    """The cache took keys that our attention function never read: the tokens would be wrong."""


def _compose(what: str, *, asked: object, there: object, change: str | None) -> str:
    """One sentence, the two facts that it does not already name in brackets, then the way out."""
    sentence = what.strip().rstrip(".")
    facts = {"asked": asked, "there": there}
    unnamed = [f"{k}: {v}" for k, v in facts.items() if v is not None and not _names(sentence, v)]
    if unnamed:
        sentence += f" ({'; '.join(unnamed)})"
    if change is None:
        return f"{sentence}."
    change = change.strip()
    return f"{sentence}. {change}" if change.endswith((".", "!", "?")) else f"{sentence}. {change}."


def _names(sentence: str, fact: object) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(fact))}(?!\w)", sentence) is not None


def _rebuild(cls: type[_Error], args: tuple[Any, ...], state: Mapping[str, Any]) -> _Error:
    # Not cls.__new__: that is MemoryError's own for a BudgetError, which CPython calls unsafe here.
    error = Exception.__new__(cls, *args)
    error.__dict__.update(state)
    return error
