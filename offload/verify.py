"""How do tokens come out that are the stock model's, faster than their KV streams? Drafted by mode fast, then checked.

The device path drafts L tokens. One pass over all of them, exact and with every offloaded token streamed, says what the
stock model would have chosen behind each. As many as agree are kept, and the first that does not is replaced by the
exact choice, so that what comes out is what exact steps give, at a share of their price: a pass over L + 1 tokens
streams as much as one over a single token.

    draft   x ─► d1 ─► d2 ─► … ─► dL           steps of mode fast; their rows are forgotten
    verify  x, d1, d2, …, dL ─► t1, t2, …, tL+1       one exact pass; its rows stay as far as they were right
    keep    t1 … ta+1, where d1 … da are t1 … ta

Rows of drafted tokens never leave the window, and those that stay are the exact pass's. So no error of a draft enters
the cache, and the replica is made of exact rows.

Sampling is coupled. torch draws a token as the largest of chance over noise; the noise of a position comes from the
generator's state there, which is set again before the exact choice is drawn. The state goes on from the last token that
was kept: tokens are those that exact steps draw with the same seed, whatever was drafted.

Every pass over a draft has the same number of rows, so that what a row gives does not depend on how many were drafted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from offload.cache import OffloadCache, cache_in
from offload.config import window_of_drafts
from offload.decode import Flags, ends_of, prepare, random_state, set_random_state

MOST_ROWS = 128  # of a pass, where nobody asks for more
ROW_STEP = 16  # rows of a pass are a multiple
LENGTHS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, MOST_ROWS - 1)  # drafts to choose from
FIRST = 8  # tokens of the first draft
REST = 64  # exact tokens after which it is tried anew whether drafts pay

# Processors that keep something from call to call: they may see nothing but tokens that are kept.
_STATEFUL = {
    "PrefixConstrainedLogitsProcessor",  # a function of the user's
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
}


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
        return cls(fitting[-1], True)

    @property
    def rows(self) -> int:
        """Rows of every verify pass."""
        return math.ceil((self.most + 1) / ROW_STEP) * ROW_STEP


@dataclass(slots=True)
class Tally:
    """What drafting and verifying came to.

    Attributes:
        passes: Verify passes.
        drafted: Tokens drafted.
        examined: Of these, compared: those up to the first that was rejected.
        accepted: Of these, kept.
        by_position: For each place in a draft how many tokens there were examined and kept.
        draft_s: Seconds of drafting, those of compiling and capturing left out.
        verify_s: Seconds of verify passes.
        exact_tokens: Made by single exact steps, because drafts did not pay.
        undrafted: Why nothing was drafted, or None.
    """

    passes: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0
    by_position: list[tuple[int, int]] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
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

    def __init__(self, drafts: Drafts) -> None:
        """Before the first draft.

        Args:
            drafts: As asked.
        """
        self._drafts = drafts
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
            drafted: Tokens.
            accepted: That agreed.
            draft_s: Seconds of drafting; None where they say nothing (a graph was captured).
            verify_s: Seconds of the pass.
        """
        if drafted:
            self._kept = 0.95 * self._kept + accepted
            self._seen = 0.95 * self._seen + min(drafted, accepted + 1)
            if draft_s is not None:
                self._draft_s = _smoothed(self._draft_s, draft_s / drafted)
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
            return tokens / (drafted * draft + verify)

        self._last = max((n for n in LENGTHS if n <= most), key=rate)
        return self._last


def _smoothed(old: float | None, new: float) -> float:
    """The mean of what was measured, new ones first; a single stall counts as a bit slower."""
    return new if old is None else 0.7 * old + 0.3 * min(new, 2 * old)


