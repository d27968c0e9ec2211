"""How do tokens come out that are the stock model's, faster than their KV streams? Drafted by mode fast, then checked.

The device path drafts L tokens. One pass over all of them, exact and with every offloaded token streamed, says what the
stock model would have chosen behind each. As many as agree are kept, and the first that does not is replaced by the
exact choice, so that what comes out is what exact steps give, at a share of their price: a pass over L + 1 tokens
streams as much as one over a single token.

    draft   x ─► d1 ─► d2 ─► … ─► dL ─► e1 ─► e2 ─► …      steps of mode fast
    verify       x, d1, d2, …, dL ─► t1, t2, …, tL+1       one exact pass, beside the steps from dL on
    keep         t1 … ta+1, where d1 … da are t1 … ta

The draft goes on while a pass looks at it, and the pass over x, d1 … dL also judges e1: where all agree, e1 is the next
x, and what has been drafted behind it is the next draft. Where they do not, all that was drafted behind is dropped.

Rows of drafted tokens never leave the window. Those of the pass are kept beside it (`offload.shadow`) and put in the
place of the draft's once they are known to be right. So no error of a draft enters the cache, and the replica is made
of exact rows.

Sampling is coupled. torch draws a token as the largest of chance over noise; the noise of a position comes from the
generator's state there, which is set again before the exact choice is drawn. The state goes on from the last token that
was kept: tokens are those that exact steps draw with the same seed, whatever was drafted.

Every pass over a draft has the same number of rows, so that what a row gives does not depend on how many were drafted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from offload.cache import CACHE, OffloadCache, cache_in
from offload.decode import (
    CapturedStep,
    Flags,
    ends_of,
    keeps_nothing,
    prepare,
    random_state,
    set_random_state,
)
from offload.scheduler.pace import Drafts, Pace, Tally
from offload.shadow import Shadow

QUEUED = 2  # steps that the device has not begun: so many are in vain when a draft is dropped


class _Chooser:
    """Which token follows, as transformers' loops choose it, for a draft and for the exact pass alike."""

    def __init__(
        self, processors: Any, generation: Any, ending: set[int], device: torch.device
    ) -> None:
        self.ending = ending  # tokens that end a sequence
        self._samples = bool(generation.do_sample)
        self._device = device
        self._all = processors
        self._own = [p for p in processors if keeps_nothing(p)]
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
        """So many tokens are kept, and none that was drafted behind: the generator goes on there."""
        if self._samples:
            set_random_state(self._states[tokens], self._device)

    def go_on(self, tokens: int) -> None:
        """So many tokens are kept, and all that was drafted behind is the begin of the next draft."""
        if self._samples:
            del self._states[:tokens]
            set_random_state(self._states[-1], self._device)

    def _pick(self, scores: Tensor) -> Tensor:
        if self._samples:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


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
        self._inputs |= self._placed(token[None], length)
        if self._last is not None:
            self._inputs["position_ids"] = self._last + ahead
        out = self._model(**self._inputs, return_dict=True)
        logits: Tensor = out.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def of_all(self, tokens: Tensor, length: int, cache: OffloadCache) -> dict[str, Any]:
        """The inputs of a pass over several tokens; rows of no meaning fill it.

        Args:
            tokens: [n].
            length: Tokens, the first of them included.
            cache: That the pass is made over.
        """
        n = tokens.shape[0]
        filled = torch.nn.functional.pad(tokens, (0, self._rows - n))
        inputs = {**self._inputs, CACHE: cache, **self._placed(filled[None], length - 1 + self._rows)}  # fmt: skip
        if self._last is not None:
            # Rows of no meaning are nowhere else: a model may have no further position, or ask how many there are.
            inputs["position_ids"] = self._last + self._places.clamp(max=n - 1)
        if inputs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = 0  # all
        return inputs

    def advance(self, tokens: int) -> None:
        """The next draft begins so many tokens later."""
        if self._last is not None:
            self._last = self._last + tokens

    def _placed(self, ids: Tensor, length: int) -> dict[str, Any]:
        """The inputs that say which tokens come, `length` of them with those before."""
        mask = {} if self._mask is None else {"attention_mask": self._mask[:, :length]}
        return {"input_ids": ids, **mask}


