"""One turn of the core: an event goes in, and what follows from it is sent and done in the right order.

The stages wait for the next step. So a turn sends its frames first, and does everything else afterwards. The driver also calls the core
when its deadline is due, and tells it whether this coordinator is connected.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from mesh.bus import Bus
from mesh.coordinator.core.events import CancelSession, Connection, Effect, Event, FinishSession, FrameOut, Tick
from mesh.coordinator.core.machine import Core
from mesh.coordinator.outbox import Outbox
from mesh.telemetry.seldom import Seldom

__all__ = ["CoreDriver"]

seldom = Seldom(logging.getLogger("mesh.coordinator"))

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class CoreDriver:
    """`carry_out(effects)` does what the core wants done, other than sending frames, and returns the events that follow from it; it is
    set (effects.py) before the first event. `counters`: `core`, the turns of the core that failed unexpectedly.

    A turn that fails ends the session that it is about, if it is about one. The core goes on with the next event.
    """

    def __init__(self, bus: Bus, core: Core, outbox: Outbox) -> None:
        self.carry_out: Callable[[list[Effect]], list[CancelSession | FinishSession]]
        self.counters: Counter[str] = Counter()
        self._bus = bus
        self._core = core
        self._outbox = outbox
        self._frozen = False
        self._pause_s = 0.0  # before the next tick, after turns that failed
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
        try:
            effects = self._core.handle(event, now)
            self._pause_s = 0.0
        except Exception as error:
            self.counters["core"] += 1
            seldom.error(f"a defect of the core at {type(event).__name__}", error)
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            effects = self._core.after_defect(event, error)
        self._outbox.frames(effect for effect in effects if isinstance(effect, FrameOut))
        self._outbox.send_now()
        if frames_sent is not None:
            frames_sent()
        following = self.carry_out(effects)
        self._arm(now)
        self._outbox.send_now()
        for each in following:
            self._apply(each)

    def _arm(self, now: float) -> None:
        """Have the core called at its deadline. A timer that is too early is left as it is: the core then gives a new deadline."""
        due = self._core.deadline()
        if due is not None:
            due = max(due, now + self._pause_s)
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
