"""The metrics of a shard, read from where it keeps its counts. mesh/telemetry/metrics.py says what each one means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesh.bus.metrics import connection_readings
from mesh.protocol.frame_codec import Nack
from mesh.runtime.device import memory
from mesh.settings.schema import MetricsSection
from mesh.shard.meter import resident_bytes
from mesh.shard.service import Shard
from mesh.telemetry.metrics_http import MetricsEndpoint
from mesh.telemetry.registry import Reading, Registry

__all__ = ["ShardMetrics", "report_shard"]


@dataclass(frozen=True, slots=True)
class ShardMetrics:
    """The metrics of a shard's process, and where it answers them; endpoint None: nowhere."""

    registry: Registry
    endpoint: MetricsEndpoint | None

    @classmethod
    def bind(cls, section: MetricsSection, *, port: int | None = None, or_free: bool = False) -> ShardMetrics:
        """Take the port, as MetricsEndpoint.bind does."""
        registry = Registry("shard")
        return cls(registry, MetricsEndpoint.bind(registry, section, port=port, or_free=or_free))

    def of(self, shard: Shard) -> None:
        """Report `shard`, whose lease says where."""
        if self.endpoint is not None:
            shard.metrics_url = self.endpoint.url
            self.endpoint.say()
        report_shard(self.registry, shard)


def report_shard(registry: Registry, shard: Shard) -> None:
    """Add the metrics of `shard` to those of its process."""
    registry.add(lambda: _readings(shard), shard=shard.options.name, model=shard.manifest.name)
    registry.add(lambda: connection_readings("mesh-shard", shard.bus))
    registry.spans_dropped.append(lambda: shard.spans_dropped)


def _readings(shard: Shard) -> Iterator[Reading]:
    state, meter, stage = shard.state, shard.meter, shard.stage
    yield "mesh_shard_info", 1, state.shape.layers, shard.status
    yield "mesh_shard_ready", shard.status == "ready"
    yield "mesh_shard_rows", state.shape.rows
    yield "mesh_shard_free_rows", state.free_rows
    yield "mesh_shard_kept_rows", state.kept_rows
    for how in ("taken", "copied", "missed"):
        yield "mesh_shard_reused_rows_total", state.reused[how], how
    yield "mesh_shard_filled_positions", state.filled_positions
    yield "mesh_shard_queue_frames", state.queued
    yield meter.steps
    yield meter.waits
    yield "mesh_shard_codec_seconds_total", meter.codec_s
    yield "mesh_shard_busy_seconds_total", shard.busy_s
    yield "mesh_shard_frames_total", meter.frames_in, "in"
    yield "mesh_shard_frames_total", meter.frames_out, "out"
    yield "mesh_shard_frame_bytes_total", meter.bytes_in, "in"
    yield "mesh_shard_frame_bytes_total", meter.bytes_out, "out"
    for nack in Nack:
        yield "mesh_shard_nacked_rows_total", state.gaps[nack.name.lower()], nack.name.lower()
    for reason, count in meter.rejected.items():
        yield "mesh_shard_rejected_total", count, reason
    yield "mesh_shard_followed_rows_total", state.followed
    yield "mesh_shard_missed_rows_total", state.missed
    yield "mesh_shard_resident_memory_bytes", resident_bytes()
    if shard.options.max_memory_bytes is not None:
        yield "mesh_shard_memory_limit_bytes", shard.options.max_memory_bytes
    keeper = shard.lease_keeper
    yield "mesh_shard_lease_failures_total", keeper.counters["failed"]
    yield "mesh_shard_remade_total", keeper.bucket.remade
    if stage is None:
        return
    yield "mesh_shard_memory_bytes", stage.need.weights_bytes, "weights"
    yield "mesh_shard_memory_bytes", stage.need.cache_bytes, "kv"
    yield "mesh_shard_memory_bytes", stage.need.workspace_bytes, "workspace"
    yield "mesh_shard_memory_bytes", stage.need.process_bytes, "process"
    yield "mesh_shard_compiled_programs_total", stage.compiled
    yield "mesh_shard_tokens_total", stage.counters.prefill_tokens, "prefill"
    yield "mesh_shard_tokens_total", stage.counters.decode_tokens, "decode"
    for device, figures in memory():
        for kind, size in figures.items():
            yield "mesh_shard_device_memory_bytes", size, device, kind
