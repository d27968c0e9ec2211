"""What does a run need, and what may it take? Demands and budgets of one attached model.

The bytes themselves are priced by `offload.scheduler.layout`; this room knows the model, the configuration and
what the machine has left.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from offload.config import OffloadConfig
from offload.errors import BudgetError, ConfigError
from offload.hardware import DeviceMemory, device_memory, host_memory
from offload.model import ModelShape
from offload.scheduler.layout import Demand, Layout, RungPrice, lay_out
from offload.scheduler.rungs import (
    RUNGS,
    cached_rows,
    row_cache_bytes,
    scratch_bytes,
    scratch_token_bytes,
)
from offload.tiers.pinned import HostBudget, PinBudget
from offload.verify import Drafts

logger = logging.getLogger(__name__)

# What torch's allocator loses to rounding and fragmentation. An 8B model used all of it in a prefill of 131,072
# tokens; with less, the allocator gives cached blocks back and asks for them again, again and again.
_ALLOCATOR_SLACK = 256 * 2**20
# What the driver takes after attaching: kernels loaded when they first run, tables of pinned pages. Without it the
# same run went 7 MiB over the cap as the driver counts.
_DRIVER_GROWTH = 96 * 2**20
# What cuBLAS keeps for a further stream, that of passes over drafts.
_STREAM_WORKSPACE = 64 * 2**20


class _Caps:
    """Caps on torch's allocator, which has one per device and process: the smallest in force holds."""

    def __init__(self) -> None:
        self._shares: dict[torch.device, list[float]] = {}
        self._before: dict[torch.device, float] = {}

    def add(self, device: torch.device, share: float) -> Callable[[], None]:
        """Adds a cap; returns what takes it away again."""
        read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        shares = self._shares.setdefault(device, [])
        if not shares:
            self._before[device] = 1.0 if read is None else read(device)
        shares.append(share)
        torch.cuda.set_per_process_memory_fraction(min(shares), device)

        def remove() -> None:
            shares.remove(share)
            left = min(shares, default=self._before[device])
            torch.cuda.set_per_process_memory_fraction(left, device)

        return remove


_caps = _Caps()


