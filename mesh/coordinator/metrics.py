"""The metrics of a coordinator, read from where it keeps its counts. mesh/telemetry/metrics.py says what each one means."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from mesh.bus.metrics import connection_readings
from mesh.bus.storage import StorageWatch
from mesh.coordinator.service import Coordinator
from mesh.protocol import subjects
from mesh.telemetry.registry import Reading, Registry

__all__ = ["report_coordinator"]

# Counters whose names are labels. All of them are reported from the start, because a series that begins at 1 shows no increase.
_PROMPTS = ("prompts", "late", "died")
_BATCH_RESULTS = ("done", "failed", "cancelled", "given_back", "dead", "errors", "failed_takes")
_RECORDS = ("written", "failed", "too_large", "lost", "not_resumed", "rejected")


def report_coordinator(registry: Registry, coordinator: Coordinator) -> None:
    """Add the metrics of `coordinator` to those of its process, and ask JetStream about its storage from now on."""
    storage = StorageWatch(coordinator.bus)
    coordinator.bus.keep(storage.run, "the storage of JetStream")
    fixed = {"coordinator": coordinator.name, "model": coordinator.manifest.name}
    for source in (_load, _requests, _steps, _records):
        registry.add(lambda source=source: source(coordinator), **fixed)  # type: ignore[misc]
    registry.add(lambda: _storage(storage), **fixed)
    registry.add(lambda: _connections(coordinator))
    registry.spans_dropped.append(lambda: sum(count for kind, count in coordinator.tracing.counters.items() if kind != "sent"))


def _connections(coordinator: Coordinator) -> Iterator[Reading]:
    for name, bus in zip(("mesh-coordinator", "mesh-requests"), coordinator.connections(), strict=False):
        yield from connection_readings(name, bus)


def _load(coordinator: Coordinator) -> Iterator[Reading]:
    now = time.monotonic()
    load, expected = coordinator.core.load(now), coordinator.options.expected
    yield "mesh_coordinator_serving", load.context is not None
    yield "mesh_coordinator_sessions", load.live - load.queued, "running"
    yield "mesh_coordinator_sessions", load.queued, "queued"
    yield "mesh_coordinator_capacity_sessions", load.capacity
    yield "mesh_coordinator_queue_limit_sessions", coordinator.options.queue_limit
    replicas = coordinator.core.replicas()
    layers = [0] * coordinator.manifest.layers
    for replica in replicas:
        yield "mesh_coordinator_shard_free_rows", replica.free_rows, replica.shard
        if not replica.draining:
            for layer in replica.layers:
                layers[layer] += 1
    yield "mesh_coordinator_shards", len(replicas)
    yield "mesh_coordinator_layers", len(layers)
    yield "mesh_coordinator_unserved_layers", layers.count(0)
    yield "mesh_coordinator_least_replicas", min(layers)
    if expected is not None:
        yield "mesh_coordinator_expected_shards", expected.ranges * expected.replicas
        yield "mesh_coordinator_expected_replicas", expected.replicas
    for range, count in Counter(replica.layers for replica in replicas).items():
        yield "mesh_coordinator_range_shards", count, range
    for shard, age_s in coordinator.shards.lease_ages().items():
        yield "mesh_coordinator_lease_age_seconds", age_s, shard
    gone = coordinator.shards.gone
    for shard in gone.keys() | {replica.shard for replica in replicas}:
        yield "mesh_coordinator_shards_gone_total", gone[shard], shard


def _requests(coordinator: Coordinator) -> Iterator[Reading]:
    counts = coordinator.core.counts()
    for result in ("finished", "failed", "cancelled", "rejected"):
        yield "mesh_coordinator_requests_total", counts[result], result
    yield "mesh_coordinator_defects_total", counts["defects"]
    yield "mesh_coordinator_restarts_total", counts["restarts"]
    yield "mesh_coordinator_failovers_total", counts["failovers"]
    yield "mesh_coordinator_resumed_total", coordinator.continuity.resumed
    yield "mesh_coordinator_suspected_total", counts["suspected"]
    yield "mesh_coordinator_probes_total", counts["asked"]
    yield "mesh_coordinator_late_answers_total", counts["late"]
    yield "mesh_coordinator_tokens_total", counts["tokens"]
    yield "mesh_coordinator_prompt_tokens_total", counts["prompt_tokens"]
    yield "mesh_coordinator_prefix_hits_total", counts["prefix_hits"]
    yield "mesh_coordinator_prefix_misses_total", counts["prefix_misses"]
    yield "mesh_coordinator_reused_tokens_total", counts["reused_tokens"]
    generations = coordinator.generations
    yield generations.first_token
    yield generations.per_token
    yield generations.duration
    yield generations.queue
    for place, count in coordinator.errors().items():
        yield "mesh_coordinator_errors_total", count, place
    if coordinator.prompts is not None:
        for result in _PROMPTS:
            yield "mesh_coordinator_prompts_total", coordinator.prompts.counters[result], result
    for result in _BATCH_RESULTS:
        yield "mesh_coordinator_batch_requests_total", coordinator.batches.counters[result], result


def _steps(coordinator: Coordinator) -> Iterator[Reading]:
    counts, hops = coordinator.core.counts(), coordinator.meter.hops
    yield "mesh_coordinator_frames_total", counts["prefill_frames"], "prefill"
    yield "mesh_coordinator_frames_total", counts["decode_frames"], "decode"
    yield "mesh_coordinator_frames_total", counts["packed_frames"], "packed"
    yield coordinator.meter.steps
    yield coordinator.meter.rows
    yield "mesh_coordinator_decode_seconds_total", hops.compute_s, "compute"
    yield "mesh_coordinator_decode_seconds_total", hops.queue_s, "queue"
    yield "mesh_coordinator_decode_seconds_total", hops.codec_s, "codec"
    yield "mesh_coordinator_decode_seconds_total", max(hops.wall_s - hops.compute_s - hops.queue_s - hops.codec_s, 0.0), "hop"
    yield "mesh_coordinator_hops_total", hops.hops
    for reason, count in coordinator.intake.rejected.items():
        yield "mesh_coordinator_rejected_frames_total", count, reason


def _records(coordinator: Coordinator) -> Iterator[Reading]:
    recorder = coordinator.continuity.recorder
    for result in _RECORDS:
        yield "mesh_coordinator_records_total", recorder.counters[result], result
    pending, lag_s = recorder.lag()
    yield "mesh_coordinator_pending_records", pending
    yield "mesh_coordinator_record_lag_seconds", lag_s
    yield "mesh_coordinator_records_writable", recorder.writable
    for what, count in coordinator.remade().items():
        yield "mesh_coordinator_remade_total", count, what


def _storage(watch: StorageWatch) -> Iterator[Reading]:
    storage = watch.latest
    if storage is None:
        return
    yield "mesh_coordinator_jetstream_reachable", storage.reachable
    if not storage.reachable:
        return
    yield "mesh_coordinator_jetstream_storage_bytes", storage.size_bytes
    if storage.limit_bytes is not None:
        yield "mesh_coordinator_jetstream_storage_limit_bytes", storage.limit_bytes
    for name, stream in storage.streams.items():
        yield "mesh_coordinator_stream_bytes", stream.size_bytes, name
        if stream.limit_bytes is not None:
            yield "mesh_coordinator_stream_limit_bytes", stream.limit_bytes, name
    for metric, name in (("batch_backlog_requests", subjects.STREAM_BATCH), ("batch_dead_messages", subjects.STREAM_DEAD)):
        found = storage.streams.get(name)
        yield f"mesh_coordinator_{metric}", 0 if found is None else found.messages
