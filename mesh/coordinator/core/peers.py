"""Which other coordinators of the model live. It only decides: what was heard, and when, is passed in.

A coordinator sends a heartbeat every few seconds, by which the others learn that it is there. It is probed several times a second, on a
subject that only its process listens on, and lives by its answers alone: one that sends heartbeats and hears nothing does no work. When
nobody listens there any more, the server says so at once. So a process that died is noticed within GONE_S; one that was merely cut off
from its server for a moment, which looks the same, is not given up. A process that listens and does not answer, because it is suspended
or cut off in one direction or both, is given up after SILENT_S. To give up a coordinator that lives costs only work: session records are
written by compare and set, so it loses the sessions that others took, and keeps the rest.

A coordinator that was itself suspended or cut off has heard nobody. That says nothing about the others: see `excuse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GONE_S", "SILENT_S", "Peer", "Peers"]

GONE_S: Final = 0.5
SILENT_S: Final = 2.0
_FORGET_S: Final = 60.0


@dataclass(slots=True)
class Peer:
    """Another coordinator's process. Times are seconds on the caller's clock."""

    instance: str
    name: str
    heard_at: float
    missing_since: float | None = None  # since when nobody listens on its subject
    given_up: bool = False


class Peers:
    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._peers: dict[str, Peer] = {}

    def heard(self, instance: str, name: str, now: float) -> bool:
        """A peer has sent a heartbeat. True where nothing was known of it; otherwise that proves nothing."""
        if instance == self._instance or instance in self._peers:
            return False
        self._peers[instance] = Peer(instance, name, now)
        return True

    def answered(self, instance: str, name: str, now: float) -> bool:
        """A peer has answered a probe. True where it was not known that it lives."""
        if instance == self._instance:
            return False
        peer = self._peers.get(instance)
        new = peer is None or peer.given_up
        self._peers[instance] = Peer(instance, name, now)
        return new

    def missing(self, instance: str, now: float) -> None:
        """Nobody listens on a peer's subject."""
        peer = self._peers.get(instance)
        if peer is not None and peer.missing_since is None:
            peer.missing_since = now

    def left(self, instance: str) -> None:
        """A peer has said that it ends."""
        self._peers.pop(instance, None)

    def excuse(self, now: float) -> None:
        """Nothing could be heard until now: the time before does not count."""
        for peer in self._peers.values():
            if not peer.given_up:
                peer.heard_at, peer.missing_since = now, None

    def gone(self, now: float) -> list[Peer]:
        """The peers that are given up now; each is named once."""
        found = []
        for peer in list(self._peers.values()):
            if peer.given_up:
                if now - peer.heard_at > _FORGET_S:
                    del self._peers[peer.instance]
                continue
            missing = peer.missing_since is not None and now - peer.missing_since >= GONE_S
            if missing or now - peer.heard_at >= SILENT_S:
                peer.given_up = True
                found.append(peer)
        return found

    def lives(self, instance: str) -> bool:
        """Whether a peer lives, as far as is known; False for one that was never heard of."""
        peer = self._peers.get(instance)
        return peer is not None and not peer.given_up

    def known(self, instance: str) -> bool:
        return instance == self._instance or instance in self._peers

    def given_up(self, instance: str) -> bool:
        peer = self._peers.get(instance)
        return peer is not None and peer.given_up

    def missing_now(self, instance: str) -> bool:
        peer = self._peers.get(instance)
        return peer is not None and peer.missing_since is not None

    def watched(self) -> list[str]:
        """The instances to probe. Those that were given up too: a suspended process may go on."""
        return list(self._peers)
