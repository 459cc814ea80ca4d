"""Sizes, times and rates read back what they write, and refuse the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.settings.units import format_bytes, format_count, format_seconds, parse_bytes, parse_count, parse_rate, parse_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999_900_000, "1 GB"),
        (43_750_000_000, "43.8 GB"),
        (350e9, "350 GB"),
        (1_235_000, "1.24 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_bytes_are_written_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_bytes_are_written_with_more_digits_on_request() -> None:
    assert format_bytes(43.75e9, 4) == "43.75 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1.2, "1.2 s"),
        (0.035, "35 ms"),
        (2e-7, "0.2 µs"),
        (125, "2 min 5 s"),
        (86400, "24 h"),
        (90_000, "1 d 1 h"),
        (-5, "-5 s"),
    ],
)
def test_seconds_are_written_in_their_own_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_counts_are_written_in_words() -> None:
    assert (format_count(175e9), format_count(134_515_008), format_count(950)) == ("175 billion", "135 million", "950")


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("16Gi", 2**34), ("512m", 512 * 10**6), ("7", 7), (7, 7), ("3 B", 3), (".5kB", 500)],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5), ("24h", 86400), ("1m30s", 90), ("250ms", 0.25), ("2.5", 2.5), (3, 3), ("1 h 5 min", 3900)]
)
def test_durations_are_read(text: str | int, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "rate"), [("10Gbit/s", 1.25e9), ("10Gbps", 1.25e9), ("10Gb/s", 1.25e9), ("1.25GB/s", 1.25e9), ("8Kibit/s", 1024)]
)
def test_rates_tell_bits_from_bytes(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


def test_parameter_counts_are_read() -> None:
    assert (parse_count("175b"), parse_count("1.7B"), parse_count("135M"), parse_count(9)) == (175 * 10**9, 1_700_000_000, 135_000_000, 9)


@pytest.mark.parametrize("text", ["", "GB", "16 XB", "5ib", "-1GB", "1e9", "16GB32", True])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="16GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "5 parsecs", "-5s", "s", -1, float("nan"), float("inf"), True, "5s?"])
def test_an_invalid_duration_is_refused(text: str | float) -> None:
    with pytest.raises(ConfigError, match="24h"):
        parse_seconds(text)


@pytest.mark.parametrize(("parse", "text"), [(parse_rate, "10GB"), (parse_rate, "fast"), (parse_count, "many"), (parse_count, "-3")])
def test_other_nonsense_is_refused(parse: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse(text)  # type: ignore[operator]


@given(st.integers(0, 10**15))
def test_a_written_size_reads_back_within_its_rounding(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006)


@given(st.floats(1e-6, 1e6))
def test_a_written_duration_reads_back_within_its_rounding(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.006)
