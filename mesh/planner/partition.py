"""Cut a line of layers into contiguous stages over unlike nodes so that the most expensive stage is as cheap as possible. Exact.

Equal nodes form a kind. Each kind has a cost for every stage [a, b); an infinite cost forbids the stage. The least possible bound T on
the costs is found by bisection over the costs that occur. For a given T, the prefixes [0, b) that some set of nodes can cover with
stages of cost <= T are the bits of an integer, so that a step of the search takes a few word operations. Nothing is assumed about the
costs.

There are two searches: with the nodes in the given order (each used or left out), and with the nodes in any order, where a state is how
many nodes of each kind are used. The second one is used if it is strictly better and its number of states is bounded; otherwise the
given order stays. Among the cuts with the least T, the one with the fewest stages wins, then the most even one (least sum of squared
costs).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import product

__all__ = ["Stage", "partition"]

Cost = Callable[[int, int, int], float]
"""cost(kind, start, stop) of a stage: any non-negative number, or math.inf where it is forbidden."""

Stage = tuple[int, int, int]
"""(position of the node in the sequence given, start, stop)"""

_MOST_STEPS = 500_000  # of the any-order search: states x kinds x layers; about a second
_CLEARLY = 1e-9  # relative: a smaller gain may be rounding, and is no reason to reorder the nodes


def partition(layers: int, kinds: Sequence[int], cost: Cost, stages: int | None = None) -> list[Stage] | None:
    """The stages in layer order, or None if no cut is allowed.

    `kinds[i]` is the kind of node i (0, 1, ...). `stages`: use exactly that many nodes; None: any number of them.
    """
    used = range(1, min(len(kinds), layers) + 1) if stages is None else range(stages, stages + 1)
    if used.stop > len(kinds) + 1 or used.stop > layers + 1 or used.stop <= 1:
        return None
    table = _Table(layers, max(kinds) + 1, cost)
    search: _Ordered | _AnyOrder
    found: tuple[float, list[int]] | None = None
    counts = [kinds.count(kind) for kind in range(max(kinds) + 1)]
    alike = sum(1 for count in counts if count) == 1
    if not alike:
        search = _Ordered(table, kinds, used)
        found = search.best()
    if alike or math.prod(count + 1 for count in counts) * len(counts) * layers <= _MOST_STEPS:
        search = _AnyOrder(table, counts, used)
        other = search.best()
        if other and (found is None or other[0] < found[0] * (1 - _CLEARLY)):
            free = [[i for i, kind in enumerate(kinds) if kind == wanted] for wanted in range(len(counts))]
            found = other[0], [free[kind].pop(0) for kind in other[1]]
    if found is None:
        return None
    bound, nodes = found
    return _even_out(table, bound, nodes, kinds)


class _Table:
    """Every cost, computed once; for a bound T, the allowed stops from each start as the bits of an integer."""

    def __init__(self, layers: int, kinds: int, cost: Cost) -> None:
        self.layers = layers
        self.goal = 1 << layers
        self.cost = [[[cost(kind, a, b) for b in range(a + 1, layers + 1)] for a in range(layers)] for kind in range(kinds)]
        self.bounds = sorted({value for rows in self.cost for row in rows for value in row if value < math.inf})
        self.allowed: list[list[int]] = []

    def set_bound(self, bound: float) -> None:
        self.allowed = [
            [sum(1 << (a + 1 + i) for i, value in enumerate(row) if value <= bound) for a, row in enumerate(rows)] for rows in self.cost
        ]

    def extend(self, prefixes: int, kind: int) -> int:
        """The prefixes reached from any of `prefixes` by one more stage on a node of `kind`."""
        reached, allowed = 0, self.allowed[kind]
        prefixes &= self.goal - 1
        while prefixes:
            lowest = prefixes & -prefixes
            reached |= allowed[lowest.bit_length() - 1]
            prefixes ^= lowest
        return reached

    def start_of(self, prefixes: int, kind: int, stop: int) -> int | None:
        """Some start among `prefixes` from which one stage on `kind` ends at `stop`."""
        return next((a for a in range(stop) if prefixes >> a & 1 and self.allowed[kind][a] >> stop & 1), None)


class _Search:
    def __init__(self, table: _Table) -> None:
        self.table = table

    def nodes(self) -> list[int] | None:
        """The nodes, in layer order, of a cut within the present bound; None if there is none."""
        raise NotImplementedError

    def best(self) -> tuple[float, list[int]] | None:
        """(least bound, its nodes)"""

        def feasible(bound: float) -> bool:
            self.table.set_bound(bound)
            return self.nodes() is not None

        bounds = self.table.bounds
        if not bounds or not feasible(bounds[-1]):
            return None
        index = bisect_left(bounds, True, hi=len(bounds) - 1, key=feasible)
        self.table.set_bound(bounds[index])
        nodes = self.nodes()
        assert nodes is not None
        return bounds[index], nodes


class _Ordered(_Search):
    """The nodes keep their order; nodes() returns their positions."""

    def __init__(self, table: _Table, kinds: Sequence[int], used: range) -> None:
        super().__init__(table)
        self.kinds = kinds
        self.used = used

    def nodes(self) -> list[int] | None:
        # reach[i][j]: prefixes that j of the first i nodes cover
        most = self.used.stop - 1
        reach = [[1] + [0] * most]
        for kind in self.kinds:
            last = reach[-1]
            reach.append([1] + [last[j] | self.table.extend(last[j - 1], kind) for j in range(1, most + 1)])
        count = next((j for j in self.used if reach[-1][j] & self.table.goal), None)
        if count is None:
            return None
        nodes: list[int] = []
        i, stop = len(self.kinds), self.table.layers
        while count:
            if not reach[i - 1][count] >> stop & 1:
                start = self.table.start_of(reach[i - 1][count - 1], self.kinds[i - 1], stop)
                assert start is not None
                nodes.append(i - 1)
                stop, count = start, count - 1
            i -= 1
        return nodes[::-1]


class _AnyOrder(_Search):
    """The nodes are in the best order; nodes() returns their kinds."""

    def __init__(self, table: _Table, counts: Sequence[int], used: range) -> None:
        super().__init__(table)
        states = product(*(range(count + 1) for count in counts))
        self.states = sorted((state for state in states if sum(state) < used.stop), key=sum)
        self.used = used

    def nodes(self) -> list[int] | None:
        reach: dict[tuple[int, ...], int] = {}
        for state in self.states:
            prefixes = 0 if any(state) else 1
            for kind, before in _predecessors(state):
                prefixes |= self.table.extend(reach[before], kind)
            reach[state] = prefixes
            if sum(state) in self.used and prefixes & self.table.goal:
                break
        else:
            return None
        nodes: list[int] = []
        stop = self.table.layers
        while any(state):
            for kind, before in _predecessors(state):
                start = self.table.start_of(reach[before], kind, stop)
                if start is not None:
                    nodes.append(kind)
                    state, stop = before, start
                    break
        return nodes[::-1]


def _predecessors(state: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    return [(kind, (*state[:kind], count - 1, *state[kind + 1 :])) for kind, count in enumerate(state) if count]


def _even_out(table: _Table, bound: float, nodes: list[int], kinds: Sequence[int]) -> list[Stage]:
    """Of all cuts over `nodes` in that order within `bound`, the one with the least sum of squared costs."""
    layers = table.layers
    best = [0.0] + [math.inf] * layers
    cuts: list[list[int]] = []
    for node in nodes:
        costs = table.cost[kinds[node]]
        after, came = [math.inf] * (layers + 1), [0] * (layers + 1)
        for a in range(layers):
            if best[a] < math.inf:
                for b in range(a + 1, layers + 1):
                    value = costs[a][b - a - 1]
                    if value <= bound and best[a] + value * value < after[b]:
                        after[b], came[b] = best[a] + value * value, a
        best = after
        cuts.append(came)
    stages: list[Stage] = []
    stop = layers
    for node, came in zip(reversed(nodes), reversed(cuts), strict=True):
        stages.append((node, came[stop], stop))
        stop = came[stop]
    return stages[::-1]
