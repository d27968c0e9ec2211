"""Is this machine ready, and what would make it faster? Each thing that offload needs, looked at and, on a card, measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.hardware import Card, host_memory, local_card
from offload.units import GIB, MIB, gib, rate

PIN_PROBE_BYTES = 2 * GIB  # enough to see the limits that WSL2 and some containers have
_COPY_BYTES = 256 * MIB
_TRANSFORMERS = (5, 17)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        value: What was found.
        ok: Whether it is as it should be; None where it only matters for some.
        advice: What to do; empty where there is nothing.
        blocks: Whether nothing runs without it.
    """

    name: str
    value: str
    ok: bool | None = True
    advice: str = ""
    blocks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All of it.

    Attributes:
        checks: In the order in which they are shown.
        verdict: One line: ready, or what blocks.
        ready: Whether anything runs.
    """

    checks: list[Check]
    verdict: str
    ready: bool


def diagnose(*, measure: bool = True) -> Diagnosis:
    """Looks at this machine.

    Args:
        measure: Whether copies and pinning are tried on a card, which takes a few seconds.
    """
    card = local_card()
    checks = [_card(card), *_link(card), _torch(card), _transformers(), _triton(card), _host(), _processor()]  # fmt: skip
    usable = card is not None and not any(check.blocks for check in checks)
    if usable and measure:
        checks += _measured()
    checks += [_optional("gguf", "GGUF files", "offload[demo]"), _optional("bitsandbytes", "4-bit weights", "offload[quant]")]  # fmt: skip
    blocking = next((check for check in checks if check.blocks), None)
    if blocking is not None:
        return Diagnosis(
            checks=checks, verdict=f"blocked: {blocking.name}: {blocking.advice}", ready=False
        )
    slow = usable and any(check.name == "triton" and check.ok is False for check in checks)
    if slow:
        return Diagnosis(
            checks=checks, verdict="ready, slowly: steps run without kernels", ready=True
        )
    verdict = "ready: device path" if usable else "ready, without a GPU: everything runs on the CPU, slowly"  # fmt: skip
    return Diagnosis(checks=checks, verdict=verdict, ready=True)


def _card(card: Card | None) -> Check:
    if card is None:
        advice = (
            "Where there is one, install NVIDIA's driver; in a container start it with --gpus all."
        )
        return Check(name="card", value="none that NVIDIA's driver shows", ok=None, advice=advice)
    others = card.total - card.free
    value = f"{card.name}, {gib(card.total)}, {gib(card.free)} free, driver {card.driver}"
    if others > GIB:
        return Check(
            name="card",
            value=value,
            ok=None,
            advice=f"Other programs hold {gib(others)}: close them, or set memory.gpu.",
        )
    return Check(name="card", value=value)


def _link(card: Card | None) -> list[Check]:
    if card is None or card.pcie_generation is None or card.pcie_width is None:
        return []
    value = f"PCIe {card.pcie_generation} x{card.pcie_width}"
    if card.most_pcie_width is not None and card.pcie_width < card.most_pcie_width:
        advice = f"The card takes {card.most_pcie_width} lanes: another slot is faster."
        return [Check(name="link", value=value, ok=False, advice=advice)]
    return [Check(name="link", value=value)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(card: Card | None) -> Check:
    found = _version("torch")
    if found is None:
        return Check(name="torch", value="not installed", ok=False, advice="pip install torch", blocks=True)  # fmt: skip
    if card is None:
        return Check(name="torch", value=found)
    import torch

    if torch.cuda.is_available():
        return Check(name="torch", value=f"{found}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        advice = "This is a build without CUDA: install one with it, as pytorch.org says."
    else:
        advice = f"It was built for CUDA {torch.version.cuda} and cannot use driver {card.driver}: update the driver."
    return Check(name="torch", value=f"{found}, sees no card", ok=False, advice=advice, blocks=True)


def _transformers() -> Check:
    found = _version("transformers")
    least = ".".join(map(str, _TRANSFORMERS))
    if found is None:
        return Check(name="transformers", value="not installed", ok=False, advice="pip install transformers", blocks=True)  # fmt: skip
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if parts < _TRANSFORMERS:
        advice = f"pip install 'transformers>={least}'"
        return Check(name="transformers", value=found, ok=False, advice=advice, blocks=True)
    return Check(name="transformers", value=found)


def _triton(card: Card | None) -> Check:
    found = _version("triton")
    if found is not None or card is None:
        return Check(name="triton", value=found or "not needed without a card", ok=True if found else None)  # fmt: skip
    advice = "Without it steps run the reference in torch, many times slower: pip install triton"
    return Check(name="triton", value="not installed", ok=False, advice=advice)


def _host() -> Check:
    memory = host_memory()
    where = ", the limit of a control group" if memory.limited_by == "cgroup" else ""
    value = f"{gib(memory.total)}{where}, {gib(memory.available)} free"
    if memory.available < 8 * GIB:
        advice = "An 8B model keeps 128 KiB of KV a token: 8 GiB hold 65,536 tokens."
        return Check(name="host memory", value=value, ok=None, advice=advice)
    return Check(name="host memory", value=value)


def _processor() -> Check:
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = set(text.partition("flags")[2].split("\n", 1)[0].split())
    wide = next((name for name in ("avx512f", "avx2") if name in flags), "")
    system = platform.system()
    if "microsoft" in platform.release().lower():
        system = "WSL"
    words = [f"{os.cpu_count() or 1} cores", wide, f"{system} {platform.machine()}"]
    return Check(name="processor", value=", ".join(word for word in words if word))


def _measured() -> list[Check]:
    """How much can be pinned, and how fast that is copied."""
    import torch

    from offload.tiers.pinned import HostRegion, PinBudget, commit_regions

    device, budget = torch.device("cuda"), PinBudget()
    wanted = min(PIN_PROBE_BYTES, host_memory().available // 4)
    region = HostRegion(_COPY_BYTES, max(wanted, _COPY_BYTES), device, budget)
    checks: list[Check] = []
    try:
        commit_regions([(region, region.reserve)])
        checks.append(_pinned(region.pinned, region.reserve, budget.refused))
        if region.pinned >= _COPY_BYTES:
            checks.append(_copies(region.view(0, _COPY_BYTES), device))
    except (RuntimeError, MemoryError) as error:  # a full card, say: what a doctor is there to tell
        reason = str(error).strip().split("\n")[0]
        advice = "Close other programs that use the card, and try again."
        checks.append(Check(name="measuring", value=reason, ok=False, advice=advice))
    finally:
        region.close()
    return checks


def _pinned(pinned: int, asked: int, refused: str | None) -> Check:
    if refused is None:
        return Check(name="pinned memory", value=f"{gib(pinned)} tried and pinned")
    advice = (
        "The rest of the KV is copied through a small buffer, and its rows are gathered by the CPU."
    )
    if "microsoft" in platform.release().lower():
        advice += " WSL2 has this limit; Linux itself has none."
    value = f"{gib(pinned)} of {gib(asked)}, then {refused}"
    return Check(name="pinned memory", value=value, ok=False, advice=advice)


def _copies(source: Any, device: Any) -> Check:
    import torch

    target = torch.empty(source.numel(), dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    best = float("inf")
    for _ in range(3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source, non_blocking=True)
        ended.record()
        torch.cuda.synchronize(device)
        best = min(best, began.elapsed_time(ended) / 1000)
    reached = source.numel() / best
    check = Check(name="copies to the card", value=rate(reached))
    if reached < 8e9:
        advice = "Slow: a card in a slot of few lanes, or of an old generation. Exact steps take as long as these copies."
        return Check(name=check.name, value=check.value, ok=False, advice=advice)
    return check


def _optional(package: str, purpose: str, extra: str) -> Check:
    found = _version(package)
    if found is not None:
        return Check(name=package, value=found)
    return Check(name=package, value="not installed", ok=None, advice=f"For {purpose}: pip install {extra}")  # fmt: skip
