"""How many tokens are drafted before an exact pass looks at them? As many as make tokens come fastest, by measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from offload.scheduler.rungs import BLOCK

MOST_ROWS = 128  # of a pass, where nobody asks for more
ROW_STEP = 16  # rows of a pass are a multiple
LENGTHS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, MOST_ROWS - 1)  # drafts to choose from
FIRST = 8  # tokens of the first draft
REST, MOST_REST = (
    64,
    256,
)  # exact tokens after which it is tried anew whether drafts pay, at first and at most
TRIAL = 3  # exact tokens that show what one takes
# What was not measured is tried where it would win if it were as fast as it may be: an exact token a third of a pass
# that steps are not beside, which takes half as long as one that they are. What was, is after so many turns.
_BEST_EXACT, _BEST_ALONE, _OLD = 3.0, 2.0, 48
_WINS = 1.1


def window_of_drafts(draft: int) -> int:
    """The smallest window, in tokens, for drafts of so many: two of them, the token before, and a page."""
    return 2 * draft + 1 + BLOCK


@dataclass(frozen=True, slots=True)
class Drafts:
    """How long drafts are.

    Attributes:
        most: Tokens.
        is_auto: Whether they may be shorter, as is fastest.
    """

    most: int
    is_auto: bool

    @classmethod
    def of(cls, asked: int | str, window: int | None = None) -> Drafts:
        """What a config asks for.

        Args:
            asked: Tokens, or "auto".
            window: Tokens of the window that has to hold drafts, where it is known.
        """
        if not isinstance(asked, str):
            return cls(asked, False)
        fitting = [n for n in LENGTHS if window is None or window_of_drafts(n) <= window]
        return cls(fitting[-1] if fitting else 0, True)  # a short run is all window

    @property
    def rows(self) -> int:
        """Rows of every verify pass."""
        return math.ceil((self.most + 1) / ROW_STEP) * ROW_STEP


@dataclass(slots=True)
class Tally:
    """What drafting and verifying came to.

    Attributes:
        passes: Verify passes.
        drafted: Tokens drafted that a pass looked at.
        examined: Of these, compared: those up to the first that was rejected.
        accepted: Of these, kept.
        dropped: Further tokens drafted, behind one that was rejected, which no pass looked at.
        by_position: For each place in a draft how many tokens there were examined and kept.
        draft_s: Seconds of drafting, those of compiling and capturing left out.
        verify_s: Seconds of verify passes.
        wait_s: Of these, seconds in which nothing was drafted.
        exact_tokens: Made by single exact steps, because drafts did not pay.
        undrafted: Why nothing was drafted, or None.
    """

    passes: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0
    dropped: int = 0
    by_position: list[tuple[int, int]] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    wait_s: float = 0.0
    exact_tokens: int = 0
    undrafted: str | None = None

    def add(self, drafted: int, accepted: int) -> None:
        """Counts a pass.

        Args:
            drafted: Tokens that it compared, at most.
            accepted: That agreed.
        """
        self.passes += 1
        self.drafted += drafted
        examined = min(drafted, accepted + 1)
        self.examined += examined
        self.accepted += accepted
        for at in range(examined):
            if at == len(self.by_position):
                self.by_position.append((0, 0))
            seen, kept = self.by_position[at]
            self.by_position[at] = (seen + 1, kept + (at < accepted))


@dataclass(frozen=True, slots=True)
class Turn:
    """What comes next.

    Attributes:
        drafted: Tokens to draft before a pass; 0 for an exact token instead.
        goes_on: Whether the draft goes on beside the pass.
    """

    drafted: int
    goes_on: bool


@dataclass(slots=True)
class _Times:
    """Seconds, while no pass is under way and while one is; None where nothing was measured."""

    alone: float | None = None
    beside: float | None = None

    def note(self, seconds: float | None, *, beside: bool) -> None:
        if seconds is None:
            return
        if beside:
            self.beside = _smoothed(self.beside, seconds)
        else:
            self.alone = _smoothed(self.alone, seconds)

    def of(self, *, beside: bool) -> float | None:
        """As measured, or as measured in the other case."""
        first, second = (self.beside, self.alone) if beside else (self.alone, self.beside)
        return second if first is None else first


class Pace:
    """How many tokens are drafted at once: as many as make tokens come fastest, by what was measured so far."""

    def __init__(self, drafts: Drafts, *, looks_ahead: bool = False) -> None:
        """Before the first draft.

        Args:
            drafts: As asked.
            looks_ahead: Whether a draft may go on while a pass looks at it; where lengths are asked for, it does.
        """
        self._drafts = drafts
        self._looks_ahead = looks_ahead
        self._resting = 0  # exact tokens to come
        self._rest = REST
        self._tries = False  # those are to show what one takes
        self._since_beside = 0  # turns since a draft went on beside its pass
        self._last = FIRST // 2
        # Agreement of a token, from what was examined; old passes count less and less. To begin with, good.
        self._kept, self._seen = 4.0, 4.5
        self._step, self._pass = _Times(), _Times()
        self._exact_s: float | None = None

    @property
    def gave_up(self) -> bool:
        """Whether exact tokens come faster than any draft makes them."""
        return self._drafts.is_auto and self._last == 0

    def note(
        self,
        drafted: int,
        accepted: int,
        verify_s: float,
        *,
        step_s: float | None,
        step_beside_s: float | None = None,
        beside: bool = False,
    ) -> None:
        """Learns from a pass.

        Args:
            drafted: Tokens that it was asked about.
            accepted: That agreed.
            verify_s: Seconds of the pass.
            step_s: Seconds of drafting a token before it; None where nothing is known (none was, or a graph was
                captured).
            step_beside_s: Likewise, beside it.
            beside: Whether the draft went on.
        """
        self._since_beside = 0 if beside else self._since_beside + 1
        if drafted:
            self._kept = 0.95 * self._kept + accepted
            self._seen = 0.95 * self._seen + min(drafted, accepted + 1)
        self._step.note(step_s, beside=False)
        self._step.note(step_beside_s, beside=True)
        self._pass.note(verify_s, beside=beside)

    def note_exact(self, seconds: float) -> None:
        """Learns from an exact token.

        Args:
            seconds: That it took.
        """
        self._exact_s = _smoothed(self._exact_s, seconds)

    def next(self) -> Turn:
        """What comes next."""
        if not self._drafts.is_auto:
            return Turn(self._drafts.most, self._looks_ahead)
        if self._resting:
            self._resting -= 1
            return Turn(0, False)
        if self.gave_up and not self._tries:
            # What was slow may be over: one short draft says so, more loudly than old ones. If not, the next comes later.
            self._last = FIRST // 2
            self._kept, self._seen = 0.2 * self._kept, 0.2 * self._seen
            return Turn(min(FIRST, self._drafts.most), False)
        self._tries = False
        # A short answer does not wait for a long draft.
        most = min(self._drafts.most, max(FIRST, 2 * self._last))
        if self._step.of(beside=False) is None or self._pass.of(beside=False) is None:
            self._last = min(most, FIRST)
            return Turn(self._last, self._looks_ahead)
        beside = (False, True) if self._looks_ahead else (False,)
        turns = [Turn(n, goes_on) for n in LENGTHS if n <= most for goes_on in beside if n or not goes_on]  # fmt: skip
        best = max(turns, key=self._rate)
        hoped = max(turns, key=self._best_rate)
        if self._best_rate(hoped) > _WINS * self._rate(best):
            best = hoped
            self._tries = not best.drafted
        if self._tries:
            self._resting = TRIAL - 1
        elif best.drafted:
            self._rest = REST
        else:
            self._resting, self._rest = self._rest - 1, min(MOST_REST, 2 * self._rest)
        self._last = best.drafted
        return best

    @property
    def _agreement(self) -> float:
        return min(self._kept / self._seen, 0.9999)

    def _tokens(self, drafted: int) -> float:
        """Of a draft and a pass, in the mean."""
        return (1 - self._agreement ** (drafted + 1)) / (1 - self._agreement)

    def _rate(self, turn: Turn) -> float:
        """Tokens per second, as far as was measured."""
        exact = self._pass.of(beside=False) if self._exact_s is None else self._exact_s
        return self._rate_with(turn, self._step, self._pass, exact)

    def _best_rate(self, turn: Turn) -> float:
        """Tokens per second, if what was not measured lately is as fast as it may be."""
        step, passes, exact = self._step, self._pass, self._exact_s
        alone, taken = passes.of(beside=False), passes.of(beside=True)
        assert alone is not None
        assert taken is not None
        if passes.alone is None:
            passes = _Times(alone=taken / _BEST_ALONE, beside=taken)
        if self._since_beside >= _OLD:
            step, passes = _Times(alone=step.of(beside=False)), _Times(alone=alone)
        if exact is None:
            exact = alone / _BEST_EXACT
        return self._rate_with(turn, step, passes, exact)

    def _rate_with(self, turn: Turn, steps: _Times, passes: _Times, exact: float | None) -> float:
        step, alone = steps.of(beside=False), passes.of(beside=False)
        assert step is not None
        assert alone is not None
        assert exact is not None
        if not turn.drafted:
            return 1 / exact
        if not turn.goes_on:
            return self._tokens(turn.drafted) / (turn.drafted * step + alone)
        beside, taken = steps.of(beside=True), passes.of(beside=True)
        assert beside is not None
        assert taken is not None
        # Where all agree, the next draft is there as far as the pass took.
        more = max(0.0, turn.drafted + 1 - taken / beside) * step
        all_agree = self._agreement ** (turn.drafted + 1)
        cost = taken + all_agree * more + (1 - all_agree) * turn.drafted * step
        return self._tokens(turn.drafted) / cost


def _smoothed(old: float | None, new: float) -> float:
    """The mean of what was measured, new ones first.

    A single stall counts as a bit slower. The first measurement may be one, of compiling: less than half is believed.
    """
    if old is None or new < old / 2:
        return new
    return 0.7 * old + 0.3 * min(new, 2 * old)
