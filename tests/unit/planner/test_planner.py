"""Placements: what they cover, what they promise, and what they advise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mesh.errors import BadLayerRange, ConfigError, DoesNotFit, PlanError
from mesh.model.memory import ModelShape, predict
from mesh.planner.placement import Node, Placement, Strategy
from mesh.planner.plan import fits, place, plan, ranges_of
from mesh.planner.remedies import apply
from mesh.planner.request import PlanRequest, same_nodes
from mesh.planner.together import plan_together
from mesh.settings.units import GB
from mesh.types import LayerRange, even_ranges

GPT3 = ModelShape.hypothetical(name="GPT-3-175B", parameters=175 * 10**9, layers=96, vocab_size=50257, context_length=2048)

PROCESS = 360 * 10**6
"""About what a shard takes beside its model."""


def _small(layers: int = 6, context: int = 512) -> ModelShape:
    return ModelShape.hypothetical(
        name="small", parameters=layers * 3_000_000 + 2_000_000, layers=layers, vocab_size=2000, context_length=context
    )


@st.composite
def _requests(draw: st.DrawFn) -> PlanRequest:
    layers = draw(st.integers(1, 7))
    replicas = draw(st.integers(1, 2))
    nodes = tuple(
        Node(
            name=f"n{i}",
            memory_bytes=PROCESS * draw(st.integers(1, 2)) + draw(st.integers(4, 70)) * 10**6,
            speed=draw(st.sampled_from([1.0, 2.0])),
            bandwidth=draw(st.sampled_from([None, 1e6])),
        )
        for i in range(draw(st.integers(replicas, 5)))
    )
    strategy: Strategy = draw(st.sampled_from(get_args(Strategy)))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1)))) if layers > 1 else []
    ranges = tuple(LayerRange(a, b) for a, b in itertools.pairwise([0, *cuts, layers]))
    return PlanRequest(
        model=_small(layers),
        nodes=nodes,
        strategy=strategy,
        ranges=ranges if strategy == "explicit" else None,
        shards_count=draw(st.none() | st.integers(1, layers)) if strategy == "even" else None,
        replication_factor=replicas,
        overlap_layers=draw(st.integers(0, 3)),
        batch_size=draw(st.integers(1, 8)),
        max_sequence_length=draw(st.integers(1, 512)),
        enable_kv_cache=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_requests())
def test_every_placement_covers_the_model_and_tells_the_truth_about_memory(request: PlanRequest) -> None:
    placement = place(request)
    assert [layer for placed in placement.ranges for layer in range(placed.layers_start, placed.layers_end)] == list(
        range(request.model.layer_count)
    )
    used: dict[str, int] = {}
    for shard in placement.shards:
        need = predict(
            request.model,
            shard.held,
            embed=shard.embed,
            head=shard.head,
            rows=request.batch_size,
            context=request.context,
            chunk=request.chunk,
            kv_cache=request.enable_kv_cache,
        )
        assert shard.total_bytes == need.total_bytes
        assert shard.embed == (shard.held_start == 0) and shard.head == (shard.held_end == request.model.layer_count)
        assert shard.held_start == max(0, shard.layers_start - request.overlap_layers)
        assert shard.held_end == min(request.model.layer_count, shard.layers_end + request.overlap_layers)
        used[shard.node] = used.get(shard.node, 0) + need.total_bytes
    assert all(len({shard.node for shard in placed.shards}) == request.replication_factor for placed in placement.ranges)
    assert fits(request) == placement.fits
    assert placement.fits == all(used.get(node.name, 0) <= node.memory_bytes for node in request.nodes)
    assert set(placement.spare_nodes) == {node.name for node in request.nodes} - set(used)
    assert Placement.model_validate_json(placement.to_json()) == placement


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_requests())
def test_whatever_is_advised_fits(request: PlanRequest) -> None:
    placement = plan(request)
    if placement.fits:
        assert placement.require_fit() is placement and not placement.remedies and placement.problem is None
        return
    assert placement.remedies
    for remedy in placement.remedies:
        assert place(apply(request, remedy)).fits, remedy.text
    with pytest.raises(DoesNotFit) as caught:
        placement.require_fit()
    assert caught.value.needed_bytes > caught.value.allowed_bytes
    assert "\n" not in str(caught.value) and placement.remedies[0].text in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_requests())
def test_no_even_or_explicit_cut_of_the_same_nodes_beats_the_weighted_one(request: PlanRequest) -> None:
    """Over one shard a node, which is what weighted places."""
    weighted = place(replace(request, strategy="weighted", ranges=None, shards_count=None))
    other = place(request)
    alone = len(other.shards) == len({shard.node for shard in other.shards})
    if request.replication_factor == 1 and alone and other.fits:
        assert weighted.fits
        assert max(s.step_s for s in weighted.shards) <= max(s.step_s for s in other.shards) * (1 + 1e-9)


@pytest.mark.parametrize("replicas", [1, 2])
def test_weighted_is_the_best_of_all_cuts_and_orders(replicas: int) -> None:
    model = _small(5)
    nodes = tuple(
        Node(name=f"n{i}-{r}", memory_bytes=PROCESS + memory * 10**6, speed=speed)
        for i, (memory, speed) in enumerate([(40, 1), (15, 3), (25, 2)])
        for r in range(replicas)
    )
    request = PlanRequest(model=model, nodes=nodes, strategy="weighted", replication_factor=replicas, max_sequence_length=64)
    best = math.inf
    primaries = nodes[::replicas]
    for count in (1, 2, 3):
        for order in itertools.permutations(primaries, count):
            for cuts in itertools.combinations(range(1, 5), count - 1):
                edges = (0, *cuts, 5)
                ranges = [LayerRange(a, b) for a, b in itertools.pairwise(edges)]
                needs = [predict(model, cut, embed=cut.start == 0, head=cut.stop == 5, rows=1, context=64).total_bytes for cut in ranges]
                if all(need <= node.memory_bytes for need, node in zip(needs, order, strict=True)):
                    read = [
                        model.layer_weights[cut.stop]
                        - model.layer_weights[cut.start]
                        + 64 * (model.cache_per_token[cut.stop] - model.cache_per_token[cut.start])
                        + (model.head.weights_bytes if cut.stop == 5 else 0)
                        for cut in ranges
                    ]
                    best = min(best, max(value / (20e9 * node.speed) for value, node in zip(read, order, strict=True)))
    placement = place(request)
    assert placement.fits
    assert max(shard.step_s for shard in placement.shards) == pytest.approx(best)


def test_the_guides_example_does_not_fit_and_says_what_would() -> None:
    request = PlanRequest(model=GPT3, nodes=same_nodes(8, 32 * GB), shards_count=8)
    with pytest.raises(DoesNotFit) as caught:
        plan(request).require_fit()
    message = str(caught.value)
    for part in (
        "350 GB of weights at 16 bits over 8 shards is 43.75 GB a shard before any KV cache",
        "13 shards of 32 GB",
        "8-bit weights",
    ):
        assert part in message
    assert caught.value.allowed_bytes == 32 * GB < 43_750_000_000 < caught.value.needed_bytes


@pytest.mark.parametrize("overlap", [0, 1])
def test_eight_bits_fit_where_sixteen_do_not(overlap: int) -> None:
    assert place(PlanRequest(model=GPT3.with_bits(8), nodes=same_nodes(8, 32 * GB), overlap_layers=overlap)).fits


def test_more_shards_are_advised_sparingly() -> None:
    fewer, advised = (place(PlanRequest(model=GPT3, nodes=same_nodes(count, 32 * GB))) for count in (12, 13))
    assert advised.fits and not fewer.fits


def test_a_long_context_is_shortened_to_the_most_that_fits() -> None:
    request = PlanRequest(model=_small(6, context=65536), nodes=same_nodes(2, PROCESS + 100 * 10**6), batch_size=4)
    remedies = plan(request).remedies
    context = next(remedy.max_sequence_length for remedy in remedies if remedy.max_sequence_length)
    assert context % 64 == 0
    assert not place(replace(request, max_sequence_length=context + 64)).fits


def test_where_nothing_alone_suffices_bits_and_shards_are_advised_together() -> None:
    # one layer at 16 bits is 3.6 GB, and first and last take 4.9 GB: no number of shards helps
    remedies = plan(PlanRequest(model=GPT3, nodes=same_nodes(8, 4 * GB))).remedies
    both = [remedy for remedy in remedies if remedy.quantization_bits and remedy.shards_count]
    assert len(both) == 1


def test_replicas_come_after_the_primaries_and_need_their_own_nodes() -> None:
    placement = place(PlanRequest(model=_small(6), nodes=same_nodes(6, GB), shards_count=3, replication_factor=2))
    assert [(shard.shard_id, shard.replica, str(shard.layers), shard.node) for shard in placement.shards] == [
        (1, 0, "0-2", "node-1"),
        (2, 0, "2-4", "node-2"),
        (3, 0, "4-6", "node-3"),
        (4, 1, "0-2", "node-4"),
        (5, 1, "2-4", "node-5"),
        (6, 1, "4-6", "node-6"),
    ]


def test_fewer_nodes_than_shards_hold_several_each() -> None:
    placement = place(PlanRequest(model=_small(6), nodes=same_nodes(3, GB), shards_count=3, replication_factor=2))
    assert placement.fits and {shard.node for shard in placement.shards} == {"node-1", "node-2", "node-3"}


def test_the_largest_need_goes_to_the_largest_node_where_the_order_given_does_not_fit() -> None:
    model = _small(6)
    small, large = (
        predict(model, LayerRange(a, b), embed=a == 0, head=b == 6, rows=1, context=512).total_bytes for a, b in ((0, 1), (1, 6))
    )
    nodes = (Node(name="large", memory_bytes=large), Node(name="small", memory_bytes=small))
    placement = place(PlanRequest(model=model, nodes=nodes, strategy="explicit", ranges=(LayerRange(0, 1), LayerRange(1, 6))))
    assert placement.fits and [shard.node for shard in placement.shards] == ["small", "large"]


def test_overlap_that_reaches_an_end_holds_its_block() -> None:
    shards = place(PlanRequest(model=_small(6), nodes=same_nodes(3, GB), overlap_layers=2)).shards
    assert [(shard.embed, str(shard.held), shard.head) for shard in shards] == [
        (True, "0-4", False),
        (True, "0-6", True),
        (False, "2-6", True),
    ]


def test_a_node_that_helps_nothing_stays_spare() -> None:
    nodes = (*same_nodes(2, GB), Node(name="tiny", memory_bytes=1000))
    placement = place(PlanRequest(model=_small(6), nodes=nodes, strategy="weighted"))
    assert placement.fits and placement.spare_nodes == ("tiny",)


@given(st.integers(1, 200), st.data())
def test_even_ranges_differ_by_at_most_one(layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers))
    ranges = even_ranges(layers, count)
    lengths = [len(cut) for cut in ranges]
    assert len(ranges) == count and sum(lengths) == layers and max(lengths) - min(lengths) <= 1
    assert lengths[0] == min(lengths) or layers % count == 0 or count == 1 or lengths.count(max(lengths)) == count - 1


def test_layers_per_shard_leave_a_shorter_last_range() -> None:
    assert [str(cut) for cut in ranges_of(10, 4)] == ["0-4", "4-8", "8-10"]
    with pytest.raises(BadLayerRange):
        ranges_of(10, 0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"shards_count": 7}, BadLayerRange, "6 layers"),
        ({"shards_count": 0}, BadLayerRange, "1 to 6"),
        ({"replication_factor": 4}, PlanError, "4 distinct nodes"),
        ({"replication_factor": 0}, PlanError, "at least 1"),
        ({"overlap_layers": -1}, PlanError, "at least 0"),
        ({"max_sequence_length": 513}, PlanError, "512 positions"),
        ({"max_sequence_length": 0}, PlanError, "512 positions"),
        ({"strategy": "explicit"}, PlanError, "needs them"),
        ({"ranges": (LayerRange(0, 6),)}, PlanError, "explicit"),
        ({"strategy": "explicit", "ranges": (LayerRange(0, 3), LayerRange(2, 6))}, BadLayerRange, "2-6 should start at 3"),
        ({"strategy": "explicit", "ranges": (LayerRange(0, 3), LayerRange(3, 7))}, BadLayerRange, "not beyond 6"),
        ({"strategy": "explicit", "ranges": (LayerRange(0, 3),)}, BadLayerRange, "add 3-6"),
        ({"strategy": "explicit", "ranges": (LayerRange(0, 6),), "shards_count": 2}, PlanError, "make them agree"),
        ({"strategy": "weighted", "shards_count": 4}, PlanError, "needs 4 nodes"),
        ({"nodes": (Node(name="a", memory_bytes=1),) * 2}, PlanError, "same name"),
        ({"nodes": ()}, PlanError, "there are 0"),
    ],
)
def test_a_request_that_cannot_be_is_refused(change: dict[str, object], error: type[PlanError], says: str) -> None:
    with pytest.raises(error, match=says):
        replace(PlanRequest(model=_small(6), nodes=same_nodes(3, GB)), **change)  # type: ignore[arg-type]


def test_a_placement_file_with_a_gap_is_refused(tmp_path: Path) -> None:
    placement = place(PlanRequest(model=_small(6), nodes=same_nodes(3, GB)))
    with pytest.raises(ValidationError):
        Placement.model_validate({**placement.model_dump(), "ranges": placement.model_dump()["ranges"][:2]})
    path = tmp_path / "placement.json"
    path.write_bytes(placement.to_json().replace(b'"layers_end": 2', b'"layers_end": 3'))
    with pytest.raises(ConfigError, match="layer 3 must start the next range"):
        Placement.load(path)
    path.write_bytes(placement.to_json())
    assert Placement.load(path) == placement
    with pytest.raises(ConfigError, match="mesh shard-model"):
        Placement.load(tmp_path / "none.json")


def test_several_models_are_placed_on_what_the_others_leave() -> None:
    nodes = tuple(Node(name=name, memory_bytes=GB) for name in ("a", "b"))
    first, second = plan_together([PlanRequest(model=_small(), nodes=nodes, shards_count=1)] * 2)
    alone = plan(PlanRequest(model=_small(), nodes=nodes, shards_count=1))
    assert first == alone and first.fits and second.fits
    assert [shard.shard_id for shard in (*first.shards, *second.shards)] == [1, 2], "no two shards of a mesh have one id"
    (one,), (other,) = first.shards, second.shards
    assert one.node != other.node, "the second takes the node with the most memory left"
    assert {node.name: node.memory_bytes for node in second.nodes} == {one.node: GB - one.total_bytes, other.node: GB}
    assert f"small take {one.node}" in second.notes[-1]


def test_models_that_leave_no_room_are_named() -> None:
    small = PlanRequest(model=_small(), nodes=(Node(name="a", memory_bytes=GB),), shards_count=1)
    placed = plan_together([small, small])
    assert placed[0].fits and placed[1].fits
    third = plan_together([small, small, small])[2]
    assert not third.fits and third.problem is not None and "small does not fit" in third.problem
    with pytest.raises(DoesNotFit, match="and leave small 0 of 1 nodes"):
        plan_together([small] * 4)
