"""One turn of the core: an event goes in, and what follows from it is sent and done in the right order.

The stages wait for the next step. So a turn sends its frames first, and does everything else afterwards. The driver also calls the core
when its deadline is due, and tells it whether this coordinator is connected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mesh.bus import Bus
from mesh.coordinator.core.events import Connection, Effect, Event, FinishSession, FrameOut, Tick
from mesh.coordinator.core.machine import Core
from mesh.coordinator.outbox import Outbox

__all__ = ["CoreDriver"]


class CoreDriver:
    """`carry_out(effects)` does what the core wants done, other than sending frames, and returns the sessions that a stop text has
    ended; it is set (effects.py) before the first event."""

    def __init__(self, bus: Bus, core: Core, outbox: Outbox) -> None:
        self.carry_out: Callable[[list[Effect]], list[str]]
        self._bus = bus
        self._core = core
        self._outbox = outbox
        self._frozen = False
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._connected_at = float("-inf")
        bus.on_change(self._on_connection)

    async def handle(self, event: Event) -> None:
        """A turn; returns when everything it sends has been handed to the connection."""
        self._apply(event)
        await self._outbox.send()

    def handle_soon(self, event: Event, name: str) -> None:
        """A turn in a task of its own, named `name` in the log."""
        self._bus.spawn(self.handle(event), name)

    def handle_now(self, event: Event, frames_sent: Callable[[], None] | None = None) -> None:
        """A turn from where nothing can be awaited. `frames_sent` is called when the turn's frames have been written."""
        self._apply(event, frames_sent)
        if self._outbox:
            self._bus.spawn(self._outbox.send(), "sending")

    def freeze(self) -> None:
        """Ignore every event from now on: the sessions are being handed over to other coordinators."""
        self._frozen = True

    def stop(self) -> None:
        """Call the core no more."""
        if self._timer is not None:
            self._timer.cancel()

    def connected_for_s(self) -> float:
        """Seconds since the last reconnection; infinite where the connection was never lost."""
        return time.monotonic() - self._connected_at

    def _apply(self, event: Event, frames_sent: Callable[[], None] | None = None) -> None:
        """Give the event to the core, and send what follows. What cannot be written at once stays in the outbox."""
        if self._frozen:
            return
        now = time.monotonic()
        effects = self._core.handle(event, now)
        self._outbox.frames(effect for effect in effects if isinstance(effect, FrameOut))
        self._outbox.send_now()
        if frames_sent is not None:
            frames_sent()
        stopped = self.carry_out(effects)
        self._arm(now)
        self._outbox.send_now()
        for session in stopped:
            self._apply(FinishSession(session))

    def _arm(self, now: float) -> None:
        """Have the core called at its deadline. A timer that is too early is left as it is: the core then gives a new deadline."""
        due = self._core.deadline()
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(due - now, 0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.handle_soon(Tick(), "tick")

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self._connected_at = time.monotonic()
        self.handle_soon(Connection(connected), "connection")
