"""Which frame goes out next, and what it carries.

Lanes. A route has as many lanes as processors compute for it, and a lane has at most one frame out. So with a frame of every lane out,
every processor has work, and a lane whose frame comes back can go out again at once, with the sessions that came meanwhile. Prompts and
sessions that decode share the lanes: what is under way is bounded by processors, not by stages.

Decode. The sessions of one route are put in the order of their rows and cut into lanes. Because lanes follow the order of the rows, the
rows of a frame lie together, and a stage that computes over a block of rows rounds them up to a power of two. Lanes of 11, 11 and 10
sessions would there each cost as much as one of 16, and take as long to come round as two of 16. So there are no more lanes than fill
their blocks.

Prompts. What a frame has room for beside the sessions that decode is filled with tokens of prompts (a history that is computed again
counts as one): whole short ones, and parts of long ones. The room is a budget of tokens, so that no step takes much longer than the others
(pace.py); while nobody decodes it is a whole chunk. In a frame that ends prompts, the part of one that goes on has the room that it would
have beside as many sessions as those prompts have tokens there: a first token does not wait for a whole chunk of another prompt. Prompts go
by virtual finishing time: a session's turn is the number of tokens that had been sent when it came, plus the number that it needs. So a
short prompt overtakes a long one, but a long one is not overtaken for ever (Demers, Keshav, Shenker 1989). Where prompts of several callers
wait, the next tokens are of the caller who has been served the fewest since it began to wait, so that nobody gets more by asking more
often. If some stage of the route computes segments one after the other (`Replica.packs`), a frame carries one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from mesh.coordinator.core.events import FrameKind, FrameOut, FrameRow
from mesh.coordinator.core.pace import Pace
from mesh.coordinator.core.routing import Route
from mesh.coordinator.core.session import Session, State

__all__ = ["Flight", "Scheduler"]

_ROUTES = 256
"""The pace of so many routes is remembered."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A frame that is out."""

    out: FrameOut
    sessions: tuple[Session, ...]
    lane: int
    prompts: bool = False  # it carries tokens of prompts

    @property
    def decode(self) -> bool:
        """Whether it carries nothing but one token of each of its sessions."""
        return self.out.kind == "decode"

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of its sessions."""
        return tuple([session.request.id for session in self.sessions])


@dataclass(slots=True)
class _Group:
    """The sessions of one route. `order` is sorted by row of the first stage."""

    route: Route
    chunk: int
    processors: int
    packs: bool
    pace: Pace
    order: list[Session] = field(default_factory=list)
    prefilling: list[Session] = field(default_factory=list)
    lanes_out: dict[int, int] = field(default_factory=dict)  # lane -> frame
    served: dict[str, int] = field(default_factory=dict)  # tokens of prompts sent, by caller; of those that have prompts to send

    def next_prompts(self) -> Iterator[Session]:
        """The sessions whose prompts are to be sent, the next one first: of the caller who was served the fewest tokens. Those of the one
        before are counted before the next one is asked for."""
        waiting: dict[str, deque[Session]] = {}
        for session in self.prefilling:
            if session.sent < len(session.history):
                waiting.setdefault(session.caller, deque()).append(session)
        self.served = {caller: self.served[caller] for caller in waiting}
        while waiting:
            caller = min(waiting, key=lambda caller: (self.served[caller], waiting[caller][0].turn, waiting[caller][0].number))
            yield waiting[caller].popleft()
            if not waiting[caller]:
                del waiting[caller]


class Scheduler:
    """`chunk_of`: the most tokens that a frame with prompts may bring through a route. `processors_of`: how many processors compute for a
    route. Shards that share one compute in turn, so more lanes than processors would only make every lane slower. `packs`: whether every
    stage of a route computes the segments of a frame as one step."""

    def __init__(
        self, chunk_of: Callable[[Route], int], processors_of: Callable[[Route], int], packs: Callable[[Route], bool], slowdown: float
    ) -> None:
        self._chunk_of = chunk_of
        self._processors_of = processors_of
        self._packs = packs
        self._slowdown = slowdown
        self._groups: dict[Route, _Group] = {}
        self._touched: dict[Route, None] = {}
        self._flights: dict[int, Flight] = {}
        self._next_frame = 1
        self._tokens_sent = 0  # of prompts
        self._paces: OrderedDict[Route, Pace] = OrderedDict()
        self._prompts_out: dict[str, int] = {}  # shard -> frames with prompts on their way through it
        self._decoders: dict[str, int] = {}  # shard -> sessions that decode through it

    @property
    def flights(self) -> dict[int, Flight]:
        return self._flights

    # -- membership ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """A session's rows are open: prefill its history."""
        group = self._group(session)
        session.turn = self._tokens_sent + len(session.history) - session.sent
        group.served.setdefault(session.caller, min(group.served.values(), default=0))
        group.prefilling.append(session)
        group.prefilling.sort(key=lambda s: (s.turn, s.number))

    def join(self, session: Session) -> None:
        """A session has its first token: it takes part in decode batches from now on."""
        self._group(session).prefilling.remove(session)
        self.resume(session)

    def resume(self, session: Session) -> None:
        """A session goes straight to decode batches: each of its rows holds the history without the last token."""
        group = self._group(session)
        group.order.append(session)
        group.order.sort(key=lambda s: s.rows[0])
        for hop in group.route:
            self._decoders[hop.shard] = self._decoders.get(hop.shard, 0) + 1

    def leave(self, session: Session) -> None:
        """A session takes no further part. Its frames that are out stay out."""
        if session.route is None or session.route not in self._groups:
            return
        group = self._group(session)
        if session in group.order:
            group.order.remove(session)
            for hop in group.route:
                self._decoders[hop.shard] -= 1
                if not self._decoders[hop.shard]:
                    del self._decoders[hop.shard]
        elif session in group.prefilling:
            group.prefilling.remove(session)

    # -- frames --------------------------------------------------------------------------------------------------------

    def landed(self, frame: int, service_s: float) -> Flight | None:
        """A frame is back; None if it was not waited for. service_s: how long it was away, less what it waited behind other work."""
        flight = self._take_off(frame)
        pace = None if flight is None else self._paces.get(flight.out.route)
        if flight is not None and pace is not None:
            pace.step(sum(len(row.tokens) for row in flight.out.rows), service_s)
        return flight

    def _take_off(self, frame: int) -> Flight | None:
        """A frame is no longer out."""
        flight = self._flights.pop(frame, None)
        if flight is None:
            return None
        for session in flight.sessions:
            session.in_flight -= 1
        route = flight.out.route
        group = self._groups.get(route)
        if group is not None:
            group.lanes_out.pop(flight.lane, None)
        if flight.prompts:
            for hop in route:
                self._prompts_out[hop.shard] -= 1
                if not self._prompts_out[hop.shard]:
                    del self._prompts_out[hop.shard]
            # prompts of another route may have waited for this one
            self._touched.update(dict.fromkeys(other for other in self._groups if not set(other).isdisjoint(route)))
        self._touched[route] = None
        return flight

    def drop(self, frame: int, keys: frozenset[int]) -> list[Session]:
        """Some rows of a frame will not come back. Returns their sessions; the other rows stay under way."""
        flight = self._flights.get(frame)
        if flight is None:
            return []
        dropped = [session for session in flight.sessions if session.key in keys]
        if len(dropped) == len(flight.sessions):
            self._take_off(frame)
            return dropped
        kept = [index for index, session in enumerate(flight.sessions) if session.key not in keys]
        out = replace(flight.out, rows=tuple(flight.out.rows[index] for index in kept))
        self._flights[frame] = replace(flight, out=out, sessions=tuple(flight.sessions[index] for index in kept))
        for session in dropped:
            session.in_flight -= 1
        return dropped

    def plan(self) -> list[FrameOut]:
        """The frames to send now. They count as out."""
        frames: list[FrameOut] = []
        touched, self._touched = self._touched, {}
        for route in touched:
            group = self._groups.get(route)
            if group is None:
                continue
            frames.extend(self._fill_lanes(group))
            if not group.order and not group.prefilling and not group.lanes_out:
                del self._groups[route]
        return frames

    def check(self) -> None:
        counts: dict[int, int] = {}
        chunks: dict[str, int] = {}
        for number, flight in self._flights.items():
            for session in flight.sessions:
                counts[id(session)] = counts.get(id(session), 0) + 1
                assert session.in_flight >= 1
            group = self._groups[flight.out.route]
            assert group.lanes_out.get(flight.lane) == number, "a lane does not know its frame"
            assert len(group.lanes_out) <= group.processors, "more frames in flight than processors"
            if flight.prompts:
                for hop in flight.out.route:
                    chunks[hop.shard] = chunks.get(hop.shard, 0) + 1
        assert chunks == self._prompts_out, "frames with prompts are miscounted"
        decoders: dict[str, int] = {}
        for route, group in self._groups.items():
            for frame in group.lanes_out.values():
                assert frame in self._flights, "a lane waits for a frame that is not out"
            for session in group.order:
                assert session.state is State.DECODING and session.route == route
                for hop in route:
                    decoders[hop.shard] = decoders.get(hop.shard, 0) + 1
            for session in group.prefilling:
                assert session.state is State.PREFILLING and session.route == route
        assert decoders == self._decoders, "decoding sessions are miscounted"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _group(self, session: Session) -> _Group:
        route = session.route
        assert route is not None
        self._touched[route] = None
        group = self._groups.get(route)
        if group is None:
            pace = self._paces.setdefault(route, Pace(self._slowdown))
            self._paces.move_to_end(route)
            if len(self._paces) > _ROUTES:
                self._paces.popitem(last=False)
            group = self._groups[route] = _Group(route, self._chunk_of(route), self._processors_of(route), self._packs(route), pace)
        return group

    def _fill_lanes(self, group: _Group) -> Iterator[FrameOut]:
        """A frame for each lane that has none out, as far as there is something to send."""
        live = len(group.order)
        lanes = _lanes(live, group.processors)
        for lane in range(group.processors):
            if lane in group.lanes_out:
                continue
            members = group.order[-(-lane * live // lanes) : -(-(lane + 1) * live // lanes)] if lane < lanes else ()
            ready = [session for session in members if not session.in_flight]
            if group.prefilling and len(ready) > group.chunk // 2:  # prompts have room in any frame
                ready = sorted(ready, key=lambda session: session.token_at)[: max(group.chunk // 2, 1)]
            rows = [_row(session, len(session.history) - 1, len(session.history)) for session in ready]
            parts = list(self._parts(group, len(ready)))
            rows += [row for _, row in parts]
            if not rows:
                continue
            kind: FrameKind = "decode" if not parts else "prefill" if len(rows) == 1 else "packed"
            out = FrameOut(self._number(), kind, group.route, tuple(rows))
            self._fly(Flight(out, (*ready, *(session for session, _ in parts)), lane, bool(parts)), group)
            yield out

    def _parts(self, group: _Group, ready: int) -> Iterator[tuple[Session, FrameRow]]:
        """The parts of prompts that a frame with `ready` decoding sessions takes along, the next in turn first. They count as sent."""
        if not group.prefilling or any(self._prompts_out.get(hop.shard, 0) >= group.processors for hop in group.route):
            return
        most = max(group.chunk - ready, 1)
        room = self._room(group, ready, most)
        states = max(group.chunk // 2, 1)  # hidden states travel back as float32, and may have come as 16 bits
        ended = 0  # tokens of the prompts that end with this frame
        for session in group.next_prompts():
            if ended and len(session.history) - session.sent > room:
                room = min(room, self._room(group, ready + ended, most))
            stop = min(session.sent + room, len(session.history))
            last = stop == len(session.history)
            if session.request.embed and last:
                if not states:
                    continue
                states -= 1
            row = _row(session, session.sent, stop)
            room -= len(row.tokens)
            ended += len(row.tokens) if last else 0
            self._tokens_sent += len(row.tokens)
            group.served[session.caller] += len(row.tokens)
            session.sent = stop
            yield session, row
            if not room or not group.packs:
                return

    def _room(self, group: _Group, ready: int, most: int) -> int:
        """Tokens of prompts that a frame may carry, at most `most`, beside `ready` sessions that decode."""
        decoding = ready or max(self._decoders.get(hop.shard, 0) for hop in group.route)
        waiting = [session for session in group.prefilling if session.sent < len(session.history)]
        recovering = any(session.restarts for session in waiting)
        return (group.pace.budget if group.packs else group.pace.part)(decoding, len(waiting), most, recovering=recovering)

    def _fly(self, flight: Flight, group: _Group) -> None:
        self._flights[flight.out.frame] = flight
        group.lanes_out[flight.lane] = flight.out.frame
        for session in flight.sessions:
            session.in_flight += 1
        if flight.prompts:
            for hop in group.route:
                self._prompts_out[hop.shard] = self._prompts_out.get(hop.shard, 0) + 1

    def _number(self) -> int:
        self._next_frame += 1
        return self._next_frame - 1


def _lanes(live: int, processors: int) -> int:
    """How many lanes `live` sessions make: the fewest whose rows, rounded up to a power of two, are no more than with a lane for each
    processor."""
    if live <= processors:
        return live
    rows = 1 << (-(-live // processors) - 1).bit_length()
    return -(-live // rows)


def _row(session: Session, start: int, stop: int) -> FrameRow:
    rows = tuple(session.rows[stage] for stage in range(len(session.rows)))
    return FrameRow(session.key, session.epoch, rows, start, tuple(session.history[start:stop]), stop == len(session.history))
