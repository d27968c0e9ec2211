"""How does a model generate under a memory budget? `attach` gives it our attention; `Runtime` does the rest."""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from offload import sensitivity
from offload.budget import Budgets
from offload.cache import (
    CACHE,
    CACHE_NAMES,
    OffloadCache,
    cache_in,
    require_ours,
    stock_layers,
)
from offload.caches import CacheMaker
from offload.config import OffloadConfig
from offload.decisions import RUN_MS, TOKEN_MS, Choice
from offload.decode import captured_steps, decode
from offload.demand import ladder_rungs
from offload.errors import CacheError, InputError, UnsupportedModelError
from offload.hardware import device_memory
from offload.model import (
    ModelShape,
    attention_names,
    examine,
    our_attention,
    refuse_unsupported,
    restore_attention,
    text_config,
)
from offload.parts import Part, device_parts
from offload.prefill import Progress, prefill, progress_bar
from offload.prompt import (
    Prompt,
    check_arguments,
    first_forward_skips_cached,
    read_prompt,
    reuse,
)
from offload.report import Notes, PhaseChange, Report
from offload.reread import require_rereadable
from offload.scheduler import phases
from offload.scheduler.cost import Times
from offload.scheduler.layout import Layout, budget_for
from offload.scheduler.pace import TRIAL, Drafts, Tally
from offload.scheduler.rungs import Rung
from offload.verify import decode_verified

logger = logging.getLogger(__name__)

_ATTACHED = "_offload_runtime"


def attach(
    model: Any, config: OffloadConfig | str | Path | dict[str, Any] | None = None, **overrides: Any
) -> Runtime:
    """Lets a transformers model generate with its KV cache split between device and host memory.

    Args:
        model: A decoder-only transformers model in evaluation mode, weights loaded as you like (bf16, 4-bit).
        config: An `OffloadConfig`, a TOML file or text, a dict, or None for the defaults.
        **overrides: Single settings, for instance gpu_memory="20GiB", window=8192, chunk=2048.

    Returns:
        The runtime. `detach()` leaves the model as it was.

    Raises:
        ConfigError: An unknown or bad setting.
        UnsupportedModelError: The model's tokens would come out wrong.
        InputError: The model is in training mode or attached already.
        BudgetError: Weights, workspace and the smallest window do not fit the budget.
    """
    settings = OffloadConfig.build(config, **overrides)
    if getattr(model, _ATTACHED, None) is not None:
        raise InputError(
            "The model is attached already",
            asked="attach",
            there="a runtime of this model",
            change="Call detach() on that runtime first.",
        )
    refuse_unsupported(model)
    before = attention_names(model)
    with our_attention(model):
        shape = examine(model)
        runtime = Runtime(model, settings, shape, before)
        setattr(model, _ATTACHED, runtime)
    return runtime


@dataclass(kw_only=True, slots=True)
class _LastRun:
    """What `report` says of the last generate."""

    layout: Layout | None = None
    final_tokens: int | None = None  # of a sequence, at most
    phases: list[PhaseChange] = field(default_factory=list)
    decisions: list[Choice] = field(default_factory=list)
    bytes: dict[str, int] | None = None
    tokens_on_device: int = 0
    tokens_on_host: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_h2d_bytes: int = 0
    capture_s: float = 0.0
    replayed_steps: int = 0
    predicted: Times | None = None
    tally: Tally = field(default_factory=Tally)
    selected_bytes: int = 0
    fetched_bytes: int = 0
    search_s: float = 0.0
    index_heads: Counter[str] = field(default_factory=Counter)
    tail_mass: float = 0.0
    left_out: float | None = None
    skipped_mass: float = 0.0
    error_estimate: float | None = 0.0


