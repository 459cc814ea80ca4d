"""The same metrics over OTLP, where the standard environment (otel_environment.py) asks for it and the extra `otlp` is installed.

    OTEL_METRIC_EXPORT_INTERVAL       milliseconds between two exports (default 60000)

A thread asks the event loop for the values and hands them to the exporter of opentelemetry. The loop waits for nothing: a collector that
hangs or refuses holds up this thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.metrics_core import Metric as Family

from mesh import __version__
from mesh.telemetry.metrics import ATTRIBUTES, Metric, declared
from mesh.telemetry.otel_environment import protocol_of, wants_otlp
from mesh.telemetry.registry import Registry

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricsData

__all__ = ["OtlpExport", "metrics_data"]

log = logging.getLogger("mesh.metrics")

_UNITS: Final = {"seconds": "s", "bytes": "By", "ratio": "1", "": "1"}
_EVERY_S: Final = 60.0
_COLLECT_S: Final = 5.0


class OtlpExport:
    """A thread that exports `registry`, which is read in `loop`."""

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop, exporter: MetricExporter, every_s: float) -> None:
        self._registry = registry
        self._loop = loop
        self._exporter = exporter
        self._every_s = every_s
        self._began_ns = time.time_ns()
        self._ending = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="metrics-otlp", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, registry: Registry, loop: asyncio.AbstractEventLoop) -> OtlpExport | None:
        """None where the environment does not ask for it, or the exporter is not installed (then the log says so)."""
        if not wants_otlp("METRICS", os.environ):
            return None
        try:
            exporter = _exporter(protocol_of("METRICS", os.environ))
        except ImportError:
            log.warning("OTEL_ variables ask for metrics over OTLP: install stagemesh[otlp]")
            return None
        try:
            every_s = float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")) / 1000
        except ValueError:
            every_s = _EVERY_S
        return cls(registry, loop, exporter, max(every_s, 0.1))

    def stop(self) -> None:
        """End. Call it in the event loop; it does not wait for a collector that hangs."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.wait(self._every_s):
            self._export()

    def _export(self) -> None:
        try:
            families = asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(_COLLECT_S)
            result = self._exporter.export(metrics_data(families, self._registry.role, self._began_ns, time.time_ns()))
            failed = getattr(result, "name", "") != "SUCCESS"
        except Exception as error:  # of the loop, which has ended, or of the exporter
            log.debug("exporting metrics: %r", error)
            failed = True
        if failed and not self._failing:
            log.warning("metrics cannot be exported over OTLP now; it is tried again every %g s", self._every_s)
        self._failing = failed

    async def _read(self) -> list[Family]:
        return list(self._registry.prometheus.collect())


def _exporter(protocol: str | None) -> MetricExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc

        return grpc.OTLPMetricExporter()
    from opentelemetry.exporter.otlp.proto.http import metric_exporter as http

    return http.OTLPMetricExporter()


def metrics_data(families: Iterable[Family], role: str, began_ns: int, now_ns: int) -> MetricsData:
    """Families of Prometheus as the SDK's data: names, units and attributes as OpenTelemetry has them."""
    from opentelemetry.sdk.metrics.export import AggregationTemporality as Temporality
    from opentelemetry.sdk.metrics.export import Gauge, MetricsData, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum
    from opentelemetry.sdk.metrics.export import Metric as Otel
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    metrics = []
    for family in families:
        metric = _declared(family)
        if metric is None:
            continue
        data: Any
        if metric.kind == "histogram":
            data = _histogram(metric, family, began_ns, now_ns)
        else:
            points = [
                NumberDataPoint(_attributes(sample.labels), began_ns, now_ns, sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            data = Sum(points, Temporality.CUMULATIVE, is_monotonic=True) if metric.kind == "counter" else Gauge(points)
        metrics.append(Otel(metric.otel_name, metric.help, _UNITS[metric.unit], data))
    scope = ScopeMetrics(InstrumentationScope("stagemesh", __version__), metrics, "")
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or f"mesh-{role}", "service.version": __version__})
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _declared(family: Family) -> Metric | None:
    """The metric that a family is; None for process_*, which are the client library's."""
    try:
        return declared(f"{family.name}_total" if family.type == "counter" else family.name)
    except KeyError:
        return None


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {ATTRIBUTES.get(label, f"mesh.{label}"): value for label, value in labels.items() if value}


def _histogram(metric: Metric, family: Family, began_ns: int, now_ns: int) -> Any:
    from opentelemetry.sdk.metrics.export import AggregationTemporality as Temporality
    from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint

    series: dict[tuple[tuple[str, str], ...], tuple[list[float], list[float]]] = {}  # labels -> (counts up to each bound, [sum])
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        below, total = series.setdefault(labels, ([], []))
        if sample.name.endswith("_bucket"):
            below.append(sample.value)
        elif sample.name.endswith("_sum"):
            total.append(sample.value)
    points = [
        HistogramDataPoint(
            _attributes(dict(labels)),
            began_ns,
            now_ns,
            int(below[-1]),
            total[0],
            [int(now - before) for before, now in zip([0.0, *below], below, strict=False)],
            metric.buckets,
            0.0,
            0.0,
        )
        for labels, (below, total) in series.items()
    ]
    return Histogram(points, Temporality.CUMULATIVE)
