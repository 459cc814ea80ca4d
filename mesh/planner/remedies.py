"""The nearest changes with which a plan fits. Each one is planned before it is named, so every remedy that is named does fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from mesh.planner.placement import Node, Placement, Remedy
from mesh.planner.request import PlanRequest
from mesh.settings.units import GB, MB, format_bytes

__all__ = ["advise", "apply"]

_LOWER_BITS = (16, 8, 4)
_CONTEXT_STEP = 64

Fits = Callable[[Remedy], bool]


def advise(request: PlanRequest, placement: Placement, fits_request: Callable[[PlanRequest], bool]) -> tuple[Remedy, ...]:
    """Remedies for `placement`, which does not fit: of each kind of change the smallest one that suffices alone.

    If neither more shards nor fewer bits suffice alone, the two are combined: the smallest number of shards at the first lower number of
    bits that fits. More memory always suffices, and comes last.
    """

    def fits(remedy: Remedy) -> bool:
        return fits_request(apply(request, remedy))

    more = _fewest_shards(request, placement, fits)
    fewer = _first((Remedy(text=f"{bits}-bit weights", quantization_bits=bits) for bits in _bits_below(request)), fits)
    found = [*_by_weight(request, fits), *more, *fewer]
    if not more and not fewer:
        for bits in _bits_below(request):
            both = _fewest_shards(request, placement, fits, bits)
            if both:
                found += both
                break
    return (*found, *_shorter(request, fits), *_fewer_rows(request, fits), *_less_overlap(request, fits), *_larger_nodes(placement, fits))


def apply(request: PlanRequest, remedy: Remedy) -> PlanRequest:
    """`request` with the change that `remedy` describes."""
    nodes = request.nodes
    if remedy.memory_bytes is not None:
        least = remedy.memory_bytes
        nodes = tuple(node.model_copy(update={"memory_bytes": max(least, node.memory_bytes)}) for node in nodes)
    if remedy.nodes_count is not None:
        nodes = _grown(nodes, remedy.nodes_count)
    changed = replace(request, nodes=nodes)
    if remedy.strategy == "weighted":
        changed = replace(changed, strategy="weighted", ranges=None, shards_count=None)
    elif remedy.nodes_count is not None and request.strategy == "weighted":
        changed = replace(changed, shards_count=None)
    elif remedy.shards_count is not None:
        changed = replace(changed, strategy="even", ranges=None, shards_count=remedy.shards_count)
    if remedy.quantization_bits is not None:
        changed = replace(changed, model=request.model.with_bits(remedy.quantization_bits))
    if remedy.max_sequence_length is not None:
        changed = replace(changed, max_sequence_length=remedy.max_sequence_length)
    if remedy.batch_size is not None:
        changed = replace(changed, batch_size=remedy.batch_size)
    if remedy.overlap_layers is not None:
        changed = replace(changed, overlap_layers=remedy.overlap_layers)
    return changed


def _by_weight(request: PlanRequest, fits: Fits) -> list[Remedy]:
    if request.strategy == "weighted" or len({node.memory_bytes for node in request.nodes}) == 1:
        return []
    return _first([Remedy(text="ranges weighted by each node's memory (strategy weighted)", strategy="weighted")], fits)


def _fewest_shards(request: PlanRequest, placement: Placement, fits: Fits, bits: int | None = None) -> list[Remedy]:
    replicas = request.replication_factor
    largest = format_bytes(max(node.memory_bytes for node in request.nodes))
    at = f" with {bits}-bit weights" if bits else ""
    present = len(request.nodes)
    alike = len({node.memory_bytes for node in request.nodes}) == 1

    if request.strategy == "weighted":
        most = request.model.layer_count * replicas

        def grown(count: int) -> Remedy:
            text = f"{count} nodes of {largest}" if alike else f"{count - present} more of {largest} ({count} nodes in all)"
            return Remedy(text=text + at, nodes_count=count, quantization_bits=bits)

        # with any number of stages allowed, a further node never hurts: double the step until it fits, then bisect
        below, step = present, 1
        while below < most and not fits(grown(min(below + step, most))):
            below, step = min(below + step, most), 2 * step
        if below >= most:
            return []
        counts = range(below + 1, min(below + step, most) + 1)
        return [grown(counts[bisect_left(counts, True, hi=len(counts) - 1, key=lambda count: fits(grown(count)))])]

    def even(count: int) -> Remedy:
        total = count * replicas
        each = f"{count} shards" if replicas == 1 else f"{total} shards ({count} layer ranges x {replicas} replicas)"
        text = f"{each} of {largest}" if alike else f"{each}, those added of {largest}"
        return Remedy(text=text + at, shards_count=count, nodes_count=max(total, present), quantization_bits=bits)

    return _first((even(count) for count in range(len(placement.ranges) + 1, request.model.layer_count + 1)), fits)


def _shorter(request: PlanRequest, fits: Fits) -> list[Remedy]:
    def at(steps: int) -> Remedy:
        tokens = steps * _CONTEXT_STEP
        return Remedy(text=f"a context of {tokens:,} tokens", max_sequence_length=tokens)

    return _largest(at, (request.context - 1) // _CONTEXT_STEP, fits)


def _fewer_rows(request: PlanRequest, fits: Fits) -> list[Remedy]:
    return _largest(
        lambda rows: Remedy(text=f"{rows} {'row' if rows == 1 else 'rows'} (batch_size)", batch_size=rows), request.batch_size - 1, fits
    )


def _less_overlap(request: PlanRequest, fits: Fits) -> list[Remedy]:
    # a shard cannot hold more than all layers: no larger overlap differs from that
    most = min(request.overlap_layers, request.model.layer_count + 1) - 1
    remedies = (Remedy(text=f"overlap_layers {overlap}", overlap_layers=overlap) for overlap in range(most, -1, -1))
    return _first(remedies, fits)


def _larger_nodes(placement: Placement, fits: Fits) -> list[Remedy]:
    used: dict[str, int] = {}
    for shard in placement.shards:
        used[shard.node] = used.get(shard.node, 0) + shard.total_bytes
    short = {node.name for node in placement.nodes if used.get(node.name, 0) > node.memory_bytes}
    largest = max(used[name] for name in short)
    unit = GB // 10 if largest >= GB else MB // 10 if largest >= MB else 1
    needed = math.ceil(largest / unit) * unit
    return _first([Remedy(text=f"nodes of {format_bytes(needed, 4)}", memory_bytes=needed)], fits)


def _bits_below(request: PlanRequest) -> Iterator[int]:
    return (bits for bits in _LOWER_BITS if bits < request.model.bits)


def _first(remedies: Iterable[Remedy], fits: Fits) -> list[Remedy]:
    return next(([remedy] for remedy in remedies if fits(remedy)), [])


def _largest(at: Callable[[int], Remedy], most: int, fits: Fits) -> list[Remedy]:
    """The largest of at(1) ... at(most) that fits. Anything smaller than one that fits does too."""
    index = bisect_left(range(most), True, key=lambda i: fits(at(most - i)))
    return [at(most - index)] if index < most else []


def _grown(nodes: tuple[Node, ...], count: int) -> tuple[Node, ...]:
    model = max(nodes, key=lambda node: node.memory_bytes)
    names = {node.name for node in nodes}
    fresh = (name for i in range(len(nodes) + count + 1) if (name := f"node-{i + 1}") not in names)
    return (*nodes, *(model.model_copy(update={"name": next(fresh)}) for _ in range(count - len(nodes))))
