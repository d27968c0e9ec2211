"""What does a run need, and what may it take? Demands and budgets of one attached model.

The bytes themselves are priced by `offload.scheduler.layout`; this room knows the model, the configuration and
what the machine has left.
"""

from __future__ import annotations

import logging
import statistics
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from offload.config import OffloadConfig
from offload.decisions import Card, Choice, choices
from offload.demand import (
    DRIVER_GROWTH,
    Held,
    demand_of,
    other_demand,
    priced_shape,
    way_of,
)
from offload.errors import BudgetError, InputError
from offload.hardware import DeviceMemory, device_memory, host_memory
from offload.model import ModelShape
from offload.probe import known_profile
from offload.scheduler.cost import Times, times
from offload.scheduler.layout import Demand, Layout, lay_out
from offload.scheduler.profiles import Profile
from offload.scheduler.rungs import Rung
from offload.tiers.pinned import HostBudget, PinBudget

logger = logging.getLogger(__name__)


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
        self._profile = _profile_of(shape.device)
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
        errors: Mapping[Rung, Sequence[float]] | None = None,
    ) -> Demand:
        """What a run needs.

        Args:
            batch: Sequences that are decoded.
            tokens: Tokens per sequence at the end, or None if unknown.
            copies: How many sequences continue one prompt.
            prompt: Tokens of the prompt, where known.
            exact: No replica, whatever the mode.
            errors: What each layer's replica costs in fidelity, by rung, where that was measured.
        """
        return demand_of(
            self._config,
            self._shape,
            self._holds(),
            batch=batch,
            tokens=tokens,
            copies=copies,
            prompt=prompt,
            exact=exact,
            errors=errors,
        )

    def decisions(
        self, demand: Demand, layout: Layout, *, budget: int, output: int | None
    ) -> list[Choice]:
        """Why a run is laid out as it is; in milliseconds where the card is known, else in bytes.

        Args:
            demand: Of the run.
            layout: That came of it.
            budget: Device bytes that it had.
            output: Tokens of the answer, where that is known.
        """
        exact = self._config.keeps_replica and not demand.rungs
        config = OffloadConfig.build(self._config, mode="exact") if exact else self._config
        card = self._card(config, batch=demand.batch, prompt=demand.prompt, output=output or 0)
        other = other_demand(
            config, self._shape, self._holds(),
            batch=demand.batch, tokens=demand.tokens, copies=demand.copies, prompt=demand.prompt,
        )  # fmt: skip
        if other is not None:  # as the device was: by now the run may have taken its memory
            other = replace(other, weights=demand.weights, overhead=demand.overhead)
        return choices(config, demand, layout, budget=budget, card=card, other=other, output=output)

    def predicted(
        self, layout: Layout, *, batch: int, prompt: int, output: int, exact: bool, captured: bool
    ) -> Times | None:
        """What a run was expected to take: a token in the mean, its parts in the middle of the answer; None where the card is not known.

        Args:
            layout: Of the run.
            batch: Sequences.
            prompt: Tokens of each.
            output: Of the answer.
            exact: Every token was streamed, whatever the mode.
            captured: Whether its steps were.
        """
        config = OffloadConfig.build(self._config, mode="exact") if exact else self._config
        card = self._card(config, batch=batch, prompt=prompt, output=output)
        if card is None or (config.mode == "verified" and not layout.host_tokens):
            return None  # what a pass streams is not known of a cache whose length is not
        way = replace(card.way, captured=captured)
        # Tokens that the device has no room for cost more the more there are: one in the middle is not the mean.
        fifths = [prompt + output * (2 * i + 1) // 10 for i in range(5)]
        found = [times(layout, card.shape, card.profile, way, tokens=at) for at in fifths]
        return replace(found[2], token=statistics.fmean(one.token for one in found))

    def _card(self, config: OffloadConfig, *, batch: int, prompt: int, output: int) -> Card | None:
        if self._profile is None:
            return None
        itemsize = max((row.dtype.itemsize for row in self._shape.rows), default=2)
        weights = self._shape.weights
        # As if every weight were multiplied with: embeddings are a few hundredths.
        shape = priced_shape(self._shape, weights=weights, parameters=weights / itemsize)
        way = way_of(config, batch=batch, prompt=prompt, output=output)
        return Card(shape=shape, profile=self._profile, way=way)

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
        share = (self.device_budget() - memory.overhead - DRIVER_GROWTH) / memory.total
        torch.cuda.empty_cache()
        self._uncap = weakref.finalize(self, _caps.add(device, min(1.0, share)))

    def uncap_allocator(self) -> None:
        """Takes the cap away again."""
        if self._uncap is not None:
            self._uncap()

    def _holds(self) -> Held:
        """What the device holds now."""
        memory = self._device()
        return Held(
            total=memory.total,
            weights=memory.allocated if self._on_card else self._held(),
            overhead=memory.overhead,
            on_card=self._on_card,
            flops_per_byte=None
            if self._profile is None
            else self._profile.gemm_flops / self._profile.pcie,
        )

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


def _profile_of(device: torch.device) -> Profile | None:
    """Rates of a card; None for others, and for cards that nothing is known of."""
    if device.type != "cuda":
        return None
    try:
        return known_profile(torch.cuda.get_device_name(device))
    except InputError:
        return None
