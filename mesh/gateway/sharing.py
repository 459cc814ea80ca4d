"""The accounts of all gateways, kept together over NATS: each gateway says what its callers have spent, and counts what the others say.

Nothing is asked before a request is admitted. Spending is told SHARE_S after it happened, so gateways that are asked at the same moment may
admit more than a quota: docs/adr/0012-quotas-of-several-gateways.md says how much.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Final

from mesh.bus import Bus, Received
from mesh.errors import MeshError
from mesh.gateway.accounts import Accounts
from mesh.protocol import topics
from mesh.protocol.usage import MAX_SPENDING, MAX_SUBJECTS, UsageQuery, UsageReport, UsageSpent

__all__ = ["SHARE_S", "Sharing"]

SHARE_S: Final = 0.05
"""How long spending waits for more of it before the other gateways are told."""
_REMIND_S: Final = 1.0
"""How often running sessions are told again."""


class Sharing:
    """Shares `accounts` with the other gateways, and answers what was used here, while `bus` is open."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._name = secrets.token_hex(8)
        self._changed = asyncio.Event()
        accounts.changed = self._changed.set

    async def start(self, bus: Bus) -> None:
        await bus.subscribe(topics.USAGE_SPENT.at(), self._on_spent)
        await bus.subscribe(topics.USAGE.at(), lambda received: self._on_question(bus, received))
        await bus.require_subscriptions("a gateway")
        bus.keep(lambda: self._tell(bus), "sharing quotas")

    async def _tell(self, bus: Bus) -> None:
        while True:
            try:
                async with asyncio.timeout(_REMIND_S):
                    await self._changed.wait()
                await asyncio.sleep(SHARE_S)
            except TimeoutError:
                self._accounts.remind()
            self._changed.clear()
            while spending := self._accounts.news(MAX_SPENDING):
                try:
                    await bus.send(topics.USAGE_SPENT.at(), UsageSpent(gateway=self._name, spending=tuple(spending)))
                except MeshError:
                    continue  # not connected: this gateway generates nothing meanwhile either

    async def _on_spent(self, received: Received) -> None:
        said = topics.USAGE_SPENT.parse(received.data)
        if said.gateway != self._name:
            for spending in said.spending:
                self._accounts.of(spending.subject).hear(said.gateway, spending)

    async def _on_question(self, bus: Bus, received: Received) -> None:
        query: UsageQuery = topics.USAGE.parse(received.data)
        found = self._accounts.report(query.subject)
        report = UsageReport(
            gateway=self._name,
            since_unix_s=self._accounts.since_unix_s,
            subjects=tuple(found[:MAX_SUBJECTS]),
            omitted=max(len(found) - MAX_SUBJECTS, 0),
        )
        await bus.respond(received, report)
