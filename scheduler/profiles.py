"""What can a card do? Data sheets of the cards that people have, and the shares of them that programs reach.

Sources: NVIDIA's product pages and architecture papers (Ampere GA102 and GA100, Ada AD102, Blackwell GB202, Hopper H100). Tensor
rates are dense bfloat16 with float32 sums. What a program reaches of them is calibrated on an H100 SXM by
`benchmarks/decode.json` (memory, matrix products, attention, copies, launches) and taken over for the others; attention
comes nearer to the data sheet on cards before Hopper, since the kernel is of their time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches

from offload.errors import InputError

GIB = 2**30
_MEMORY_SHARE = 0.86  # of the data sheet, by a copy and by our scan
_GEMM_SHARE = {"hopper": 0.57, "other": 0.75}
_ATTENTION_SHARE = {"hopper": 0.29, "other": 0.7}
# Bytes per second of copies from pinned memory, by generation of PCIe and lanes.
_PCIE = {"3x16": 12e9, "4x8": 12.5e9, "4x16": 25e9, "5x16": 53e9}

RATES = "bytes_per_s", "gemm_flops", "attention_flops", "pcie", "host_bytes_per_s"  # of a profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Rates of one machine.

    Attributes:
        name: Of the card.
        memory: Bytes of the card.
        host: Bytes of memory of a typical host.
        bytes_per_s: Of the card's memory, as programs reach it.
        gemm_flops: Of matrix products, per second.
        attention_flops: Of attention to many queries, per second.
        pcie: Bytes per second of copies from pinned memory.
        host_bytes_per_s: At which all cores of a typical host read its memory.
        context: Bytes that the driver takes for a process.
        basis: "data_sheet", "calibrated" where whole runs were timed on such a card, or "measured" where all rates were on this machine.
        measured: Rates that were measured on this machine, whatever the basis of the others.
    """

    name: str
    memory: int
    host: int
    bytes_per_s: float
    gemm_flops: float
    attention_flops: float
    pcie: float
    context: int
    basis: str
    host_bytes_per_s: float = 40e9  # two channels of DDR4-3200, of 51 GB/s by the standard
    measured: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuses entries that no machine has.

        Raises:
            InputError: An entry is negative or not a number, or a rate or a size is zero.
        """
        for entry in ("memory", "host", *RATES):
            self._require(entry, getattr(self, entry) > 0)
        self._require("context", self.context >= 0)

    def source_of(self, rate: str) -> str:
        """Where one of `RATES` comes from."""
        return "measured" if rate in self.measured else self.basis

    def _require(self, entry: str, holds: bool) -> None:
        value = getattr(self, entry)
        if not holds or not math.isfinite(value):
            raise InputError(
                f"The profile {self.name} has an entry that no machine has: {entry}",
                asked=value,
                there="a finite number above zero",
                change="Measure the machine anew, or take a profile by its name.",
            )


def _card(
    name: str, gib: int, gb_per_s: int, tflops: float, pcie: str, host_gib: int, kind: str = "other"
) -> Profile:
    return Profile(
        name=name,
        memory=gib * GIB,
        host=host_gib * GIB,
        bytes_per_s=_MEMORY_SHARE * gb_per_s * 1e9,
        gemm_flops=_GEMM_SHARE[kind] * tflops * 1e12,
        attention_flops=_ATTENTION_SHARE[kind] * tflops * 1e12,
        pcie=_PCIE[pcie],
        # 0.7 GiB on the H100, whose many multiprocessors take more.
        context=(3 * GIB // 4) if kind == "hopper" else GIB // 2,
        basis="calibrated" if name == "h100" else "data_sheet",
        # 109 GB/s were read by 16 cores beside an H100; desktops have two channels.
        host_bytes_per_s=109e9 if host_gib >= 256 else 40e9,
    )


PROFILES = {
    card.name: card
    for card in (
        _card("rtx3060", 12, 360, 25.5, "4x16", 32),
        _card("rtx3090", 24, 936, 71, "4x16", 64),
        _card("rtx4060ti-16gb", 16, 288, 44, "4x8", 32),
        _card("rtx4070", 12, 504, 58, "4x16", 64),
        _card("rtx4090", 24, 1008, 165, "4x16", 64),
        _card("rtx5090", 32, 1792, 209, "5x16", 64),
        _card("l4", 24, 300, 121, "4x16", 64),
        _card("a10", 24, 600, 125, "4x16", 64),
        _card("a100", 80, 2039, 312, "4x16", 256),
        _card("h100", 80, 3350, 989, "5x16", 256, "hopper"),
        _card("h200", 141, 4800, 989, "5x16", 256, "hopper"),
    )
}


def profile_of(name: str) -> Profile:
    """A card by its name, however it is written.

    Raises:
        InputError: There is no such profile.
    """
    # As people write it, and as drivers do: "RTX 4090", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3".
    words = name.lower().replace("-", " ").replace("_", " ").split()
    sizes = [int(word[:-2]) for word in words if word.endswith("gb") and word[:-2].isdigit()]
    dropped = ("nvidia", "geforce", "tesla", "sxm", "sxm4", "sxm5", "hbm3", "hbm3e")
    rest = [word for word in words if word not in dropped and not word.endswith("gb")]
    wanted = "".join(rest)
    for key, profile in PROFILES.items():
        short = key.removesuffix("-16gb")
        same = wanted in (short, short.removeprefix("rtx"))
        if same and all(abs(size - profile.memory / GIB) <= 3 for size in sizes):
            return profile
    near = get_close_matches(wanted, PROFILES, n=1)
    raise InputError(
        "There is no profile of this card",
        asked=name,
        there=", ".join(PROFILES),
        change=f"Did you mean {near[0]}?"
        if near
        else "Name one of these, or the nearest one and --gpu-memory.",
    )
