"""What a plan is asked for: the model, the nodes, and how the layers should be spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import BadLayerRange, PlanError
from mesh.model.memory import DEFAULT_CHUNK, ModelShape
from mesh.planner.placement import Node, Strategy
from mesh.settings.schema import LoadBalancing
from mesh.types import LayerRange

__all__ = ["PlanRequest", "same_nodes"]


@dataclass(frozen=True)
class PlanRequest:
    """What to place, and where. A request that contradicts itself raises PlanError when it is made (BadLayerRange for its ranges)."""

    model: ModelShape
    nodes: tuple[Node, ...]
    strategy: Strategy = "even"
    shards_count: int | None = None  # layer ranges; None: as many as nodes allow (weighted: as many as help)
    ranges: tuple[LayerRange, ...] | None = None  # with explicit, and only there
    replication_factor: int = 1
    overlap_layers: int = 0
    batch_size: int = 1  # rows
    max_sequence_length: int | None = None  # tokens a row; None: the model's context
    chunk: int = DEFAULT_CHUNK
    enable_kv_cache: bool = True
    load_balancing_strategy: LoadBalancing = "least_loaded"

    def __post_init__(self) -> None:
        layers, nodes, replicas = self.model.layer_count, len(self.nodes), self.replication_factor
        for name, least in (("replication_factor", 1), ("overlap_layers", 0), ("batch_size", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 1 <= self.context <= self.model.context_length:
            raise PlanError(
                f"max_sequence_length is {self.context}: {self.model.name} was made for 1 to {self.model.context_length} positions"
            )
        if len({node.name for node in self.nodes}) != nodes:
            raise PlanError("two nodes have the same name: give each its own")
        if replicas > nodes:
            raise PlanError(f"replication_factor {replicas} needs {replicas} distinct nodes and there are {nodes}: add nodes or lower it")
        if (self.strategy == "explicit") != (self.ranges is not None):
            raise PlanError("layer ranges go with the explicit strategy, and it needs them")
        if self.shards_count is not None and not 1 <= self.shards_count <= layers:
            raise BadLayerRange(f"shards_count is {self.shards_count}: {self.model.name} has {layers} layers, so give 1 to {layers}")
        if self.ranges is not None:
            _check_cover(self.ranges, self.model)
            if self.shards_count not in (None, len(self.ranges)):
                raise PlanError(f"shards_count is {self.shards_count} and there are {len(self.ranges)} layer ranges: make them agree")
        if self.strategy == "weighted" and self.shards_count and self.shards_count * replicas > nodes:
            raise PlanError(
                f"the weighted strategy puts one shard on a node: {self.shards_count} shards_count x {replicas} replication_factor "
                f"needs {self.shards_count * replicas} nodes and there are {nodes}"
            )

    @property
    def context(self) -> int:
        return self.model.context_length if self.max_sequence_length is None else self.max_sequence_length


def same_nodes(count: int, memory_bytes: int) -> tuple[Node, ...]:
    """`count` equal nodes, node-1 to node-`count`."""
    return tuple(Node(name=f"node-{i + 1}", memory_bytes=memory_bytes) for i in range(count))


def _check_cover(ranges: Sequence[LayerRange], model: ModelShape) -> None:
    at = 0
    for cut in ranges:
        if cut.start != at or not cut.start < cut.stop <= model.layer_count:
            raise BadLayerRange(
                f"layer ranges {', '.join(map(str, ranges))} do not cover layers 0-{model.layer_count} of {model.name} in order: "
                f"{cut} should start at {at}, stop after it starts and not beyond {model.layer_count}"
            )
        at = cut.stop
    if at != model.layer_count:
        raise BadLayerRange(f"layer ranges end at {at} and {model.name} has layers 0-{model.layer_count}: add {at}-{model.layer_count}")
