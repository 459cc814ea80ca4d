"""Metrics as a scraper reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Values", "value", "values"]

Values = list[tuple[str, dict[str, str], float]]


def values(body: bytes | str) -> Values:
    """(name, labels, value) of every sample of a scrape."""
    text = body.decode() if isinstance(body, bytes) else body
    return [(sample.name, sample.labels, sample.value) for family in text_string_to_metric_families(text) for sample in family.samples]


def value(found: Values, name: str, default: float | None = None, /, **labels: str) -> float:
    """The value of the one series of this name that has these labels; `default` where there is none. AssertionError: there is not one."""
    matching = [number for each, of, number in found if each == name and labels.items() <= of.items()]
    if not matching and default is not None:
        return default
    assert len(matching) == 1, f"{name} {labels}: {len(matching)} series"
    return matching[0]
