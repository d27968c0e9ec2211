"""Which tokens stay on the device, which on the host, and which are computed again, as a batch grows? A plan in three phases.

| phase | from | K and V are |
|---|---|---|
| I | the first token | on the device, all of them |
| II | `p1` + 1 tokens | on the device and on the host, there as K and V or as the inputs of layers |
| III | `p2` + 1 tokens | there too, but the oldest ones nowhere: they are read again from their ids |

Source: Zhao et al., ALISA (ISCA 2024, arXiv 2403.17312), algorithm 2. Different here: engines overlap (the paper adds them
up), and recomputing is exact, in two forms. *Inputs*: what goes into a layer is kept instead of K and V, which are made
of it by the model's own projections; PCIe copies less and the card multiplies more. *Prefix*: the oldest tokens, whose K and
V depend on nothing else, are read again in every step. All attention is exact; every price is `cost.placed`'s.

`plan` searches all of this, for the simulator. The runtime goes by its layout, which has pages, sinks and buffers: its
phases are read off that by `course`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

from offload.errors import BudgetError, InputError
from offload.scheduler.cost import Busy, Placement, Shape, copying, placed, reading
from offload.scheduler.layout import AUTO_CHUNK, STAGING_BYTES, Layout
from offload.scheduler.profiles import Profile
from offload.units import duration, gib

# Shares of the host's tokens that may be kept as inputs. The same ones for every budget: else more of it could find less.
# A half of a 32nd off the best split costs 1 % of a step.
_SHARES = 32
_POINTS = 16  # steps that are priced of a longer answer, each for those around it
_MOST_CHANGED = 2**63 - 1


class Phase(Enum):
    """Where the tokens of a step are."""

    DEVICE = "I"
    HOST = "II"
    AGAIN = "III"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What is to be planned.

    Attributes:
        shape: Of the model.
        batch: Sequences decoded at once.
        prompt: Tokens of each.
        output: Further tokens of each; the last one is not attended to.
        device: Bytes that may be used, weights included.
        host: Bytes for tokens.
        workspace: Device bytes of everything but weights, tokens and staging: the driver's context, activations.
        staging: Bytes of one of two buffers that copies go through. They are there only if tokens leave the device.
        inputs: Whether inputs of layers may be kept instead of K and V.
        prefix: Whether the oldest tokens may be dropped and read again.
    """

    shape: Shape
    batch: int
    prompt: int
    output: int
    device: int
    host: int
    workspace: int = 0
    staging: int = STAGING_BYTES
    inputs: bool = True
    prefix: bool = True

    def __post_init__(self) -> None:
        """Refuses what asks for nothing.

        Raises:
            InputError: No sequence, prompt, output or staging, or a negative budget.
        """
        for name, least in (
            ("batch", 1),
            ("prompt", 1),
            ("output", 1),
            ("staging", 1),
            ("device", 0),
            ("host", 0),
            ("workspace", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"There is nothing to plan: {name} is too small",
                    asked=getattr(self, name),
                    there=f"at least {least}",
                    change=f"Raise {name}.",
                )

    @property
    def longest(self) -> int:
        """Tokens of a sequence that are kept at most."""
        return self.prompt + self.output - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Why something was chosen.

    Attributes:
        what: Was chosen.
        seconds: Of the whole run with it.
        instead: What else there was.
        instead_seconds: Of the whole run with that; None where it does not fit.
    """

    what: str
    seconds: float
    instead: str
    instead_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change with which a plan is there.

    Attributes:
        what: Of an `Ask` to change.
        value: The nearest that is enough.
        share: By which it changes.
    """

    what: str
    value: int
    share: float

    def __str__(self) -> str:
        """As a setting: `device = 17.25 GiB`."""
        amount = f"{self.value:,}"
        if self.what in ("device", "host", "staging"):
            amount = gib(self.value, digits=2)
        if self.what in ("inputs", "prefix"):
            amount = "on"
        return f"{self.what} = {amount}"


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """Where every token is, at every length.

    Attributes:
        ask: That is planned.
        profile: Of the machine.
        share: Of the host's tokens, those kept as inputs, in 32nds.
        prefill_s: Seconds of reading the prompts.
        decode_s: Seconds of the steps.
        decisions: With the two costs that made each.
    """

    ask: Ask
    profile: Profile
    share: int
    prefill_s: float
    decode_s: float
    decisions: tuple[Decision, ...] = ()

    @property
    def p1(self) -> int:
        """Tokens of a sequence up to which all K and V are on the device."""
        return self.capacity // self.ask.batch

    @cached_property
    def p2(self) -> int | None:
        """Tokens of a sequence up to which none is dropped; None where none ever is."""
        most = self.ask.longest
        if not self._at(most).dropped:
            return None
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._at(middle).dropped else (middle, high)
        return low

    @cached_property
    def capacity(self) -> int:
        """Tokens of all sequences together whose K and V the device holds."""
        return _capacity(self.ask)

    @cached_property
    def host_capacity(self) -> int:
        """Tokens of all sequences together that the host holds."""
        return _host_tokens(self.ask, self.share)

    @property
    def alpha(self) -> float:
        """Share of all tokens that are on the host at the end."""
        end = self._at(self.ask.longest)
        return (end.fetched + end.rebuilt) / (self.ask.batch * self.ask.longest)

    @property
    def beta(self) -> float:
        """Share of all tokens that are dropped and read again at the end."""
        return self._at(self.ask.longest).dropped / (self.ask.batch * self.ask.longest)

    @property
    def rebuilt(self) -> float:
        """Share of the host's tokens that are kept as inputs."""
        return self.share / _SHARES

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, the reading of prompts included."""
        return self.ask.batch * self.ask.output / self.seconds

    def phase(self, tokens: int) -> Phase:
        """The phase at so many tokens of a sequence."""
        return phase_of(self._at(tokens))

    def keeps_input(self, token: int) -> bool:
        """Whether what is kept of a token on the host is its inputs: evenly spread over the tokens."""
        return (token + 1) * self.share // _SHARES > token * self.share // _SHARES

    def placement(self, tokens: int, sequences: int | None = None) -> Placement:
        """From where a step gets its tokens: the device is full first, then the host holds what it can.

        Args:
            tokens: Of all sequences together.
            sequences: That are decoded; None: all.
        """
        if sequences is None:
            sequences = self.ask.batch
        away = max(0, tokens - self.capacity)
        least = max(0, away - self.host_capacity)
        where = self._with_dropped(least, tokens, away, sequences)
        most = min(away, _most_dropped(self.ask, sequences))
        if least >= most:
            return where

        def seconds(dropped: int) -> tuple[float, float]:
            at = self._with_dropped(dropped, tokens, away, sequences)
            busy = placed(at, self.ask.shape, self.profile)
            return busy.link, busy.computes

        # With each token that is dropped the link has less to do, and the card more: up to where one takes over.
        link, computes = seconds(least)
        if link <= computes:
            return where
        low, high, above = least, most, link - computes
        link, computes = seconds(most)
        below, halve = computes - link, False
        while high - low > 1:
            # Both are nearly straight lines, so the guess is close; every other time the middle, lest it creep.
            guess = low + int(
                (high - low) * (0.5 if halve or below <= 0 else above / (above + below))
            )
            middle, halve = min(max(guess, low + 1), high - 1), not halve
            link, computes = seconds(middle)
            if link > computes:
                low, above = middle, link - computes
            else:
                high, below = middle, computes - link
        # Where it makes no difference, what is kept is kept.
        best = min((max(seconds(dropped)), dropped) for dropped in (least, low, high))[1]
        return self._with_dropped(best, tokens, away, sequences)

    def step(self, tokens: int) -> Busy:
        """Price of a step at so many tokens of a sequence; what leaves the device is not in it."""
        return placed(self._at(tokens), self.ask.shape, self.profile)

    def host_bytes(self, where: Placement) -> int:
        """Bytes of a placement's tokens on the host."""
        return _host_bytes(self.ask.shape, where)

    @property
    def buffers(self) -> int:
        """Device bytes that copies go through."""
        return 0 if _fits_device(self.ask) else 2 * self.ask.staging

    def device_bytes(self, where: Placement) -> int:
        """Bytes of everything on the device in a step of a placement."""
        held = int(where.resident) * self.ask.shape.kv_bytes
        return self.ask.shape.weights + self.ask.workspace + self.buffers + held

    def timeline(self, rows: int = 8) -> str:
        """The plan as a table: the steps where something begins, and some between.

        Args:
            rows: Steps that are shown, besides those.
        """
        first, last = self.ask.prompt, self.ask.longest
        shown = {first + i * (last - first) // max(1, rows - 1) for i in range(rows)}
        begins = [p + 1 for p in (self.p1, self.p2) if p is not None]
        shown |= {tokens for tokens in begins if first < tokens <= last}
        head = ("tokens", "phase", "device", "host K V", "host inputs", "dropped", "step", "limit")
        lines: list[tuple[str, ...]] = [head]
        for tokens in sorted(shown):
            where, busy = self._at(tokens), self.step(tokens)
            each = [where.resident, where.fetched, where.rebuilt, where.dropped]
            cells = [f"{n / self.ask.batch:,.0f}" for n in each]
            lines.append(
                (f"{tokens:,}", self.phase(tokens).value, *cells, duration(busy.seconds), busy.limit)
            )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def _with_dropped(self, dropped: int, tokens: int, away: int, sequences: int) -> Placement:
        inputs = (away - dropped) * self.share // _SHARES
        return Placement(
            sequences=sequences,
            resident=tokens - away,
            fetched=away - dropped - inputs,
            rebuilt=inputs,
            dropped=dropped,
            staging=self.ask.staging,
        )

    def _at(self, tokens: int) -> Placement:
        return self.placement(tokens * self.ask.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The phases of a run of the runtime, as its layout decides them.

    Attributes:
        p1: Tokens of a sequence up to which all are on the device; None where the run ends before.
        p2: Tokens of a sequence up to which none is dropped; None where none ever is.
        host_share: Of all tokens, those on the host at the end.
        rebuilt_share: Of the tokens on the host, those kept as inputs of attention.
        dropped_share: Of all tokens, those that are dropped and read again at the end.
    """

    p1: int | None
    p2: int | None
    host_share: float
    rebuilt_share: float
    dropped_share: float

    @property
    def begins(self) -> dict[Phase, int]:
        """Tokens of a sequence with which each phase begins."""
        found = {Phase.HOST: self.p1, Phase.AGAIN: self.p2}
        return {Phase.DEVICE: 1} | {phase: p + 1 for phase, p in found.items() if p is not None}

    def phase(self, tokens: int) -> Phase:
        """The phase at so many tokens of a sequence."""
        return [phase for phase, first in self.begins.items() if first <= max(1, tokens)][-1]

    def __str__(self) -> str:
        """As a sentence: `I up to 4,671 tokens; then II, at the end 85.7% on the host`."""
        if self.p1 is None:
            return "I to the end, all on the device"
        rebuilt = f", {self.rebuilt_share:.0%} of these as inputs" if self.rebuilt_share else ""
        said = f"I up to {self.p1:,} tokens; then II, at the end {self.host_share:.1%} on the host{rebuilt}"
        if self.p2 is None:
            return said
        return (
            f"{said}; from {self.p2 + 1:,} on III, at the end {self.dropped_share:.1%} read again"
        )


def course(layout: Layout, *, tokens: int | None, prompt: int = 0) -> Course:
    """The phases of a run, by the rule of its layout.

    Args:
        layout: Of the run.
        tokens: Of a sequence at the end; None where that is not known: then the phases that a long one has.
        prompt: Of these, tokens of the prompt.
    """
    p1: int | None = layout.most_on_device
    p2: int | None = None
    if layout.host_blocks is not None:
        p2 = layout.most_on_device + layout.host_blocks * layout.page
    if tokens is None:
        host = dropped = 0
    else:
        host = layout.on_host(tokens, prompt=prompt)
        dropped = layout.dropped(tokens, prompt=prompt)
        p1 = p1 if host else None
        p2 = p2 if dropped else None
    inputs = 0.0 if layout.hidden is None else layout.hidden.tokens / layout.page
    return Course(
        p1=p1,
        p2=p2,
        host_share=host / (tokens or 1),
        rebuilt_share=inputs,
        dropped_share=dropped / (tokens or 1),
    )


def phase_of(where: Placement) -> Phase:
    """The phase of a placement."""
    if where.dropped:
        return Phase.AGAIN
    return Phase.HOST if where.fetched or where.rebuilt else Phase.DEVICE


def plan(ask: Ask, profile: Profile) -> PhasePlan:
    """The fastest plan within the budgets.

    Searched is the share of the host's tokens that are kept as inputs, over 32nds; at every length the fewest tokens
    are dropped that fit the host, or as many as make the step fastest. More budget, of either memory, is never
    predicted slower: every share gets no slower by it, and the shares are always the same. Equal plans keep more K and V.

    Args:
        ask: What is to be planned.
        profile: Of the machine.

    Raises:
        BudgetError: No plan fits; says by how much, and the smallest changes with which one does.
    """
    _require_room(ask)
    tried: dict[int, PhasePlan] = {}
    for share in range(_SHARES + 1 if _may_rebuild(ask) and not _fits_device(ask) else 1):
        if _room_on_host(ask, share):
            tried[share] = _timed(PhasePlan(
                ask=ask, profile=profile, share=share, prefill_s=0.0, decode_s=0.0
            ))  # fmt: skip
    best = min(tried.values(), key=lambda found: (found.seconds, found.share))
    if _fits_device(ask):
        return best
    fetched = tried.get(0)
    decisions = [
        Decision(
            what=f"{best.share}/{_SHARES} of the host's tokens as inputs",
            seconds=best.seconds,
            instead="all as K and V",
            instead_seconds=None if fetched is None else fetched.seconds,
        )
    ]
    if best.p2 is not None:
        kept = replace(ask, prefix=False)
        without = _room_on_host(kept, best.share)
        instead = _timed(replace(best, ask=kept)).seconds if without else None
        decisions.append(
            Decision(
                what=f"the oldest tokens dropped beyond {best.p2:,}",
                seconds=best.seconds,
                instead="all kept",
                instead_seconds=instead,
            )
        )
    return replace(best, decisions=tuple(decisions))


def grouped(ask: Ask, profile: Profile) -> PhasePlan:
    """The plan of the group of sequences whose decoding at once, group after group, is fastest for all of the batch.

    Fewer at once need less of PCIe for each and read the weights more often. Of groups that make equally many turns
    the smallest is tried.

    Args:
        ask: Of all sequences.
        profile: Of the machine.

    Returns:
        A plan whose batch is that of a group. The last group may be smaller.

    Raises:
        BudgetError: Not even one sequence has a plan.
    """
    found: list[tuple[float, int, PhasePlan]] = []
    for size in sorted({-(-ask.batch // turns) for turns in range(1, ask.batch + 1)}):
        try:
            of_group = plan(replace(ask, batch=size), profile)
        except BudgetError:
            if size == 1:  # what one has no room for, several have none for
                raise
            continue
        found.append((-(-ask.batch // size) * of_group.seconds, size, of_group))
    return min(found, key=lambda of: of[:2])[2]


def longest(ask: Ask, *, most: int = 2**24) -> int:
    """Tokens of output of the longest run that has a plan; 0 where none does."""
    return _largest(lambda output: fits(replace(ask, output=output)), most)


def fits(ask: Ask) -> bool:
    """Whether there is a plan."""
    return _missing(ask) is None


def changes(ask: Ask) -> list[Change]:
    """The smallest changes, three at most, each of which alone makes room for a plan."""
    found = [
        Change(what=what, value=1, share=0.0)
        for what in ("inputs", "prefix")
        if not getattr(ask, what) and fits(_changed(ask, what, True))
    ]
    for what in ("device", "host"):
        value: int = getattr(ask, what)
        more = _least(lambda n, of=what, now=value: fits(_changed(ask, of, now + n)))  # type: ignore[misc]
        if more is not None:
            share = more / value if value else float("inf")
            found.append(Change(what=what, value=value + more, share=share))
    for what in ("batch", "output", "prompt", "staging"):
        value = getattr(ask, what)
        less = _largest(lambda n, of=what: fits(_changed(ask, of, n)), value - 1)  # type: ignore[misc]
        if less:
            found.append(Change(what=what, value=less, share=(value - less) / value))
    return sorted(found, key=lambda change: change.share)[:3]


def prefill_seconds(where: Placement, ask: Ask, profile: Profile, *, tokens: int) -> float:
    """Seconds of reading prompts, in chunks of 4,096 tokens; products and attention beside what is copied.

    A chunk attends to all before it: what is on the host then is copied once more for each chunk, half of the end's
    on average, and what is dropped is read again. What stays on the host is copied there once.

    Args:
        where: The prompts' tokens are at the end.
        ask: Of the run.
        profile: Of the machine.
        tokens: Of all prompts together.
    """
    chunks = -(-tokens // where.sequences // AUTO_CHUNK)
    again = (chunks - 1) / 2
    held = _host_bytes(ask.shape, where)
    computes = reading(
        ask.shape.work, profile, sequences=where.sequences, tokens=tokens, passes=chunks
    )
    if where.dropped:
        busy = placed(replace(where, fetched=0, rebuilt=0, resident=0), ask.shape, profile)
        computes += again * busy.device["prefix"]
    return max(computes, copying(again * held, held, profile))


def _timed(untimed: PhasePlan) -> PhasePlan:
    """A plan with its times: of every step, or of 16 that stand for those around them."""
    ask, profile = untimed.ask, untimed.profile
    start = untimed.placement(ask.batch * ask.prompt)
    first = prefill_seconds(start, ask, profile, tokens=ask.batch * ask.prompt)
    points = min(_POINTS, ask.output)
    seconds = 0.0
    for i in range(points):
        low, high = i * ask.output // points, (i + 1) * ask.output // points
        seconds += (high - low) * untimed.step(ask.prompt + (low + high - 1) // 2).seconds
    return replace(untimed, prefill_s=first, decode_s=seconds)


def _host_bytes(shape: Shape, where: Placement) -> int:
    return int(where.fetched) * shape.kv_bytes + int(where.rebuilt) * shape.input_bytes


def _fits_device(ask: Ask) -> bool:
    """Whether no token ever leaves the device; then no buffers are there either."""
    room = ask.device - ask.shape.weights - ask.workspace
    return ask.batch * ask.longest * ask.shape.kv_bytes <= room


def _capacity(ask: Ask) -> int:
    """Tokens of all sequences that the device holds."""
    if _fits_device(ask):
        return (ask.device - ask.shape.weights - ask.workspace) // ask.shape.kv_bytes
    room = ask.device - ask.shape.weights - ask.workspace - 2 * ask.staging
    return max(0, room // ask.shape.kv_bytes)


def _may_rebuild(ask: Ask) -> bool:
    return ask.inputs and ask.shape.rebuilds


def _host_tokens(ask: Ask, share: int) -> int:
    """The most tokens that the host holds, with a share of them as inputs."""
    kv, inputs = ask.shape.kv_bytes, ask.shape.input_bytes

    def held(tokens: int) -> int:
        rebuilt = tokens * share // _SHARES
        return (tokens - rebuilt) * kv + rebuilt * inputs

    # Part of a token more or less, from rounding.
    tokens = ask.host * _SHARES // ((_SHARES - share) * kv + share * inputs) + 2
    while tokens and held(tokens) > ask.host:
        tokens -= 1
    return tokens


def _most_dropped(ask: Ask, sequences: int) -> int:
    """Tokens of all sequences that can be read again: those of one sequence within a staging buffer."""
    return sequences * (ask.staging // ask.shape.prefix_bytes) if ask.prefix else 0


def _room_on_host(ask: Ask, share: int) -> bool:
    """Whether the host, and reading again, take what the device does not hold at the end."""
    away = max(0, ask.batch * ask.longest - _capacity(ask))
    return away <= _host_tokens(ask, share) + _most_dropped(ask, ask.batch)


def _missing(ask: Ask) -> tuple[str, int, int] | None:
    """What no plan has room for: which budget, bytes needed of it at least, bytes there; None where one fits."""
    if not _fits_device(ask):
        # The newest token of every sequence is attended to from where it is made.
        least = ask.shape.weights + ask.workspace + 2 * ask.staging
        least += ask.batch * ask.shape.kv_bytes
        whole = least - 2 * ask.staging + ask.batch * (ask.longest - 1) * ask.shape.kv_bytes
        if ask.device < least:
            return "device", min(least, whole), ask.device
    if not _room_on_host(ask, _SHARES if _may_rebuild(ask) else 0):
        more = _least(
            lambda more: _room_on_host(
                replace(ask, host=ask.host + more), _SHARES if _may_rebuild(ask) else 0
            )
        )
        return "host", ask.host + (more or 0), ask.host
    return None


def _changed(ask: Ask, what: str, value: Any) -> Ask:
    return replace(ask, **{what: value})


def _require_room(ask: Ask) -> None:
    missing = _missing(ask)
    if missing is None:
        return
    what, requested, available = missing
    found = "; ".join(str(change) for change in changes(ask))
    raise BudgetError(
        f"A plan of {ask.batch} x {ask.longest:,} tokens on the {what}",
        requested=requested,
        available=available,
        setting="memory.gpu" if what == "device" else "memory.cpu",
        change=f"Any of these is enough: {found}." if found else "No single change is enough.",
    )


def _least(enough: Callable[[int], bool]) -> int | None:
    """The least number above zero that is enough; None where none is."""
    high = 1
    while not enough(high):
        if high > _MOST_CHANGED:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, where all smaller ones do; 0 where none does."""
    low, high = 0, max(0, most) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
