"""A placement as the variables of terraform/environments: `placement.auto.tfvars.json`."""

from __future__ import annotations

from typing import Any

import orjson

from mesh.planner.placement import PlacedShard, Placement

__all__ = ["terraform_variables"]


def terraform_variables(placement: Placement) -> bytes:
    """The JSON that Terraform reads. The types of the variables `placement` in terraform/ have exactly these keys."""
    document = {
        "placement": {
            "model": placement.model,
            "model_hash": placement.model_hash,
            "weights_bytes": placement.weights_bytes,
            "replication_factor": placement.replication_factor,
            "overlap_layers": placement.overlap_layers,
            "batch_size": placement.batch_size,
            "max_sequence_length": placement.max_sequence_length,
            "enable_kv_cache": placement.enable_kv_cache,
            "shards": [_shard(shard) for shard in placement.shards],
        }
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _shard(shard: PlacedShard) -> dict[str, Any]:
    """`memory_bytes`: what it takes. `weights_bytes`: what it fetches, and keeps on its disk."""
    return {
        "shard_id": shard.shard_id,
        "node": shard.node,
        "layers_start": shard.layers_start,
        "layers_end": shard.layers_end,
        "memory_bytes": shard.total_bytes,
        "weights_bytes": shard.weights_bytes,
    }
