"""How many tokens are drafted before an exact pass looks at them? As many as make tokens come fastest, by measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from offload.scheduler.rungs import BLOCK

MOST_ROWS = 128  # of a pass, where nobody asks for more
ROW_STEP = 16  # rows of a pass are a multiple
LENGTHS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, MOST_ROWS - 1)  # drafts to choose from
FIRST = 8  # tokens of the first draft
# Share of a pass by which the draft beside it comes later: both read device memory and over PCIe. Steps of 9.9 ms took
# 11.9 on an H100 with passes beside them 82 % of the time.
SLOWED = 0.2
REST = 64  # exact tokens after which it is tried anew whether drafts pay


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


class Pace:
    """How many tokens are drafted at once: as many as make tokens come fastest, by what was measured so far."""

    def __init__(self, drafts: Drafts, *, looks_ahead: bool = False) -> None:
        """Before the first draft.

        Args:
            drafts: As asked.
            looks_ahead: Whether a draft goes on while a pass looks at it.
        """
        self._drafts = drafts
        self._looks_ahead = looks_ahead
        # Exact tokens since drafts did not pay, and how many there shall be.
        self._rested, self._rest = 0, REST
        self._last = FIRST // 2
        # Agreement of a token, from what was examined; old passes count less and less. To begin with, good.
        self._kept, self._seen = 4.0, 4.5
        self._draft_s: float | None = None  # of a token
        self._verify_s: float | None = None  # of a pass

    @property
    def gave_up(self) -> bool:
        """Whether exact tokens come faster than any draft makes them."""
        return self._drafts.is_auto and self._last == 0

    def note(self, drafted: int, accepted: int, draft_s: float | None, verify_s: float) -> None:
        """Learns from a pass.

        Args:
            drafted: Tokens that it was asked about.
            accepted: That agreed.
            draft_s: Seconds of drafting a token; None where nothing is known (none was, or a graph was captured).
            verify_s: Seconds of the pass.
        """
        if drafted:
            self._kept = 0.95 * self._kept + accepted
            self._seen = 0.95 * self._seen + min(drafted, accepted + 1)
        if draft_s is not None:
            self._draft_s = _smoothed(self._draft_s, draft_s)
        self._verify_s = _smoothed(self._verify_s, verify_s)

    def next(self) -> int:
        """Tokens of the next draft."""
        if not self._drafts.is_auto:
            return self._drafts.most
        if self.gave_up:
            self._rested += 1
            if self._rested < self._rest:
                return 0
            # What was slow may be over: one short draft says so. If not, the next one comes later.
            self._rested, self._rest = 0, 2 * self._rest
            self._last = FIRST // 2
            return min(FIRST, self._drafts.most)
        # A short answer does not wait for a long draft.
        most = min(self._drafts.most, max(FIRST, 2 * self._last))
        draft, verify = self._draft_s, self._verify_s
        if draft is None or verify is None:
            self._last = min(most, FIRST)
            return self._last
        agreement = min(self._kept / self._seen, 0.9999)

        def rate(drafted: int) -> float:
            tokens = (1 - agreement ** (drafted + 1)) / (1 - agreement)
            cost = drafted * draft + verify
            if self._looks_ahead and drafted:  # where all agree, the next draft is there by then
                all_agree = agreement ** (drafted + 1)
                cost = all_agree * max((drafted + 1) * draft, verify) + (1 - all_agree) * cost
                cost += SLOWED * verify
            return tokens / cost

        self._last = max((n for n in LENGTHS if n <= most), key=rate)
        return self._last


def _smoothed(old: float | None, new: float) -> float:
    """The mean of what was measured, new ones first; a single stall counts as a bit slower."""
    return new if old is None else 0.7 * old + 0.3 * min(new, 2 * old)
