"""How does a model generate under a memory budget? `attach` gives it our attention; `Runtime` does the rest."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.cache import OffloadCache, require_ours, stock_layers
from offload.config import OffloadConfig
from offload.errors import BudgetError, CacheError, InputError
from offload.hardware import device_memory, host_memory
from offload.model import (
    ModelShape,
    attention_names,
    examine,
    our_attention,
    refuse_unsupported,
    restore_attention,
    text_config,
)
from offload.prefill import Progress, Prompt, prefill, progress_bar
from offload.report import Report
from offload.scheduler.layout import Demand, Layout, budget_for, lay_out
from offload.tiers.pinned import HostRegion, PinBudget
from offload.tiers.store import LayerStore, StoreLimits
from offload.tiers.transfer import HostReader, HostWriter, Streams, TransferCounters

logger = logging.getLogger(__name__)

_ATTACHED = "_offload_runtime"
# What torch's allocator loses to rounding and fragmentation. An 8B model used all of it in a prefill of 131,072
# tokens; with less, the allocator gives cached blocks back and asks for them again, again and again.
_ALLOCATOR_SLACK = 192 * 2**20
# What the driver takes after attaching: kernels loaded when they first run, tables of pinned pages. Without it the
# same run went 7 MiB over the cap as the driver counts.
_DRIVER_GROWTH = 96 * 2**20

# Arguments of generate that would go past the cache or ask for what it does not have.
_REFUSED_ARGUMENTS = {
    "cache_implementation": "the runtime brings its own cache; call model.generate for a stock one",
    "custom_generate": "it replaces the decoding loop",
    "prefill_chunk_size": "set prefill.chunk of the configuration instead: attach(model, chunk=...)",
    "penalty_alpha": "contrastive search is not supported",
    "dola_layers": "DoLa decoding is not supported",
    "output_attentions": "attention weights are never made",
}


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
    bytes: dict[str, int] | None = None
    tokens_on_device: int = 0
    tokens_on_host: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_h2d_bytes: int = 0


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
        self._streams = Streams(shape.device)
        self._counters = TransferCounters()
        self._notes: dict[str, None] = {}
        if shape.fed_whole is not None:
            self._notes[f"prompts are read in one piece: {shape.fed_whole}"] = None
            logger.warning("%s reads prompts in one piece: %s", shape.model_type, shape.fed_whole)
        host = host_memory()
        pinned = config.memory.pinned
        self._pins = PinBudget(
            limit=None if pinned.is_auto else pinned.resolve(total=host.total, auto=0)
        )
        # The runtime holds every region, caches only borrow them: were one part of a forgotten cache, the garbage
        # collector would close it while the cache's own finalizer hands it back.
        self._regions: list[HostRegion] = []
        self._free_regions: dict[int, list[HostRegion]] = {}
        self._reserve = max(2**30, host.total // max(1, len(shape.rows)))
        self._last = _LastRun()
        self._current: weakref.ref[OffloadCache] | None = None  # the cache used last
        self._fraction_before: float | None = None
        # The smallest run must fit, or attaching was pointless: say so now, not after minutes of loading.
        self._lay_out(self._demand(batch=1, tokens=None), host_tokens_known=False)
        self._cap_allocator()

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
            **kwargs: Any keyword argument of transformers' generate. past_key_values takes a cache of
                `new_cache()`; the prompt then is the whole conversation, and what the cache holds of it is
                not computed again.

        Returns:
            What transformers' generate returns.

        Raises:
            InputError: An empty or right-padded prompt, or an argument that is not supported.
            CacheError: The cache was closed, or is another runtime's.
            BudgetError: The run does not fit the budgets.
        """
        self._require_attached()
        self._refuse(kwargs)
        given = kwargs.pop("past_key_values", None)
        cache = None if given is None else self._own(require_ours(given))
        if kwargs.get("inputs_embeds") is not None:
            return self._generate_stock(inputs, cache, kwargs)
        prompt, generation = self._prompt(inputs, kwargs)
        copies = max(generation.num_beams or 1, generation.num_return_sequences or 1)
        batch, n_prompt = prompt.input_ids.shape
        total = _final_length(generation, n_prompt)
        self._warn_beyond_positions(total)
        if cache is None:
            cache = self._make_cache(
                copies=copies, prompt_tokens=n_prompt, tokens=total, batch=batch * copies
            )
        else:
            self._reuse(cache, prompt.input_ids)
        fed: list[Tensor] = []
        hook = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
        )
        past = cache.get_seq_length()
        try:
            return self._run(prompt, cache, generation, on_progress, kwargs, keep=given is not None)
        except BaseException:
            cache.settle()
            if given is not None:
                self._remember(cache, prompt.input_ids, past, fed)
            raise
        finally:
            hook.remove()
            if given is None and not _is_returned(kwargs, generation):
                self._note_tiers(cache)
                cache.close("its generate call is over")

    def new_cache(self, max_tokens: int | None = None) -> OffloadCache:
        """A cache for stock `model.generate(past_key_values=...)`, or for several turns of `generate`.

        Args:
            max_tokens: Tokens per sequence that it will hold; None: host memory grows as needed, and the
                device window takes what the budget leaves.

        Returns:
            An empty cache. Its memory is taken at its first use and given back when it is closed or deleted.
        """
        self._require_attached()
        return self._make_cache(copies=1, prompt_tokens=0, tokens=max_tokens, batch=None)

    def report(self) -> Report:
        """Bytes per tier, time per token and every fallback, of the last `generate`."""
        last = self._last
        layout = last.layout
        current = self._current() if self._current is not None else None
        if current is not None:
            self._note_tiers(current)
        notes = [*self._notes]
        if self._pins.refused is not None:
            notes.append(f"not all host pages are pinned: {self._pins.refused}")
        return Report(
            mode=self.config.mode,
            model_type=self.shape.model_type,
            device=str(self.shape.device),
            bytes=last.bytes or {"weights": self.shape.weights},
            tokens_on_device=last.tokens_on_device,
            tokens_on_host=last.tokens_on_host,
            budget=self.device_budget(),
            planned=dict(layout.device) if layout else {},
            chunk=layout.chunk if layout else 0,
            prompt_tokens=last.prompt_tokens,
            reused_tokens=last.reused_tokens,
            new_tokens=last.new_tokens,
            prefill_s=last.prefill_s,
            decode_s=last.decode_s,
            h2d_bytes=self._counters.h2d_bytes,
            d2h_bytes=self._counters.d2h_bytes,
            bounced_bytes=self._counters.bounced_bytes,
            decode_h2d_bytes=last.decode_h2d_bytes,
            notes=notes,
        )

    def detach(self) -> None:
        """Leaves the model as it was: its attention implementation, and no memory of ours. May be repeated."""
        if not self._attached:
            return
        self._attached = False
        for cache in list(self._caches):
            cache.close("its runtime was detached")
        self._streams.synchronize()
        self._free_regions.clear()
        for region in self._regions:
            region.close()
        self._regions.clear()
        restore_attention(self.model, self._before)
        delattr(self.model, _ATTACHED)
        if self._fraction_before is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction_before, self.shape.device)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def device_budget(self) -> int:
        """Device bytes allowed now, weights included."""
        memory = device_memory(self.shape.device)
        reserve = self.config.memory.reserve.resolve(total=memory.total, auto=0)
        # On a card, what others hold is in the demand as overhead; a CPU's "device" is what is free of it.
        on_card = self.shape.device.type == "cuda"
        auto = memory.total if on_card else self._held() + memory.free
        return self.config.memory.gpu.resolve(total=memory.total, auto=auto - reserve)

    def _held(self) -> int:
        """Device bytes of the model and of live caches, where no allocator counts them."""
        stores = [store for cache in self._caches for store in cache.stores]
        return self.shape.weights + sum(
            store.device_bytes for store in stores if isinstance(store, LayerStore)
        )

    def budget_for(
        self, *, kv_share: float, prompt_tokens: int, new_tokens: int, batch: int = 1
    ) -> int:
        """The smallest device budget that leaves room for a share of the KV cache in the window.

        Args:
            kv_share: Share of the final tokens that shall stay on the device, over 0 and at most 1.
            prompt_tokens: Tokens of the prompt.
            new_tokens: Tokens of the answer.
            batch: Sequences.

        Returns:
            Bytes, weights and workspace included: a value for memory.gpu.
        """
        tokens = prompt_tokens + new_tokens
        demand = self._demand(batch=batch, tokens=tokens)
        return budget_for(demand, device_tokens=int(kv_share * tokens))

    # Layout and memory.

    def _demand(
        self, *, batch: int, tokens: int | None, copies: int = 1, prompt: int = 0
    ) -> Demand:
        cache, memory = self.config.cache, device_memory(self.shape.device)
        on_card = self.shape.device.type == "cuda"
        staging = self.config.decode.staging
        return Demand(
            batch=batch,
            copies=copies,
            prompt=prompt,
            tokens=tokens,
            page=cache.page,
            sinks=cache.sinks,
            window=None if isinstance(cache.window, str) else cache.window,
            chunk=None if isinstance(self.config.prefill.chunk, str) else self.config.prefill.chunk,
            staging=None if staging.is_auto else staging.resolve(total=memory.total, auto=0),
            token_bytes=self.shape.token_bytes,
            weights=memory.allocated if on_card else self._held(),
            overhead=memory.overhead + _ALLOCATOR_SLACK + _DRIVER_GROWTH if on_card else 0,
            workspace=self.shape.workspace,
            workspace_per_token=self.shape.workspace_per_token,
            other_kv=batch * self.shape.other_kv_bytes(tokens),
        )

    def _lay_out(self, demand: Demand, *, host_tokens_known: bool = True) -> Layout:
        host = host_memory()
        asked = self.config.memory.cpu
        reserve = self.config.memory.reserve.resolve(total=host.total, auto=0)
        idle = sum(r.committed for regions in self._free_regions.values() for r in regions)
        available = max(0, host.available + idle - reserve)
        allowed = asked.resolve(total=host.total, auto=available)
        layout = lay_out(demand, device_budget=self.device_budget(), host_budget=allowed)
        if host_tokens_known and layout.host_bytes > available:
            raise BudgetError(
                "The KV cache in host memory",
                requested=layout.host_bytes,
                available=available,
                setting="memory.cpu",
                change=f"The {host.limited_by} has no more free memory. Close other programs, shorten the "
                "context, or lower memory.reserve.",
            )
        return layout

    def _cap_allocator(self) -> None:
        """Makes an explicit device budget hard: torch's allocator then refuses instead of exceeding it."""
        if self.shape.device.type != "cuda" or self.config.memory.gpu.is_auto:
            return
        memory = device_memory(self.shape.device)
        share = (self.device_budget() - memory.overhead - _DRIVER_GROWTH) / memory.total
        read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        self._fraction_before = 1.0 if read is None else read(self.shape.device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.shape.device)

    def _make_cache(
        self, *, copies: int, prompt_tokens: int, tokens: int | None, batch: int | None
    ) -> OffloadCache:
        """A cache whose stores are built at its first update, when its batch is known."""
        taken: list[tuple[int, HostRegion]] = []
        readers: list[HostReader] = []

        def build(sequences: int, first_tokens: int) -> list[LayerStore]:
            if self.shape.device.type == "cuda":
                torch.cuda.empty_cache()
            demand = self._demand(
                batch=batch or sequences, tokens=tokens, copies=copies, prompt=prompt_tokens
            )
            layout = self._lay_out(demand)
            cache.layout = layout
            self._current = weakref.ref(cache)
            chunk_asked = self.config.prefill.chunk
            if isinstance(chunk_asked, str) and layout.chunk < min(4096, tokens or 4096):
                self._notes[
                    f"prefill.chunk went from 4,096 to {layout.chunk:,} tokens to fit the device budget"
                ] = None
            reader = HostReader(self._streams, layout.staging_bytes, self._counters)
            writer = HostWriter(self._streams, layout.eviction_bytes, self._counters)
            limits = StoreLimits(
                page=self.config.cache.page,
                sink_blocks=layout.sink_blocks,
                window_blocks=layout.window_blocks,
                host_tokens=layout.host_tokens,
            )
            stores = []
            for row in self.shape.rows:
                page_bytes = limits.page * row.token_bytes
                region = self._take_region(page_bytes)
                taken.append((page_bytes, region))
                stores.append(
                    LayerStore(
                        row, limits, batch=sequences, region=region, reader=reader, writer=writer
                    )
                )
            reader.reset(list(stores))
            readers.append(reader)
            return stores

        def give_back() -> None:
            self._streams.synchronize()
            for reader in readers:
                reader.reset(
                    []
                )  # it and its stores hold each other: without this memory waits for the GC
            readers.clear()
            for page_bytes, region in taken:
                self._free_regions.setdefault(page_bytes, []).append(region)
            taken.clear()

        cache = OffloadCache(
            stock_layers(text_config(self.model)),
            self.shape.offloaded,
            build,
            give_back,
            modules=self.shape.modules,
        )
        self._caches.add(cache)
        return cache

    def _take_region(self, page_bytes: int) -> HostRegion:
        free = self._free_regions.get(page_bytes)
        if free:
            return free.pop()
        region = HostRegion(page_bytes, self._reserve, self.shape.device, self._pins)
        self._regions.append(region)
        return region

    # One call of generate.

    def _require_attached(self) -> None:
        if not self._attached:
            raise CacheError(
                "The runtime was detached",
                asked="generate",
                there="a detached runtime",
                change="Call offload.attach(model) again.",
            )

    def _own(self, cache: OffloadCache) -> OffloadCache:
        if cache not in self._caches:
            raise CacheError(
                "The cache was made for another model",
                asked="past_key_values",
                there="a cache of another runtime",
                change="Use this runtime's new_cache().",
            )
        return cache

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config")
        for name, reason in _REFUSED_ARGUMENTS.items():
            value = kwargs.get(name)
            if value is None and config is not None:
                value = getattr(config, name, None)
            if value is not None and value is not False:
                raise InputError(
                    f"generate cannot take {name}", asked=value, there=None, change=f"{reason}."
                )
        if kwargs.get("use_cache") is False:
            raise InputError(
                "generate cannot run without a cache",
                asked="use_cache=False",
                there=None,
                change="Call model.generate for that.",
            )
        if self.model.training:
            raise InputError(
                "The model is in training mode",
                asked="generate",
                there="dropout",
                change="Call model.eval() first.",
            )

    def _prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Prompt, Any]:
        """The prompt with the mask and positions that transformers will give it, and its generation config."""
        model = self.model
        loop_names = set(inspect.signature(model.generate).parameters) - {"inputs", "kwargs"}
        for_config = {k: v for k, v in kwargs.items() if k not in loop_names}
        generation, model_kwargs = model._prepare_generation_config(
            kwargs.get("generation_config"), **for_config
        )
        ids, name, model_kwargs = model._prepare_model_inputs(
            inputs, generation.bos_token_id, model_kwargs
        )
        if name != "input_ids" or ids.dim() != 2 or ids.shape[1] == 0:
            raise InputError(
                "The prompt is empty",
                asked=tuple(ids.shape),
                there="token ids [sequences, tokens]",
                change="Pass at least one token.",
            )
        mask = model_kwargs.pop("attention_mask", None)
        given = mask is not None
        model._prepare_special_tokens(generation, given, device=ids.device, batch_size=ids.shape[0])
        accepted = inspect.signature(model.forward).parameters
        if mask is None:
            mask = model._prepare_attention_mask_for_generation(ids, generation, dict(model_kwargs))
        if mask.shape != ids.shape:
            raise InputError(
                "attention_mask and prompt differ in shape",
                asked=tuple(mask.shape),
                there=tuple(ids.shape),
                change="Pass the whole conversation and a mask over all of it.",
            )
        if bool((mask[:, -1] == 0).any()):
            raise InputError(
                "The prompt is padded on the right",
                asked="attention_mask that ends in 0",
                there="decoding goes on at the right end",
                change='Set tokenizer.padding_side = "left".',
            )
        if "position_ids" in accepted and model_kwargs.get("position_ids") is None:
            model_kwargs["position_ids"] = model._prepare_position_ids_for_generation(
                ids, model_kwargs | {"attention_mask": mask}
            )
        padded = bool((mask == 0).any())
        model_kwargs.pop("use_cache", None)
        model_kwargs.pop("past_key_values", None)
        prompt = Prompt(
            input_ids=ids, attention_mask=mask if padded else None, model_kwargs=model_kwargs
        )
        return prompt, generation

    def _reuse(self, cache: OffloadCache, ids: Tensor) -> None:
        """Makes a used cache hold a prefix of the prompt; forgets what the prompt does not begin with."""
        past = cache.get_seq_length()
        if past == 0:
            return
        keep = min(past, ids.shape[1] - 1)
        known = cache.token_ids
        if known is not None:
            if known.shape[0] != ids.shape[0]:
                raise CacheError(
                    "The cache holds another number of sequences",
                    asked=ids.shape[0],
                    there=known.shape[0],
                    change="Make a new cache: runtime.new_cache().",
                )
            n = min(keep, known.shape[1])
            differ = (known[:, :n] != ids[:, :n].cpu()).any(dim=0)
            keep = int(differ.int().argmax()) if bool(differ.any()) else n
        elif past >= ids.shape[1]:
            raise InputError(
                "The prompt is not longer than what the cache holds",
                asked=ids.shape[1],
                there=past,
                change="Pass the whole conversation, earlier turns included.",
            )
        if keep < past:
            if not cache.can_go_back():
                raise InputError(
                    "The prompt does not begin with the tokens of the cache, whose recurrent states or "
                    "sliding windows cannot go back",
                    asked=f"{keep:,} tokens in common",
                    there=f"{past:,} tokens in the cache",
                    change="Pass a new cache.",
                )
            logger.info(
                "The prompt shares %d of %d cached tokens; the rest is read anew.", keep, past
            )
            cache.crop(keep - past)

    def _remember(self, cache: OffloadCache, ids: Tensor, past: int, fed: list[Tensor]) -> None:
        """Notes what a cache holds after an interrupted call, so that the next one can check its prompt.

        Args:
            cache: Settled.
            ids: The prompt [B, N].
            past: Tokens that the cache held before the call.
            fed: The token ids of every forward pass of the call, in order.
        """
        length = cache.get_seq_length()
        batches = {len(step) for step in fed}
        if batches == {len(ids)}:
            known = torch.cat([ids[:, :past], *fed], dim=1)
            if known.shape[1] - length in (
                0,
                fed[-1].shape[1],
            ):  # the last pass was taken in, or not
                cache.token_ids = known[:, :length].cpu()
                return
        # Beams were reordered or drafts rejected: only the prompt is known.
        if length > ids.shape[1]:
            if not cache.can_go_back():
                cache.close("an exception interrupted it, and which tokens it holds is not known")
                return
            cache.crop(ids.shape[1] - length)
            length = ids.shape[1]
        stores = cache.stores
        copies = stores[0].batch // len(ids) if stores else 1
        cache.token_ids = ids[:, :length].repeat_interleave(copies, dim=0).cpu()

    def _run(
        self,
        prompt: Prompt,
        cache: OffloadCache,
        generation: Any,
        on_progress: Callable[[Progress], None] | None,
        kwargs: dict[str, Any],
        *,
        keep: bool,
    ) -> Any:
        copies = max(generation.num_beams or 1, generation.num_return_sequences or 1)
        cache.start(prompt.input_ids.shape[0], prompt.input_ids.shape[1])
        assert cache.layout is not None
        self._current = weakref.ref(cache)
        last = self._last
        last.prompt_tokens, last.reused_tokens = prompt.input_ids.shape[1], cache.get_seq_length()
        cache.token_ids = None  # until the run has ended well
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
                for store in cache.stores:
                    if isinstance(store, LayerStore):
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
            if copies > 1 and cache.get_seq_length():
                cache.batch_repeat_interleave(copies)
            self._keep_pages_resident(cache)
        last.prefill_s = done.seconds
        began, h2d = time.perf_counter(), self._counters.h2d_bytes
        call = dict(kwargs)
        call.pop("input_ids", None)
        assisted = generation.prompt_lookup_num_tokens or kwargs.get("assistant_model") is not None
        with _first_forward_skips_cached(self.model, cache) if assisted else nullcontext():
            result = self.model.generate(prompt.input_ids, past_key_values=cache, **call)
        sequences = result if isinstance(result, Tensor) else result.sequences
        if self._streams.on:
            torch.cuda.synchronize(self.shape.device)
        last.decode_s = time.perf_counter() - began
        last.decode_h2d_bytes = self._counters.h2d_bytes - h2d
        last.new_tokens = sequences.shape[1] - total
        if keep and (generation.num_beams or 1) == 1:
            cache.token_ids = sequences[:, : cache.get_seq_length()].cpu()
        self._note_tiers(cache)
        return result

    def _keep_pages_resident(self, cache: OffloadCache) -> None:
        """Fills the memory that prefill needed and decoding does not with the oldest host pages.

        They then need not be streamed. The next prefill takes the memory back.
        """
        layout = cache.layout
        stores = [store for store in cache.stores if isinstance(store, LayerStore)]
        # A CPU's copy would be no nearer, and an explicit window says what shall be on the device.
        wanted = self._streams.on and isinstance(self.config.cache.window, str)
        if not wanted or layout is None or not stores or not stores[0].columns:
            return
        torch.cuda.empty_cache()
        spare = (
            layout.device["workspace"] * 7 // 8
        )  # an eighth is plenty for one token of each sequence
        per_column = sum(
            store.page_bytes * (1 if store.shared_columns else store.batch) for store in stores
        )
        for store in stores:
            store.keep_resident(spare // per_column)

    def _generate_stock(
        self, inputs: Tensor | None, cache: OffloadCache | None, kwargs: dict[str, Any]
    ) -> Any:
        """Prompts of embeddings go through transformers' own prefill, all at once."""
        logger.warning(
            "inputs_embeds are read in one piece: activations grow with the prompt. Pass input_ids to have "
            "it read in chunks."
        )
        own = cache if cache is not None else self.new_cache()
        try:
            return self.model.generate(inputs, past_key_values=own, **kwargs)
        except BaseException:
            own.settle()
            raise
        finally:
            self._note_tiers(own)
            if cache is None:
                own.close("its generate call is over")

    def _warn_beyond_positions(self, total: int) -> None:
        limit = self.shape.max_positions
        if limit is not None and total > limit:
            logger.warning(
                "Prompt and answer are up to %d tokens, the model was made for %d: expect poor text beyond.",
                total,
                limit,
            )

    def _note_tiers(self, cache: OffloadCache) -> None:
        """Keeps for `report` what a cache holds."""
        stores = [store for store in cache.stores if isinstance(store, LayerStore)]
        layout = cache.layout
        if not stores or layout is None:
            return
        self._last.layout = layout
        regions = {id(store._region): store._region for store in stores}.values()
        pinned = sum(region.pinned for region in regions)
        self._last.bytes = {
            "weights": self.shape.weights,
            "window": sum(store.device_bytes - store.resident_bytes for store in stores),
            "resident": sum(store.resident_bytes for store in stores),
            "staging": 2 * layout.staging_bytes,
            "eviction": 2 * layout.eviction_bytes,
            "host_pinned": pinned,
            "host_pageable": sum(region.committed for region in regions) - pinned,
        }
        self._last.tokens_on_device = stores[0].device_tokens
        self._last.tokens_on_host = stores[0].host_tokens


@contextmanager
def _first_forward_skips_cached(model: Any, cache: OffloadCache) -> Iterator[None]:
    """Cuts the tokens that the cache holds off the first forward pass inside the block.

    Assisted decoding (transformers 5.17 to 5.23) feeds the whole prompt in its first step even to a warm cache,
    stock ones too, and its tokens are then wrong.
    """

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hook.remove()
        past, ids = cache.get_seq_length(), kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] == ids.shape[1]:
            kwargs["position_ids"] = positions[..., past:]
        kwargs["input_ids"] = ids[:, past:]
        return args, kwargs

    hook = model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _final_length(generation: Any, n_prompt: int) -> int:
    """Tokens per sequence at the end, at most."""
    if generation.max_new_tokens is not None:
        return n_prompt + int(generation.max_new_tokens)
    if generation.max_length is not None:
        return max(n_prompt + 1, int(generation.max_length))
    return n_prompt + 20  # transformers' own default


def _is_returned(kwargs: dict[str, Any], generation: Any) -> bool:
    """Whether the caller gets the cache in the result and may go on with it."""
    return bool(kwargs.get("return_dict_in_generate") or generation.return_dict_in_generate)
