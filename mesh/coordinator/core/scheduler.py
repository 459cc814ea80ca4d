"""Which frame goes out next.

Decode. The sessions of one route are put in the order of their rows and cut into lanes, at most as many as the route has processors. A
lane is a decode batch, and has at most one frame out. So with a frame of every lane out, every processor has work, and a lane whose
frame comes back can go out again at once, with the sessions that joined meanwhile. Because lanes follow the order of the rows, the rows
of a frame lie together, and a stage computes over a block of rows, rounded up to a power of two. Lanes of 11, 11 and 10 sessions would
each cost as much as one of 16, and take as long to come round as two of 16. So there are no more lanes than fill their blocks.

Prefill. A history goes out in chunks. While some session decodes through a shard, the shard gets one chunk at a time, so that a decode
step waits for one chunk at most; the chunk is smaller where a whole one takes much longer than a step (pace.py). Otherwise a route gets
as many chunks as it has stages. Chunks go out by virtual finishing time: a session's turn is the number of chunks that had been sent when
it came, plus the number that it needs. So a short prompt overtakes a long one, but a long one is not overtaken for ever (Demers, Keshav,
Shenker 1989).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mesh.coordinator.core.events import FrameOut, FrameRow
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
    lane: int  # of decode frames
    chunk: int = 0  # of prefill frames that were sent while others decode: the most tokens they could have brought

    @property
    def decode(self) -> bool:
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
    pace: Pace
    order: list[Session] = field(default_factory=list)
    prefilling: list[Session] = field(default_factory=list)
    lanes_out: dict[int, int] = field(default_factory=dict)  # lane -> frame


class Scheduler:
    """`chunk_of`: the most tokens that a prefill frame may bring through a route. `processors_of`: how many processors compute for a
    route. Shards that share one compute in turn, so more lanes than processors would only make every lane slower."""

    def __init__(self, chunk_of: Callable[[Route], int], processors_of: Callable[[Route], int]) -> None:
        self._chunk_of = chunk_of
        self._processors_of = processors_of
        self._groups: dict[Route, _Group] = {}
        self._touched: dict[Route, None] = {}
        self._flights: dict[int, Flight] = {}
        self._next_frame = 1
        self._chunks_sent = 0.0
        self._paces: OrderedDict[Route, Pace] = OrderedDict()
        self._chunks_out: dict[str, int] = {}  # shard -> prefill frames on their way through it
        self._decoders: dict[str, int] = {}  # shard -> sessions that decode through it

    @property
    def flights(self) -> dict[int, Flight]:
        return self._flights

    # -- membership ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """A session's rows are open: prefill its history."""
        group = self._group(session)
        session.turn = self._chunks_sent + -(-len(session.history) // group.chunk)
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
        if flight is None or pace is None:
            return flight
        if flight.decode:
            pace.step(service_s)
        elif flight.chunk:
            pace.chunk(len(flight.out.rows[0].tokens), flight.chunk, service_s)
        return flight

    def _take_off(self, frame: int) -> Flight | None:
        """A frame is no longer out."""
        flight = self._flights.pop(frame, None)
        if flight is None:
            return None
        for session in flight.sessions:
            session.in_flight -= 1
        route = flight.out.route
        if flight.decode:
            group = self._groups.get(route)
            if group is not None:
                group.lanes_out.pop(flight.lane, None)
        else:
            for hop in route:
                self._chunks_out[hop.shard] -= 1
                if not self._chunks_out[hop.shard]:
                    del self._chunks_out[hop.shard]
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
        """The frames to send now, decode before prefill. They count as out."""
        frames: list[FrameOut] = []
        touched, self._touched = self._touched, {}
        for route in touched:
            group = self._groups.get(route)
            if group is None:
                continue
            if group.order:
                frames.extend(self._decode(group))
            if group.prefilling:
                frames.extend(self._prefill(group))
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
            if flight.decode:
                group = self._groups[flight.out.route]
                assert group.lanes_out.get(flight.lane) == number, "a lane does not know its frame"
                assert len(group.lanes_out) <= len(group.route), "more frames in flight than stages"
            else:
                for hop in flight.out.route:
                    chunks[hop.shard] = chunks.get(hop.shard, 0) + 1
        assert chunks == self._chunks_out, "prefill frames are miscounted"
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
            pace = self._paces.setdefault(route, Pace())
            self._paces.move_to_end(route)
            if len(self._paces) > _ROUTES:
                self._paces.popitem(last=False)
            group = self._groups[route] = _Group(route, self._chunk_of(route), self._processors_of(route), pace)
        return group

    def _decode(self, group: _Group) -> list[FrameOut]:
        live = len(group.order)
        lanes = _lanes(live, group.processors)
        frames = []
        for lane in range(lanes):
            if lane in group.lanes_out:
                continue
            members = group.order[-(-lane * live // lanes) : -(-(lane + 1) * live // lanes)]
            ready = tuple(session for session in members if not session.in_flight)
            if not ready:
                continue
            rows = tuple(_row(session, len(session.history) - 1, len(session.history)) for session in ready)
            out = FrameOut(self._number(), "decode", group.route, rows)
            group.lanes_out[lane] = out.frame
            self._fly(Flight(out, ready, lane))
            frames.append(out)
        return frames

    def _prefill(self, group: _Group) -> list[FrameOut]:
        frames: list[FrameOut] = []
        shards = [hop.shard for hop in group.route]
        for session in group.prefilling:
            while session.sent < len(session.history):
                shared = any(shard in self._decoders for shard in shards)
                limit = 1 if shared else len(shards)
                if any(self._chunks_out.get(shard, 0) >= limit for shard in shards):
                    return frames
                size = group.pace.size(group.chunk) if shared else group.chunk
                stop = min(session.sent + size, len(session.history))
                last = stop == len(session.history)
                out = FrameOut(self._number(), "prefill", group.route, (_row(session, session.sent, stop),), last)
                self._chunks_sent += (stop - session.sent) / group.chunk
                session.sent = stop
                for shard in shards:
                    self._chunks_out[shard] = self._chunks_out.get(shard, 0) + 1
                self._fly(Flight(out, (session,), 0, group.chunk if shared else 0))
                frames.append(out)
        return frames

    def _fly(self, flight: Flight) -> None:
        self._flights[flight.out.frame] = flight
        for session in flight.sessions:
            session.in_flight += 1

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
    return FrameRow(session.key, session.epoch, rows, start, tuple(session.history[start:stop]))