class Runtime:
    """A model with our cache. Made by `attach`.

    One call of `generate` at a time.
    """

    def __init__(
        self,
        model: Any,
        config: OffloadConfig,
        shape: ModelShape,
        attention_before: list[tuple[Any, str | None]],
    ) -> None:
        """Use `attach`.

        Args:
            model: With our attention.
            config: As asked.
            shape: As examined.
            attention_before: What `detach` restores.
        """
        self.model = model
        self.config = config
        self.shape = shape
        self._before = attention_before
        self._attached = True
        self._caches: weakref.WeakSet[OffloadCache] = weakref.WeakSet()
        caches = self._caches  # not self: the budgets must not keep the runtime alive
        self.budgets = Budgets(
            config, shape, lambda: [cache.layout for cache in caches if cache.layout is not None]
        )
        self._notes = Notes()
        self._maker = CacheMaker(model, config, shape, self.budgets, self._notes, caches)
        self._streams, self._counters = self._maker.streams, self._maker.counters
        if shape.fed_whole is not None:
            self._notes.add(f"prompts are read in one piece: {shape.fed_whole}")
            logger.warning("%s reads prompts in one piece: %s", shape.model_type, shape.fed_whole)
        self._last = _LastRun()
        self._at_attach = device_memory(shape.device)
        self._idle = threading.Lock()  # held by a generate
        self._asked_tokens = 0  # in calls of mode fast
        self._current: weakref.ref[OffloadCache] | None = None  # the cache used last
        config.require_usable()
        if config.mode == "verified":
            _require_croppable(model, shape)
        if config.scheduler.recompute == "prefix":
            require_rereadable(model, shape, sorted(_rope_types(text_config(model))))
        # The smallest run must fit, or attaching was pointless: say so now, not after minutes of loading.
        self.budgets.lay_out(self.budgets.demand(batch=1, tokens=None))
        self.budgets.cap_allocator()

        def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Tells a cache of ours which tokens a pass over it feeds, whoever calls the model."""
            cache = cache_in(kwargs)
            if isinstance(cache, OffloadCache) and cache in caches:
                ids = kwargs.get("input_ids", args[0] if args else None)
                cache.begin_pass(ids, kwargs.get("attention_mask"))

        def end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            cache = cache_in(kwargs)
            if isinstance(cache, OffloadCache) and cache in caches:
                cache.end_pass()

        self._hooks = (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, with_kwargs=True),
        )

    # What users call.

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as `model.generate` does, with the prompt read in chunks and the cache on two tiers.

        Args:
            inputs: Token ids [B, N], as in transformers; input_ids= works too.
            on_progress: Called with a `Progress` while the prompt is read.
            **kwargs: Any keyword argument of transformers' generate. cache, or past_key_values, takes one of
                `new_cache()`; the prompt then is the whole conversation, and what the cache holds of it is
                not computed again.

        Returns:
            What transformers' generate returns. Of the prompt, output_hidden_states has the last token only: the
            others were read before, in chunks.

        Raises:
            InputError: An empty or right-padded prompt, an argument that is not supported, or another call that is
                not over.
            CacheError: The cache was closed, or is another runtime's.
            BudgetError: The run does not fit the budgets.
        """
        self._require_ready()
        if not self._idle.acquire(blocking=False):
            raise InputError(
                "The runtime is generating already",
                asked="another generate",
                there="one call at a time",
                change="Wait for the first one, or attach another copy of the model.",
            )
        try:
            return self._generate(inputs, on_progress, kwargs)
        finally:
            self._idle.release()

    def _generate(
        self,
        inputs: Tensor | None,
        on_progress: Callable[[Progress], None] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """`generate`, while nobody else does."""
        given = cache_in(kwargs)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        cache = None if given is None else self._own(require_ours(given))
        if kwargs.get("inputs_embeds") is not None:
            return self._generate_stock(inputs, cache, kwargs, "inputs_embeds")
        if self.config.scheduler.recompute == "prefix" and kwargs.get("position_ids") is not None:
            raise InputError(
                "Tokens that are read again get the positions that transformers gives them",
                asked="position_ids",
                there='scheduler.recompute = "prefix"',
                change='Leave position_ids out, or write scheduler.recompute = "off".',
            )
        prompt = read_prompt(self.model, inputs, kwargs)
        if not prompt.in_chunks:
            return self._generate_stock(inputs, cache, kwargs, "inputs beside the text")
        self._check_length(prompt.final_length)
        if cache is None:
            cache = self._new(
                prompt_tokens=prompt.input_ids.shape[1],
                tokens=prompt.final_length,
                exact=prompt.is_beams or self._undrafted(prompt, kwargs) is not None,
            )
        else:
            self._check_batch(cache, prompt)
        try:
            if given is not None:
                reuse(cache, prompt)
            return self._run(prompt, cache, on_progress, kwargs)
        except BaseException:
            if given is not None:
                cache.settle()
                if cache.is_open:
                    cache.stop_recording()
            raise
        finally:
            if given is None and not _is_returned(kwargs, prompt.generation):
                self._note_tiers(cache)
                cache.close("its generate call is over")

    def new_cache(self, max_tokens: int | None = None) -> OffloadCache:
        """A cache for stock `model.generate`, or for several turns of ours.

        It is passed as `cache`; stock `generate` takes `past_key_values` before transformers 5.24, ours takes both.

        Args:
            max_tokens: Tokens per sequence that it will hold; None: host memory grows as needed, and the
                device window takes what the budget leaves.

        Returns:
            An empty cache. Its device memory is taken at its first use and given back when it is closed or
            deleted; its host memory then waits for the runtime's next cache, until `detach`.

        Raises:
            InputError: max_tokens is not positive, or the model is in training mode.
            CacheError: The runtime was detached.
        """
        self._require_ready()
        if max_tokens is not None and max_tokens < 1:
            raise InputError(
                "A cache holds at least one token",
                asked=max_tokens,
                there=None,
                change="Leave max_tokens out for a cache that grows as needed.",
            )
        return self._new(prompt_tokens=0, tokens=max_tokens)

    def _new(self, **wanted: Any) -> OffloadCache:
        cache = self._maker.make(**wanted)
        self._current = weakref.ref(cache)
        return cache

    def report(self) -> Report:
        """Bytes per tier, time per token and every fallback, of the last `generate`."""
        last = self._last
        layout = last.layout
        current = self._current() if self._current is not None else None
        if current is not None:
            self._note_tiers(current)
        notes = [*self._notes]
        if self.budgets.pins.refused is not None:
            notes.append(f"not all host pages are pinned: {self.budgets.pins.refused}")
        parts, unaccounted = self._parts()
        return Report(
            mode=self.config.mode,
            verify_passes=last.tally.passes,
            drafted_tokens=last.tally.drafted,
            accepted_tokens=last.tally.accepted,
            agreement=[kept / seen for seen, kept in last.tally.by_position],
            draft_s=last.tally.draft_s,
            verify_s=last.tally.verify_s,
            wait_s=last.tally.wait_s,
            dropped_tokens=last.tally.dropped,
            model_type=self.shape.model_type,
            device=str(self.shape.device),
            bytes=last.bytes or {"weights": self.shape.weights},
            tokens_on_device=last.tokens_on_device,
            tokens_on_host=last.tokens_on_host,
            budget=self.budgets.device_budget(),
            planned=dict(layout.device) if layout else {},
            planned_host=layout.host_bytes if layout else 0,
            chunk=layout.chunk if layout else 0,
            prompt_tokens=last.prompt_tokens,
            reused_tokens=last.reused_tokens,
            new_tokens=last.new_tokens,
            prefill_s=last.prefill_s,
            decode_s=last.decode_s,
            h2d_bytes=self._counters.h2d_bytes,
            d2h_bytes=self._counters.d2h_bytes,
            bounced_bytes=self._counters.bounced_bytes,
            discarded_bytes=self._counters.discarded_bytes,
            decode_h2d_bytes=last.decode_h2d_bytes,
            rung=layout.rung.name if layout and layout.rung else None,
            lifted_layers=layout.lifted_layers if layout else 0,
            whole_layers=len(layout.whole) if layout else 0,
            selected_bytes=last.selected_bytes,
            fetched_bytes=last.fetched_bytes,
            index=self.config.retrieval.index if "host_index" in (last.bytes or {}) else None,
            index_bytes=(last.bytes or {}).get("host_index", 0),
            index_heads=dict(last.index_heads),
            search_s=last.search_s,
            tail_mass=last.tail_mass,
            left_out=last.left_out,
            skipped_mass=last.skipped_mass,
            error_estimate=last.error_estimate,
            replayed_steps=last.replayed_steps,
            predicted_ms=None if last.predicted is None else 1000 * last.predicted.token,
            predicted_parts={}
            if last.predicted is None
            else {part: 1000 * s for part, s in last.predicted.parts.items()},
            predicted_limit=None if last.predicted is None else last.predicted.limit,
            capture_s=last.capture_s,
            phases=last.phases,
            decisions=[*last.decisions, *self._measured()],
            device_parts=parts,
            unaccounted=unaccounted,
            notes=notes,
        )

    def _parts(self) -> tuple[list[Part], int | None]:
        """Device bytes of the last run by purpose, and what no purpose explains; nothing before it."""
        last = self._last
        if last.layout is None or last.bytes is None:
            return [], None
        device = self.shape.device
        now = device_memory(device)
        used = now.total - now.free
        parts, _, unaccounted = device_parts(
            last.layout.device, last.bytes, device, before=self._at_attach,
            most_used=used, last_used=used, last_reserved=used - now.overhead,
        )  # fmt: skip
        return parts, unaccounted

    def _measured(self) -> list[Choice]:
        """What the last run's steps came to, beside what they replaced."""
        last, found = self._last, []
        if last.replayed_steps:
            found.append(
                Choice(
                    what="launches", chosen=f"{last.replayed_steps:,} steps replayed as a graph",
                    cost=1000 * last.capture_s, instead="launched one by one", instead_cost=None, unit=RUN_MS,
                    why="decode.capture is on; the cost is that of compiling and capturing", source="measured",
                )
            )  # fmt: skip
        if last.tally.passes and last.new_tokens:
            drafted = last.tally.drafted / last.tally.passes
            found.append(
                Choice(
                    what="drafts", chosen=f"{drafted:.1f} tokens before a pass",
                    cost=1000 * (last.decode_s - last.capture_s) / last.new_tokens,
                    instead="a pass for every token", instead_cost=1000 * last.tally.verify_s / last.tally.passes,
                    unit=TOKEN_MS, why="as long as made tokens come fastest, by what drafts and passes took",
                    source="measured",
                )
            )  # fmt: skip
        return found

    def detach(self) -> None:
        """Leaves the model as it was: its attention implementation, and no memory of ours. May be repeated."""
        if not self._attached:
            return
        self._attached = False
        try:
            self._maker.close("its runtime was detached")
        finally:  # also after a CUDA error: the model is given back whatever happened to its memory
            for hook in self._hooks:
                hook.remove()
            restore_attention(self.model, self._before)
            delattr(self.model, _ATTACHED)
            self.budgets.uncap_allocator()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def budget_for(
        self, *, kv_share: float, prompt_tokens: int, new_tokens: int, batch: int = 1
    ) -> int:
        """The smallest device budget that leaves room for a share of the KV cache in the window of mode exact.

        Mode fast spends the same bytes on a small window and a replica of the rest.

        Args:
            kv_share: Share of the final tokens that shall stay on the device, over 0 and at most 1.
            prompt_tokens: Tokens of the prompt.
            new_tokens: Tokens of the answer.
            batch: Sequences.

        Returns:
            Bytes, weights and workspace included: a value for memory.gpu.

        Raises:
            InputError: kv_share is not such a share.
        """
        if not 0 < kv_share <= 1:
            raise InputError(
                "kv_share is not a share",
                asked=kv_share,
                there="over 0 and at most 1",
                change="Write 0.3 for 30 %.",
            )
        tokens = prompt_tokens + new_tokens
        demand = self.budgets.demand(batch=batch, tokens=tokens)
        return budget_for(demand, device_tokens=int(kv_share * tokens))

    # One call of generate.

    def _require_ready(self) -> None:
        if not self._attached:
            raise CacheError(
                "The runtime was detached",
                asked="generate",
                there="a detached runtime",
                change="Call offload.attach(model) again.",
            )
        if self.model.training:
            raise InputError(
                "The model is in training mode",
                asked="generate",
                there="dropout",
                change="Call model.eval() first.",
            )

    def _check_batch(self, cache: OffloadCache, prompt: Prompt) -> None:
        """Raises CacheError unless a used cache has room for the sequences of a prompt."""
        if not cache.layer_stores:
            return
        rows, store = prompt.input_ids.shape[0], cache.layer_stores[0]
        if rows != store.batch or rows * prompt.copies > store.limits.batch:
            raise CacheError(
                "The cache holds another number of sequences, or has no room for so many beams",
                asked=f"{rows} x {prompt.copies}",
                there=f"{store.batch}, laid out for {store.limits.batch}",
                change="Make a new cache: runtime.new_cache().",
            )

    def _own(self, cache: OffloadCache) -> OffloadCache:
        if cache not in self._caches:
            raise CacheError(
                "The cache was made for another model",
                asked="a cache",
                there="a cache of another runtime",
                change="Use this runtime's new_cache().",
            )
        return cache

    def _run(
        self,
        prompt: Prompt,
        cache: OffloadCache,
        on_progress: Callable[[Progress], None] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        self._maker.measure_errors = partial(self._layer_errors, prompt.input_ids)
        try:
            cache.start(prompt.input_ids.shape[0], prompt.copies)
        finally:
            self._maker.measure_errors = None
        assert cache.layout is not None
        self._current = weakref.ref(cache)
        last = self._last
        last.final_tokens = prompt.final_length
        last.prompt_tokens, last.reused_tokens = prompt.input_ids.shape[1], cache.get_seq_length()
        trace = self.config.trace
        total = prompt.input_ids.shape[1]
        with (
            progress_bar(total, wanted=trace.progress and total >= trace.progress_from) as bar,
            torch.no_grad(),
        ):

            def report(progress: Progress) -> None:
                for show in (bar, on_progress):
                    if show is not None:
                        show(progress)

            if total - 1 - cache.get_seq_length() > self.config.cache.page:
                # All layers at once, not each when its turn comes: the first one's activations need it.
                for store in cache.layer_stores:
                    store.drop_resident()
            done = prefill(
                self.model,
                cache,
                prompt,
                chunk=cache.layout.chunk,
                whole=self.shape.fed_whole is not None,
                keeps_logits=self.shape.keeps_logits,
                on_progress=report,
            )
            if prompt.copies > 1:
                cache.batch_repeat_interleave(prompt.copies)
            undrafted = self._undrafted(prompt, kwargs)
            fast = cache.decodes_fast and not prompt.is_beams and undrafted is None
            # Whether every step is exact and of one token; beams change the order of sequences between steps.
            streams = not cache.decodes_fast and not prompt.is_beams
            drafts = None
            if fast:
                self._check_replica(cache)
                drafts = self._drafts(cache)
            # Steps on the device path stream nothing, and those of an assistant's candidates need the memory.
            if drafts is not None:
                self._maker.keep_pages_resident(cache, rows=drafts.rows)
            elif not fast and not prompt.is_assisted:
                self._maker.keep_pages_resident(cache)
        last.prefill_s = done.seconds
        last.tail_mass = last.skipped_mass = last.error_estimate = 0.0
        last.left_out = None
        last.selected_bytes = last.fetched_bytes = 0
        last.search_s = 0.0
        last.tally = Tally()
        cache.reset_stats()  # what a stock generate or an interrupted one left
        began, h2d = time.perf_counter(), self._counters.h2d_bytes
        call = dict(kwargs)
        call.pop("input_ids", None)
        with ExitStack() as stack:
            captured = None
            if prompt.is_assisted:
                stack.enter_context(first_forward_skips_cached(self.model, cache))
            elif self._streams.on and self.config.decode.capture and (fast or streams):
                # Compiled layers round otherwise: exact steps are those of the stock cache.
                compiles = fast and self._wants_compiled(prompt.final_length - total)
                captured = stack.enter_context(captured_steps(self.model, cache, compiles=compiles))
                takes_loop = prompt.is_plain and "custom_generate" not in call
                if captured.reason is None and takes_loop and drafts is None:
                    # transformers passes no streamer on to a loop of one's own.
                    # A step that streams takes longer than waiting for it, and a step too many as long.
                    waits = streams and any(store.columns for store in cache.layer_stores)
                    call["custom_generate"] = partial(decode, streamer=call.get("streamer"), waits=waits)  # fmt: skip
            if drafts is not None:
                call["custom_generate"] = partial(
                    decode_verified, tally=last.tally, drafts=drafts, streamer=call.get("streamer"),
                    captured=captured, beside=self._streams.beside, looks_ahead=self._looks_ahead(),
                )  # fmt: skip
            if "custom_generate" not in kwargs and "custom_generate" in call:
                # Experts are computed another way for few tokens; transformers' own loop does this too.
                stack.enter_context(self.model._optimize_model_for_decode())
            stack.enter_context(cache.streaming(cache.decodes_fast and not fast))
            result = self.model.generate(prompt.input_ids, **{CACHE: cache}, **call)
        cache.stop_recording()
        sequences = result if isinstance(result, Tensor) else result.sequences
        if self._streams.on:
            torch.cuda.synchronize(self.shape.device)
        last.decode_s = time.perf_counter() - began
        last.decode_h2d_bytes = self._counters.h2d_bytes - h2d
        last.new_tokens = sequences.shape[1] - total
        last.capture_s = last.replayed_steps = 0
        if captured is not None:
            last.capture_s, last.replayed_steps = captured.seconds, captured.replays
            if captured.reason is not None:
                note = self._notes.tell if fast else self._notes.add
                note(f"decode steps run eagerly: {captured.reason}")
            if captured.not_compiled is not None:
                self._notes.tell(f"layers are not compiled: {captured.not_compiled}")
            if captured.relaunched is not None:
                self._notes.tell(f"attention is launched anew in every step: {captured.relaunched}")
        replayed = captured is not None and captured.reason is None
        last.predicted = None
        if (streams and not prompt.is_assisted) or (fast and replayed):
            last.predicted = self.budgets.predicted(
                cache.layout, batch=prompt.input_ids.shape[0] * prompt.copies, prompt=total,
                output=last.new_tokens, exact=streams, captured=replayed,
            )  # fmt: skip
        if fast:
            self._note_masses(cache)
        undrafted = undrafted or last.tally.undrafted
        if undrafted is not None and not prompt.is_beams:
            self._notes.add(f"mode verified drafts nothing with {undrafted}: exact steps")
        if last.tally.exact_tokens > TRIAL and last.tally.undrafted is None:
            self._notes.add(
                f"{last.tally.exact_tokens:,} tokens were made one by one: drafts did not pay, of which "
                f"{last.tally.accepted:,} of {last.tally.examined:,} tokens agreed"
            )
        self._note_tiers(cache)
        return result

    def _layer_errors(self, ids: Tensor) -> dict[Rung, tuple[float, ...]] | None:
        """What each layer's replica costs in fidelity, measured on a prompt; None where nothing can be."""
        rungs = ladder_rungs(self.config)
        if not rungs:
            return None
        if ids.shape[0] > 1 or ids.shape[1] < sensitivity.LEAST_READ:
            self._notes.add(
                f"replica.ladder measures one prompt of {sensitivity.LEAST_READ:,} tokens or more: all layers get the same bits"
            )
            return None
        began = time.perf_counter()
        try:
            asked = self.config.retrieval.tokens
            as_used = [replace(rung, tokens=rung.selected(asked)) for rung in rungs]
            found = sensitivity.layer_errors(self.model, self.shape.modules, ids, as_used)
        except torch.cuda.OutOfMemoryError:
            self._notes.add(
                "the device has no room to measure what layers need: the first and last get most bits"
            )
            return None
        finally:
            if self._streams.on:
                torch.cuda.empty_cache()
        logger.info("Measured what bits layers need in %.1f s", time.perf_counter() - began)
        if not all(math.isfinite(error) for of_rung in found for error in of_rung):
            self._notes.add("what bits layers need could not be measured (NaN): all get the same")
            return None
        return dict(zip(rungs, found, strict=True))

    def _undrafted(self, prompt: Prompt, kwargs: dict[str, Any]) -> str | None:
        """Why mode verified makes the tokens of a call one by one; None where it drafts, and in other modes.

        Args:
            prompt: Of the call.
            kwargs: Of the call.
        """
        if self.config.mode != "verified":
            return None
        reasons = {
            "several sequences at once": prompt.input_ids.shape[0] * prompt.copies > 1,
            "an assistant": prompt.is_assisted,
            "a loop of one's own": kwargs.get("custom_generate") is not None,
            "more than tokens in the result, or stop strings": not prompt.is_plain,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _drafts(self, cache: OffloadCache) -> Drafts | None:
        """How long drafts are in mode verified; None in other modes."""
        if self.config.mode != "verified":
            return None
        assert cache.layout is not None
        room = cache.layout.window_blocks * self.config.cache.page
        return Drafts.of(self.config.decode.draft, room)

    def _looks_ahead(self) -> bool:
        """Whether drafts go on while a pass looks at them. A CPU has nothing to do it with."""
        asked = self.config.decode.look_ahead
        return self._streams.on if isinstance(asked, str) else asked

    def _wants_compiled(self, new_tokens: int) -> bool:
        """Whether the layers of this call's steps are compiled.

        Args:
            new_tokens: That the call may make, per sequence.
        """
        self._asked_tokens += new_tokens
        return self.config.compiles(self._asked_tokens)

    def _check_replica(self, cache: OffloadCache) -> None:
        """Raises InputError if the replica cannot stand for what was read."""
        for index, store in zip(self.shape.offloaded, cache.layer_stores, strict=True):
            bad = None if store.path is None else store.path.bad_block(store.columns)
            if bad is not None:
                first = store.first_host_token + bad * store.limits.page
                last = first + store.limits.page - 1
                raise InputError(
                    f"Keys or values of layer {index} are not finite, or too large for a replica",
                    asked=f"tokens {first:,} to {last:,}",
                    there="NaN, infinity, or over 65,504",
                    change="Load the model in bfloat16 or float32, or set mode to 'exact'.",
                )

    def _note_masses(self, cache: OffloadCache) -> None:
        """Keeps for `report` what the steps left to the replica, and what they read from the host."""
        last, selected, fetched = self._last, 0, 0
        offloaded = [(s.path, s.columns) for s in cache.layer_stores if s.path and s.columns]
        reasons = [path.why_streamed(columns) for path, columns in offloaded]
        why = next((reason for reason in reasons if reason is not None), None)
        if why is not None:
            self._notes.tell(f"every token is streamed: {why}")
            return
        masses, error, layers = torch.zeros(2), 0.0, len(cache.layer_stores)
        for store in cache.layer_stores:
            path = store.path
            if path is not None and store.columns:
                masses += path.masses() / layers
                error += path.error_estimate() / layers
                exactly, from_host = path.selected_bytes()
                selected += exactly
                fetched += from_host
                last.search_s += 0.0 if path.search is None else path.search.seconds
        last.tail_mass, last.skipped_mass = masses.tolist()
        shares = [path.left_out() for path, _ in offloaded]
        if any(share is not None for share in shares):
            last.left_out = statistics.fmean(share for share in shares if share is not None)
        last.error_estimate = None if math.isnan(error) else error
        last.selected_bytes, last.fetched_bytes = selected, fetched

    def _generate_stock(
        self, inputs: Tensor | None, cache: OffloadCache | None, kwargs: dict[str, Any], what: str
    ) -> Any:
        """Prompts of embeddings or images go through transformers' own prefill, all at once."""
        logger.warning(
            "A prompt with %s is read in one piece: its activations grow with its length, which the plan does "
            "not know.",
            what,
        )
        check_arguments(self.model, kwargs)
        own = cache if cache is not None else self.new_cache()
        last = self._last = _LastRun(reused_tokens=own.get_seq_length())
        began, h2d = time.perf_counter(), self._counters.h2d_bytes
        own.reset_stats()
        try:
            result = self.model.generate(inputs, **{CACHE: own}, **kwargs)
            if own.decodes_fast:
                self._note_masses(own)
            last.decode_s = time.perf_counter() - began
            last.decode_h2d_bytes = self._counters.h2d_bytes - h2d
            return result
        except BaseException:
            own.settle()
            raise
        finally:
            self._note_tiers(own)
            if cache is None:
                own.close("its generate call is over")

    def _check_length(self, total: int) -> None:
        limit = self.shape.longest
        if limit is not None and total > limit:
            raise InputError(
                "Prompt and answer are longer than the model's sliding window, which is as long as its positions",
                asked=total,
                there=limit,
                change="Shorten them, or use the stock cache.",
            )
        limit = self.shape.max_positions
        if limit is not None and total > limit:
            logger.warning(
                "Prompt and answer are up to %d tokens, the model was made for %d: expect poor text beyond.",
                total,
                limit,
            )

    def _note_tiers(self, cache: OffloadCache) -> None:
        """Keeps for `report` what a cache holds."""
        stores, layout = cache.layer_stores, cache.layout
        if not stores or layout is None:
            return
        self._last.layout, self._last.decisions = layout, cache.decisions
        regions = [store.region for store in stores]
        pinned = sum(region.pinned for region in regions)
        self._last.bytes = {
            "weights": self.shape.weights,
            "window": sum(store.window_bytes for store in stores),
            "resident": sum(store.resident_bytes for store in stores),
            "replica": sum(store.replica_bytes for store in stores),
            "cached rows": sum(store.row_cache_bytes for store in stores),
            "staging": 2 * layout.staging_bytes,
            "eviction": 2 * layout.eviction_bytes,
            "host_pinned": pinned,
            "host_pageable": sum(region.committed for region in regions) - pinned,
        }
        searches = [store.path.search for store in stores if store.path is not None]
        if any(search is not None for search in searches):
            indexed = sum(search.nbytes for search in searches if search is not None)
            self._last.bytes["host_index"] = indexed
            self._last.index_heads = Counter()
            for search in searches:
                self._last.index_heads += search.chosen if search is not None else Counter()
        usual = max(
            stores, key=lambda store: store.host_tokens
        )  # not one that keeps all on the device
        last = self._last
        last.tokens_on_device = usual.device_tokens
        last.tokens_on_host = usual.host_tokens
        planned = phases.course(layout, tokens=last.final_tokens, prompt=last.prompt_tokens).begins
        changes = {phases.Phase.HOST: usual.left, phases.Phase.AGAIN: usual.gone}
        last.phases = [
            PhaseChange(
                phase=phase.value,
                planned=planned.get(phase),
                tokens=None if change is None else change.tokens,
                at=None if change is None else change.at,
            )
            for phase, change in changes.items()
            if change is not None or phase in planned
        ]


def _require_croppable(model: Any, shape: ModelShape) -> None:
    """Raises UnsupportedModelError unless tokens that were rejected can be forgotten without a trace."""
    config = text_config(model)
    stock = stock_layers(config)
    plain = [i for i in shape.offloaded if not isinstance(stock[i], LinearAttentionLayer)]
    strangers = sorted({type(stock[i]).__name__ for i in range(len(stock)) if i not in plain})
    reason = f"it has layers that cannot forget rejected tokens ({', '.join(strangers)})"
    if not strangers:
        turns = _rope_types(config) & {"dynamic", "longrope"}
        if not turns:
            return
        reason = f"its positions are turned by how long the sequence is, drafts included ({', '.join(sorted(turns))})"
    raise UnsupportedModelError(
        "Mode verified",
        model_type=shape.model_type,
        reason=reason,
        change="Set mode to 'exact', or to 'fast'.",
    )


def _rope_types(config: Any) -> set[str]:
    """Kinds of position embedding that turn keys, of all layers."""
    given = getattr(config, "rope_parameters", None) or {}
    tables = [given, *(value for value in given.values() if isinstance(value, dict))]
    return {str(table["rope_type"]) for table in tables if "rope_type" in table}


def _is_returned(kwargs: dict[str, Any], generation: Any) -> bool:
    """Whether the caller gets the cache in the result and may go on with it."""
    return bool(kwargs.get("return_dict_in_generate") or generation.return_dict_in_generate)