class _Chooser:
    """Which token follows, as transformers' loops choose it, for a draft and for the exact pass alike."""

    def __init__(
        self, processors: Any, generation: Any, ending: set[int], device: torch.device
    ) -> None:
        self.ending = ending  # tokens that end a sequence
        self._samples = bool(generation.do_sample)
        self._device = device
        self._all = processors
        self._own = [p for p in processors if _keeps_nothing(p)]
        self.is_plain = not processors and not self._samples
        self.is_stateful = len(self._own) < len(processors)
        # The generator's state before each token of the draft, and behind the last one drawn.
        self._states: list[Tensor] = []

    def begin(self) -> None:
        """A draft begins."""
        self._states = [random_state(self._device)] if self._samples else []

    def draft(self, ids: Tensor, logits: Tensor) -> Tensor:
        """A drafted token [1].

        Args:
            ids: [1, length] so far.
            logits: float32 [1, V].
        """
        for processor in self._own:
            logits = processor(ids, logits)
        token = self._pick(logits)
        if self._samples:
            self._states.append(random_state(self._device))
        return token

    def exact(self, ids: Tensor, logits: Tensor, at: int) -> Tensor:
        """The token [1] that exact steps would draw at place `at` behind the begin of the draft."""
        if self._samples and (at == 0 or not self.is_stateful):
            # Processors that draw numbers of their own are called in turn, as exact steps call them.
            set_random_state(self._states[at], self._device)
        token = self._pick(self._all(ids, logits))
        if self._samples:
            self._states[at + 1 :] = [random_state(self._device), *self._states[at + 2 :]]
        return token

    def end(self, tokens: int) -> None:
        """So many tokens are kept: the generator goes on behind them."""
        if self._samples:
            set_random_state(self._states[tokens], self._device)

    def _pick(self, scores: Tensor) -> Tensor:
        if self._samples:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


def _keeps_nothing(processor: Any) -> bool:
    kind = type(processor)
    return kind.__module__ == logits_process.__name__ and kind.__name__ not in _STATEFUL


class _Clock:
    """When the device got somewhere, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"

    def now(self) -> Any:
        if not self._on_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds; the device is past both."""
        return float(first.elapsed_time(second) / 1000 if self._on_card else second - first)


class _Passes:
    """The model's forward over tokens of one sequence."""

    def __init__(self, model: Any, inputs: dict[str, Any], mask: Tensor | None, rows: int) -> None:
        self._model = model
        self._mask = mask
        self._inputs = inputs
        self._rows = rows
        positions = inputs.get("position_ids")
        # Of the token that comes first.
        self._last = None if positions is None else positions[..., -1:]
        self._places = torch.arange(rows, device=inputs["input_ids"].device)

    def step(self, token: Tensor, length: int, ahead: int) -> Tensor:
        """Logits [1, V] behind one token.

        Args:
            token: [1].
            length: Tokens, it included.
            ahead: Tokens between the first one of the draft and it.
        """
        self._place(token[None], length)
        if self._last is not None:
            self._inputs["position_ids"] = self._last + ahead
        out = self._model(**self._inputs, return_dict=True)
        logits: Tensor = out.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def all(self, tokens: Tensor, length: int) -> Tensor:
        """Logits [n, V] behind each of n tokens; rows of no meaning fill the pass.

        Args:
            tokens: [n].
            length: Tokens, the first of them included.
        """
        n = tokens.shape[0]
        filled = torch.nn.functional.pad(tokens, (0, self._rows - n))
        self._place(filled[None], length - 1 + self._rows)
        inputs = dict(self._inputs)
        if self._last is not None:
            # Rows of no meaning are nowhere else: a model may have no further position, or ask how many there are.
            inputs["position_ids"] = self._last + self._places.clamp(max=n - 1)
        if inputs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = 0  # all
        logits: Tensor = self._model(**inputs, return_dict=True).logits[0, :n]
        return logits

    def advance(self, tokens: int) -> None:
        """The next draft begins so many tokens later."""
        if self._last is not None:
            self._last = self._last + tokens

    def _place(self, ids: Tensor, length: int) -> None:
        self._inputs["input_ids"] = ids
        if self._mask is not None:
            self._inputs["attention_mask"] = self._mask[:, :length]


