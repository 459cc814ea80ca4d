"""What a mesh lacks of what its configuration says it should be."""

from __future__ import annotations

from mesh.coordinator.core.expectations import ExpectedShards
from mesh.coordinator.core.routing import Replica
from mesh.types import LayerRange


def replica(shard: str, start: int, stop: int, *, draining: bool = False) -> Replica:
    return Replica(shard, LayerRange(start, stop), rows=4, free_rows=4, context=64, chunk=16, draining=draining)


def test_ranges_without_a_shard_and_ranges_with_too_few_are_named() -> None:
    expected = ExpectedShards(2, 2)
    assert expected.lacking([]) == "2 of 2 layer ranges have no shard"
    there = [replica("a", 0, 2), replica("b", 0, 2), replica("c", 2, 3)]
    assert expected.lacking(there) == "layers 2-3 1 of 2"
    assert expected.lacking(there[:2]) == "1 of 2 layer ranges have no shard"
    assert expected.lacking([*there, replica("d", 2, 3, draining=True)]) == "layers 2-3 1 of 2"
    assert expected.lacking([*there, replica("d", 2, 3)]) == ""
    assert expected.as_dict(there) == {"shards": 4, "lacking": "layers 2-3 1 of 2"}
