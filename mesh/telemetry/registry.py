"""The metrics of one process: where their values come from, and how they are written for Prometheus.

Values are read where they are kept, in the event loop, when somebody asks. A source is a function that yields readings:

    yield "mesh_shard_rows", shape.rows
    yield "mesh_shard_frames_total", meter.frames_in, "in"      # a label's value for each of the metric's own labels
    yield meter.steps                                           # a Histogram
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mesh import __version__
from mesh.telemetry.metrics import Metric, declared, fixed_labels
from mesh.telemetry.seldom import Seldom

__all__ = ["Histogram", "Reading", "Registry", "Source"]

log = logging.getLogger("mesh.metrics")
seldom = Seldom(log)

FRESH_S: Final = 0.1
"""What was written is sent again for so long, so that nobody can make the process write it more often."""
_MOST_SERIES: Final = 1000
"""A histogram has so many label values at most; further ones are counted under `_OTHER`."""


class Histogram:
    """Observations of one metric. One thread feeds it."""

    def __init__(self, name: str) -> None:
        self.metric = declared(name)
        self._bounds = self.metric.buckets
        self.series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}  # labels -> (count of each bucket, [sum])

    def observe(self, value: float, *labels: str) -> None:
        """Count `value`, in the metric's unit. `labels`: the values of its own labels, in their order."""
        found = self.series.get(labels)
        if found is None:
            if len(labels) != len(self.metric.own_labels):
                raise ValueError(f"{self.metric.name} has the labels {self.metric.own_labels}, and was given {labels}")
            if len(self.series) >= _MOST_SERIES:
                labels = ("_OTHER",) * len(labels)
            found = self.series.setdefault(labels, ([0] * (len(self._bounds) + 1), [0.0]))
        counts, total = found
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value


Reading = tuple[Any, ...] | Histogram
"""(name, value, *label values), or a histogram."""
Source = Callable[[], Iterable[Reading]]


class Registry:
    """`role`: coordinator, gateway or shard. `spans_dropped`: each part of the process that makes spans adds what says how many of them
    were dropped."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.spans_dropped: list[Callable[[], float]] = []
        self.prometheus = CollectorRegistry(auto_describe=False)
        self._sources: list[tuple[Source, dict[str, str]]] = [(self._own, {})]
        self._written: dict[str, tuple[float, bytes]] = {}  # content type -> (when, what)
        ProcessCollector(registry=self.prometheus)  # process_*: the names that every Prometheus client has
        self.prometheus.register(_Sources(self))

    def add(self, source: Source, **fixed: str) -> None:
        """Read `source` too. `fixed`: the values of the labels that are the same in the whole process, such as shard="shard-1"."""
        self._sources.append((source, fixed))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(the metrics, their content type): OpenMetrics where the Accept header asks for it, otherwise Prometheus' text. Call it in the
        event loop's thread."""
        encoder, content_type = choose_encoder(accept)
        now = time.monotonic()
        at, body = self._written.get(content_type, (float("-inf"), b""))
        if now - at >= FRESH_S:
            body = encoder(self.prometheus)
            if len(self._written) >= 8:  # Accept may name several escaping schemes
                self._written.clear()
            self._written[content_type] = (now, body)
        return body, content_type

    def families(self) -> Iterator[Family]:
        """What the sources say now. A source that fails is left out, and the log says so: the others are still worth having."""
        found: dict[str, Family] = {}
        for source, fixed in self._sources:
            try:
                for reading in list(source()):
                    _take(found, reading, fixed)
            except Exception as error:
                seldom.error("reading metrics", error)
        return iter(found.values())

    def _own(self) -> Iterator[Reading]:
        yield "mesh_build_info", 1, self.role, __version__
        yield "mesh_spans_dropped_total", sum(dropped() for dropped in self.spans_dropped)


class _Sources(Collector):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Family]:
        return self._registry.families()


_KINDS: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


def _take(found: dict[str, Family], reading: Reading, fixed: dict[str, str]) -> None:
    if isinstance(reading, Histogram):
        _take_histogram(found, reading, fixed)
        return
    name, value, *labels = reading
    metric = declared(name)
    if len(labels) != len(metric.own_labels):
        raise ValueError(f"{name} has the labels {metric.own_labels}, and a reading gives {labels}")
    _family(found, metric).add_metric([*_fixed(metric, fixed), *map(str, labels)], float(value))  # type: ignore[attr-defined]


def _family(found: dict[str, Family], metric: Metric) -> Family:
    family = found.get(metric.name)
    if family is None:
        family = found[metric.name] = _KINDS[metric.kind](metric.name, metric.help, labels=metric.labels)
    return family


def _fixed(metric: Metric, fixed: dict[str, str]) -> list[str]:
    return [fixed[label] for label in fixed_labels(metric)]


def _take_histogram(found: dict[str, Family], histogram: Histogram, fixed: dict[str, str]) -> None:
    metric = histogram.metric
    family = _family(found, metric)
    bounds = [*(floatToGoString(bound) for bound in metric.buckets), "+Inf"]
    for labels, (counts, total) in histogram.series.items():
        below, buckets = 0, []
        for bound, count in zip(bounds, counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric([*_fixed(metric, fixed), *labels], buckets=buckets, sum_value=total[0])  # type: ignore[attr-defined]