class _Checker:
    """Makes exact passes, one at a time: beside the steps of a draft, or, where that is not wanted, at once.

    Launching a pass takes as long as some steps take, so it is launched by a thread of its own, on its own stream.
    """

    def __init__(
        self, model: Any, device: torch.device, stream: torch.cuda.Stream | None, *, beside: bool
    ) -> None:
        """With no pass under way.

        Args:
            model: Attached.
            device: Its device.
            stream: For passes beside steps; None on a CPU.
            beside: Whether they are.
        """
        self._model = model
        self._device = device
        self._clock = _Clock(device)
        self._thread = ThreadPoolExecutor(1, "offload-verify") if beside else None
        self._stream = stream if beside else None
        self._pass: Future[Tensor] | None = None
        self._times: list[Any] = []
        self._inputs: dict[str, Any] = {}

    def begin(self, inputs: dict[str, Any]) -> None:
        """Begins a pass.

        Args:
            inputs: Of the model's forward, for one sequence.
        """
        self._inputs = inputs  # held until the pass is over: it is on another stream
        self._times = []
        if self._thread is None:
            logits, over = self._run(inputs), Future[Tensor]()
            over.set_result(logits)
            self._pass = over
            return
        launched = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._pass = self._thread.submit(self._run_beside, inputs, launched, _Modes(self._device))

    def is_over(self) -> bool:
        """Whether the result is there."""
        assert self._pass is not None
        if not self._pass.done():
            return False
        return self._stream is None or self._pass.exception() is not None or self._times[1].query()

    def result(self) -> Tensor:
        """Logits [rows, V] of the pass; the current stream waits for them."""
        assert self._pass is not None
        logits = self._pass.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._times[1])
        return logits

    def join(self) -> None:
        """Waits until the pass is launched, however that ends."""
        if self._pass is not None:
            with suppress(Exception):
                self._pass.result()

    def seconds(self) -> float:
        """That the pass took; it is over."""
        return self._clock.between(*self._times)

    def close(self) -> None:
        """Ends the thread, and waits until the device has done what it launched: its memory is given back then."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def _run(self, inputs: dict[str, Any]) -> Tensor:
        self._times.append(self._clock.now())
        logits: Tensor = self._model(**inputs, return_dict=True).logits[0]
        self._times.append(self._clock.now())
        return logits

    def _run_beside(self, inputs: dict[str, Any], launched: Any, modes: _Modes) -> Tensor:
        with modes.entered(), torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(launched)
            return self._run(inputs)


class _Modes:
    """Those modes of torch that belong to a thread, as they are where this is made."""

    def __init__(self, device: torch.device) -> None:
        self._learns, self._infers = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._index = torch.cuda.current_device() if device.type == "cuda" else -1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within, another thread has them."""
        with (
            torch.cuda.device(self._index),
            torch.inference_mode(self._infers),
            torch.set_grad_enabled(self._learns),
        ):
            yield


