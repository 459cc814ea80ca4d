"""Which shards a session goes through.

The table holds the last lease of each shard, and the rows that this coordinator has taken there since. A route is one shard for each of
a chain of layer ranges, from layer 0 to the last. Where shards of different cuts are present, the chain with the fewest stages that has
a free row is taken. Among the replicas of a range the strategy chooses:

    least_loaded   of two drawn at random, the one with the larger share of free rows. That is almost as good as the best of all
                   (Mitzenmacher 2001), and coordinators that all know equally little do not all choose the same one
    round_robin    in turn
    queue_group    the coordinator names no shard: the range's queue group answers, so NATS chooses

Where shards hold what the session begins with (prefixes.py), the strategy chooses among those that hold most of it, at every stage. But
the session goes elsewhere if at some stage their share of free rows is lower than another shard's by more than REUSE_WORTH times the share
of the prompt that they spare.

Free rows are an estimate between leases: other coordinators open rows too. A shard that refuses is believed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple

from mesh.protocol.frame import Hop
from mesh.types import LayerRange

__all__ = ["Choice", "Choices", "Hop", "Replica", "Replicas", "Reuse", "Route", "Strategy", "complete"]

Strategy = Literal["least_loaded", "round_robin", "queue_group"]

REUSE_WORTH = 0.5
"""A prompt that is there as a whole outweighs so large a share of a shard's rows."""
REFUSAL_REST_S = 1.0
"""A shard that refused although it has a free row is left alone for this time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One stage of a route that is being opened. shard None: the queue group of the range decides, and has not answered yet."""

    layers: LayerRange
    shard: str | None


Choices = tuple[Choice, ...]
Route = tuple[Hop, ...]
"""A complete route: every stage has its shard."""


def complete(choices: Choices) -> Route | None:
    """The route, if every stage has its shard."""
    route = tuple([Hop(choice.layers, choice.shard) for choice in choices if choice.shard is not None])
    return route if len(route) == len(choices) else None


class Reuse(NamedTuple):
    """at(shard): the positions that a session could begin with there. prompt: its length."""

    at: Callable[[str], int]
    prompt: int


@dataclass(frozen=True, slots=True)
class Replica:
    """A shard, as its lease says. context: positions of a row. chunk: the most tokens of a frame with prompts."""

    shard: str
    layers: LayerRange
    rows: int
    free_rows: int
    context: int
    chunk: int
    instance: str = ""  # of the process; the rows of a new process are empty
    draining: bool = False
    mirrors: bool = False  # it follows the frames of the others of its range
    packs: bool = False  # it computes the segments of a frame as one step
    processor: str = ""  # shards of the same processor compute in turn; empty: it has one of its own


@dataclass(slots=True)
class _Entry:
    replica: Replica
    held: set[int] = field(default_factory=set)  # keys of the sessions with a row here, or asking for one
    held_at_lease: int = 0
    full: bool = False  # it had no free row, and none of this coordinator's rows there has been closed since
    rest_until: float = 0.0
    suspected: bool = False  # a step through it did not come back
    probed_at: float | None = None  # suspected, and probed since, because it has said a lease

    def free(self, now: float) -> int:
        if self.replica.draining or self.full or now < self.rest_until:
            return 0
        held = len(self.held)
        # The lease may be older than the rows that were taken since. There are never more free rows than rows.
        return max(0, min(self.replica.free_rows + self.held_at_lease, self.replica.rows) - held)

    def share(self, now: float) -> float:
        """The share of its rows that is free."""
        return self.free(now) / self.replica.rows


