"""Which replicas a session goes through.

The table holds what each replica said last (its lease) and what this coordinator has taken from it since. A route is one
replica for each of a chain of layer ranges from 0 to the last layer; where ranges of different cuts are present the chain with
the fewest stages that has a row free is taken. Among the replicas of a range the strategy decides:

    least_loaded   the one with the larger share of free rows of two drawn at random (Mitzenmacher 2001: almost as good as
                   the best of all, and coordinators that know equally little do not all run to the same one)
    round_robin    in turn
    queue_group    nobody is named: the range's queue group answers, so NATS decides

Free rows are an estimate between leases: other coordinators open rows too. A replica that refuses is believed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from mesh.protocol.frame import Hop
from mesh.types import LayerRange

__all__ = ["Choice", "Choices", "Hop", "Replica", "Replicas", "Route", "Strategy", "complete"]

Strategy = Literal["least_loaded", "round_robin", "queue_group"]

REFUSAL_REST_S = 1.0
"""How long a replica that refused for another reason than want of rows is left alone."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One stage of a route that is being opened. shard None: the queue group of the range decides, and has not answered yet."""

    layers: LayerRange
    shard: str | None


Choices = tuple[Choice, ...]
Route = tuple[Hop, ...]
"""A complete route: every stage has its shard."""


def complete(choices: Choices) -> Route | None:
    """The route, where every stage has its shard."""
    route = tuple([Hop(choice.layers, choice.shard) for choice in choices if choice.shard is not None])
    return route if len(route) == len(choices) else None


@dataclass(frozen=True, slots=True)
class Replica:
    """A shard as its lease says. context: positions a row; chunk: the most tokens a prefill frame may bring it."""

    shard: str
    layers: LayerRange
    rows: int
    free_rows: int
    context: int
    chunk: int
    instance: str = ""  # another one: the process is new, and its rows are empty
    draining: bool = False
    mirrors: bool = False  # it follows frames of the others of its range
    processor: str = ""  # shards of one processor compute in turn; none named: one of its own


@dataclass(slots=True)
class _Entry:
    replica: Replica
    held: set[int] = field(default_factory=set)  # session keys with a row here, or one being opened
    held_at_lease: int = 0
    full: bool = False  # it refused for want of rows, and none of ours has been closed since
    rest_until: float = 0.0
    suspected: bool = False  # a step through it did not come back

    def free(self, now: float) -> int:
        if self.replica.draining or self.full or now < self.rest_until:
            return 0
        held = len(self.held)
        # A lease may be older than what was taken since it was written: never more than the rows there are.
        return max(0, min(self.replica.free_rows + self.held_at_lease, self.replica.rows) - held)


