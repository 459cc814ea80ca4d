"""Human sizes, times and rates, both ways.

GB is 10^9 bytes and GiB is 2^30 bytes, everywhere: on the command line, in configuration keys (`_gb`, `_mb`) and in what
is printed. A bandwidth in `bit/s` or `bps` is bits, in `B/s` bytes. Everything unreadable is a ConfigError.
"""

from __future__ import annotations

import math
import re

from mesh.errors import ConfigError

__all__ = [
    "GB",
    "MB",
    "format_bytes",
    "format_count",
    "format_seconds",
    "parse_bytes",
    "parse_count",
    "parse_rate",
    "parse_seconds",
]

MB = 10**6
GB = 10**9

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}
_PREFIX = _DECIMAL | _BINARY
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BYTES = re.compile(rf"{_NUMBER}\s*([kmgtp]?i?)b?", re.IGNORECASE)
_RATE = re.compile(rf"{_NUMBER}\s*([kmgtp]?i?)(bit/s|bps|b/s)", re.IGNORECASE)
_PART = re.compile(rf"\s*{_NUMBER}\s*(ns|us|µs|ms|min|s|m|h|d)")
_COUNT = re.compile(rf"{_NUMBER}\s*([kmbt]?)", re.IGNORECASE)


def format_bytes(count: float, digits: int = 3) -> str:
    """`count` bytes with about `digits` significant digits: 43.8 GB, 512 MB, 0 B."""
    return _scaled(count, digits, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_count(count: float, digits: int = 3) -> str:
    """A number of things, such as parameters: 175 billion, 135 million, 950."""
    return _scaled(count, digits, (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)), "")


def format_seconds(seconds: float, digits: int = 3) -> str:
    """`seconds` with about `digits` significant digits below two minutes, then whole units: 1.2 s, 35 ms, 2 min 5 s, 24 h."""
    if seconds < 0:
        return "-" + format_seconds(-seconds, digits)
    if seconds < 120:
        return _scaled(seconds, digits, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)), "s")
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    if whole == 86400:
        return "24 h"
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def parse_bytes(text: str | int | float) -> int:
    """Bytes of `16GB`, `1.5 GiB`, `512M`, `16Gi`; a bare number is bytes."""
    match = _BYTES.fullmatch(str(text).strip())
    if match is None or not _known_prefix(match[2]):
        raise ConfigError(f"{text!r} is not a size: write a number with a unit, such as 16GB, 512MB or 16GiB")
    return round(float(match[1]) * _PREFIX[match[2].lower()])


def parse_seconds(text: str | int | float) -> float:
    """Seconds of `5s`, `250ms`, `1m30s`, `24h`; a bare number is seconds."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if math.isfinite(text) and text >= 0:
            return float(text)
    else:
        stripped = str(text).strip()
        if re.fullmatch(_NUMBER, stripped):
            return float(stripped)
        total, position = 0.0, 0
        while position < len(stripped) and (match := _PART.match(stripped, position)):
            total += float(match[1]) * _SECONDS[match[2]]
            position = match.end()
        if stripped and position == len(stripped):
            return total
    raise ConfigError(f"{text!r} is not a duration: write a number with a unit, such as 5s, 250ms, 1m30s or 24h")


def parse_rate(text: str) -> float:
    """Bytes per second of `10Gbit/s`, `10Gbps` (bits) or `1.25GB/s` (bytes)."""
    match = _RATE.fullmatch(text.strip())
    if match is None or not _known_prefix(match[2]):
        raise ConfigError(f"{text!r} is not a bandwidth: write bits or bytes per second, such as 10Gbit/s or 1.25GB/s")
    value = float(match[1]) * _PREFIX[match[2].lower()]
    return value if match[3] == "B/s" else value / 8


def parse_count(text: str | int) -> int:
    """A number of parameters: `175B`, `135M`, `1.7b`, or a bare number."""
    match = _COUNT.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a number of parameters: write 175B, 135M or the number itself")
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match[2].lower()]
    return round(float(match[1]) * scale)


def _known_prefix(prefix: str) -> bool:
    return prefix.lower() in _PREFIX


def _scaled(value: float, digits: int, units: tuple[tuple[str, float], ...], base: str) -> str:
    """`value` in the largest unit in which it is at least 1 once rounded, so that 999.9 MB becomes 1 GB and never 1000 MB."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    for index, (unit, scale) in enumerate(units):
        number = _rounded(value / scale, digits)
        if number >= 1 or (index == len(units) - 1 and base == "s" and value > 0):
            return f"{sign}{_plain(number)} {unit}".rstrip()
    return f"{sign}{_plain(_rounded(value, digits))} {base}".rstrip()


def _rounded(value: float, digits: int) -> float:
    if value == 0:
        return 0.0
    places = digits - 1 - math.floor(math.log10(value))
    return round(value, max(places, 0))


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.10f}".rstrip("0")
