from __future__ import annotations

import pytest

from mesh.protocol.status import ShardLease
from mesh.shard.gaps import can_replace
from mesh.types import LayerRange


def lease(start: int, stop: int, state: str = "ready") -> ShardLease:
    return ShardLease.model_validate(
        {
            "shard": f"s{start}-{stop}",
            "instance": "i",
            "model": "m",
            "model_hash": "0" * 16,
            "layers_start": start,
            "layers_end": stop,
            "total_layers": 6,
            "state": state,
            "rows": 1,
            "free_rows": 1,
            "context": 8,
            "chunk": 8,
            "hidden_size": 4,
            "hidden_itemsize": 4,
            "max_frame_bytes": 1000,
            "queue_limit": 4,
            "frame_version": 1,
        }
    )


@pytest.mark.parametrize(
    ("others", "replaced"),
    [
        ([], False),
        ([lease(0, 3)], True),
        ([lease(0, 3, "draining")], False),
        ([lease(0, 3, "warming")], False),
        ([lease(3, 6)], False),
        ([lease(0, 1), lease(1, 3)], True),
        ([lease(0, 2), lease(2, 6)], True),
        ([lease(0, 2), lease(1, 3)], False),
        ([lease(0, 6)], True),
    ],
)
def test_a_shard_of_layers_0_to_3_of_6_can_be_done_without(others: list[ShardLease], replaced: bool) -> None:
    assert can_replace(others, LayerRange(0, 3), 6) is replaced
