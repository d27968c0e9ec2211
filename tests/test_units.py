"""Sizes, lengths and times: read what people write, write what can be read back."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    Size,
    duration,
    gib,
    gib_apart,
    parse_bytes,
    parse_tokens,
    rate,
)

amounts = st.one_of(
    st.integers(1, 2**63 - 1),
    st.builds(
        lambda n, scale: n * scale,
        st.integers(1, 4096),
        st.sampled_from([KIB, MIB, GIB, TIB, 1000, 10**6, 10**9, 10**12]),
    ),
)
percents = st.decimals("0.001", 100, places=3)
sizes = st.one_of(
    st.just(Size()),
    st.builds(lambda n: Size(bytes=n), amounts),
    st.builds(lambda p: Size(percent=p), percents),
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("20GiB", 20 * GIB),
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("512MiB", 512 * MIB),
        ("512 mib", 512 * MIB),
        (" 1.5 TiB ", 3 * TIB // 2),
        ("3KiB", 3 * KIB),
        ("3kB", 3000),
        ("7B", 7),
        ("1e9", 10**9),
        ("+2GiB", 2 * GIB),
        (".5GiB", GIB // 2),
        ("0.3GiB", 322_122_547),
        (20, 20),
        (1e9, 10**9),
    ],
)
def test_bytes_are_read(text: str | float, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("24Gb", '"24GiB"'),
        ("24Gbit", '"24GiB"'),
        ("24Gib", '"24GiB"'),
        ("24 gigs", '"24GiB"'),
        ("24G", '"24GB"'),
        ("24m", '"24MiB"'),
        ("20", '"20GiB"'),
        ("0.8", '"80%"'),
        (0.8, '"80%"'),
        ("", '"20GiB"'),
        ("GiB", '"20GiB"'),
        ("lots", '"20GiB"'),
        ("24,5GB", '"20GiB"'),
        ("80 percent", '"80%"'),
        ("٣GiB", '"20GiB"'),
        ("0", '"20GiB"'),
        ("0GiB", '"20GiB"'),
        ("0.1B", '"20GiB"'),
        ("-1GiB", '"20GiB"'),
        (-1, '"20GiB"'),
        (0, '"20GiB"'),
        ("nan", '"20GiB"'),
        ("inf", '"20GiB"'),
        (float("nan"), '"20GiB"'),
        (float("inf"), '"20GiB"'),
        (1.5, '"20GiB"'),
        ("1e99GiB", '"20GiB"'),
        ("1e999999999GiB", '"20GiB"'),
        ("9" * 5000, '"20GiB"'),
        (2**63, '"20GiB"'),
        (True, '"20GiB"'),
        (None, '"20GiB"'),
    ],
)
def test_what_is_not_a_size_is_refused_with_what_to_write(text: object, change: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert change in str(caught.value.change)
    with pytest.raises(ConfigError):
        Size.parse(text)


def test_an_ambiguous_unit_is_answered_with_both_readings() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes("24 gigs")
    assert str(caught.value) == (
        "'gigs' in '24 gigs' is not a unit of memory. "
        'Write "24GiB" (1 GiB = 1024^3 bytes) or "24GB" (1 GB = 1000^3).'
    )
    assert caught.value.asked == "24 gigs"


@pytest.mark.parametrize("text", ["0%", "-5%", "101%", "%", "GiB%", "5GiB%", "nan%"])
def test_a_share_is_above_0_and_at_most_100_percent(text: str) -> None:
    with pytest.raises(ConfigError):
        Size.parse(text)


@pytest.mark.parametrize(
    ("text", "size", "written"),
    [
        ("auto", Size(), "auto"),
        (" AUTO ", Size(), "auto"),
        ("80%", Size(percent=Decimal(80)), "80%"),
        ("12.50 %", Size(percent=Decimal("12.5")), "12.5%"),
        ("1e1%", Size(percent=Decimal(10)), "10%"),
        ("24GB", Size(bytes=24 * 10**9), "24GB"),
        ("20GiB", Size(bytes=20 * GIB), "20GiB"),
        ("1.5GiB", Size(bytes=1536 * MIB), "1536MiB"),
        (1001, Size(bytes=1001), "1001B"),
        (Size(bytes=5), Size(bytes=5), "5B"),
    ],
)
def test_sizes_are_read_and_written_shortest(text: object, size: Size, written: str) -> None:
    assert Size.parse(text) == size
    assert str(size) == written


def test_a_size_resolves_on_the_machine() -> None:
    given = {"total": 1000, "auto": 7}
    assert Size.parse("auto").resolve(**given) == 7
    assert Size.parse("12.55%").resolve(**given) == 125
    assert Size.parse("100%").resolve(**given) == 1000
    assert Size.parse("2000B").resolve(**given) == 2000


def test_a_size_is_not_both() -> None:
    with pytest.raises(ValueError, match="not both"):
        Size(bytes=1, percent=Decimal(1))


@given(sizes)
def test_a_written_size_reads_back_equal(size: Size) -> None:
    assert Size.parse(str(size)) == size


@given(amounts)
def test_written_bytes_read_back_equal(n_bytes: int) -> None:
    assert parse_bytes(str(Size(bytes=n_bytes))) == n_bytes
    assert parse_bytes(n_bytes) == n_bytes


@given(percents, st.integers(0, 2**50))
def test_a_share_is_never_above_the_whole(percent: Decimal, total: int) -> None:
    assert 0 <= Size(percent=percent).resolve(total=total, auto=0) <= total


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        size = Size.parse(text)
    except ConfigError:
        return
    assert Size.parse(str(size)) == size


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("128K", 131_072),
        ("128k", 131_072),
        ("1M", 1_048_576),
        ("1.5 K", 1536),
        ("4096", 4096),
        (64, 64),
    ],
)
def test_tokens_are_read(text: str | int, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "K", "1.5", "4KiB", "4G", "many", "-1", 0, -64, "0", 1.0, True, None, "1e99"]
)
def test_what_is_no_number_of_tokens_is_refused(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_tokens(text)  # type: ignore[arg-type]


def test_zero_tokens_are_read_where_zero_makes_sense() -> None:
    assert parse_tokens("0", at_least=0) == 0


@given(st.integers(1, 2**40))
def test_tokens_read_back_equal(tokens: int) -> None:
    assert parse_tokens(tokens) == parse_tokens(str(tokens)) == tokens
    assert parse_tokens(f"{tokens}K") == tokens * 1024


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1000, "1.0 KiB"),
        (5 * KIB, "5.0 KiB"),
        (96 * MIB, "96.0 MiB"),
        (103 * MIB, "0.1 GiB"),
        (int(3.1 * GIB), "3.1 GiB"),
        (2000 * GIB, "2,000.0 GiB"),
        (-GIB, "-1.0 GiB"),
    ],
)
def test_bytes_are_written_in_binary_units(n_bytes: int, text: str) -> None:
    assert gib(n_bytes) == text


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_different_amounts_are_written_differently(first: int, second: int) -> None:
    texts = gib_apart(first, second)
    assert (texts[0] == texts[1]) == (first == second)


def test_rates_are_written() -> None:
    assert rate(48.4 * GIB) == "48.4 GiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (29e-6, "29 µs"),
        (0.0081, "8.1 ms"),
        (0.33, "330 ms"),
        (0.9999, "1.0 s"),
        (2.5, "2.5 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3840, "1 h 04 min"),
        (-2.5, "-2.5 s"),
    ],
)
def test_times_are_written(seconds: float, text: str) -> None:
    assert duration(seconds) == text
