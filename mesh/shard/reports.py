"""What a shard reports of itself: its lease, which says what it serves, and its statistics."""

from __future__ import annotations

import os
import socket
import time
from typing import Protocol

from mesh import __version__
from mesh.bus import Bus
from mesh.kernels.library import kernels
from mesh.model.manifest import Manifest
from mesh.protocol import frame_codec
from mesh.protocol.status import ShardLease, ShardStats
from mesh.runtime.device import processor
from mesh.runtime.engine import Engine
from mesh.shard.lease import LeaseKeeper
from mesh.shard.machine import machine_report
from mesh.shard.meter import Meter, resident_bytes
from mesh.shard.options import ShardOptions, Status
from mesh.shard.state import ShardState

__all__ = ["ReportingShard", "lease_of", "stats_of"]


class ReportingShard(Protocol):
    """What the reports read of a shard (mesh/shard/service.py)."""

    bus: Bus
    options: ShardOptions
    manifest: Manifest
    state: ShardState
    stage: Engine | None
    meter: Meter
    instance: str
    http_url: str
    metrics_url: str
    started_unix_s: float
    predicted_bytes: int

    @property
    def status(self) -> Status: ...

    @property
    def busy_s(self) -> float: ...

    @property
    def lease_keeper(self) -> LeaseKeeper: ...


def stats_of(shard: ReportingShard) -> ShardStats:
    counters, meter, state = (shard.stage.counters if shard.stage else None), shard.meter, shard.state
    return ShardStats(
        shard=shard.options.name,
        instance=shard.instance,
        model=shard.manifest.name,
        state=shard.status,
        uptime_s=time.time() - shard.started_unix_s,
        rows=state.shape.rows,
        free_rows=state.free_rows,
        sessions=state.sessions,
        queue_frames=state.queued,
        prefill_steps=counters.prefill_steps if counters else 0,
        prefill_tokens=counters.prefill_tokens if counters else 0,
        prefill_s=counters.prefill_s if counters else 0.0,
        decode_steps=counters.decode_steps if counters else 0,
        decode_tokens=counters.decode_tokens if counters else 0,
        decode_s=counters.decode_s if counters else 0.0,
        queue_s=meter.queue_s,
        codec_s=meter.codec_s,
        frames_in=meter.frames_in,
        frames_out=meter.frames_out,
        bytes_in=meter.bytes_in,
        bytes_out=meter.bytes_out,
        gaps=dict(state.gaps),
        rejected={**meter.rejected, **({"reply": refused} if (refused := shard.bus.refused_replies) else {})},
        memory_bytes=resident_bytes(),
        storage=dict(shard.lease_keeper.counters) | {"remade": shard.lease_keeper.bucket.remade},
        unix_s=time.time(),
        predicted_bytes=shard.predicted_bytes,
        machine=machine_report(),
    )


def lease_of(shard: ReportingShard, now: float) -> ShardLease:
    """now: time.monotonic."""
    shape, busy_s = shard.state.shape, shard.busy_s
    return ShardLease(
        shard=shard.options.name,
        instance=shard.instance,
        model=shard.manifest.name,
        model_hash=shape.model_hash,
        layers_start=shape.layers.start,
        layers_end=shape.layers.stop,
        held_start=shard.stage.held.start if shard.stage is not None else 0,
        held_end=shard.stage.held.stop if shard.stage is not None else 0,
        total_layers=shape.total_layers,
        state=shard.status,
        rows=shape.rows,
        free_rows=shard.state.free_rows,
        context=shape.context,
        chunk=shard.options.chunk,
        hidden_size=shape.hidden_size,
        hidden_itemsize=shape.hidden_dtype.itemsize,
        max_frame_bytes=shard.bus.max_payload,
        queue_limit=shape.queue_limit,
        queue_frames=shard.state.queued,
        mirrors=shard.options.mirror,
        packs=shard.stage is not None and shard.stage.packs,
        kept_rows=shard.state.kept_rows,
        load=shard.meter.load(now, busy_s),
        step_s=shard.meter.step_s,
        memory_bytes=resident_bytes(),
        weights_bytes=shard.stage.need.weights_bytes if shard.stage is not None else 0,
        predicted_bytes=shard.predicted_bytes,
        frame_version=frame_codec.VERSION,
        version=__version__,
        host=socket.gethostname(),
        processor=processor() if shard.stage is not None else "",
        kernels=(kernels().name or "none") if shard.stage is not None else "",
        pid=os.getpid(),
        started_unix_s=shard.started_unix_s,
        http=shard.http_url,
        metrics=shard.metrics_url,
    )