class Budgets:
    """The budgets of one attached model.

    Attributes:
        pins: What may be pinned.
        host: What host pages may take.
    """

    def __init__(
        self, config: OffloadConfig, shape: ModelShape, layouts: Callable[[], Iterable[Layout]]
    ) -> None:
        """Checks explicit budgets against the machine.

        Args:
            config: As asked.
            shape: Of the model.
            layouts: Tells the layouts of all live caches.

        Raises:
            BudgetError: More device memory was asked for than there is.
        """
        self._config = config
        self._shape = shape
        self._layouts = layouts
        self._on_card = shape.device.type == "cuda"
        self._uncap: weakref.finalize[..., Budgets] | None = None
        pinned = config.memory.pinned
        total = host_memory().total
        self.pins = PinBudget(limit=None if pinned.is_auto else pinned.resolve(total=total, auto=0))
        available = weakref.WeakMethod(self._host_available)  # no cycle: the cap must end with us

        def host_available(held: int) -> int:
            method = available()
            return 0 if method is None else method(held)

        self.host = HostBudget(available=host_available)
        memory = self._device()
        asked = self.device_budget()
        if asked > memory.total:
            raise BudgetError(
                "memory.gpu",
                requested=asked,
                available=memory.total,
                setting="memory.gpu",
                change="The device has no more. Lower it, or set it to 'auto'.",
            )

    def device_budget(self) -> int:
        """Device bytes allowed now, weights included."""
        memory = self._device()
        reserve = self._config.memory.reserve.resolve(total=memory.total, auto=0)
        # On a card, what others hold is in the demand as overhead; a CPU's "device" is what is free of it. Weights that
        # are mapped from a file count as free as well as held.
        held = memory.total if self._on_card else self._held() + memory.free
        auto = min(memory.total, held)
        return self._config.memory.gpu.resolve(total=memory.total, auto=auto - reserve)

    def demand(
        self,
        *,
        batch: int,
        tokens: int | None,
        copies: int = 1,
        prompt: int = 0,
        exact: bool = False,
    ) -> Demand:
        """What a run needs.

        Args:
            batch: Sequences that are decoded.
            tokens: Tokens per sequence at the end, or None if unknown.
            copies: How many sequences continue one prompt.
            prompt: Tokens of the prompt, where known.
            exact: No replica, whatever the mode.
        """
        shape = self._shape
        fast = self._config.keeps_replica and not exact
        cache, memory = self._config.cache, self._device()
        staging = self._config.decode.staging
        chunk = self._config.prefill.chunk
        whole = prompt if self._shape.fed_whole is not None and prompt else None
        return Demand(
            batch=batch,
            copies=copies,
            prompt=prompt,
            tokens=tokens,
            page=cache.page,
            sinks=cache.sinks,
            window=None if isinstance(cache.window, str) else cache.window,
            chunk=whole or (None if isinstance(chunk, str) else chunk),
            staging=None if staging.is_auto else staging.resolve(total=memory.total, auto=0),
            token_bytes=self._shape.token_bytes,
            weights=memory.allocated if self._on_card else self._held(),
            overhead=memory.overhead + _ALLOCATOR_SLACK + _DRIVER_GROWTH if self._on_card else 0,
            workspace=self._shape.workspace,
            workspace_per_token=self._shape.workspace_per_token,
            least_workspace=self.pass_bytes(batch, self._decoded_rows(exact)),
            other_kv=batch * self._shape.other_kv_bytes(tokens),
            rungs=self._rungs() if fast else (),
            whole_layers=self._whole_layers() if fast else 0,
            streams=self._config.replica.rung == "auto",
            scratch_bytes=sum(scratch_bytes(*heads, self._selected()) for heads in set(shape.heads))
            if fast
            else 0,
            scratch_token_bytes=sum(scratch_token_bytes(*heads) for heads in set(shape.heads)),
            longest=shape.max_positions or 2**20,
        )

    def pass_bytes(self, batch: int, rows: int) -> int:
        """Device bytes of a pass that gives logits of every row, which processors and samplers copy.

        Args:
            batch: Sequences.
            rows: Tokens of each; of more than one the keys and values are kept beside the cache.
        """
        shape = self._shape
        per_row = shape.workspace_per_token + 8 * shape.vocabulary
        beside = _STREAM_WORKSPACE * self._on_card + batch * rows * sum(shape.token_bytes)
        needed = shape.workspace + batch * (rows * per_row + 16 * shape.vocabulary)
        return needed + (beside if rows > 1 else 0)

    def _decoded_rows(self, exact: bool) -> int:
        """Tokens of a sequence that a pass of decoding computes together, at most."""
        verified = self._config.mode == "verified" and not exact
        return Drafts.of(self._config.decode.draft).rows if verified else 1

    def _whole_layers(self) -> int:
        asked, there = self._config.replica.whole_layers, len(self._shape.rows)
        if asked > there:
            raise ConfigError(
                "replica.whole_layers is more than the layers that keep every token",
                asked=asked,
                there=there,
                change=f"Write at most {there}.",
            )
        return asked

    def _selected(self) -> int:
        """Tokens that a step attends to exactly per KV head, at most."""
        return max(rung.selected(self._config.retrieval.tokens) for rung in RUNGS)

    def _rungs(self) -> tuple[RungPrice, ...]:
        """The rungs that the config allows, best first."""
        asked, retrieval = self._config.replica.rung, self._config.retrieval
        prices = []
        for rung in RUNGS:
            automatic = rung.faithful or self._config.mode == "verified"
            if asked != rung.name and not (asked == "auto" and automatic):
                continue
            layer_bytes = tuple(
                rung.token_bytes(row.kv_heads, row.key_dim, row.value_dim)
                for row in self._shape.rows
            )
            tokens = rung.selected(retrieval.tokens)
            slots = cached_rows(tokens, retrieval.row_cache) if self._on_card else 0
            row_bytes = tuple(
                row_cache_bytes(slots, row.kv_heads, row.token_bytes) for row in self._shape.rows
            )
            prices.append(RungPrice(rung=rung, layer_bytes=layer_bytes, row_bytes=row_bytes))
            if slots and isinstance(retrieval.row_cache, str):
                # What is only faster must not cost a rung.
                without = replace(rung, caches=False)
                none = (0,) * len(row_bytes)
                prices.append(RungPrice(rung=without, layer_bytes=layer_bytes, row_bytes=none))
        return tuple(prices)

    def lay_out(self, demand: Demand, *, idle_host: int = 0) -> Layout:
        """Divides a run between the tiers.

        Args:
            demand: What is asked.
            idle_host: Host bytes that are held already and that the run will use again.

        Raises:
            BudgetError: It does not fit the budgets, or the machine has not what the budgets allow.
        """
        layout = lay_out(
            demand,
            device_budget=self.device_budget(),
            host_budget=max(0, self._host_available(self.host.held) + idle_host),
        )
        more = layout.device_bytes - demand.weights - demand.overhead
        free = self._device_free()
        if more > free:
            raise BudgetError(
                "The window, its buffers and the workspace on the device",
                requested=more,
                available=free,
                setting="memory.gpu",
                change="The device has no more free memory. Close other programs and caches that are not "
                "used, lower memory.gpu, or set it to 'auto'.",
            )
        return layout

    def cap_allocator(self) -> None:
        """Makes an explicit device budget hard: torch's allocator then refuses instead of exceeding it."""
        if not self._on_card or self._config.memory.gpu.is_auto:
            return
        memory, device = self._device(), self._shape.device
        share = (self.device_budget() - memory.overhead - _DRIVER_GROWTH) / memory.total
        torch.cuda.empty_cache()
        self._uncap = weakref.finalize(self, _caps.add(device, min(1.0, share)))

    def uncap_allocator(self) -> None:
        """Takes the cap away again."""
        if self._uncap is not None:
            self._uncap()

    def _device(self) -> DeviceMemory:
        return device_memory(self._shape.device)

    def _device_free(self) -> int:
        memory = self._device()
        if not self._on_card:
            return memory.free
        return memory.free + torch.cuda.memory_reserved(self._shape.device) - memory.allocated

    def _held(self) -> int:
        """Device bytes of the model and of live caches, where no allocator counts them."""
        pools = (
            "sinks and window",
            "tail",
            "staging",
            "eviction",
            "replica",
            "cached rows",
            "other KV",
        )
        return self._shape.weights + sum(
            layout.device[pool] for layout in self._layouts() for pool in pools
        )

    def _host_available(self, held: int) -> int:
        """Bytes of pages that may be committed in addition to those held."""
        host = host_memory()
        reserve = self._config.memory.reserve.resolve(total=host.total, auto=0)
        free = max(0, host.available - reserve)
        asked = self._config.memory.cpu
        return free if asked.is_auto else min(free, asked.resolve(total=host.total, auto=0) - held)
