"""What a shard reports of its machine, and of the memory that it was planned to take."""

from __future__ import annotations

from mesh.host.machine import machine
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.protocol.status import MachineReport
from mesh.runtime.device import memory_habits
from mesh.shard.options import ShardOptions

__all__ = ["machine_report", "predicted_bytes"]


def machine_report() -> MachineReport:
    here = machine()
    return MachineReport(
        processor=here.processor[:256],
        features=here.features,
        cores=here.cores,
        usable_cores=here.usable_cores,
        quota_cores=here.quota_cores or 0.0,
        memory_bytes=here.memory_bytes,
        memory_limit_bytes=here.limit_bytes,
        available_bytes=here.available_bytes,
        open_files=here.open_files,
    )


def predicted_bytes(manifest: Manifest, options: ShardOptions) -> int:
    """The memory of a process that holds these layers, as it is predicted before they are loaded."""
    held = options.layers.widened(options.overlap, manifest.layers)
    need = predict(
        manifest,
        held,
        embed=held.start == 0,
        head=held.stop == manifest.layers,
        rows=options.rows,
        context=min(options.context or manifest.context_length, manifest.context_length),
        chunk=options.chunk,
        kv_cache=options.kv_cache,
        **memory_habits(),
    )
    return need.total_bytes
