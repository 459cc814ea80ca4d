"""Place the layers of a model on nodes. Pure: a model's shape and a list of nodes in, a Placement out.

    even      ranges of equal length; where that is not possible, the middle ones are longer (mesh.types.even_ranges)
    explicit  the given ranges
    weighted  the ranges that make the slowest stage as fast as possible, given each node's memory, speed and link: exact, see
              mesh/planner/partition.py. Replicas are on alike nodes, and a stage is as slow as its slowest replica

Each range is served by `replication_factor` shards on distinct nodes. With `overlap_layers` k a shard also holds weights and cache of
the k layers before and the k layers after its range, so that it can move its range without loading. If that reaches an end of the
model, it holds the embedding or the head as well.

The time of a stage is an estimate for comparisons: the bytes that a decode step reads (weights of the range, a full KV cache) divided by
BASE_BANDWIDTH * speed, plus the time to send the hidden state of every row to the next stage over the node's link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mesh.errors import BadLayerRange
from mesh.model.memory import MemoryNeed, predict
from mesh.planner.partition import Stage, partition
from mesh.planner.placement import Node, PlacedRange, PlacedShard, Placement
from mesh.planner.remedies import advise
from mesh.planner.request import PlanRequest
from mesh.settings.defaults import DEFAULT_ROWS
from mesh.settings.units import format_bytes
from mesh.types import LayerRange, even_ranges

__all__ = ["BASE_BANDWIDTH", "fits", "place", "plan", "ranges_of", "with_most_rows"]

BASE_BANDWIDTH = 20e9
"""Bytes/s that a node of speed 1.0 reads from memory: an ordinary VM with a few cores."""

_TOKEN_BYTES = 4  # what the last stage sends for a row


def plan(request: PlanRequest) -> Placement:
    """The placement, whether it fits or not. If not, its remedies are the nearest changes that would; see Placement.require_fit."""
    placement = place(request)
    return placement if placement.fits else placement.model_copy(update={"remedies": advise(request, placement, fits)})


def place(request: PlanRequest) -> Placement:
    """The placement without remedies."""
    book = _Book(request)
    if request.strategy == "weighted":
        ranges, nodes = _Weighted(request, book).stages()
    else:
        ranges = request.ranges or tuple(even_ranges(request.model.layer_count, request.shards_count or _default_count(request)))
        nodes = _assign([book.need(cut).total_bytes for cut in ranges], request.nodes, request.replication_factor)
    return _placement(request, book, ranges, nodes)


def fits(request: PlanRequest) -> bool:
    """The same as place(request).fits, with less work."""
    return _Weighted(request, _Book(request)).possible() if request.strategy == "weighted" else place(request).fits


def with_most_rows(request: PlanRequest) -> PlanRequest:
    """`request` with DEFAULT_ROWS rows, or as many of them as fit; with one if none do."""
    rows = DEFAULT_ROWS
    while rows > 1 and not fits(replace(request, batch_size=rows)):
        rows //= 2
    return replace(request, batch_size=rows)


def ranges_of(layers: int, layers_per_shard: int) -> tuple[LayerRange, ...]:
    """Ranges of `layers_per_shard` layers each; the last one is shorter if they do not divide evenly."""
    if layers_per_shard < 1:
        raise BadLayerRange(f"layers_per_shard is {layers_per_shard}: it must be at least 1")
    return tuple(LayerRange(a, min(a + layers_per_shard, layers)) for a in range(0, layers, layers_per_shard))


@dataclass(frozen=True)
class _Book:
    """Memory and times of ranges, each computed once."""

    request: PlanRequest
    _needs: dict[LayerRange, MemoryNeed] = field(default_factory=dict)

    def held(self, cut: LayerRange) -> LayerRange:
        overlap = self.request.overlap_layers
        return LayerRange(max(0, cut.start - overlap), min(self.request.model.layer_count, cut.stop + overlap))

    def need(self, cut: LayerRange) -> MemoryNeed:
        held = self.held(cut)
        if held not in self._needs:
            request = self.request
            self._needs[held] = predict(
                request.model,
                held,
                embed=held.start == 0,
                head=held.stop == request.model.layer_count,
                rows=request.batch_size,
                context=request.context,
                chunk=request.chunk,
                kv_cache=request.enable_kv_cache,
            )
        return self._needs[held]

    def step_s(self, cut: LayerRange, node: Node) -> float:
        model, request = self.request.model, self.request
        last = cut.stop == model.layer_count
        read = model.layer_weights[cut.stop] - model.layer_weights[cut.start] + (model.head.weights_bytes if last else 0)
        cached = model.cache_per_token[cut.stop] - model.cache_per_token[cut.start]
        read += cached * request.batch_size * request.context
        sent = request.batch_size * (_TOKEN_BYTES if last else model.hidden_size * model.compute_itemsize)
        link = node.latency_s + (sent / node.bandwidth if node.bandwidth else 0.0)
        return read / (BASE_BANDWIDTH * node.speed) + link


class _Weighted:
    """The weighted strategy: groups of alike nodes, one for each stage; equal groups are one kind."""

    def __init__(self, request: PlanRequest, book: _Book) -> None:
        self.request, self.book = request, book
        self.groups = _groups(request.nodes, request.replication_factor)
        members = [[request.nodes[i] for i in group] for group in self.groups]
        traits = [[(node.memory_bytes, node.speed, node.bandwidth, node.latency_s) for node in group] for group in members]
        distinct = [i for i, group in enumerate(traits) if traits.index(group) == i]
        self.kinds = [distinct.index(traits.index(group)) for group in traits]
        self.members = [members[i] for i in distinct]  # of each kind
        self.memory = [min(node.memory_bytes for node in group) for group in self.members]
        self.totals: dict[tuple[int, int], int] = {}  # bytes of each range, which every kind asks for

    def stages(self) -> tuple[tuple[LayerRange, ...], list[list[int]]]:
        """The ranges, and the nodes of each. If nothing fits, those whose nodes lack the least memory in proportion."""
        stages = self._cut(self._slowest) or self._cut(self._fullness)
        assert stages is not None  # `_fullness` forbids no cut, and there are no more stages than groups
        return tuple(LayerRange(a, b) for _, a, b in stages), [self.groups[i] for i, _, _ in stages]

    def possible(self) -> bool:
        return self._cut(lambda kind, start, stop: 0.0 if self._fullness(kind, start, stop) <= 1 else math.inf) is not None

    def _cut(self, cost: Callable[[int, int, int], float]) -> list[Stage] | None:
        return partition(self.request.model.layer_count, self.kinds, cost, self.request.shards_count)

    def _slowest(self, kind: int, start: int, stop: int) -> float:
        if self._fullness(kind, start, stop) > 1:
            return math.inf
        return max(self.book.step_s(LayerRange(start, stop), node) for node in self.members[kind])

    def _fullness(self, kind: int, start: int, stop: int) -> float:
        total = self.totals.get((start, stop))
        if total is None:
            total = self.totals[start, stop] = self.book.need(LayerRange(start, stop)).total_bytes
        return total / self.memory[kind]


def _groups(nodes: Sequence[Node], replicas: int) -> list[list[int]]:
    """Groups of `replicas` alike nodes, in the order of their first ones. Nodes that are left over are in no group."""
    if replicas == 1:
        return [[i] for i in range(len(nodes))]
    by_size = sorted(range(len(nodes)), key=lambda i: (-nodes[i].memory_bytes, -nodes[i].speed, i))
    return sorted(sorted(by_size[i : i + replicas]) for i in range(0, len(nodes) - replicas + 1, replicas))


def _default_count(request: PlanRequest) -> int:
    return max(1, min(len(request.nodes) // request.replication_factor, request.model.layer_count))


def _assign(needs: Sequence[int], nodes: Sequence[Node], replicas: int) -> list[list[int]]:
    """The nodes of each range: in the given order, or, if only that fits, the range with the largest need to the node with the most free
    memory.

    One shard for each node if there are enough nodes (then it fits if anything does); several otherwise.
    """
    count, total = len(needs), len(nodes)
    alone = total >= count * replicas
    simple = [[r * count + i if alone else (i + r) % total for r in range(replicas)] for i in range(count)]
    free = [node.memory_bytes for node in nodes]
    for need, chosen in zip(needs, simple, strict=True):
        for i in chosen:
            free[i] -= need
    if min(free) >= 0:
        return simple
    free = [node.memory_bytes for node in nodes]
    busy = [False] * total
    result: list[list[int]] = [[] for _ in needs]
    for index in sorted(range(count), key=lambda i: -needs[i]):
        for _ in range(replicas):
            choices = [i for i in range(total) if i not in result[index] and not (alone and busy[i])]
            best = max(choices, key=lambda i: (free[i], -i))
            result[index].append(best)
            free[best] -= needs[index]
            busy[best] = True
    return result if min(free) >= 0 else simple


def _placement(request: PlanRequest, book: _Book, ranges: Sequence[LayerRange], nodes: Sequence[Sequence[int]]) -> Placement:
    model = request.model
    used = [0] * len(request.nodes)
    for cut, chosen in zip(ranges, nodes, strict=True):
        for i in chosen:
            used[i] += book.need(cut).total_bytes

    def shard(index: int, replica: int) -> PlacedShard:
        cut, node = ranges[index], request.nodes[nodes[index][replica]]
        need, held = book.need(cut), book.held(cut)
        return PlacedShard(
            shard_id=replica * len(ranges) + index + 1,
            node=node.name,
            replica=replica,
            layers_start=cut.start,
            layers_end=cut.stop,
            held_start=held.start,
            held_end=held.stop,
            embed=held.start == 0,
            head=held.stop == model.layer_count,
            weights_bytes=need.weights_bytes,
            cache_bytes=need.cache_bytes,
            workspace_bytes=need.workspace_bytes,
            process_bytes=need.process_bytes,
            total_bytes=need.total_bytes,
            memory_bytes=node.memory_bytes,
            fits=used[nodes[index][replica]] <= node.memory_bytes,
            step_s=book.step_s(cut, node),
        )

    placed = tuple(
        PlacedRange(layers_start=cut.start, layers_end=cut.stop, shards=tuple(shard(i, r) for r in range(request.replication_factor)))
        for i, cut in enumerate(ranges)
    )
    over = [i for i, node in enumerate(request.nodes) if used[i] > node.memory_bytes]
    return Placement(
        model=model.name,
        model_hash=model.model_hash,
        total_layers=model.layer_count,
        total_parameters=model.parameters,
        weights_bytes=model.weights_bytes,
        quantization_bits=model.bits,
        strategy=request.strategy,
        replication_factor=request.replication_factor,
        overlap_layers=request.overlap_layers,
        load_balancing_strategy=request.load_balancing_strategy,
        batch_size=request.batch_size,
        max_sequence_length=request.context,
        enable_kv_cache=request.enable_kv_cache,
        chunk=request.chunk,
        nodes=request.nodes,
        ranges=placed,
        spare_nodes=tuple(node.name for i, node in enumerate(request.nodes) if not used[i]),
        fits=not over,
        problem=_problem(request, placed, used, over) if over else None,
        notes=model.notes,
    )


def _problem(request: PlanRequest, ranges: Sequence[PlacedRange], used: Sequence[int], over: Sequence[int]) -> str:
    """Why it does not fit, as one sentence without a full stop."""
    model = request.model
    worst = max(over, key=lambda i: used[i] / request.nodes[i].memory_bytes)
    node = request.nodes[worst]
    held = [shard for placed in ranges for shard in placed.shards if shard.node == node.name]
    layers = ", ".join(f"{shard.layers}" for shard in held)
    overlap = f" and {request.overlap_layers} more on either side" if request.overlap_layers else ""
    sums = [sum(getattr(shard, part) for shard in held) for part in ("weights_bytes", "cache_bytes", "workspace_bytes", "process_bytes")]
    weights, cache, workspace, process = (format_bytes(value) for value in sums)
    average = format_bytes(model.weights_bytes / len(ranges), 4)
    return (
        f"{model.name} does not fit: {format_bytes(model.weights_bytes)} of weights at {model.bits} bits over {len(ranges)} "
        f"{'shard is' if len(ranges) == 1 else 'shards is'} {average} a shard before any KV cache; {node.name} has "
        f"{format_bytes(node.memory_bytes)} and layers {layers}{overlap} need {format_bytes(used[worst])} there "
        f"(weights {weights}, KV cache {cache}, workspace {workspace}, process {process})"
    )
