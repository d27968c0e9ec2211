"""How much memory does this machine have, and how much of it is free? Read at the moment of asking.

Device memory is counted by the driver. Host memory is what psutil calls available, or what the control group
of a container leaves, whichever is less.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

    from offload.probe import Probe

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes of host memory.

    Attributes:
        total: Of the machine, or of the container if that is less.
        available: Without swapping.
        limited_by: "cgroup" or "machine".
    """

    total: int
    available: int
    limited_by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes of device memory.

    Attributes:
        total: Of the card (of the host, for a CPU device).
        free: As the driver counts it.
        allocated: In live tensors of this process.
        overhead: Neither free nor torch's: driver contexts, other processes. 0 for a CPU.
    """

    total: int
    free: int
    allocated: int
    overhead: int


def host_memory(cgroup: Path = _CGROUP) -> HostMemory:
    """Host memory of the machine or container.

    Args:
        cgroup: Where control groups are mounted.
    """
    machine = psutil.virtual_memory()
    limits = [HostMemory(total=machine.total, available=machine.available, limited_by="machine")]
    for folder in _own_groups(cgroup):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= machine.total:
            continue
        # File cache counts as used in a group, but gives way.
        used -= min(used, _inactive_file(folder / "memory.stat"))
        limits.append(HostMemory(total=limit, available=max(0, limit - used), limited_by="cgroup"))
    return min(limits, key=lambda memory: memory.available)


def device_memory(device: torch.device) -> DeviceMemory:
    """Memory of a device; of the host for a CPU device."""
    if device.type != "cuda":
        host = host_memory()
        return DeviceMemory(total=host.total, free=host.available, allocated=0, overhead=0)
    import torch

    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return DeviceMemory(
        total=total,
        free=free,
        allocated=torch.cuda.memory_allocated(device),
        overhead=max(0, total - free - reserved),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """An NVIDIA card, as its driver says.

    Attributes:
        name: As in "NVIDIA GeForce RTX 4090".
        total: Bytes of its memory.
        free: Of these, free.
        driver: Version of the driver.
        pcie_generation: Of the link; None where it is not known.
        pcie_width: Lanes that are in use.
        most_pcie_width: Lanes that the card has.
        power_limit_w: Watts that the driver lets it take.
        most_clock_mhz: Of its multiprocessors, the highest.
        most_memory_clock_mhz: Of its memory, the highest.
    """

    name: str
    total: int
    free: int
    driver: str
    pcie_generation: int | None = None
    pcie_width: int | None = None
    most_pcie_width: int | None = None
    power_limit_w: float | None = None
    most_clock_mhz: int | None = None
    most_memory_clock_mhz: int | None = None


def local_card() -> Card | None:
    """The first NVIDIA card of this machine; None without one. Needs no torch."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None

    def asked(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except pynvml.NVMLError:
            return None

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        limit = asked(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
        clock = pynvml.nvmlDeviceGetMaxClockInfo
        return Card(
            name=str(pynvml.nvmlDeviceGetName(handle)),
            total=int(memory.total),
            free=int(memory.free),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            # Of an idle card the link sleeps: what it can do says more than what it does.
            pcie_generation=asked(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            pcie_width=asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            most_pcie_width=asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            power_limit_w=None if limit is None else limit / 1000,
            # Likewise its clocks.
            most_clock_mhz=asked(clock, handle, pynvml.NVML_CLOCK_SM),
            most_memory_clock_mhz=asked(clock, handle, pynvml.NVML_CLOCK_MEM),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def free_for_us() -> int | None:
    """Bytes of the first card that are free or that torch holds in this process; None without a card. Imports no torch."""
    card = local_card()
    return None if card is None else card.free + held_here()


def held_here() -> int:
    """Bytes that torch holds of its current card in this process; 0 where it is not loaded or has begun nothing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved())


def probe(*, measure: bool = True) -> Probe:
    """What this machine can do: measured once, in some seconds, and kept for later.

    What is kept is used again where card, driver, torch, processor and cores are the same and at least as much device memory
    is free; otherwise it is measured anew.

    Args:
        measure: False: what is kept, or an error.

    Raises:
        InputError: Without `measure`: nothing is kept, or it is not of this machine as it is now.
        BudgetError: The card or the host have too little free memory to measure.
    """
    from offload.probe import probe as probed  # late: it asks this module for the card

    return probed(measure=measure)


def _own_groups(cgroup: Path) -> list[Path]:
    """The folders of this process's control groups: its own, its parents', and the mount's root."""
    folders = [cgroup, cgroup / "memory"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        if controllers not in ("", "memory"):
            continue
        folder = (cgroup / "memory" if controllers else cgroup) / path.lstrip("/")
        while folder != cgroup and cgroup in folder.parents:
            folders.append(folder)
            folder = folder.parent
    return list(dict.fromkeys(folders))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _inactive_file(path: Path) -> int:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        return 0
    names = ("inactive_file", "total_inactive_file")
    return next((int(line.split()[1]) for line in lines if line.split()[0] in names), 0)
