"""Coordinators tell each other what rows of shards hold, so that each finds what another one's sessions have left.

A message that is lost, or comes too late, costs a prompt that is computed as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mesh.bus import Bus, Received, Subscription
from mesh.coordinator.core.events import PrefixKept
from mesh.coordinator.core.prefixes import Remembered
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.outbox import Outbox
from mesh.errors import MeshError
from mesh.protocol import topics
from mesh.protocol.status import KeptPrefix

__all__ = ["KeptPrefixes"]

log = logging.getLogger("mesh.coordinator")


class KeptPrefixes:
    """`instance`: this coordinator's process. `alone()`: whether no other coordinator of the model is there."""

    def __init__(self, bus: Bus, driver: CoreDriver, outbox: Outbox, *, model: str, instance: str, alone: Callable[[], bool]) -> None:
        self._bus = bus
        self._driver = driver
        self._outbox = outbox
        self._model = model
        self._instance = instance
        self._alone = alone
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(topics.KEPT.at(self._model), self._on_kept)

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.stop()

    def tell(self, kept: PrefixKept) -> None:
        """Tell the others, if there are any."""
        if self._alone():
            return
        held = kept.held
        message = KeptPrefix(
            coordinator=self._instance,
            shards=kept.shards,
            digest=held.digest,
            positions=held.positions,
            every=held.every,
            digests=held.digests,
        )
        self._outbox.message(topics.KEPT.at(self._model).subject, message.to_bytes())

    async def _on_kept(self, received: Received) -> None:
        try:
            kept = topics.KEPT.parse(received.data)
        except MeshError as error:
            log.warning("what another coordinator says that shards hold cannot be read: %s", error)
            return
        if kept.coordinator != self._instance:
            held = Remembered(kept.digest, kept.positions, kept.every, kept.digests)
            await self._driver.handle(PrefixKept(kept.shards, held))
