"""Where is every byte of the device, and was it planned? Planned, measured and unaccounted, purpose by purpose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offload.demand import ALLOCATOR_SLACK, DRIVER_GROWTH
from offload.hardware import DeviceMemory


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one purpose.

    Attributes:
        purpose: As the plan names it.
        planned: Bytes.
        measured: At the peak; None where this device has no way to tell.
    """

    purpose: str
    planned: int
    measured: int | None


def device_parts(
    planned: Mapping[str, int],
    there: Mapping[str, int],
    device: torch.device,
    *,
    before: DeviceMemory,
    most_used: int,
    last_used: int,
    last_reserved: int,
) -> tuple[list[Part], int | None, int | None]:
    """Planned and measured by purpose, the driver's peak, and what is unaccounted; the last two are None on a CPU.

    Peaks of torch's allocator are those since its statistics were reset, which `attach` does.

    Args:
        planned: Bytes of the layout, by purpose.
        there: Bytes of our pools, by purpose, as of `Report.bytes`.
        device: Of the model.
        before: Memory of the device before the run.
        most_used: The most bytes of the card in use that were seen, by whomever.
        last_used: Bytes of the card in use behind the run.
        last_reserved: Of these, held by torch.
    """
    planned, there = defaultdict(int, planned), defaultdict(int, there)
    held = {
        "weights": (planned["weights"], there["weights"]),
        "sinks, window, tail": (planned["sinks and window"] + planned["tail"], there["window"]),
        "replica": (planned["replica"], there["replica"]),
        "cached rows": (planned["cached rows"], there["cached rows"]),
        "staging": (planned["staging"], there["staging"]),
        "eviction": (planned["eviction"], there["eviction"]),
    }
    passes = planned["workspace"] + planned["decode step"] + planned["other KV"]
    passes += planned["rebuilding"] + planned["reading again"]
    if device.type != "cuda":
        parts = [Part(name, *pair) for name, pair in held.items() if any(pair)]
        return [*parts, Part("passes and states", passes, None)], None, None
    if before.allocated:  # what the allocator counts, other live tensors included
        held["weights"] = (planned["weights"], before.allocated)
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    driver = max(0, last_used - last_reserved)
    # Between two samples memory can rise and fall unseen; torch's own peak misses nothing.
    peak = max(most_used, driver + reserved)
    # What nobody counts by itself is what is left, but no more of it than was planned: the rest is unaccounted.
    left = {
        "passes and states": (passes, allocated - sum(pair[1] for pair in held.values())),
        "allocator": (ALLOCATOR_SLACK, reserved - allocated),
        "driver": (before.overhead + DRIVER_GROWTH, driver),
    }
    parts = [Part(name, *pair) for name, pair in held.items() if any(pair)]
    parts += [Part(name, size, max(0, min(size, rest))) for name, (size, rest) in left.items()]
    return parts, peak, peak - sum(part.measured or 0 for part in parts)
