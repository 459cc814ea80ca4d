"""The metrics of the mesh: every name, its kind, labels, meaning and buckets. docs/metrics.md is made from this file.

A metric is declared here, and read where its value is kept: mesh/coordinator/metrics.py, mesh/shard/metrics.py, mesh/gateway/metrics.py.
Values are read when somebody asks for them (registry.py); only histograms are fed as things happen.

Where OpenTelemetry's conventions have a metric, its name and its buckets are used: `gen_ai.server.*`, `http.server.*`. Everything else is
`mesh_*`. A label never has a value that clients choose: no session, no request, no user. Shards and coordinators are named, because there
are few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["ATTRIBUTES", "METRICS", "Kind", "Metric", "declared"]

Kind = Literal["counter", "gauge", "histogram"]
Process = Literal["every", "coordinator", "shard", "gateway"]

_UNITS: Final = ("seconds", "bytes", "ratio")
_FIXED: Final[dict[Process, tuple[str, ...]]] = {
    "every": (),
    "coordinator": ("coordinator", "model"),
    "shard": ("shard", "model"),
    "gateway": (),
}
"""Labels that have the same value in every series of a process. They come first."""

_GEN_AI: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_HTTP_S: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_STEP_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_WAIT_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_QUEUE_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """name: in Prometheus' form, with unit, and `_total` for a counter. own_labels: those that its readings give. buckets: upper bounds,
    of a histogram. otel: its name over OTLP, where that does not follow from `name`."""

    name: str
    kind: Kind
    process: Process
    help: str
    own_labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    otel: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """All of its labels; those of the process come first."""
        return (*fixed_labels(self), *self.own_labels)

    @property
    def unit(self) -> str:
        """seconds, bytes, ratio, or nothing for a count."""
        word = self.name.removesuffix("_total").rpartition("_")[2]
        return word if word in _UNITS else ""

    @property
    def otel_name(self) -> str:
        if self.otel:
            return self.otel
        stem = self.name.removesuffix("_total")
        stem = stem.removesuffix(f"_{self.unit}") if self.unit else stem
        room, _, rest = stem.partition("_")
        return f"{room}.{self.process}.{rest.removeprefix(f'{self.process}_')}" if self.process != "every" else f"{room}.{rest}"


def fixed_labels(metric: Metric) -> tuple[str, ...]:
    """The labels of the process that come with every series of `metric`."""
    return _FIXED[metric.process] if metric.name.startswith("mesh_") else ()


_GENERATIONS = (
    Metric(
        "gen_ai_server_time_to_first_token_seconds",
        "histogram",
        "coordinator",
        "From a request's arrival to its first token, of requests that got one.",
        _GEN_AI,
        _FIRST_TOKEN_S,
        "gen_ai.server.time_to_first_token",
    ),
    Metric(
        "gen_ai_server_time_per_output_token_seconds",
        "histogram",
        "coordinator",
        "Mean time between two tokens after the first one, one value for each request.",
        _GEN_AI,
        _TOKEN_S,
        "gen_ai.server.time_per_output_token",
    ),
    Metric(
        "gen_ai_server_request_duration_seconds",
        "histogram",
        "coordinator",
        "From a request's arrival to its last token or its error. error_type is empty where it succeeded.",
        (*_GEN_AI, "error_type"),
        _REQUEST_S,
        "gen_ai.server.request.duration",
    ),
)


def _c(name: str, kind: Kind, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(f"mesh_coordinator_{name}", kind, "coordinator", help, labels, buckets)


_COORDINATOR = (
    _c("serving", "gauge", "1 while every layer has a shard, so that a token can be generated."),
    _c("sessions", "gauge", "Sessions that have not ended, by state: running, or queued until there is a row.", "state"),
    _c("capacity_sessions", "gauge", "Sessions that the shards have rows for."),
    _c("queue_limit_sessions", "gauge", "Sessions that may wait; further requests are refused as busy."),
    _c("queue_wait_seconds", "histogram", "How long a session waited for rows, observed when it ends.", buckets=_QUEUE_S),
    _c("shards", "gauge", "Shards that take part."),
    _c("expected_shards", "gauge", "Shards that the configuration asks for."),
    _c("layers", "gauge", "Layers of the model."),
    _c("unserved_layers", "gauge", "Layers that no shard serves."),
    _c("least_replicas", "gauge", "Shards of the layer that has the fewest."),
    _c("expected_replicas", "gauge", "Shards of each layer that the configuration asks for."),
    _c("range_shards", "gauge", "Shards of each layer range that has one.", "range"),
    _c("shard_free_rows", "gauge", "Free rows of a shard, as its lease says.", "shard"),
    _c("lease_age_seconds", "gauge", "Since a shard was heard last: by its lease, or by an answer.", "shard"),
    _c("shards_gone_total", "counter", "How often a shard was taken to be gone, by its name.", "shard"),
    _c("requests_total", "counter", "Requests by result: finished, failed, cancelled, or rejected before they began.", "result"),
    _c("defects_total", "counter", "Unexpected errors, each of which has ended a session."),
    _c("restarts_total", "counter", "Routes that sessions lost; each session went on along another one."),
    _c("failovers_total", "counter", "Sessions that lost a shard in the middle and went on."),
    _c("resumed_total", "counter", "Sessions that were taken over from other coordinators."),
    _c("suspected_total", "counter", "Suspicions of shards that did not answer."),
    _c("probes_total", "counter", "Probes of shards."),
    _c("late_answers_total", "counter", "Answers that nothing waited for any more."),
    _c("tokens_total", "counter", "Tokens generated."),
    _c("prompt_tokens_total", "counter", "Tokens of the prompts that were accepted."),
    _c("prefix_hits_total", "counter", "Sessions that began with positions that a row of a shard held."),
    _c("prefix_misses_total", "counter", "Rows that a shard no longer held when a session asked for them."),
    _c("reused_tokens_total", "counter", "Tokens of prompts that were not computed, because rows held them."),
    _c("frames_total", "counter", "Frames sent to shards, by phase: prefill, decode or packed (both).", "phase"),
    _c("step_seconds", "histogram", "From sending a frame to its answer, through all stages, by phase.", "phase", buckets=_STEP_S),
    _c("decode_batch_rows", "histogram", "Sessions that share a decode step.", buckets=_ROWS),
    _c(
        "decode_seconds_total",
        "counter",
        "Time of decode steps, by part: compute, queue, codec, or hop (the rest: NATS, the kernel, event loops).",
        "part",
    ),
    _c("hops_total", "counter", "Hops of decode steps; decode_seconds_total{part=~'hop|codec'} divided by this is the cost of a hop."),
    _c("rejected_frames_total", "counter", "Answer frames that were refused, by reason.", "reason"),
    _c("errors_total", "counter", "What failed unexpectedly, by place in the coordinator.", "place"),
    _c("prompts_total", "counter", "Prompts that were tokenized; of these, late and died are those that ended their process.", "result"),
    _c("records_total", "counter", "Session records, by result: written, failed, too_large, lost, not_resumed, rejected.", "result"),
    _c("pending_records", "gauge", "Session records that have changed since they were written last."),
    _c("record_lag_seconds", "gauge", "The age of the oldest change of a session that is not written down yet."),
    _c("records_writable", "gauge", "0 after a write of a session record that failed or was slow, until one succeeds."),
    _c("remade_total", "counter", "What was lost in JetStream and made again: sessions, events, batches.", "what"),
    _c("batch_requests_total", "counter", "What became of requests of batches that this coordinator took, by result.", "result"),
    _c("batch_backlog_requests", "gauge", "Requests of batches that wait in the mesh, as JetStream says."),
    _c("batch_dead_messages", "gauge", "Messages on the dead list, which no coordinator could handle."),
    _c("jetstream_reachable", "gauge", "1 if JetStream answered the last question; it is asked every 15 s."),
    _c("jetstream_storage_bytes", "gauge", "Disk that the account's streams take."),
    _c("jetstream_storage_limit_bytes", "gauge", "Disk that the account may take; absent where there is no limit."),
    _c("stream_bytes", "gauge", "Size of a stream of the mesh.", "stream"),
    _c("stream_limit_bytes", "gauge", "The size at which a stream refuses writes; absent for streams that drop old messages.", "stream"),
)


def _s(name: str, kind: Kind, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(f"mesh_shard_{name}", kind, "shard", help, labels, buckets)


_SHARD = (
    _s("info", "gauge", "Always 1: the layer range and the state of the shard.", "range", "state"),
    _s("ready", "gauge", "1 while the shard takes sessions."),
    _s(
        "step_seconds",
        "histogram",
        "Time in which the shard computes a frame, by phase: prefill, decode, packed.",
        "phase",
        buckets=_STEP_S,
    ),
    _s("queue_wait_seconds", "histogram", "Time in which a frame waits for the compute thread.", buckets=_WAIT_S),
    _s("codec_seconds_total", "counter", "Time in which frames are read and written."),
    _s("busy_seconds_total", "counter", "Time in which the compute thread had work. 1 - rate() is the share of time that it was idle."),
    _s("tokens_total", "counter", "Tokens computed, by phase; as a mirror too.", "phase"),
    _s("frames_total", "counter", "Frames, by direction: in or out.", "direction"),
    _s("frame_bytes_total", "counter", "Bytes of frames, by direction: in or out.", "direction"),
    _s("queue_frames", "gauge", "Frames that wait for the compute thread or are in it."),
    _s("rows", "gauge", "Sessions that the shard has room for."),
    _s("free_rows", "gauge", "Rows that no session has."),
    _s("kept_rows", "gauge", "Free rows that hold what a session may begin with."),
    _s("reused_rows_total", "counter", "Rows that sessions asked to begin with: taken, copied, or missed (no longer there).", "result"),
    _s("filled_positions", "gauge", "Positions that are filled in the rows of open sessions."),
    _s("nacked_rows_total", "counter", "Rows of frames that were not computed, by reason.", "reason"),
    _s("rejected_total", "counter", "Frames and messages that were refused, by reason.", "reason"),
    _s("followed_rows_total", "counter", "Rows that were computed as a mirror."),
    _s("missed_rows_total", "counter", "Rows that a mirror could not compute, because it is behind."),
    _s("resident_memory_bytes", "gauge", "Resident memory of the process."),
    _s("memory_limit_bytes", "gauge", "The most memory that the shard may take (resources.max_memory_gb)."),
    _s(
        "memory_bytes",
        "gauge",
        "Planned memory of the shard, by kind: weights, kv (the caches), workspace, process.",
        "kind",
    ),
    _s(
        "device_memory_bytes",
        "gauge",
        "Memory of an accelerator, by kind: used, peak, limit. Absent where JAX does not report it.",
        "device",
        "kind",
    ),
    _s("compiled_programs_total", "counter", "Programs that were compiled, or loaded compiled. It does not rise while the shard serves."),
    _s("lease_failures_total", "counter", "Writes of the lease to JetStream that failed."),
    _s("remade_total", "counter", "How often the bucket of leases was lost and made again."),
)

_GATEWAY = (
    Metric(
        "http_server_request_duration_seconds",
        "histogram",
        "gateway",
        "HTTP requests: from the head to the last byte of the answer. http_route is `(no route)` where no route matched.",
        ("http_request_method", "http_route", "http_response_status_code"),
        _HTTP_S,
        "http.server.request.duration",
    ),
    Metric("http_server_active_requests", "gauge", "gateway", "HTTP requests under way.", otel="http.server.active_requests"),
    Metric("mesh_gateway_connections", "gauge", "gateway", "Open HTTP connections."),
    Metric("mesh_gateway_open_streams", "gauge", "gateway", "Answers that are being sent as server-sent events."),
    Metric("mesh_gateway_retries_total", "counter", "gateway", "Requests that the gateway sent to a coordinator again."),
    Metric("mesh_gateway_tokens_total", "counter", "gateway", "Tokens of callers, by kind: prompt or completion.", ("kind",)),
    Metric("mesh_gateway_quota_refusals_total", "counter", "gateway", "Calls that were refused because their caller's quota was used."),
)

_EVERY = (
    Metric("mesh_build_info", "gauge", "every", "Always 1: the version of the process.", ("role", "version")),
    Metric("mesh_spans_dropped_total", "counter", "every", "Spans that were dropped because they could not be kept or sent."),
    Metric("mesh_nats_connected", "gauge", "every", "1 while the connection to NATS is there.", ("connection",)),
    Metric("mesh_nats_reconnects_total", "counter", "every", "How often the connection to NATS was lost and came back.", ("connection",)),
    Metric(
        "mesh_nats_errors_total",
        "counter",
        "every",
        "What went wrong on a connection: dropped (messages that came too fast), handler_errors, task_failures, rejected, refused_replies.",
        ("connection", "kind"),
    ),
)

METRICS: Final = (*_GENERATIONS, *_COORDINATOR, *_SHARD, *_GATEWAY, *_EVERY)

ATTRIBUTES: Final = {
    "gen_ai_operation_name": "gen_ai.operation.name",
    "gen_ai_provider_name": "gen_ai.provider.name",
    "gen_ai_request_model": "gen_ai.request.model",
    "error_type": "error.type",
    "http_request_method": "http.request.method",
    "http_route": "http.route",
    "http_response_status_code": "http.response.status_code",
}
"""Label -> the attribute of OpenTelemetry's conventions. Every other label is `mesh.LABEL` over OTLP."""

_BY_NAME: Final = {metric.name: metric for metric in METRICS}


def declared(name: str) -> Metric:
    """The metric of this name. KeyError: none is declared."""
    return _BY_NAME[name]
