"""Where was this measured, and with which versions? What two measurements have to agree in to be compared.

torch is imported by `environment`, not by this module.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offload import __version__
from offload.hardware import local_card

PACKAGES = ("torch", "transformers", "triton", "numpy", "numba", "faiss-cpu")


def versions() -> dict[str, str | None]:
    """Versions of offload, Python and what offload stands on; None for what is not installed.

    They are read from the installed metadata: importing torch to ask for its version takes seconds.
    """
    found: dict[str, str | None] = {"offload": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """Date, versions, processor and card, as plain values; None for what is not there or not known."""
    import torch

    card = local_card()
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "card": None,
    }
    if card is not None:
        facts |= {
            "card": card.name,
            "card_bytes": card.total,
            "driver": card.driver,
            "cuda": torch.version.cuda,
            "pcie_generation": card.pcie_generation,
            "pcie_width": card.pcie_width,
            "power_limit_w": card.power_limit_w,
            "most_clock_mhz": card.most_clock_mhz,
            "most_memory_clock_mhz": card.most_memory_clock_mhz,
        }
    return facts


def processor() -> str | None:
    """The processor's name, as Linux has it; None where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, None)
