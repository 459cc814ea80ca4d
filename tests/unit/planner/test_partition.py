"""The partition against all partitions, on cases small enough to list them."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.planner.partition import partition


def _brute_force(layers: int, kinds: list[int], costs: dict[tuple[int, int, int], float], counts: range) -> float:
    """The least dearest stage over every choice and order of nodes and every set of cuts; infinite where there is none."""
    best = math.inf
    for count in counts:
        for order in set(itertools.permutations(kinds, count)):
            for cuts in itertools.combinations(range(1, layers), count - 1):
                edges = (0, *cuts, layers)
                best = min(best, max(costs[kind, a, b] for kind, a, b in zip(order, edges, edges[1:], strict=False)))
    return best


@st.composite
def _cases(draw: st.DrawFn) -> tuple[int, list[int], dict[tuple[int, int, int], float], int | None]:
    layers = draw(st.integers(1, 6))
    kinds = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    cost = st.one_of(st.integers(0, 12).map(float), st.just(math.inf))  # arbitrary: neither additive nor monotonic
    costs = {(kind, a, b): draw(cost) for kind in range(3) for a in range(layers) for b in range(a + 1, layers + 1)}
    return layers, kinds, costs, draw(st.none() | st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_the_dearest_stage_is_as_cheap_as_any_partition_makes_it(
    case: tuple[int, list[int], dict[tuple[int, int, int], float], int | None],
) -> None:
    layers, kinds, costs, stages = case
    most = min(len(kinds), layers)
    counts = range(1, most + 1) if stages is None else range(stages, stages + 1) if stages <= most else range(0)
    expected = _brute_force(layers, kinds, costs, counts)
    found = partition(layers, kinds, lambda kind, a, b: costs[kind, a, b], stages)
    if math.isinf(expected):
        assert found is None
        return
    assert found is not None
    assert max(costs[kinds[node], a, b] for node, a, b in found) == expected
    assert [a for _, a, _ in found] + [layers] == [0] + [b for _, _, b in found]
    assert len({node for node, _, _ in found}) == len(found)
    assert stages in (None, len(found))


def test_nodes_keep_their_order_where_another_is_no_better() -> None:
    found = partition(8, [0, 1, 0], lambda kind, a, b: (b - a) / (1 + kind))
    assert found is not None
    assert [node for node, _, _ in found] == [0, 1, 2]


def test_nodes_are_reordered_where_that_is_better() -> None:
    # the last layers are dear and only kind 1 is fast, but it comes first
    found = partition(4, [1, 0], lambda kind, a, b: ((b - a) + (10 if b == 4 else 0)) / (10 if kind else 1))
    assert found is not None
    assert [node for node, _, _ in found] == [1, 0]


def test_with_equal_dearest_stages_the_cut_is_even() -> None:
    found = partition(10, [0] * 4, lambda _kind, a, b: b - a, 4)
    assert found is not None
    assert sorted(b - a for _, a, b in found) == [2, 2, 3, 3]


def test_too_many_kinds_for_every_order_still_gives_the_best_cut_in_the_order_given() -> None:
    kinds = list(range(20))
    found = partition(40, kinds, lambda kind, a, b: (b - a) / (1 + kind % 3))
    assert found is not None
    # by weight 1, 2, 3, 1, 2, 3 ...: 39 in all for 40 layers, so some stage takes 2 layers a unit of speed and none more
    assert max((b - a) / (1 + kinds[node] % 3) for node, a, b in found) <= 2
    assert [node for node, _, _ in found] == sorted(node for node, _, _ in found)