class _Run:
    """One sequence that grows by what is drafted and verified."""

    def __init__(
        self, cache: OffloadCache, passes: _Passes, chooser: _Chooser, pace: Pace, tally: Tally,
        ids: Tensor, length: int, captured_s: Callable[[], float],
    ) -> None:  # fmt: skip
        """Before its first token.

        Args:
            cache: Holds all tokens but the last one.
            passes: Over it.
            chooser: Of its tokens.
            pace: How many are drafted.
            tally: Counts.
            ids: [1, N + room]: the tokens so far, and room for more.
            length: Tokens so far.
            captured_s: Seconds that went into compiling and capturing so far.
        """
        self.cache = cache
        self.ids = ids
        self.length = length
        self._passes = passes
        self._chooser = chooser
        self._pace = pace
        self._tally = tally
        self._captured_s = captured_s
        self._clock = _Clock(ids.device)

    def turn(self, most: int, ends: Tensor | None) -> Tensor:
        """The next tokens [n], n from 1 to `most`, written behind `length`, which `take` moves on.

        Args:
            most: That are wanted.
            ends: Tokens [m, 1] that end the sequence.
        """
        self._chooser.begin()
        wanted = min(self._pace.next(), most - 1)
        if not any(store.columns for store in self.cache.layer_stores):
            tokens = self._exact()  # as steps are while nothing is on the host
        elif self._pace.gave_up:
            self._tally.exact_tokens += 1
            with self.cache.streaming(True):
                tokens = self._exact()
        else:
            tokens = self._drafted(wanted, ends)
        self.ids[0, self.length : self.length + tokens.shape[0]] = tokens
        return tokens

    def take(self, tokens: int, of: int) -> None:
        """Keeps so many of the tokens that the last turn made, and goes on behind them."""
        if tokens < of:
            self.cache.crop(tokens - of)
        self._chooser.end(tokens)
        self._passes.advance(tokens)
        self.length += tokens

    def mend(self) -> None:
        """After an exception: drafted rows may be there, which are not exact, and nobody may go on from them."""
        self.cache.settle()
        if self.cache.is_open:
            self.cache.crop(min(0, self.length - 1 - self.cache.get_seq_length()))

    def _exact(self) -> Tensor:
        logits = self._passes.step(self.ids[:, self.length - 1], self.length, 0)
        return self._chooser.exact(self.ids[:, : self.length], logits, 0)

    def _drafted(self, wanted: int, ends: Tensor | None) -> Tensor:
        clock, length, capturing = self._clock, self.length, self._captured_s()
        began = clock.now()
        n = self._draft(wanted, ends)
        self.cache.crop(length - 1 - self.cache.get_seq_length())
        between = clock.now()
        logits = self._passes.all(self.ids[0, length - 1 : length + n], length).to(torch.float32)
        ended = clock.now()
        kept, targets = _compare(self._chooser, self.ids, logits, length, n)
        self.cache.crop(length - 1 + kept - self.cache.get_seq_length())
        draft_s, verify_s = clock.between(began, between), clock.between(between, ended)
        captured_s = self._captured_s() - capturing
        self._pace.note(n, kept - 1, None if captured_s else draft_s, verify_s)
        self._tally.add(n, kept - 1)
        self._tally.draft_s += draft_s - captured_s
        self._tally.verify_s += verify_s
        return targets[:kept]

    def _draft(self, wanted: int, ends: Tensor | None) -> int:
        """Drafts tokens behind `length`, until one ends the sequence; says how many."""
        token, flags = self.ids[:, self.length - 1], Flags(self.ids, None)
        for at in range(wanted):
            so_far = self.length + at
            logits = self._passes.step(token, so_far, at)
            token = self._chooser.draft(self.ids[:, :so_far], logits)
            self.ids[:, so_far] = token
            # One step late, so that the device never waits.
            if ends is not None and flags.send((token == ends).any(0), token):
                return at
        return wanted


