"""How bytes, tokens and times are written by people, and how we write them back.

The only module that knows KiB and GiB: everywhere else bytes and tokens are `int`, seconds `float`.
Bytes are read as `20GiB` (2^30) or `24GB` (10^9), lengths as `128K` (131,072), and whatever could
mean two things is refused with both readings. Output is in binary units only.

A leaf: it imports only `offload.errors`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

from offload.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
TIB: Final = 1024**4

# In the order in which equally short texts are preferred: binary first.
_BYTE_UNITS: Final = {
    "TiB": TIB,
    "GiB": GIB,
    "MiB": MIB,
    "KiB": KIB,
    "TB": 1000**4,
    "GB": 1000**3,
    "MB": 1000**2,
    "kB": 1000,
    "B": 1,
}
_BYTES_BY_NAME: Final = {name.lower(): scale for name, scale in _BYTE_UNITS.items()}
_PREFIXES: Final = "KMGT"
_TOKEN_UNITS: Final = {"": 1, "k": KIB, "m": MIB}

# Lower case b after a capital means bits: 24Gb is 3 GB. All in lower case (24gb) nobody means bits.
_BITS: Final = re.compile(r"[KMGTkmgt]i?bits?|[KMGT]i?b|[kmg]bps", re.ASCII)
_QUANTITY: Final = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)\s*(?P<unit>[A-Za-z]*)"
)
_LONGEST_TEXT: Final = 64  # no quantity is longer, and Python's int() is quadratic in the length
_LARGEST: Final = 2**63 - 1  # what an offset of the operating system holds


def parse_bytes(value: int | float | str) -> int:
    """Reads a number of bytes.

    Args:
        value: An int is bytes. A str is a number with a unit (`20GiB`, `24GB`, `1.5 TiB`), in any
            case, or a bare number of bytes from one MiB on (`1e9`): a smaller one lacks its unit. A
            float is read when it is whole, because TOML and JSON write 1e9 as a float.

    Returns:
        Bytes, at least 1. A fraction of a byte is dropped.

    Raises:
        ConfigError: Not a size, zero, negative, too large, in bits, or with a unit that can be read
            in two ways (`24G`).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _not_a_size(value)
    if isinstance(value, str):
        return _checked(_bytes_of_text(value), value)
    if isinstance(value, float):
        if 0 < value < 1:
            raise _share(value)
        if not math.isfinite(value) or value != int(value):
            raise _not_a_size(value)
    return _checked(Fraction(value), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """An amount of memory as it was asked for: `auto`, a share of the whole, or bytes.

    What it comes to is decided later, by `resolve`, on the machine where it is used. `str(size)`
    gives a text that `Size.parse` reads back as an equal value.

    Attributes:
        bytes: The amount, at least 1, if it was given in bytes.
        percent: The share, above 0 and at most 100, if it was given as one. Both None: `auto`.
    """

    bytes: int | None = None
    percent: Decimal | None = None

    def __post_init__(self) -> None:
        """Refuses what no text could have meant."""
        if self.bytes is not None:
            if self.percent is not None:
                raise ValueError("a Size is bytes or a percentage, not both")
            _checked(Fraction(self.bytes), self.bytes)
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ConfigError(
                f"{self.percent}% is not a share of memory",
                asked=f"{self.percent}%",
                there="more than 0% and at most 100%",
                change='Write for example "80%".',
            )

    @classmethod
    def parse(cls, value: object) -> Size:
        """Reads `auto`, `80%`, or whatever `parse_bytes` reads. A Size is returned as it is.

        Raises:
            ConfigError: None of these; the message says what to write.
        """
        if isinstance(value, Size):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _not_a_size(value)
        if isinstance(value, str):
            text = value.strip()
            if text.lower() == "auto":
                return cls()
            if text.endswith("%"):
                found = _match(text[:-1].strip())
                if found is None or found["unit"]:
                    raise _not_a_size(value)
                return cls(percent=Decimal(found["number"]))
        return cls(bytes=parse_bytes(value))

    @property
    def is_auto(self) -> bool:
        """Whether the amount is left to us."""
        return self.bytes is None and self.percent is None

    def resolve(self, *, total: int, auto: int) -> int:
        """The amount in bytes.

        Args:
            total: Bytes of which `percent` is a share.
            auto: Bytes that `auto` stands for.

        Returns:
            Bytes. A share is rounded down; the given number of bytes is returned even above `total`.
        """
        if self.bytes is not None:
            return self.bytes
        if self.percent is not None:
            return math.floor(total * Fraction(self.percent) / 100)
        return auto

    def __str__(self) -> str:
        """The shortest exact text: 20GiB, 24GB, 1536MiB, 1001B, 80%, auto."""
        if self.percent is not None:
            text = f"{self.percent:f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"
        if self.bytes is None:
            return "auto"
        size = self.bytes
        exact = [f"{size // n}{unit}" for unit, n in _BYTE_UNITS.items() if size % n == 0]
        return min(exact, key=len)


def parse_tokens(value: int | str, *, at_least: int = 1) -> int:
    """Reads a number of tokens.

    Args:
        value: An int, or a str: a whole number, alone or with K (1,024) or M (1,048,576), in either
            case. `128K` is 131,072.
        at_least: The smallest number that makes sense.

    Returns:
        Tokens.

    Raises:
        ConfigError: Not a whole number of tokens, or fewer than `at_least`.
    """
    tokens: Fraction | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = Fraction(value)
    elif isinstance(value, str) and (found := _match(value.strip())) is not None:
        scale = _TOKEN_UNITS.get(found["unit"].lower())
        tokens = None if scale is None else Fraction(found["number"]) * scale
    if tokens is None or tokens.denominator != 1 or tokens > _LARGEST:
        raise ConfigError(
            f"{value!r} is not a number of tokens",
            asked=value,
            change='Write a whole number (131072), or one with K = 1,024 or M = 1,048,576 ("128K").',
        )
    if tokens < at_least:
        raise ConfigError(
            f"{value} tokens are too few",
            asked=value,
            change=f"Write {at_least:,} or more.",
        )
    return int(tokens)


def gib(n_bytes: float, *, digits: int = 1) -> str:
    """Bytes for a reader: `3.1 GiB`. Below 0.1 of a unit the next smaller one: `96.0 MiB`, `12 B`.

    Args:
        n_bytes: Bytes. Negative is written with a minus sign.
        digits: Decimal places.
    """
    if n_bytes < 0:
        return f"-{gib(-n_bytes, digits=digits)}"
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= scale / 10:
            return f"{n_bytes / scale:,.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


def gib_apart(first: int, second: int) -> tuple[str, str]:
    """Two amounts with as many digits as it takes to tell them apart, if they differ."""
    for digits in (1, 2, 3):
        texts = gib(first, digits=digits), gib(second, digits=digits)
        if texts[0] != texts[1] or first == second:
            return texts
    return f"{first:,} B", f"{second:,} B"


def rate(bytes_per_s: float) -> str:
    """Bytes per second for a reader: `48.4 GiB/s`."""
    return f"{gib(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    """A time for a reader: `29 µs`, `8.1 ms`, `330 ms`, `2.5 s`, `2 min 05 s`, `1 h 04 min`."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if round(seconds) >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if round(seconds) >= 60:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    if seconds >= 0.9995:
        return f"{seconds:.1f} s"
    if seconds >= 0.09995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds >= 0.0009995:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} µs"


