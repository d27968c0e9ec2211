"""What can this machine do, as measured on it? A record that is kept, and used again where it is of the same machine.

`offload.measure` measures; here are the record, its file, and what of it takes the place of a data sheet. A plan reads the
file and imports neither torch nor Numba.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from offload import hardware
from offload.environment import processor, versions
from offload.errors import InputError
from offload.index.workers import cores
from offload.loading import cache_dir
from offload.scheduler.profiles import RATES, Profile, profile_of
from offload.units import GIB, gib_apart

logger = logging.getLogger(__name__)

Unit = Literal["B", "B/s", "FLOP/s", "s"]
Source = Literal["computed", "measured", "calibrated", "data_sheet"]

_AGAIN = "Measure anew: offload doctor --probe."
# What the driver takes of a card of which nothing is known: the most of any that is (`offload.scheduler.profiles`).
_CONTEXT = 3 * GIB // 4


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number of a machine.

    Attributes:
        value: In `unit`, finite, above zero; bytes may be none.
        unit: What it counts.
        source: Where it comes from.
    """

    value: float
    unit: Unit
    source: Source

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Refuses what no machine has.

        Raises:
            InputError: The value is negative or not a number, or a rate or a time is zero.
        """
        if not math.isfinite(self.value) or self.value < 0 or (not self.value and self.unit != "B"):
            raise InputError(
                "No machine has such a number",
                asked=f"{self.value} {self.unit}",
                there="a finite number above zero",
                change=_AGAIN,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What measurements of two machines have to agree in to be of the same one.

    Attributes:
        card: Its name; None without one.
        driver: Its driver's version.
        torch: Version.
        cpu: The processor's name.
        cores: That a process may use.
    """

    card: str | None
    driver: str | None
    torch: str | None
    cpu: str | None
    cores: int

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What a machine can do. What is of a card is None without one, and where it could not be measured.

    Attributes:
        fingerprint: Of the machine.
        free_bytes: Of device memory, while it was measured; what torch holds of the process counts as free.
        date: ISO 8601.
        took_s: Seconds that measuring took.
        h2d: Copies from pinned memory to the card, by bytes of one copy.
        d2h: Copies back, likewise.
        dma_from: Bytes of one copy from which the copy engine is as fast as a kernel that reads host memory itself; None where
            no copy that was tried is.
        zero_copy: Rows anywhere in pinned memory that a kernel attends to, by bytes of a row.
        device_stream: The card's memory, read and written by a copy.
        gemm: Matrix products of a prompt's shape, by dtype.
        attention: Attention of a prompt's queries to many keys, in bfloat16.
        launch: From one launch of a small kernel to the next.
        hand_off: From the card to the host and back.
        pinnable: Host memory that can be pinned: where the driver refused more, what it had granted; else what is free.
        host_stream: Host memory, as all cores read it in order.
        host_scan: Codes of keys that all cores score, `offload.index.scan`.
        host_attend: Rows anywhere in host memory that all cores attend to, `offload.index.paged`.
        worker_hand_off: A task without work to every thread that searches, and back.
    """

    fingerprint: Fingerprint
    free_bytes: int | None
    date: str
    took_s: float
    h2d: Mapping[int, Quantity] | None
    d2h: Mapping[int, Quantity] | None
    dma_from: Quantity | None
    zero_copy: Mapping[int, Quantity] | None
    device_stream: Quantity | None
    gemm: Mapping[str, Quantity] | None
    attention: Quantity | None
    launch: Quantity | None
    hand_off: Quantity | None
    pinnable: Quantity
    host_stream: Quantity
    host_scan: Quantity
    host_attend: Quantity
    worker_hand_off: Quantity

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Refuses numbers in a unit that is not that of their entry, sizes that are none, and a time or memory below zero.

        Raises:
            InputError: There is one.
        """
        for name, value in (("took_s", self.took_s), ("free_bytes", self.free_bytes or 0)):
            if not 0 <= value < 2**63:
                raise InputError(
                    f"An entry of the probe is not what it should be: {name}",
                    asked=value,
                    there="a finite number, zero or above",
                    change=_AGAIN,
                )
        for entry in self.entries():
            unit = _UNITS[entry.name]
            size = entry.of
            if entry.quantity.unit != unit or (isinstance(size, int) and size < 1):
                raise InputError(
                    f"An entry of the probe is not what it should be: {entry.name}",
                    asked=f"{entry.quantity.unit} of {size}",
                    there=unit,
                    change=_AGAIN,
                )

    def entries(self) -> Iterator[Entry]:
        """Every number that there is."""
        for name in _UNITS:
            found = getattr(self, name)
            if isinstance(found, Quantity):
                yield Entry(name, None, found)
            elif found is not None:
                for of, quantity in found.items():
                    yield Entry(name, of, quantity)

    def differences(self, here: Fingerprint, free_bytes: int | None) -> list[str]:
        """What keeps this from being used on a machine; nothing where it is the same one.

        Args:
            here: Of that machine.
            free_bytes: Of its device memory.
        """
        found = [
            f"{name} {there or 'none'}, here {now or 'none'}"
            for name, there in asdict(self.fingerprint).items()
            if there != (now := getattr(here, name))
        ]
        if not found and (free_bytes or 0) < (self.free_bytes or 0):
            there, now = gib_apart(self.free_bytes or 0, free_bytes or 0)
            found.append(f"{there} of device memory free, here {now}")
        return found


