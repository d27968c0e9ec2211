"""Did it get slower? Rows of `offload bench` against those of an earlier run, read from its JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from offload.errors import InputError

SCHEMA: Final = 1
DEVIATIONS: Final = 2.0  # that a row may be slower by
_APART: Final = ("date",)  # facts that differ between any two runs
_INPUTS: Final = ("model", "dtype", "prompt_file", "seed", "settings")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A row against the same one of an earlier run.

    Attributes:
        then: Tokens per second of the earlier run, mean.
        now: Of this one.
        deviation: Standard deviation, pooled over both; None where each ran once.
    """

    then: float
    now: float
    deviation: float | None

    @property
    def share(self) -> float:
        """How much faster it is now, as a share of then; negative where it is slower."""
        return self.now / self.then - 1

    @property
    def is_slower(self) -> bool:
        """Whether it is slower by more than two standard deviations."""
        return self.deviation is not None and self.then - self.now > DEVIATIONS * self.deviation

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "tokens_per_s": self.then, "change": self.share, "pooled_sd": self.deviation, "slower": self.is_slower,
        }  # fmt: skip


def change(then: Sequence[float], now: Sequence[float]) -> Change:
    """Two sets of measurements of one thing.

    Args:
        then: Tokens per second of each repetition, at least one.
        now: Likewise.
    """
    freedom, deviation = len(then) + len(now) - 2, None
    if freedom:
        squares = sum((rate - statistics.fmean(rates)) ** 2 for rates in (then, now) for rate in rates)  # fmt: skip
        deviation = math.sqrt(squares / freedom)
    return Change(then=statistics.fmean(then), now=statistics.fmean(now), deviation=deviation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """An earlier run.

    Attributes:
        name: Of its file.
        rates: Tokens per second of each repetition, by mode and test.
        inputs: What was asked.
        environment: Where it ran.
    """

    name: str
    rates: dict[tuple[str, str], list[float]]
    inputs: dict[str, Any]
    environment: dict[str, Any]

    def change(self, mode: str, test: str, now: Sequence[float]) -> Change | None:
        """What became of a row; None where the earlier run has none.

        Args:
            mode: Of the row.
            test: Its name.
            now: Its tokens per second, of each repetition.
        """
        then = self.rates.get((mode, test))
        return None if then is None else change(then, now)

    def differences(
        self, inputs: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> dict[str, tuple[Any, Any]]:
        """What was another then, as (then, now), by name: model, settings, versions, card.

        Args:
            inputs: Of this run.
            environment: Of this run.
        """
        names = [name for name in {**self.environment, **environment} if name not in _APART]
        pairs = {name: (self.inputs.get(name), inputs.get(name)) for name in _INPUTS}
        pairs |= {name: (self.environment.get(name), environment.get(name)) for name in names}
        settings = pairs.pop("settings")
        first, second = (given if isinstance(given, dict) else {} for given in settings)
        pairs |= {key: (first.get(key, "default"), second.get(key, "default")) for key in {**first, **second}}  # fmt: skip
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_baseline(file: Path) -> Baseline:
    """Reads what `offload bench -o json` printed.

    Args:
        file: Its file.

    Raises:
        InputError: It cannot be read, is something else, or was written by a newer version.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(file, error.strerror) from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise _bad(file, f"no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("command") != "bench":
        raise _bad(file, "no result of offload bench")
    version = found.get("schema_version")
    if version != SCHEMA:
        newer = isinstance(version, int) and version > SCHEMA
        way_out = "Update offload, or measure anew." if newer else None
        raise _bad(file, f"schema_version {version}, this offload reads {SCHEMA}", way_out)
    try:
        rates = {
            (str(row["mode"]), str(row["test"])): [s["tokens"] / s["seconds"] for s in row["samples"]]
            for row in found["rows"]
            if row["samples"]
        }  # fmt: skip
        inputs, environment = dict(found["inputs"]), dict(found["environment"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise _bad(file, f"no whole result of offload bench ({what})") from error
    return Baseline(name=file.name, rates=rates, inputs=inputs, environment=environment)


def _bad(file: Path, there: str | None, way_out: str | None = None) -> InputError:
    return InputError(
        f"{file} is no baseline",
        asked=str(file),
        there=there,
        change=way_out or "Write one: offload bench -o json > first.json",
    )
