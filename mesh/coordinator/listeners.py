"""Whether those who asked for a whole answer still listen.

A stream has documents all the time, and the server says when nobody takes one (outbox.py). A request without a stream has a single
message: its answer. So nothing would show that its sender has gone, and it would keep its row to the last token. Therefore nats-server is
asked every few seconds where a message to the reply subject would go. It reports that without delivering the message (message tracing, with
`Nats-Trace-Only`). Twice in a row nobody: the request is cancelled.

A sender that stays connected and listens with a wildcard, as most libraries do for all their requests, is not seen to have given up.
Servers before 2.11 would deliver the message: they are not asked.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from mesh.bus import Bus, Subscription
from mesh.coordinator.replies import Job
from mesh.protocol import subjects
from mesh.protocol.headers import REQUEST_HEADER, SERVER_TRACE_HEADER, SERVER_TRACE_ONLY_HEADER

__all__ = ["Listeners", "heard_by"]

ASK_S: Final = 2.0
_UNHEARD: Final = 2
"""So often in a row: a client that reconnects to another server is away for a moment."""
_FIRST_SERVER: Final = (2, 11)
_CLIENT: Final = 0
"""The kind of a connection that is neither a server's nor an account's."""
_MOST_BYTES: Final = 64 * 1024


class Listeners:
    """`jobs`: the requests that are held, by session. `settled`: whether the connection has been there long enough for others to be back
    as well. `gone(session)` is called where nobody listens for the answer any more."""

    def __init__(
        self, bus: Bus, jobs: Mapping[str, Job], *, instance: str, settled: Callable[[], bool], gone: Callable[[str], object]
    ) -> None:
        self._bus = bus
        self._jobs = jobs
        self._reports = subjects.server_traces(f"{instance}-clients")
        self._settled = settled
        self._gone = gone
        self._asked: dict[str, str] = {}  # public id -> session, of the last round
        self._unheard: Counter[str] = Counter()  # reports in a row, by session
        self._subscription: Subscription | None = None
        self._asking: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe_direct(self._reports, self._on_report)
        self._asking = self._bus.keep(self._ask, "asking who listens")

    async def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        if self._subscription is not None:
            await self._subscription.stop()

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(ASK_S)
            waiting = {job.id: session for session, job in self._jobs.items() if not job.message.stream}
            if not self._settled() or self._bus.server_version < _FIRST_SERVER:
                waiting = {}
            self._unheard = Counter({session: self._unheard[session] for session in waiting.values()})
            self._asked = waiting
            for id, session in waiting.items():
                headers = {SERVER_TRACE_HEADER: self._reports, SERVER_TRACE_ONLY_HEADER: "true", REQUEST_HEADER: id}
                self._bus.post(self._jobs[session].reply, b"", headers=headers)

    def _on_report(self, data: bytes) -> None:
        id, heard = heard_by(data)
        session = self._asked.get(id)
        if session is None:
            return
        self._unheard[session] = 0 if heard else self._unheard[session] + 1
        if self._unheard[session] >= _UNHEARD:
            del self._asked[id]
            self._gone(session)


def heard_by(data: bytes) -> tuple[str, bool]:
    """(public id, whether anybody may listen) of a server's report; no id: it is none of the first server, which knows of all listeners."""
    if len(data) > _MOST_BYTES:
        return "", True
    try:
        document = orjson.loads(data)
        headers = {key.lower(): value for key, value in document["request"]["header"].items()}
        id, events = str(headers[REQUEST_HEADER.lower()][0]), document["events"]
        first = events[0]
        if first["type"] != "in" or first["kind"] != _CLIENT:
            return "", True
        return id, len(events) > 1 or bool(first.get("error"))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return "", True