def _match(text: str) -> re.Match[str] | None:
    return _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_TEXT else None


def _bytes_of_text(value: str) -> Fraction:
    found = _match(value.strip())
    if found is None:
        raise _not_a_size(value)
    number, unit = Fraction(found["number"]), found["unit"]
    if unit and _BITS.fullmatch(unit):
        raise ConfigError(
            f"{value!r} is in bits",
            asked=value,
            change=f"Memory is counted in bytes. {_readings(found)}.",
        )
    if unit.lower() in _BYTES_BY_NAME:
        return number * _BYTES_BY_NAME[unit.lower()]
    if unit and unit[0].upper() not in _PREFIXES:
        raise _not_a_size(value)
    if unit:
        raise ConfigError(
            f"{unit!r} in {value!r} is not a unit of memory",
            asked=value,
            change=f"{_readings(found)}.",
        )
    if 0 < number < 1:
        raise _share(value)
    if 0 < number < MIB:
        raise ConfigError(
            f"{value!r} has no unit",
            asked=value,
            change=f'{_readings(found)}, or "{found["number"]}B" if bytes are meant.',
        )
    return number


def _checked(number: Fraction, value: object) -> int:
    """The whole number of bytes, if it is one that memory can have."""
    size = math.floor(number)
    if size < 1:
        what = "negative" if number < 0 else "no memory at all"
        raise ConfigError(
            f"{value!r} is {what}",
            asked=value,
            change='Write a size above zero, for example "20GiB".',
        )
    if size > _LARGEST:
        raise ConfigError(
            f"{value!r} is more than any machine has",
            asked=value,
            change='Write for example "20GiB".',
        )
    return size


def _readings(found: re.Match[str]) -> str:
    """The ways to write what was probably meant: by the first letter of the unit, giga without one."""
    number, prefix = found["number"].lstrip("+"), found["unit"][:1].upper() or "G"
    decimal = "k" if prefix == "K" else prefix
    binary, thousand = f"{prefix}iB", f"{decimal}B"
    exponent = _PREFIXES.index(prefix) + 1
    return (
        f'Write "{number}{binary}" (1 {binary} = 1024^{exponent} bytes)'
        f' or "{number}{thousand}" (1 {thousand} = 1000^{exponent})'
    )


def _share(value: object) -> ConfigError:
    percent = f"{float(str(value)) * 100:g}%"
    return ConfigError(
        f"{value!r} is less than one byte",
        asked=value,
        change=f'A share of memory is written "{percent}".',
    )


def _not_a_size(value: object) -> ConfigError:
    return ConfigError(
        f"{value!r} is not a size",
        asked=value,
        change='Write bytes ("20GiB", "24GB") or, for a budget, a share ("80%") or "auto".',
    )
