"""What shards of other models on this host are about to take."""

from __future__ import annotations

import socket
from typing import Any

from mesh.protocol.status import ShardLease
from mesh.shard.placing import _others_here

MINE, OTHER = "0" * 16, "1" * 16


def lease(shard: str, **values: Any) -> ShardLease:
    fixed: dict[str, Any] = {
        "shard": shard, "instance": "1", "model": "m", "model_hash": OTHER, "layers_start": 0, "layers_end": 1, "total_layers": 1,
        "state": "loading", "rows": 1, "free_rows": 1, "context": 64, "chunk": 16, "hidden_size": 8, "hidden_itemsize": 4,
        "max_frame_bytes": 10**6, "queue_limit": 8, "frame_version": 1, "host": socket.gethostname(), "memory_bytes": 200,
        "predicted_bytes": 1000,
    }  # fmt: skip
    return ShardLease(**{**fixed, **values})


def test_shards_of_other_models_that_still_load_here_count_with_what_they_lack() -> None:
    leases = [
        lease("loading"),
        lease("warming", state="warming", memory_bytes=700),
        lease("ready", state="ready"),  # the system does not count its memory as free
        lease("mine", model_hash=MINE),  # counted by its layers
        lease("elsewhere", host="another"),
        lease("larger", memory_bytes=2000),
    ]
    assert _others_here(MINE, leases) == 800 + 300
