"""Which settings make this model, this prompt and this machine fastest, most faithful, or reach furthest?

One knob after the other, from the settings as they are: values that cannot fit or that the cost model calls hopeless are
never run, the others make the answer for real. What was set by the user is not touched. Every run is kept in a file, so
that a search that was interrupted goes on where it was. A gain is said from two further runs, not from those that were
searched: the best of many noisy runs looks better than it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from offload.config import OffloadConfig
from offload.errors import InputError, OffloadError
from offload.scheduler.rungs import RUNGS

Objective = Literal["speed", "fidelity", "context"]
Settings = dict[str, Any]

GAIN = (
    0.02  # share by which a run has to be better: they differ by about as much from one to the next
)
SAME_ERROR = 1.05  # at equal fidelity the expected error grows by no more
SAME_TIME = 1.10  # as fast as before, for the objective fidelity
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Knob:
    """A key and the values to try.

    Attributes:
        key: As in the file: "replica.rung".
        values: Those that are worth it; one may be in effect.
    """

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        prefill_s: Seconds of reading the prompt.
        token_s: Seconds of a token, compiling and capturing left out.
        error: Expected error of an attention layer's output; None where nothing is known of it.
        device_bytes: Of everything.
        effective: What keys came to that are "auto".
        failed: Why there is none of this; None where there is.
    """

    prefill_s: float = 0.0
    token_s: float = 0.0
    error: float | None = 0.0
    device_bytes: int = 0
    effective: Settings = field(default_factory=dict)
    failed: str | None = None

    def seconds(self, output: int) -> float:
        """Of the prompt and an answer of so many tokens."""
        return self.prefill_s + output * self.token_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What the cost model says of some settings.

    Attributes:
        fits: Whether they do.
        seconds: Of the prompt and the answer.
        band: Share by which that may be off.
        longest: Tokens of the longest context.
    """

    fits: bool
    seconds: float = 0.0
    band: float = 0.0
    longest: int = 0


@dataclass(kw_only=True, slots=True)
class Tuned:
    """What came of it.

    Attributes:
        settings: Keys that are better otherwise, and how.
        before: Of the settings as they were.
        after: Of the better ones; of the same runs where none is.
        longest: Of objective context: tokens before and after.
        runs: How many were made, those of an earlier search left out.
        skipped: What was not run, and why.
        is_over: Whether all values were tried; otherwise the time was up.
    """

    settings: Settings = field(default_factory=dict)
    before: Outcome = field(default_factory=Outcome)
    after: Outcome = field(default_factory=Outcome)
    longest: tuple[int, int] | None = None
    runs: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    is_over: bool = True


class Runs:
    """Outcomes of runs, in a file that is written after each."""

    def __init__(self, file: Path | None, fingerprint: Mapping[str, Any]) -> None:
        """With what the file holds, where it is of the same model, prompt, settings and machine.

        Args:
            file: Where they are kept; None for nowhere.
            fingerprint: What outcomes depend on.

        Raises:
            InputError: The file is something else.
        """
        self._file = file
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._found: dict[str, Outcome] = {}
        if file is not None and file.is_file():
            self._found = self._read(file)

    @property
    def kept(self) -> int:
        """How many there are."""
        return len(self._found)

    def get(self, settings: Settings) -> Outcome | None:
        """The outcome of some settings, where they were run."""
        return self._found.get(_name(settings))

    def add(self, settings: Settings, outcome: Outcome) -> None:
        """Keeps an outcome."""
        self._found[_name(settings)] = outcome
        if self._file is None:
            return
        data = {
            "version": _VERSION, "fingerprint": self._fingerprint,
            "runs": {name: asdict(found) for name, found in self._found.items()},
        }  # fmt: skip
        beside = self._file.with_name(self._file.name + ".new")
        beside.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(beside, self._file)  # whole, or not at all

    def _read(self, file: Path) -> dict[str, Outcome]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["version"] != _VERSION or data["fingerprint"] != self._fingerprint:
                return {}  # of something else: it begins anew
            found = {name: Outcome(**one) for name, one in data["runs"].items()}
            for outcome in found.values():
                outcome.seconds(1)
            return found
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file} does not hold the runs of a search",
                asked=str(file),
                there=str(error),
                change="Remove it, or name another file.",
            ) from error


# Keys that change no token.
_HARMLESS = frozenset({"prefill.chunk", "decode.staging", "decode.draft"})


def knobs(config: OffloadConfig, prompt: int | None = None) -> list[Knob]:
    """What can be tried beside what the user has set, in the order in which it is.

    Not whether layers are compiled: that takes longer than most answers, and `auto` does it where it pays.

    Args:
        config: As it is.
        prompt: Tokens of the prompt, where known: chunks that hold all of it are one and the same.
    """
    set_by_user = {setting.key for setting in config.settings() if setting.is_set}
    chunks = [n for n in (1024, 2048, 4096, 8192) if prompt is None or n < prompt]
    tried: dict[str, Sequence[Any]] = {"prefill.chunk": chunks}
    if config.mode != "exact" and not config.scheduler.sparsity:
        tried["replica.rung"] = tuple(rung.name for rung in RUNGS if rung.faithful)
        tried["retrieval.tokens"] = (32, 64, 128, 256)
        tried["replica.whole_layers"] = (2, 4)
    if config.mode == "verified":
        tried["decode.draft"] = (32, 64)
    tried["decode.staging"] = ("16MiB", "64MiB")
    return [Knob(key, tuple(values)) for key, values in tried.items() if key not in set_by_user]


def with_settings(config: OffloadConfig, settings: Settings) -> OffloadConfig:
    """A configuration with some keys replaced.

    Raises:
        ConfigError: They cannot be used.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = OffloadConfig.build(config, **sections)
    changed.require_usable()
    return changed


