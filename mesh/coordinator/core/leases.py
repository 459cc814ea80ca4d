"""Which shards live, by what was heard of them. It only decides: what was heard, and when, is passed in.

A shard says its lease every RENEW_S seconds over plain NATS. Silence proves nothing: messages can be lost, and what carries them can
stand still. So a shard that has been silent for OVERDUE_S is probed, again and again:

    no process listens on its subject                          it is gone at once (not decided here)
    it answers                                                 it stays, with the last lease that is known
    neither lease nor answer for GONE_S, and a probe waited    it is gone; its next lease brings it back
    for ANSWER_S

Of two processes of one name the later instance counts. A lease of the earlier one is ignored while the later one is heard.

A coordinator that was itself suspended or cut off has heard no shard. That says nothing about the shards: see `excuse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.protocol.subjects import LEASE_TTL_S, RENEW_S

__all__ = ["ANSWER_S", "GONE_S", "OVERDUE_S", "Leases"]

OVERDUE_S: Final = 2 * RENEW_S
GONE_S: Final = LEASE_TTL_S
ANSWER_S: Final = 1.0


@dataclass(slots=True)
class _Heard:
    """instance: of the shard. at: when the shard was heard last. asked_at: the first probe since then."""

    instance: str
    at: float
    asked_at: float | None = None


class Leases:
    """Times are seconds on the caller's clock."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    def heard(self, shard: str, instance: str, now: float) -> bool:
        """A lease came. False: it is of an earlier instance than the one that serves, and counts for nothing."""
        known = self._heard.get(shard)
        if known is not None and instance < known.instance and now - known.at < OVERDUE_S:
            return False
        self._heard[shard] = _Heard(instance, now)
        return True

    def answered(self, shard: str, now: float) -> None:
        """The shard has answered a probe."""
        known = self._heard.get(shard)
        if known is not None:
            known.at, known.asked_at = now, None

    def gone(self, shard: str) -> None:
        """The shard is known to be gone."""
        self._heard.pop(shard, None)

    def excuse(self, now: float) -> None:
        """Nothing could be heard until now: the time before does not count."""
        for known in self._heard.values():
            known.at, known.asked_at = now, None

    def instance(self, shard: str) -> str | None:
        """The instance of a shard that lives, as far as is known."""
        known = self._heard.get(shard)
        return None if known is None else known.instance

    def ages(self, now: float) -> dict[str, float]:
        """Seconds since each shard was heard."""
        return {shard: max(now - known.at, 0.0) for shard, known in self._heard.items()}

    def check(self, now: float) -> tuple[list[str], list[str]]:
        """(shards to probe now, shards that are gone). A shard that is gone is forgotten."""
        probe, gone = [], []
        for shard, known in list(self._heard.items()):
            silent_s = now - known.at
            if silent_s < OVERDUE_S:
                continue
            if known.asked_at is not None and silent_s >= GONE_S and now - known.asked_at >= ANSWER_S:
                del self._heard[shard]
                gone.append(shard)
                continue
            if known.asked_at is None:
                known.asked_at = now
            probe.append(shard)
        return probe, gone
