"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

__all__ = ["Finding", "Level", "error", "ok", "skipped", "warning", "worst"]

Level = Literal["ok", "skipped", "warning", "error"]
_ORDER: Final[tuple[Level, ...]] = ("ok", "skipped", "warning", "error")


@dataclass(frozen=True, slots=True)
class Finding:
    """`check`: the check's name. `found`: what is the case. `advice`: what to do; a finding that is not well always has one. `skipped`: it
    could not be looked at, and `advice` says how it can."""

    check: str
    level: Level
    found: str
    advice: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def ok(check: str, found: str, advice: str = "") -> Finding:
    return Finding(check, "ok", found, advice)


def skipped(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "skipped", found, advice)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def error(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "error", found, advice)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them; "ok" where there are none."""
    return max((finding.level for finding in findings), key=_ORDER.index, default="ok")