class _Run:
    """One sequence that grows by what is drafted and verified."""

    def __init__(
        self, cache: OffloadCache, passes: _Passes, chooser: _Chooser, pace: Pace, tally: Tally,
        ids: Tensor, length: int, shadow: Shadow, checker: _Checker, drafts: Drafts, captured: CapturedStep | None,
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
            shadow: Of the cache.
            checker: Makes passes.
            drafts: How long they are.
            captured: What makes steps, where they are captured.
        """
        self.cache = cache
        self.ids = ids
        self.length = length
        self._passes = passes
        self._chooser = chooser
        self._pace = pace
        self._tally = tally
        self._shadow = shadow
        self._checker = checker
        self._most = drafts.most
        self._captured = captured
        self._clock = _Clock(ids.device)
        self._ahead = 0  # tokens drafted behind `length`
        self._ended = False  # the last of them ends the sequence
        self._lives = False  # those behind what the last turn made are the next draft
        self._flags = Flags(ids, None)
        self._steps: deque[torch.cuda.Event] = deque()  # that are queued

    def turn(self, most: int, ends: Tensor | None) -> Tensor:
        """The next tokens [n], n from 1 to `most`, written behind `length`, which `take` moves on.

        Args:
            most: That are wanted.
            ends: Tokens [m, 1] that end the sequence.
        """
        wanted = self._pace.next()
        on_host = any(store.columns for store in self.cache.layer_stores)
        drafts, n, limit = on_host and not self._pace.gave_up, 0, 0
        if drafts:
            n = min(max(wanted.drafted, self._ahead), self._most, most - 1)
            limit = min(n + 1 + self._most, most - 1) if wanted.goes_on and self._most else n
            self._make_way(limit)
            drafts = self._steps_draft()
        if drafts:
            tokens = self._drafted(n, limit, ends)
        else:
            if self._ahead:  # of a draft that will not be looked at
                self._tally.dropped += self._ahead
                self._chooser.end(0)
                self._drop()
            self._chooser.begin()
            self._lives = False
            if on_host:
                self._tally.exact_tokens += 1
                with self.cache.streaming(True):
                    tokens = self._timed_exact()
            else:
                tokens = self._exact()  # as steps are while nothing is on the host
        self.ids[0, self.length : self.length + tokens.shape[0]] = tokens
        return tokens

    def take(self, tokens: int, *, goes_on: bool) -> None:
        """Keeps so many of the tokens that the last turn made, and goes on behind them.

        Args:
            tokens: To keep: all, if further ones are wanted.
            goes_on: Whether they are.
        """
        self._passes.advance(tokens)
        self.length += tokens
        if self._lives and goes_on:
            self._ahead -= tokens
            self._chooser.go_on(tokens)
            return
        self._chooser.end(tokens)
        if self._lives:
            self._tally.dropped += self._ahead - tokens
        self._drop()
        self._lives = False

    def mend(self) -> None:
        """After an exception: drafted rows may be there, which are not exact, and nobody may go on from them."""
        try:
            self._checker.close()
            self.cache.settle()
            if self.cache.is_open:
                self._drop()
        except BaseException:  # a second interrupt: nobody knows which rows are exact
            self.cache.close("it was interrupted while it was being mended")
            raise

    def _drop(self) -> None:
        """Forgets what was drafted, and every row but those of exact passes."""
        self._ahead, self._ended = 0, False
        self._flags.forget()
        self.cache.crop(min(0, self.length - 1 - self.cache.get_seq_length()))

    def _exact(self) -> Tensor:
        logits = self._passes.step(self.ids[:, self.length - 1], self.length, 0)
        return self._chooser.exact(self.ids[:, : self.length], logits, 0)

    def _timed_exact(self) -> Tensor:
        began = self._clock.now()
        token = self._exact()
        ended = self._clock.now()
        token.cpu()  # the device is past both
        self._pace.note_exact(self._clock.between(began, ended))
        return token

    def _steps_draft(self) -> bool:
        """Whether steps go by the device path. Those that stream would take turns with a pass at the same buffers."""
        for store in self.cache.layer_stores:
            reason = "no replica" if store.path is None else store.path.why_streamed(store.columns)
            if reason is not None:
                self._tally.undrafted = f"steps that stream every token ({reason})"
                return False
        return True

    def _drafted(self, n: int, limit: int, ends: Tensor | None) -> Tensor:
        """As `turn`, by a draft and a pass over it.

        Args:
            n: Tokens to draft before the pass, those that are drafted already among them.
            limit: Tokens drafted when the pass is waited for, at most.
            ends: As of `turn`.
        """
        clock, length, capturing = self._clock, self.length, self._captured_s
        began = clock.now()
        if not self._ahead:
            self._chooser.begin()
        before = self._ahead
        while self._ahead < n and not self._ended:
            self._draft(ends)
        first, n = self._ahead - before, min(n, self._ahead)
        self._shadow.look(length - 1)
        tokens = self.ids[0, length - 1 : length + n]
        launched = drafted = clock.now()
        self._checker.begin(self._passes.of_all(tokens, length, self._shadow.cache))
        while self._ahead < limit and not self._ended and not self._checker.is_over():
            self._draft(ends)
            drafted = clock.now()
        more = self._ahead - before - first
        logits = self._checker.result()[: n + 1].to(torch.float32)
        ended = clock.now()
        compared = min(self._ahead, n + 1)
        agreed, targets = _compare(self._chooser, self.ids, logits, length, compared)
        kept = min(min(agreed, n) + 1, targets.shape[0])
        self._shadow.commit(self.ids[:, length - 1 : length - 1 + kept])
        self._lives = agreed == n + 1
        compiled_s = self._captured_s - capturing
        draft_s = clock.between(began, drafted)  # the device is past all: tokens were compared
        verify_s = self._checker.seconds()
        self._pace.note(
            compared, agreed, verify_s, beside=more > 0,
            step_s=clock.between(began, launched) / first if first and not compiled_s else None,
            step_beside_s=clock.between(launched, drafted) / more if more and not compiled_s else None,
        )  # fmt: skip
        self._tally.add(compared, agreed)
        self._tally.dropped += 0 if self._lives else self._ahead - compared
        self._tally.draft_s += draft_s - compiled_s
        self._tally.verify_s += verify_s
        self._tally.wait_s += clock.between(drafted, ended)
        return targets[:kept]

    @property
    def _captured_s(self) -> float:
        return 0.0 if self._captured is None else self._captured.seconds

    def _make_way(self, ahead: int) -> None:
        """Sees to it that nothing leaves the window while so many tokens are drafted, none of which is exact."""
        first = self.length - 1
        rows = first + ahead + 2  # up to the one too many of a draft that ended
        self.cache.make_way(rows - self.cache.get_seq_length(), first)

    def _draft(self, ends: Tensor | None) -> None:
        """Drafts one token, or finds that the one before ended the sequence."""
        so_far = self.length + self._ahead
        if len(self._steps) == QUEUED:
            self._steps.popleft().synchronize()
        logits = self._passes.step(self.ids[:, so_far - 1], so_far, self._ahead)
        token = self._chooser.draft(self.ids[:, :so_far], logits)
        self.ids[:, so_far] = token
        if token.is_cuda:
            self._steps.append(torch.cuda.current_stream(token.device).record_event())
        # One step late, so that the device never waits.
        if ends is not None and self._flags.send((token == ends).any(0), token):
            self._ended = True
        else:
            self._ahead += 1


def decode_verified(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    tally: Tally,
    drafts: Drafts,
    captured: CapturedStep | None,
    beside: torch.cuda.Stream | None,
    looks_ahead: bool,
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
        captured: What makes steps of one token, where they are captured.
        beside: The stream of passes beside steps; None on a CPU.
        looks_ahead: Whether a draft goes on, in this thread, while a pass looks at it in another.
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
        drafts, looks_ahead = Drafts(0, False), False
        tally.undrafted = "processors that keep something, beside stopping criteria"
    room = max(longest, length) + drafts.rows
    ids, mask, inputs = prepare(model, input_ids, room, model_kwargs)
    assert inputs["input_ids"].shape[1] == 1
    # What autocast has cast is kept for all threads, in no order: one thread then.
    looks_ahead = looks_ahead and not torch.is_autocast_enabled(input_ids.device.type)
    visible = None if mask is None else mask[:, :length].bool()
    for store in cache.layer_stores:
        if store.path is not None:  # whether steps draft depends on the padding
            store.path.can_step(
                None if visible is None or bool(visible.all()) else visible, store.columns
            )
    checker = _Checker(model, input_ids.device, beside, beside=looks_ahead)
    if captured is not None:
        captured.before_capture = checker.join
    run = _Run(
        cache, _Passes(model, inputs, mask, drafts.rows), chooser, Pace(drafts, looks_ahead=looks_ahead), tally,
        ids, length, Shadow(cache, drafts.rows), checker, drafts, captured,
    )  # fmt: skip
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
            run.take(taken, goes_on=not over)  # an end may be among them
    except BaseException:
        run.mend()
        raise
    finally:
        checker.close()
    if streamer is not None:
        streamer.end()
    return ids[:, : run.length].contiguous()


def _compare(
    chooser: _Chooser, ids: Tensor, logits: Tensor, length: int, drafted: int
) -> tuple[int, Tensor]:
    """How many drafted tokens agree with the exact ones, and those.

    Args:
        chooser: Of the run.
        ids: [1, ...]: the draft stands at [length, length + drafted).
        logits: float32 [n, V] behind the token at length - 1 and behind further ones of the draft.
        length: Tokens before the draft.
        drafted: Tokens to compare, at most n.

    Returns:
        Tokens that agree, up to the first that does not, and the exact choices [at most n], those behind the first
        that was not drafted of no meaning.
    """
    draft = ids[0, length : length + drafted]
    if chooser.is_plain:
        targets = logits.argmax(dim=-1)
    else:
        chosen: list[Tensor] = []
        for at in range(logits.shape[0]):
            chosen.append(chooser.exact(ids[:, : length + at], logits[at : at + 1], at))
            # What keeps something from call to call must not see a token that is not kept.
            if chooser.is_stateful and at < drafted:
                token = int(chosen[-1])
                if token != int(draft[at]) or token in chooser.ending:
                    break
        targets = torch.cat(chosen)
    agree = targets[:drafted] == draft[: targets.shape[0]]
    return int(agree.long().cumprod(0).sum()), targets