def decode_verified(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    tally: Tally,
    drafts: Drafts,
    captured_s: Callable[[], float],
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search and sampling with the tokens of transformers' own loop over the stock cache.

    Args:
        model: Attached; its cache has a device path in every layer and can be cropped.
        input_ids: [1, N], of which the cache holds all but the last.
        logits_processor: Of transformers, as prepared by `generate`; likewise the further ones.
        stopping_criteria: With a longest length.
        generation_config: As merged.
        tally: Counts.
        drafts: How long they are.
        captured_s: Seconds that went into compiling and capturing so far.
        streamer: Gets tokens once they are verified.
        synced_gpus: Must be False.
        **model_kwargs: The cache, and attention_mask and position_ids where the model takes them.

    Returns:
        [1, N + new], as `generate` returns it.
    """
    assert not synced_gpus
    assert input_ids.shape[0] == 1
    cache, length = cache_in(model_kwargs), input_ids.shape[1]
    longest = int(stopping_criteria.max_length)
    ends, others = ends_of(stopping_criteria, input_ids.device)
    ending = set() if ends is None else set(ends.flatten().tolist())
    chooser = _Chooser(logits_processor, generation_config, ending, input_ids.device)
    if others and chooser.is_stateful:
        # Whether a token is the last is only known behind it.
        drafts = Drafts(0, False)
        tally.undrafted = "processors that keep something, beside stopping criteria"
    room = max(longest, length) + drafts.rows
    ids, mask, inputs = prepare(model, input_ids, room, model_kwargs)
    assert inputs["input_ids"].shape[1] == 1
    passes = _Passes(model, inputs, mask, drafts.rows)
    run = _Run(cache, passes, chooser, Pace(drafts), tally, ids, length, captured_s)
    over = False
    try:
        while not over and run.length < longest:
            tokens = run.turn(longest - run.length, ends).cpu()
            taken = 0
            while taken < tokens.shape[0] and not over:
                taken += 1
                so_far = run.length + taken
                over = so_far >= longest or int(tokens[taken - 1]) in ending
                if others:
                    over = bool(stopping_criteria(ids[:, :so_far], None).all())
                if streamer is not None:
                    streamer.put(tokens[taken - 1 : taken])
            run.take(taken, tokens.shape[0])  # an end may be among them
    except BaseException:
        run.mend()
        raise
    if streamer is not None:
        streamer.end()
    return ids[:, : run.length].contiguous()


def _compare(
    chooser: _Chooser, ids: Tensor, logits: Tensor, length: int, drafted: int
) -> tuple[int, Tensor]:
    """How many tokens are kept, the exact one behind them included, and those tokens.

    Args:
        chooser: Of the run.
        ids: [1, ...]: the draft stands at [length, length + drafted).
        logits: float32 [drafted + 1, V] behind the token at length - 1 and behind each of the draft.
        length: Tokens before the draft.
        drafted: Tokens of the draft.

    Returns:
        Tokens that are kept, and the exact choices [at most drafted + 1], those behind the last kept one of no meaning.
    """
    draft = ids[0, length : length + drafted]
    if chooser.is_plain:
        targets = logits.argmax(dim=-1)
    else:
        chosen: list[Tensor] = []
        for at in range(drafted + 1):
            chosen.append(chooser.exact(ids[:, : length + at], logits[at : at + 1], at))
            # What keeps something from call to call must not see a token that is not kept.
            if chooser.is_stateful and at < drafted:
                token = int(chosen[-1])
                if token != int(draft[at]) or token in chooser.ending:
                    break
        targets = torch.cat(chosen)
    agree = targets[:drafted] == draft[: targets.shape[0]]
    return min(int(agree.long().cumprod(0).sum()) + 1, targets.shape[0]), targets
