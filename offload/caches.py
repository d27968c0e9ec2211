"""How does a cache come by its memory? Laid out for its batch, its host regions borrowed, its stores built."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offload.budget import Budgets
from offload.cache import OffloadCache, stock_layers
from offload.config import OffloadConfig
from offload.demand import NEAREST_BYTES
from offload.hardware import host_memory
from offload.model import ModelShape, text_config
from offload.recompute import Angles, Inputs, LayerSource, recipes
from offload.report import Notes
from offload.reread import Rereader
from offload.scheduler.layout import AUTO_CHUNK, Demand, Layout
from offload.scheduler.rungs import Rung, cached_rows
from offload.scheduler.window import staged_rows
from offload.tiers.hidden import HiddenForm
from offload.tiers.nearest import CardNearest
from offload.tiers.path import LARGEST_HEAD, StepMemory, StepPath
from offload.tiers.pinned import HostRegion, commit_regions
from offload.tiers.replica import DevicePath, PathSettings
from offload.tiers.search import HostSearch, Searchers, SearchSettings
from offload.tiers.sparse import SparsePath, SparseSettings
from offload.tiers.store import LayerStore, StoreLimits
from offload.tiers.transfer import HostReader, HostWriter, Streams, TransferCounters


class CacheMaker:
    """Makes the caches of one model.

    It holds every host region, caches only borrow them: were one part of a forgotten cache, the garbage collector would
    close it while the cache's own finalizer hands it back.

    Attributes:
        caches: Those that are in use.
        streams: On which all of them copy.
        counters: What they copied.
    """

    def __init__(
        self, model: Any, config: OffloadConfig, shape: ModelShape, budgets: Budgets, notes: Notes,
        caches: weakref.WeakSet[OffloadCache],
    ) -> None:  # fmt: skip
        """For one runtime.

        Args:
            model: With our attention.
            config: As asked.
            shape: As examined.
            budgets: Of the runtime.
            notes: Where fallbacks are told.
            caches: Where caches are noted.
        """
        self._model = model
        self._config = config
        self._shape = shape
        self._budgets = budgets
        self._notes = notes
        self.caches = caches
        self.streams = Streams(shape.device)
        self.counters = TransferCounters()
        self._regions: list[HostRegion] = []
        # What each layer's replica costs in fidelity, and what measures it while a prompt is there.
        self.errors: dict[Rung, tuple[float, ...]] | None = None
        self.measure_errors: Callable[[], dict[Rung, tuple[float, ...]] | None] | None = None
        self._inputs: Inputs | None = None  # of attention, where pages hold them
        threads = config.retrieval.threads
        self.searchers = Searchers(None if isinstance(threads, str) else threads)
        draws = config.retrieval.index == "graph" and self.streams.on
        self._nearest = CardNearest(shape.device, NEAREST_BYTES) if draws else None
        self._free_regions: dict[int, list[HostRegion]] = {}
        self._reserve = max(2**30, host_memory().total // max(1, len(shape.rows)))

    def make(self, *, prompt_tokens: int, tokens: int | None, exact: bool = False) -> OffloadCache:
        """A cache whose stores are built at its first use, when its batch is known.

        Args:
            prompt_tokens: Of the first prompt, where known.
            tokens: Tokens per sequence at the end, where known.
            exact: Every token is streamed, whatever the mode.
        """
        fast = self._config.keeps_replica and not exact
        memory = StepMemory(self._shape.device) if fast else None
        if memory is not None:
            # Where nobody verifies (stock `generate` over this cache), no step may go by a replica.
            memory.suspended = self._config.mode == "verified"
        if self._config.scheduler.recompute == "hidden" and self._inputs is None:
            found = recipes(self._model, self._shape)
            self._inputs = Inputs(self._shape.modules, found)
        angles = Angles()
        taken: list[tuple[int, HostRegion]] = []
        readers: list[HostReader] = []
        searches: list[HostSearch] = []

        this: list[weakref.ref[OffloadCache]] = []  # strong, what it calls would keep it alive
        key: list[int] = []

        def first_ids(n: int) -> Tensor | None:
            cache = this[0]()
            return None if cache is None else cache.first_ids(n)

        reread = None
        if self._config.scheduler.recompute == "prefix":
            reread = Rereader(self._model, self._shape, first_ids)

        def build(sequences: int, copies: int) -> tuple[Layout, list[LayerStore]]:
            for other in list(self.caches):
                for store in other.layer_stores:
                    store.drop_resident()  # copies that an idle cache does without
            if self.streams.on:
                torch.cuda.empty_cache()
            demand = partial(
                self._budgets.demand,
                batch=sequences * copies,
                tokens=tokens,
                copies=copies,
                prompt=prompt_tokens,
                exact=exact,
            )
            budget = self._budgets.device_budget()
            layout = self._laid_out(demand)
            owner = this[0]()
            assert owner is not None
            owner.decisions = self._budgets.decisions(
                demand(errors=self.errors),
                layout,
                budget=budget,
                output=None if tokens is None else tokens - prompt_tokens,
            )
            auto = isinstance(self._config.prefill.chunk, str) and self._shape.fed_whole is None
            if auto and layout.chunk < min(AUTO_CHUNK, tokens or AUTO_CHUNK):
                note = (
                    f"prefill.chunk is {layout.chunk:,} tokens, not 4,096, to fit the device budget"
                )
                self._notes.add(note)
            self._note_sparse(layout)
            reader = HostReader(self.streams, layout.staging_bytes, self.counters)
            writer = HostWriter(self.streams, layout.eviction_bytes, self.counters)
            all_limits = self._layer_limits(layout, tokens, sequences * copies)
            try:
                grow = []
                for index, of_layer in enumerate(all_limits):
                    page_bytes = self._page_bytes(index, layout)
                    region = self._take_region(page_bytes)
                    taken.append((page_bytes, region))
                    pages = LayerStore.initial_pages(of_layer, sequences)
                    grow.append((region, pages * page_bytes))
                self._make_host_room(sum(max(0, size - region.committed) for region, size in grow))
                commit_regions(grow)
                stores = []
                for index, (row, of_layer, (_, region)) in enumerate(
                    zip(self._shape.rows, all_limits, taken, strict=True)
                ):
                    path = None
                    if memory is not None:
                        path = self._device_path(index, layout, of_layer, memory, sequences)
                    if path is not None and path.search is not None:
                        searches.append(path.search)
                    stores.append(
                        LayerStore(
                            row,
                            of_layer,
                            batch=sequences,
                            region=region,
                            reader=reader,
                            writer=writer,
                            path=path,
                            hidden=self._hidden_form(index, layout, angles),
                            reread=None if reread is None else partial(reread.take, index),
                        )
                    )
            except BaseException:
                give_back()
                raise
            sparse = [store.path for store in stores if isinstance(store.path, SparsePath)]
            for path, following in pairwise(sparse):
                path.precede(following)
            reader.reset(list(stores))
            readers.append(reader)
            if layout.hidden is None and self._inputs is not None:
                self._inputs.forget(key[0])
            return layout, stores

        def settle() -> None:
            if reread is not None:
                reread.stop()
            for reader in readers:
                reader.reset(reader.order)

        def give_back() -> None:
            if reread is not None:
                reread.stop()
            self.streams.synchronize()
            # The garbage collector may be what calls this, within a thread that indexes: nothing waits for one here.
            indexing = [building for search in searches if (building := search.abandon()) is not None]  # fmt: skip
            searches.clear()
            for reader in readers:
                # It and its stores hold each other: without this their memory waits for the garbage collector.
                reader.reset([])
            readers.clear()
            if self._inputs is not None and key:
                self._inputs.forget(key[0])
            regions = [*taken]
            taken.clear()
            ended = itertools.count(1)

            def hand_back(_: object = None) -> None:
                if next(ended) >= len(indexing):
                    for page_bytes, region in regions:
                        self._free_regions.setdefault(page_bytes, []).append(region)

            for building in indexing:
                building.add_done_callback(hand_back)
            if not indexing:
                hand_back()

        cache = OffloadCache(
            stock_layers(text_config(self._model)),
            self._shape.offloaded,
            build,
            on_settle=settle,
            on_close=give_back,
            modules=self._shape.modules,
        )
        this.append(weakref.ref(cache))
        key.append(id(cache))
        if reread is not None:
            cache.on_end_pass = reread.stop
        self.caches.add(cache)
        if self._inputs is not None:
            self._inputs.asking.add(id(cache))
        return cache

    def _page_bytes(self, layer: int, layout: Layout) -> int:
        """Bytes of a host page of a layer."""
        if layout.hidden is not None:
            return layout.hidden.page_bytes[layer]
        return self._config.cache.page * self._shape.rows[layer].token_bytes

    def _hidden_form(self, layer: int, layout: Layout, angles: Angles) -> HiddenForm | None:
        """How a layer's pages hold inputs; None where they hold keys and values."""
        if layout.hidden is None or self._inputs is None:
            return None
        return HiddenForm(
            width=self._inputs.recipes[layer].width,
            tokens=layout.hidden.tokens,
            source=LayerSource(self._inputs, layer, angles),
        )

    def close(self, reason: str) -> None:
        """Closes every cache and gives all host memory back."""
        for cache in list(self.caches):
            cache.close(reason)
        self.streams.synchronize()
        self.searchers.close()  # it hands back what it still reads
        self._free_regions.clear()
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        for region in self._regions:
            region.close()
        self._regions.clear()

    def _laid_out(self, demand: Callable[..., Demand]) -> Layout:
        """A layout by what layers need, where that is known or can be measured now.

        Args:
            demand: Makes the demand; takes `errors`.
        """
        idle = sum(r.committed for free in list(self._free_regions.values()) for r in free)
        layout = self._budgets.lay_out(demand(errors=self.errors), idle_host=idle)
        if not layout.rungs:
            return layout
        if self.errors is None and self.measure_errors is not None:
            self.errors = self.measure_errors()
            if self.errors is not None:
                layout = self._budgets.lay_out(demand(errors=self.errors), idle_host=idle)
        if self.errors is not None:
            whole, rungs = layout.whole, enumerate(layout.rungs)
            bits = " ".join("whole" if i in whole else str(rung.bits) for i, rung in rungs)
            self._notes.add(f"bits of each layer's replica, by what the prompt says: {bits}")
        return layout

    def _layer_limits(self, layout: Layout, tokens: int | None, batch: int) -> list[StoreLimits]:
        """How each layer's tokens are divided between the tiers."""
        usual = StoreLimits(
            page=self._config.cache.page,
            sink_blocks=layout.sink_blocks,
            window_blocks=layout.window_blocks,
            host_tokens=layout.host_tokens,
            host_blocks=layout.host_blocks,
            batch=batch,
        )
        # Layers that keep all their tokens on the device have a window as long as the run.
        blocks = -(-(tokens or 0) // usual.page) - layout.sink_blocks
        whole = replace(usual, window_blocks=max(1, blocks), host_tokens=0)
        return [whole if i in layout.whole else usual for i in range(len(self._shape.rows))]

    def _device_path(
        self, index: int, layout: Layout, limits: StoreLimits, memory: StepMemory, batch: int
    ) -> StepPath | None:
        """The device path of one layer, or None where the replica did not fit and every token is streamed."""
        if not layout.rungs and layout.host_tokens:
            what = "chosen rows fit" if self._config.scheduler.sparsity else "replica fits"
            self._notes.tell(f"no {what} the device budget: every token is streamed")
            return None
        retrieval = self._config.retrieval
        rung = layout.rungs[index] if layout.rungs else None
        if rung is not None and rung.share:
            return self._sparse_path(index, layout, limits, memory, batch)
        tokens = 0 if rung is None else rung.selected(retrieval.tokens)
        keeps = self.streams.on and retrieval.index == "replica"
        kept_rows = cached_rows(tokens, retrieval.row_cache) if keeps else 0
        if keeps and rung is not None and not rung.caches:
            own = [r.caches for i, r in enumerate(layout.rungs) if i not in layout.whole]
            if index not in layout.whole:
                some = "" if not any(own) else f" of {own.count(False)} of {len(own)} layers"
                self._notes.tell(f"the device has no room to keep selected rows{some}: each step reads them all from the host")  # fmt: skip
            kept_rows = 0
        blocks = 0 if index in layout.whole else layout.replica_tokens // limits.page
        search = None
        if retrieval.index != "replica" and blocks and tokens:
            search = HostSearch(
                self._shape.rows[index],
                SearchSettings(index=retrieval.index, tokens=tokens, recall=retrieval.recall),
                self.searchers,
                batch=batch,
                blocks=blocks,
                page=limits.page,
                host=self._budgets.host,
                nearest=self._nearest,
            )
        path = DevicePath(
            self._shape.rows[index],
            PathSettings(
                bits=4 if rung is None else rung.bits,
                clustered=rung is not None and rung.clustered,
                tokens=tokens,
                cached_rows=kept_rows,
                skipped_mass=self._config.replica.skipped_mass,
            ),
            memory,
            batch=batch,
            blocks=blocks,
            slots=limits.device_blocks + 1,
            page=limits.page,
            device=self._shape.device,
            search=search,
        )
        if not path.has_kernels and path.blocks:
            self._notes.tell(
                f"heads are larger than {LARGEST_HEAD}, which no kernel knows: slow steps"
                if self.streams.on
                else "without a GPU its steps are slower than those of mode exact"
            )
        return path

    def _note_sparse(self, layout: Layout) -> None:
        """Tells how many of the chosen tokens steps read on the host."""
        own = [rung for i, rung in enumerate(layout.rungs) if i not in layout.whole]
        far = sum(rung.far for rung in own) / max(1, len(own))
        if far:
            most = own[0].near + own[0].far
            self._notes.add(f"of {most:,} chosen tokens per KV head {far:,.0f} are read on the host: the device has no room")  # fmt: skip

    def _sparse_path(
        self, index: int, layout: Layout, limits: StoreLimits, memory: StepMemory, batch: int
    ) -> SparsePath:
        """The device path of a layer that attends to some of its tokens."""
        rung = layout.rungs[index]
        window = layout.sparse(rung.share)
        path = SparsePath(
            self._shape.rows[index],
            SparseSettings(
                window=window,
                most=rung.near + rung.far,
                near=rung.near,
                staged=staged_rows(
                    rung.near + rung.far, limits.batch, self._shape.rows[index].token_bytes
                ),
                decay=window.decay(layout.last_tokens),
            ),
            memory,
            batch=batch,
            blocks=0 if index in layout.whole else layout.replica_tokens // limits.page,
            slots=limits.device_blocks + 1,
            page=limits.page,
            device=self._shape.device,
        )
        if not path.has_kernels and self.streams.on:
            self._notes.tell(f"heads are larger than {LARGEST_HEAD}, which no kernel knows: slow steps")  # fmt: skip
        return path

    def _take_region(self, page_bytes: int) -> HostRegion:
        free = self._free_regions.get(page_bytes)
        if free:
            free.sort(key=lambda region: region.committed)
            return free.pop()
        region = HostRegion(
            page_bytes, self._reserve, self._shape.device, self._budgets.pins, self._budgets.host
        )
        self._regions.append(region)
        return region

    def _make_host_room(self, nbytes: int) -> None:
        """Closes idle regions where the host budget has no room beside them."""
        room = self._budgets.host.room()
        if room is None or room >= nbytes:
            return
        for free in list(self._free_regions.values()):
            while free:
                region = free.pop()
                region.close()
                self._regions.remove(region)

    def keep_pages_resident(self, cache: OffloadCache, *, rows: int = 1) -> None:
        """Fills the memory that prefill needed and decoding does not with the oldest host pages.

        They then need not be streamed. The next prefill takes the memory back.

        Args:
            cache: In use.
            rows: Tokens of each sequence that are computed together.
        """
        layout = cache.layout
        stores = cache.layer_stores
        # A CPU's copy would be no nearer.
        if not self.streams.on or layout is None or not stores or not stores[0].columns:
            return
        spare = layout.idle_bytes + int(
            layout.resident_share
            * layout.host_tokens
            * stores[0].batch
            * sum(self._shape.token_bytes)
        )
        if layout.host_blocks is not None or not spare:
            return  # tokens that are read again need that memory
        torch.cuda.empty_cache()
        per_column = sum(
            store.column_bytes * (1 if store.shared_columns else store.batch) for store in stores
        )
        for store in stores:
            store.keep_resident(spare // per_column, rows=rows)