def tune(
    config: OffloadConfig,
    measure: Callable[[OffloadConfig], Outcome],
    runs: Runs,
    *,
    objective: Objective,
    output: int,
    prompt: int | None = None,
    predict: Callable[[OffloadConfig], Predicted] | None = None,
    until: float = float("inf"),
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Searches.

    Args:
        config: As it is; what it sets stays.
        measure: Makes a run.
        runs: Of this search so far.
        objective: What is to become better: seconds of the prompt and the answer at equal fidelity, the expected error
            at equal speed, or the longest context.
        output: Tokens of an answer.
        prompt: Tokens of the prompt, where known.
        predict: What the cost model says, where it knows the machine.
        until: `time.monotonic()` at which no further run is begun.
        tell: Told what happens.

    Raises:
        InputError: The longest context of a machine that nobody knows.
        BudgetError: The settings as they are do not fit.
    """
    if objective == "context" and predict is None:
        raise InputError(
            "Only a plan says how long a context may be, and no card is known here",
            asked="--objective context",
            there=None,
            change="Run it on a machine with a card.",
        )
    search = _Search(
        config, knobs(config, prompt), measure, runs, objective, output, predict, until, tell
    )
    return search.context() if objective == "context" else search.by_runs()


class _Search:
    """One search."""

    def __init__(
        self,
        config: OffloadConfig,
        tried: list[Knob],
        measure: Callable[[OffloadConfig], Outcome],
        runs: Runs,
        objective: Objective,
        output: int,
        predict: Callable[[OffloadConfig], Predicted] | None,
        until: float,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._knobs = tried
        self._measure = measure
        self._runs = runs
        self._objective = objective
        self._output = output
        self._predict = predict
        self._until = until
        self._tell = tell
        self._longest_run = 0.0
        self._found = Tuned()

    def by_runs(self) -> Tuned:
        """Of the objectives that runs decide."""
        base = self._run({})
        assert base is not None
        if base.failed is not None:
            raise InputError(
                "The settings as they are cannot be run", asked=base.failed, there=None, change=None
            )
        best: Settings = {}
        reached = base
        for knob in self._knobs:
            start = dict(best)
            for value in knob.values:
                if value == base.effective.get(knob.key):
                    continue  # it is in effect
                tried = start | {knob.key: value}
                outcome = self._promising_run(tried, base)
                if outcome is not None and self._is_better(tried, outcome, reached, base):
                    best, reached = tried, outcome
        # What is in the file counts as set when the same command reads it again: nothing before the search is over.
        self._found.settings = best if self._found.is_over else {}
        self._found.before, self._found.after = self._again(self._found.settings, base)
        return self._found

    def context(self) -> Tuned:
        """Of the longest context, which plans decide; one run shows that the settings work."""
        assert self._predict is not None
        first = self._predict(self._config).longest
        found: list[tuple[int, Settings]] = []
        best: Settings = {}
        longest = first
        for knob in self._knobs:
            start = dict(best)
            for value in knob.values:
                tried = start | {knob.key: value}
                changed = self._changed(tried)
                reach = 0 if changed is None else self._predict(changed).longest
                if reach > longest * (1 + GAIN):
                    best, longest = tried, reach
                    found.append((reach, tried))
                    self._tell(f"{_name(tried)}: {longest:,} tokens")
        self._found.longest = (first, first)
        before = self._run({})
        assert before is not None
        self._found.before = self._found.after = before
        for reach, settings in reversed(found):  # the first that works
            outcome = self._run(settings)
            if outcome is not None and outcome.failed is None:
                self._found.settings, self._found.after = settings, outcome
                self._found.longest = (first, reach)
                break
        return self._found

    def _changed(self, settings: Settings) -> OffloadConfig | None:
        """The configuration with some settings; None, and noted, where they cannot be used."""
        try:
            return with_settings(self._config, settings)
        except OffloadError as error:
            self._found.skipped[_name(settings)] = str(error)
            return None

    def _promising_run(self, settings: Settings, base: Outcome) -> Outcome | None:
        """The outcome of settings that may be better; None for those that are not run."""
        changed = self._changed(settings)
        if changed is None:
            return None
        if self._predict is not None and self._runs.get(settings) is None:
            predicted, as_it_is = self._predict(changed), self._predict(self._config)
            why = None
            if not predicted.fits:
                why = "it would not fit"
            elif as_it_is.fits and predicted.seconds > as_it_is.seconds * SAME_TIME * (
                1 + predicted.band
            ):
                why = f"{predicted.seconds:.1f} s are predicted, {as_it_is.seconds:.1f} s as it is"
            if why is not None:
                self._found.skipped[_name(settings)] = why
                return None
        return self._run(settings)

    def _run(self, settings: Settings, *, anew: bool = False) -> Outcome | None:
        """An outcome, made or remembered; None once the time is up."""
        known = None if anew else self._runs.get(settings)
        if known is not None:
            return known
        began = time.monotonic()
        if began + self._longest_run > self._until and settings:
            self._found.is_over = False
            return None
        try:
            outcome = self._measure(with_settings(self._config, settings))
        except Exception as error:
            if not settings:
                raise
            outcome = Outcome(failed=f"{type(error).__name__}: {error}")
        self._longest_run = max(self._longest_run, time.monotonic() - began)
        self._found.runs += 1
        if not anew:
            self._runs.add(settings, outcome)
        self._tell(f"{_name(settings)}: {self._said(outcome)}")
        return outcome

    def _said(self, outcome: Outcome) -> str:
        if outcome.failed is not None:
            return outcome.failed
        error = "unknown" if outcome.error is None else f"{outcome.error:.2%}"
        return (
            f"{outcome.seconds(self._output):.2f} s, {1000 * outcome.token_s:.2f} ms a token, "
            f"expected error {error}"
        )

    def _is_better(
        self, settings: Settings, outcome: Outcome, than: Outcome, base: Outcome
    ) -> bool:
        if outcome.failed is not None:
            return False
        ours, theirs = outcome.seconds(self._output), than.seconds(self._output)
        if self._objective == "speed":
            if base.error is None:  # nothing is known: only what changes no token may change
                same = _HARMLESS.issuperset(settings)
            else:
                same = outcome.error is not None and outcome.error <= SAME_ERROR * base.error
            return same and ours < theirs * (1 - GAIN)
        if outcome.error is None or ours > SAME_TIME * base.seconds(self._output):
            return False
        return than.error is None or outcome.error < than.error * (1 - GAIN)

    def _again(self, best: Settings, base: Outcome) -> tuple[Outcome, Outcome]:
        """Both once more, if there is time; settings whose gain is gone are dropped."""
        if not best:
            return base, base
        before = self._run({}, anew=True) if time.monotonic() + self._longest_run <= self._until else None  # fmt: skip
        after = self._run(best, anew=True)
        if before is None or after is None:  # not said before it was seen again
            self._found.is_over = False
            self._found.settings = {}
            return base, base
        if not self._is_better(best, after, before, before):
            self._tell("what was gained was gone in two further runs: nothing is changed")
            self._found.settings = {}
            return before, before
        return before, after


def _name(settings: Settings) -> str:
    """Settings as one word each, in one order."""
    return " ".join(f"{key}={settings[key]}" for key in sorted(settings)) or "as it is"


def tuned_toml(base: str, settings: Settings, said: Mapping[str, str]) -> str:
    """A file with some keys set, its comments and everything else as they were.

    Args:
        base: The file's text; empty for a new one.
        settings: Keys and values.
        said: What stands behind each key, as a comment.
    """
    import tomlkit

    document = tomlkit.parse(base)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section and section not in document:
            document[section] = tomlkit.table()
        table: Any = document[section] if section else document
        item = tomlkit.item(value)
        if key in said:
            item.comment(said[key])
        table[name] = item
    return tomlkit.dumps(document)