class Replicas:
    """The lease table, and the choice among its shards. `layers`: of the model."""

    def __init__(self, layers: int, strategy: Strategy, random: Random) -> None:
        self._layers = layers
        self._strategy = strategy
        self._random = random
        self._entries: dict[str, _Entry] = {}
        self._turns: dict[LayerRange, int] = {}

    def __contains__(self, shard: str) -> bool:
        return shard in self._entries

    def __iter__(self) -> Iterator[Replica]:
        return iter([entry.replica for entry in self._entries.values()])

    # -- what is known -------------------------------------------------------------------------------------------------

    def seen(self, replica: Replica) -> bool:
        """A lease was written. True where the shard is another process than before, or has another range: its rows are gone."""
        entry = self._entries.get(replica.shard)
        if entry is None or (entry.replica.layers, entry.replica.instance) != (replica.layers, replica.instance):
            self._entries[replica.shard] = _Entry(replica)
            return entry is not None
        entry.replica = replica
        entry.held_at_lease = len(entry.held)
        entry.full = False
        return False

    def on_trial(self, shard: str, now: float) -> bool:
        """Whether to probe the shard, which has said a lease. A lease shows that a suspected shard can speak; only an answer shows that it
        hears."""
        entry = self._entries.get(shard)
        if entry is None or not entry.suspected:
            return False
        entry.probed_at = now
        return True

    def answered(self, shard: str, asked_at: float) -> None:
        """The shard has answered the probe of `asked_at`."""
        entry = self._entries.get(shard)
        if entry is not None and entry.probed_at is not None and asked_at >= entry.probed_at:
            entry.suspected, entry.probed_at = False, None

    def gone(self, shard: str) -> None:
        self._entries.pop(shard, None)

    def suspect(self, shard: str) -> bool:
        """A step through the shard did not come back: others are preferred until it has said its lease again and answered a probe. True
        where it was not suspected yet."""
        entry = self._entries.get(shard)
        if entry is None:
            return False
        entry.probed_at = None
        if entry.suspected:
            return False
        entry.suspected = True
        return True

    def take(self, shard: str, key: int) -> None:
        """Session `key` has a row of `shard`, or asks for one."""
        if shard in self._entries:
            self._entries[shard].held.add(key)

    def give_back(self, shard: str, key: int) -> None:
        entry = self._entries.get(shard)
        if entry is not None and key in entry.held:
            entry.held.discard(key)
            entry.full = False

    def refused(self, shard: str, key: int, *, full: bool, now: float) -> None:
        """`shard` refused to open a row: because it has none free (`full`), or for another reason."""
        entry = self._entries.get(shard)
        if entry is None:
            return
        entry.held.discard(key)
        if full:
            entry.full = True
        else:
            entry.rest_until = now + REFUSAL_REST_S
            entry.suspected, entry.probed_at = True, None

    # -- decisions -----------------------------------------------------------------------------------------------------

    def choose(self, positions: int, now: float, reuse: Reuse | None = None) -> Choices | None:
        """Shards with a free row for a session of `positions`, the first stage first; None where there is no such chain."""
        free: dict[int, list[_Entry]] = {}
        for entry in self._entries.values():
            if entry.free(now) > 0 and entry.replica.context >= positions:
                free.setdefault(entry.replica.layers.start, []).append(entry)
        hops = self._hops_to_end(free)
        if 0 not in hops:
            return None
        stages: list[tuple[LayerRange, list[_Entry]]] = []
        at = 0
        while at < self._layers:
            best = [entry for entry in free[at] if hops.get(entry.replica.layers.stop) == hops[at] - 1]
            layers = min(entry.replica.layers for entry in best)
            candidates = [entry for entry in best if entry.replica.layers == layers]
            candidates = [entry for entry in candidates if not entry.suspected] or candidates
            stages.append((layers, candidates))
            at = layers.stop
        holders = [] if reuse is None else self._holders([candidates for _, candidates in stages], reuse, now)
        if holders:
            return tuple(Choice(layers, self._choose(layers, held, now)) for (layers, _), held in zip(stages, holders, strict=True))
        by_group = self._strategy == "queue_group"
        return tuple(Choice(layers, None if by_group else self._choose(layers, candidates, now)) for layers, candidates in stages)

    def _holders(self, stages: list[list[_Entry]], reuse: Reuse, now: float) -> list[list[_Entry]]:
        """For each stage those of its candidates that hold the longest beginning that every stage has. Nothing where no shard holds one, or
        it is not worth the load there."""
        held = [{entry.replica.shard: reuse.at(entry.replica.shard) for entry in candidates} for candidates in stages]
        common = min(max(each.values()) for each in held)
        if not common:
            return []
        holders = [[entry for entry in entries if each[entry.replica.shard] >= common] for entries, each in zip(stages, held, strict=True)]
        for candidates, holding in zip(stages, holders, strict=True):
            behind = max(entry.share(now) for entry in candidates) - max(entry.share(now) for entry in holding)
            if behind > REUSE_WORTH * common / reuse.prompt:
                return []
        return holders

    def mirrors(self, choices: Choices, positions: int, now: float, reuse: Reuse | None = None) -> dict[int, str]:
        """For each stage that has one: another shard of its range that mirrors and has a free row (stage -> shard)."""
        found: dict[int, str] = {}
        for stage, choice in enumerate(choices):
            primary = self._entry(choice.shard)
            if primary is None or not primary.replica.mirrors:
                continue
            others = [entry for entry in self._fit(choice.layers, positions, now) if entry is not primary and entry.replica.mirrors]
            others = [entry for entry in others if not entry.suspected]
            if reuse is not None:  # one that lacks what the stage begins with could not follow
                most = max((reuse.at(entry.replica.shard) for entry in others), default=0)
                others = [entry for entry in others if reuse.at(entry.replica.shard) == most]
            if others:
                found[stage] = self._choose(choice.layers, others, now, by="least_loaded")
        return found

    def mend(
        self, key: int, choices: Choices, mirrors: dict[int, str], positions: int, now: float
    ) -> tuple[Choices, dict[int, str]] | None:
        """Choices for session `key` that differ from `choices` only where they must: a stage whose shard is gone, is another process
        now, is suspected or drains goes to its mirror, or else to another shard of the range. The mirrors that are left come with the
        choices. None: some stage has no other shard."""
        mended: list[Choice] = []
        left: dict[int, str] = {}
        for stage, choice in enumerate(choices):
            mirror = mirrors.get(stage)
            if mirror is not None and not self._well(mirror, key):
                mirror = None
            if choice.shard is not None and self._well(choice.shard, key):
                mended.append(choice)
                if mirror is not None:
                    left[stage] = mirror
                continue
            if mirror is not None:
                mended.append(Choice(choice.layers, mirror))
                continue
            others = [entry for entry in self._fit(choice.layers, positions, now) if not entry.suspected]
            if others:
                shard = None if self._strategy == "queue_group" else self._choose(choice.layers, others, now)
                mended.append(Choice(choice.layers, shard))
                continue
            entry = self._entry(choice.shard)
            if entry is None or key not in entry.held or entry.suspected:
                return None
            mended.append(choice)  # it drains, and there is no other
        return tuple(mended), left

    def longest(self) -> int | None:
        """The most positions that any chain of shards holds, busy or not; None where no chain is complete. Draining shards take no new
        sessions, so they do not count."""
        there = [entry.replica for entry in self._entries.values() if not entry.replica.draining]
        best = {self._layers: 2**62}
        for start in sorted({replica.layers.start for replica in there}, reverse=True):
            reach = [
                min(replica.context, best[replica.layers.stop])
                for replica in there
                if replica.layers.start == start and replica.layers.stop in best
            ]
            if reach:
                best[start] = max(reach)
        return best.get(0)

    def missing(self) -> tuple[LayerRange, ...]:
        """The layers that lack a shard that takes new sessions. Where every layer has one, but the ranges do not join to a chain: from
        where a chain from layer 0 ends to where one begins that reaches the last layer."""
        there = sorted({entry.replica.layers for entry in self._entries.values() if not entry.replica.draining})
        gaps: list[LayerRange] = []
        covered = 0
        for layers in there:
            if layers.start > covered:
                gaps.append(LayerRange(covered, layers.start))
            covered = max(covered, layers.stop)
        if covered < self._layers:
            gaps.append(LayerRange(covered, self._layers))
        if gaps:
            return tuple(gaps)
        reached, ends = {0}, {self._layers}
        for layers in there:
            if layers.start in reached:
                reached.add(layers.stop)
        for layers in reversed(there):
            if layers.stop in ends:
                ends.add(layers.start)
        return (LayerRange(max(reached), min(end for end in ends if end > max(reached))),) if 0 not in ends else ()

    def chunk_of(self, route: Route) -> int:
        """The most tokens that a prefill frame may bring through a route."""
        return min(self._entries[hop.shard].replica.chunk for hop in route if hop.shard in self._entries)

    def processors_of(self, route: Route) -> int:
        """How many processors compute for a route."""
        replicas = [self._entries[hop.shard].replica for hop in route if hop.shard in self._entries]
        return len({replica.processor or replica.shard for replica in replicas})

    def rows_of(self, shard: str) -> int:
        """How many rows a shard has; 0 where it takes no part."""
        entry = self._entries.get(shard)
        return 0 if entry is None else entry.replica.rows

    def packs(self, route: Route) -> bool:
        """Whether every stage of a route computes the segments of a frame as one step."""
        return all(self._entries[hop.shard].replica.packs for hop in route if hop.shard in self._entries)

    def capacity(self) -> int:
        """Sessions that fit at once: the rows of the scarcest of the ranges that have shards."""
        rows: dict[LayerRange, int] = {}
        for entry in self._entries.values():
            layers = entry.replica.layers
            rows[layers] = rows.get(layers, 0) + entry.replica.rows
        return min(rows.values(), default=0)

    def free(self, now: float) -> int:
        """Sessions that would find rows now: the free rows of the scarcest of the ranges that have shards."""
        rows: dict[LayerRange, int] = {}
        for entry in self._entries.values():
            layers = entry.replica.layers
            rows[layers] = rows.get(layers, 0) + entry.free(now)
        return min(rows.values(), default=0)

    def check(self) -> None:
        """Raise AssertionError where a shard holds more than its rows. Not with queue groups: their answers are always believed."""
        for entry in self._entries.values() if self._strategy != "queue_group" else ():
            assert len(entry.held) <= entry.replica.rows, f"{entry.replica.shard} holds more than its rows"

    def held(self) -> dict[str, frozenset[int]]:
        """Session keys by shard."""
        return {shard: frozenset(entry.held) for shard, entry in self._entries.items()}

    def _entry(self, shard: str | None) -> _Entry | None:
        return None if shard is None else self._entries.get(shard)

    def _hops_to_end(self, free: dict[int, list[_Entry]]) -> dict[int, int]:
        hops = {self._layers: 0}
        for start in sorted(free, reverse=True):
            ahead = [hops[entry.replica.layers.stop] for entry in free[start] if entry.replica.layers.stop in hops]
            if ahead:
                hops[start] = 1 + min(ahead)
        return hops

    def _well(self, shard: str, key: int) -> bool:
        """Whether the session's row there is still its own, and may stay."""
        entry = self._entries.get(shard)
        return entry is not None and key in entry.held and not entry.suspected and not entry.replica.draining

    def _fit(self, layers: LayerRange, positions: int, now: float) -> list[_Entry]:
        return [
            entry
            for entry in self._entries.values()
            if entry.replica.layers == layers and entry.replica.context >= positions and entry.free(now) > 0
        ]

    def _choose(self, layers: LayerRange, candidates: list[_Entry], now: float, by: Strategy | None = None) -> str:
        """One of the candidates, by the strategy, or by `by`. (A queue group cannot be restricted to some of its members.)"""
        candidates.sort(key=lambda entry: entry.replica.shard)
        if (by or self._strategy) == "round_robin":
            turn = self._turns.get(layers, 0)
            self._turns[layers] = turn + 1
            return candidates[turn % len(candidates)].replica.shard
        if len(candidates) > 2:
            candidates = self._random.sample(candidates, 2)
        return max(candidates, key=lambda entry: entry.share(now)).replica.shard
