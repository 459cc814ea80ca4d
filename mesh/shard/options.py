"""What one shard is told when it is made, and the states it goes through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.bus import Pull
from mesh.model.memory import DEFAULT_CHUNK
from mesh.model.signature import Signers
from mesh.protocol import subjects
from mesh.settings.defaults import DEFAULT_ROWS
from mesh.types import LayerRange

__all__ = ["ShardOptions", "Status"]

Status = Literal["loading", "warming", "ready", "draining"]


@dataclass(frozen=True)
class ShardOptions:
    """The layers that a shard serves, and how.

    rows: sessions at once. context: positions of a row (None: the model's). chunk: the most tokens of one prefill step.
    max_memory_bytes: the most that weights and caches may take (None: no limit).
    signers: one of them must have signed the model (None: no signature is asked for).
    warm_up False: programs are compiled when they are first needed (for tests). drain_s: how long a drain waits for open sessions.
    mirror: also compute the frames of the range's other replicas, for sessions that are open on both. overlap: so many layers of
    each neighbour are held as well (mesh/shard/moving.py). kv_cache False: keep the incoming hidden states and compute keys and
    values again (mesh/runtime/recompute.py). incoming: brings the files that are not in the directory yet, while the shard loads.
    """

    name: str
    directory: Path
    layers: LayerRange
    rows: int = DEFAULT_ROWS
    context: int | None = None
    chunk: int = DEFAULT_CHUNK
    max_memory_bytes: int | None = None
    signers: Signers | None = None
    warm_up: bool = True
    drain_s: float = 30.0
    lease_ttl_s: float = subjects.LEASE_TTL_S
    mirror: bool = False
    overlap: int = 0
    kv_cache: bool = True
    incoming: Pull | None = None