class Entry(NamedTuple):
    """One number of a probe.

    Attributes:
        name: Of the field.
        of: Bytes or dtype, where the field has several.
        quantity: The number.
    """

    name: str
    of: int | str | None
    quantity: Quantity


_UNITS: dict[str, Unit] = {
    "h2d": "B/s", "d2h": "B/s", "dma_from": "B", "zero_copy": "B/s", "device_stream": "B/s",
    "gemm": "FLOP/s", "attention": "FLOP/s", "launch": "s", "hand_off": "s", "pinnable": "B",
    "host_stream": "B/s", "host_scan": "B/s", "host_attend": "B/s", "worker_hand_off": "s",
}  # fmt: skip


def probe(*, measure: bool = True, file: Path | None = None) -> Probe:
    """What this machine can do: as it was measured once, or measured now and kept.

    Args:
        measure: False: what is kept, or an error.
        file: Where it is kept; None: `probe_file()`.

    Raises:
        InputError: Without `measure`: nothing is kept, or it is not of this machine as it is now.
        BudgetError: The card or the host have too little free memory to measure.
    """
    file = file or probe_file()
    try:
        return kept(file)
    except InputError as error:
        if not measure:
            raise
        if os.path.exists(file):  # likewise
            logger.warning("%s It is measured anew.", str(error).removesuffix(_AGAIN).strip())
    return renewed(file)


def renewed(file: Path | None = None) -> Probe:
    """Measures this machine and keeps what comes of it.

    Args:
        file: As for `probe`.

    Raises:
        BudgetError: As for `probe`.
    """
    from offload.measure import measured

    file = file or probe_file()
    found = measured(fingerprint())
    try:
        write(found, file)
    except OSError as error:
        logger.warning(
            "What was measured of this machine is not kept: %s. OFFLOAD_CACHE_DIR names another folder.",
            error,
        )
    return found


def kept(file: Path) -> Probe:
    """What was measured of this machine.

    Raises:
        InputError: Nothing was, the file is something else, or it is not of this machine as it is now.
    """
    found = read(file)
    differences = found.differences(fingerprint(), hardware.free_for_us())
    if differences:
        raise InputError(
            f"{file} is of a machine that differs: {'; '.join(differences)}",
            asked=str(file),
            change=_AGAIN,
        )
    return found


