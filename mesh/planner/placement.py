"""The result of a plan: which shard holds which layers on which node, how much memory it takes, and whether that fits. `placement.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mesh.errors import ConfigError, DoesNotFit
from mesh.protocol.documents import problem
from mesh.settings.schema import LoadBalancing
from mesh.types import LayerRange

__all__ = ["Node", "PlacedRange", "PlacedShard", "Placement", "Remedy", "Strategy"]

_MOST_BYTES = 16 * 1024 * 1024
Strategy = Literal["even", "explicit", "weighted"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Node(_Strict):
    """A machine that can hold shards. A node of `speed` 1.0 reads its memory at `plan.BASE_BANDWIDTH`. `bandwidth` and `latency_s` are
    of the link that it sends on."""

    name: str = Field(min_length=1)
    memory_bytes: int = Field(gt=0)  # that shards may use
    speed: float = Field(default=1.0, gt=0)
    bandwidth: float | None = Field(default=None, gt=0)  # bytes/s; None: never the limit
    latency_s: float = Field(default=0.0, ge=0)


class PlacedShard(_Strict):
    """One shard process. It serves [layers_start, layers_end) and holds [held_start, held_end), overlap included.

    `embed` and `head` say whether it holds those blocks. `step_s` is the estimated time of one decode step of its stage.
    """

    shard_id: int = Field(ge=1)
    node: str
    replica: int = Field(ge=0)  # 0: the first of its range
    layers_start: int
    layers_end: int
    held_start: int
    held_end: int
    embed: bool
    head: bool
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    process_bytes: int
    total_bytes: int
    memory_bytes: int  # of its node
    fits: bool  # everything placed on its node fits there
    step_s: float

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layers_start, self.layers_end)

    @property
    def held(self) -> LayerRange:
        return LayerRange(self.held_start, self.held_end)


class PlacedRange(_Strict):
    """A layer range and its replicas."""

    layers_start: int
    layers_end: int
    shards: tuple[PlacedShard, ...] = Field(min_length=1)


class Remedy(_Strict):
    """One change that makes a plan fit; `text` describes it to people. It was checked by planning with it. Unset fields: unchanged."""

    text: str
    strategy: Strategy | None = None
    shards_count: int | None = None
    nodes_count: int | None = None  # in all; added nodes are like the one with the most memory
    quantization_bits: int | None = None
    max_sequence_length: int | None = None
    batch_size: int | None = None
    overlap_layers: int | None = None
    memory_bytes: int | None = None  # of each node, at least


class Placement(_Strict):
    """A whole plan. A valid one covers every layer once, in order, with each range on `replication_factor` distinct nodes."""

    format: Literal[1] = 1
    model: str
    model_hash: str | None = None  # None: planned before import, or for another number of bits
    total_layers: int = Field(ge=1)
    total_parameters: int
    weights_bytes: int  # all weights, once
    quantization_bits: int
    strategy: Strategy
    replication_factor: int = Field(ge=1)
    overlap_layers: int = Field(ge=0)
    load_balancing_strategy: LoadBalancing = "least_loaded"
    batch_size: int  # rows
    max_sequence_length: int  # tokens a row
    enable_kv_cache: bool
    chunk: int  # tokens of a prefill step
    nodes: tuple[Node, ...]
    ranges: tuple[PlacedRange, ...] = Field(min_length=1)
    spare_nodes: tuple[str, ...] = ()  # nodes without shards
    fits: bool
    problem: str | None = None  # why it does not fit
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()  # what was assumed or estimated

    @model_validator(mode="after")
    def _check(self) -> Placement:
        names = {node.name for node in self.nodes}
        if len(names) != len(self.nodes):
            raise ValueError("two nodes have the same name")
        at = 0
        for placed in self.ranges:
            if placed.layers_start != at or placed.layers_end <= at:
                raise ValueError(f"ranges: layer {at} must start the next range, which is {placed.layers_start}-{placed.layers_end}")
            at = placed.layers_end
            on = [shard.node for shard in placed.shards]
            if len(on) != self.replication_factor or len(set(on)) != len(on) or not set(on) <= names:
                raise ValueError(f"range {placed.layers_start}-{at} must be on {self.replication_factor} distinct nodes, not on {on}")
        if at != self.total_layers:
            raise ValueError(f"ranges end at layer {at} of {self.total_layers}")
        if len({shard.shard_id for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same shard_id")
        return self

    @property
    def shards(self) -> tuple[PlacedShard, ...]:
        """Every shard, by shard_id."""
        return tuple(sorted((shard for placed in self.ranges for shard in placed.shards), key=lambda shard: shard.shard_id))

    def numbered_from(self, first: int) -> Placement:
        """The same with shard_ids from `first` on: no two shards of a mesh have one id, whatever they serve."""
        if first == 1:
            return self

        def renumbered(placed: PlacedRange) -> PlacedRange:
            shards = tuple(shard.model_copy(update={"shard_id": shard.shard_id + first - 1}) for shard in placed.shards)
            return placed.model_copy(update={"shards": shards})

        return self.model_copy(update={"ranges": tuple(map(renumbered, self.ranges))})

    def require_fit(self) -> Placement:
        """This placement. DoesNotFit, with what is lacking and what would fit, if it does not fit."""
        if self.fits:
            return self
        short = max((shard for shard in self.shards if not shard.fits), key=lambda shard: shard.total_bytes / shard.memory_bytes)
        needed = sum(shard.total_bytes for shard in self.shards if shard.node == short.node)
        ways = "; or ".join(remedy.text for remedy in self.remedies)
        message = f"{self.problem}. What would fit: {ways}" if ways else str(self.problem)
        raise DoesNotFit(message, needed_bytes=needed, allowed_bytes=short.memory_bytes)

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Read `placement.json`. ConfigError: it is missing or wrong."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ConfigError(f"{path} has more than {_MOST_BYTES:,} bytes, which no placement needs")
            return cls.model_validate_json(data)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: make it with `mesh shard-model --config distributed_config.json`") from None
        except ValidationError as error:
            key, _, said = problem(error)
            raise ConfigError(f"{path}: {key or 'the document'}: {said}; make it again with `mesh shard-model`") from None
