"""Which shards the configuration asks for (`shards_count`, `replication_factor`), and which of them are lacking. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mesh.coordinator.core.routing import Replica

__all__ = ["ExpectedShards"]


@dataclass(frozen=True, slots=True)
class ExpectedShards:
    """`ranges` layer ranges, each on `replicas` shards."""

    ranges: int
    replicas: int = 1

    def lacking(self, there: Iterable[Replica]) -> str:
        """What is lacking, in words; empty where nothing is lacking."""
        held = Counter(replica.layers for replica in there if not replica.draining)
        few = [f"layers {layers} {count} of {self.replicas}" for layers, count in sorted(held.items()) if count < self.replicas]
        if len(held) < self.ranges:
            few.insert(0, f"{self.ranges - len(held)} of {self.ranges} layer ranges have no shard")
        return ", ".join(few)

    def as_dict(self, there: Iterable[Replica]) -> dict[str, Any]:
        """For $SRV.STATS."""
        return {"shards": self.ranges * self.replicas, "lacking": self.lacking(there)}