def read(file: Path) -> Probe:
    """A probe from its file, of whatever machine.

    Raises:
        InputError: There is none, or an entry of it is missing, unknown, negative or not a number.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "This machine has not been measured", asked=str(file), there=None, change=_AGAIN
        ) from None
    except (OSError, UnicodeError) as error:
        raise _unreadable(file, str(error)) from error
    try:
        return _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _unreadable(file, f"{place}: {first['msg']}".removeprefix(": ")) from error


def write(found: Probe, file: Path) -> None:
    """Keeps a probe: whole, or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        beside.write_text(json.dumps(asdict(found), indent=1, allow_nan=False), encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def probe_file() -> Path:
    """Where the probe of this machine is kept. A folder may be shared by several machines."""
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in platform.node()) or "machine"
    return cache_dir() / "probes" / f"{name}.json"


def fingerprint() -> Fingerprint:
    """Of this machine, as it is now. Imports no torch."""
    card = hardware.local_card()
    return Fingerprint(
        card=None if card is None else card.name,
        driver=None if card is None else card.driver,
        torch=versions()["torch"],
        cpu=processor(),
        cores=cores(),
    )


def known_profile(name: str) -> Profile:
    """Rates of a card of this machine: those that were measured on it, and the others as its data sheet has them.

    A probe that is not of this machine as it is now is left out, with a warning.

    Args:
        name: As its driver writes it.

    Raises:
        InputError: Nothing is known of it, and it was not measured.
    """
    measured = _kept_of(name)
    try:
        known = profile_of(name)
    except InputError:
        made = None if measured is None else _profile_by(measured, name)
        if made is None:
            raise
        return made
    return known if measured is None else measured_profile(known, measured)


def measured_profile(known: Profile, found: Probe) -> Profile:
    """A profile with what was measured in place of what a data sheet says.

    Where the card is calibrated, by whole runs, its own rates stay: only what belongs to the machine around it, the link and
    the host, is as measured.

    Args:
        known: Of the card.
        found: Of this machine.
    """
    rates = _rates_by(found)
    if known.basis == "calibrated":
        rates = {entry: rate for entry, rate in rates.items() if entry in _AROUND}
    basis = "measured" if len(rates) == len(RATES) else known.basis
    return replace(known, **rates, basis=basis, measured=frozenset(rates))


_AROUND = {"pcie", "host_bytes_per_s"}  # what two machines with the same card may differ in


def _rates_by(found: Probe) -> dict[str, Any]:
    """The entries of a profile that a probe has."""
    products = found.gemm or {}
    by = {
        "bytes_per_s": found.device_stream,
        "gemm_flops": products.get("bfloat16") or products.get("float16"),
        "attention_flops": found.attention,
        "pcie": found.h2d[max(found.h2d)] if found.h2d else None,
        "host_bytes_per_s": found.host_stream,
    }
    return {entry: quantity.value for entry, quantity in by.items() if quantity is not None}


def _profile_by(found: Probe, name: str) -> Profile | None:
    """A profile of a card that has no data sheet here; None where something of it was not measured."""
    rates, card = _rates_by(found), hardware.local_card()
    if card is None or len(rates) < len(RATES):
        return None
    return Profile(
        name=name, memory=card.total, host=hardware.host_memory().total, context=_CONTEXT,
        basis="measured", measured=frozenset(rates), **rates,
    )  # fmt: skip


def _kept_of(name: str) -> Probe | None:
    """What was measured with this card; None where nothing was, or, with a warning, where it cannot be used."""
    file = probe_file()
    if not os.path.isfile(file):  # that of a path raises where a folder may not be read
        return None
    try:
        found = kept(file)
    except InputError as error:
        logger.warning("Rates of the data sheet are used. %s", error)
        return None
    return found if found.fingerprint.card == name else None


def _unreadable(file: Path, why: str) -> InputError:
    return InputError(
        f"{file} does not hold what was measured of a machine",
        asked=str(file),
        there=why,
        change=_AGAIN,
    )


@cache
def _adapter() -> TypeAdapter[Probe]:
    return TypeAdapter(Probe)