class Replicas:
    """The lease table. `layers` is the number of layers of the model."""

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
        """A lease was renewed; True where it is another process, or another range, than before: what was held there is gone."""
        entry = self._entries.get(replica.shard)
        if entry is None or (entry.replica.layers, entry.replica.instance) != (replica.layers, replica.instance):
            self._entries[replica.shard] = _Entry(replica)
            return entry is not None
        entry.replica = replica
        entry.held_at_lease = len(entry.held)
        entry.full = entry.suspected = False
        return False

    def gone(self, shard: str) -> None:
        self._entries.pop(shard, None)

    def suspect(self, shard: str) -> bool:
        """A step through it did not come back: the others are preferred until its next lease. Whether that is news."""
        entry = self._entries.get(shard)
        if entry is None or entry.suspected:
            return False
        entry.suspected = True
        return True

    def take(self, shard: str, key: int) -> None:
        """Session `key` has, or is asking for, a row of `shard`."""
        if shard in self._entries:
            self._entries[shard].held.add(key)

    def give_back(self, shard: str, key: int) -> None:
        entry = self._entries.get(shard)
        if entry is not None and key in entry.held:
            entry.held.discard(key)
            entry.full = False

    def refused(self, shard: str, key: int, *, full: bool, now: float) -> None:
        """`shard` would not open a row: for want of one, or for another reason."""
        entry = self._entries.get(shard)
        if entry is None:
            return
        entry.held.discard(key)
        if full:
            entry.full = True
        else:
            entry.rest_until = now + REFUSAL_REST_S
            entry.suspected = True

    # -- decisions -----------------------------------------------------------------------------------------------------

    def choose(self, positions: int, now: float) -> Choices | None:
        """Replicas with a free row for a session of `positions`, first stage first; None where there is no such chain."""
        free: dict[int, list[_Entry]] = {}
        for entry in self._entries.values():
            if entry.free(now) > 0 and entry.replica.context >= positions:
                free.setdefault(entry.replica.layers.start, []).append(entry)
        hops = self._hops_to_end(free)
        if 0 not in hops:
            return None
        choices: list[Choice] = []
        at = 0
        while at < self._layers:
            best = [entry for entry in free[at] if hops.get(entry.replica.layers.stop) == hops[at] - 1]
            layers = min(entry.replica.layers for entry in best)
            candidates = [entry for entry in best if entry.replica.layers == layers]
            candidates = [entry for entry in candidates if not entry.suspected] or candidates
            choices.append(Choice(layers, None if self._strategy == "queue_group" else self._choose(layers, candidates, now)))
            at = layers.stop
        return tuple(choices)

    def mirrors(self, choices: Choices, positions: int, now: float) -> dict[int, str]:
        """For each stage that has one, another replica with a free row, which follows frames: stage -> shard."""
        found: dict[int, str] = {}
        for stage, choice in enumerate(choices):
            primary = self._entry(choice.shard)
            if primary is None or not primary.replica.mirrors:
                continue
            others = [entry for entry in self._fit(choice.layers, positions, now) if entry is not primary and entry.replica.mirrors]
            others = [entry for entry in others if not entry.suspected]
            if others:
                found[stage] = self._choose(choice.layers, others, now, by="least_loaded")
        return found

    def mend(
        self, key: int, choices: Choices, mirrors: dict[int, str], positions: int, now: float
    ) -> tuple[Choices, dict[int, str]] | None:
        """Choices for session `key` that differ from `choices` only where they must: a stage whose shard is gone, is another process
        now, is suspected or drains is taken over by its mirror, else by another replica of the range. None: some stage has
        nobody else. The mirrors that are left come with it."""
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
        """The most positions any chain of replicas holds, busy or not; None where no chain is complete. Who drains takes nobody."""
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

    def chunk_of(self, route: Route) -> int:
        """The most tokens that a prefill frame may bring through a route."""
        return min(self._entries[hop.shard].replica.chunk for hop in route if hop.shard in self._entries)

    def processors_of(self, route: Route) -> int:
        """How many processors compute for a route."""
        replicas = [self._entries[hop.shard].replica for hop in route if hop.shard in self._entries]
        return len({replica.processor or replica.shard for replica in replicas})

    def capacity(self) -> int:
        """Sessions that fit at once: the rows of the scarcest range of those that are there."""
        rows: dict[LayerRange, int] = {}
        for entry in self._entries.values():
            layers = entry.replica.layers
            rows[layers] = rows.get(layers, 0) + entry.replica.rows
        return min(rows.values(), default=0)

    def free(self, now: float) -> int:
        """Sessions that would find rows now: the free rows of the scarcest range of those that are there."""
        rows: dict[LayerRange, int] = {}
        for entry in self._entries.values():
            layers = entry.replica.layers
            rows[layers] = rows.get(layers, 0) + entry.free(now)
        return min(rows.values(), default=0)

    def check(self) -> None:
        """Of replicas that were named. A queue group's answer is believed, though we thought that the row was another session's."""
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
        """One of them, in the strategy's way; a queue group cannot be asked for some of its members."""
        candidates.sort(key=lambda entry: entry.replica.shard)
        if (by or self._strategy) == "round_robin":
            turn = self._turns.get(layers, 0)
            self._turns[layers] = turn + 1
            return candidates[turn % len(candidates)].replica.shard
        if len(candidates) > 2:
            candidates = self._random.sample(candidates, 2)
        return max(candidates, key=lambda entry: entry.free(now) / entry.replica.rows).replica.shard
