"""Which other coordinators of the model live. Deciding only: what was heard and when is passed in.

A coordinator says that it lives every few seconds, and is asked several times a second, on a subject that only its process
listens on: the server answers at once when nobody listens there any more, so a process that died is noticed within GONE_S, and one
that was merely cut off from its server for a moment (which looks the same) is not. One that listens and does not answer, because it is
suspended or cut off, is given up after SILENT_S. To give up one that lives costs nothing but work: session records are compared
and set, so it loses what others took, and keeps the rest.

Who was suspended itself, or cut off, has heard nobody, which says nothing of anybody: `excuse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GONE_S", "SILENT_S", "Peer", "Peers"]

GONE_S: Final = 0.5
SILENT_S: Final = 4.0
_FORGET_S: Final = 60.0


@dataclass(slots=True)
class Peer:
    """Another coordinator's process. Times are of the caller's clock, in seconds."""

    instance: str
    name: str
    heard_at: float
    missing_since: float | None = None  # nobody has listened since then
    given_up: bool = False


class Peers:
    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._peers: dict[str, Peer] = {}

    def heard(self, instance: str, name: str, now: float) -> bool:
        """It lives. Whether it was not known to."""
        if instance == self._instance:
            return False
        peer = self._peers.get(instance)
        new = peer is None or peer.given_up
        self._peers[instance] = Peer(instance, name, now)
        return new

    def missing(self, instance: str, now: float) -> None:
        """Nobody listens on its subject."""
        peer = self._peers.get(instance)
        if peer is not None and peer.missing_since is None:
            peer.missing_since = now

    def left(self, instance: str) -> None:
        """It said that it ends."""
        self._peers.pop(instance, None)

    def excuse(self, now: float) -> None:
        """Nothing could be heard until now."""
        for peer in self._peers.values():
            if not peer.given_up:
                peer.heard_at, peer.missing_since = now, None

    def gone(self, now: float) -> list[Peer]:
        """Those who are given up now, each once."""
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
        """As far as is known; False for one never heard of."""
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
        """Whom to ask. Those given up too: a suspended process may go on."""
        return list(self._peers)

    def named(self, name: str) -> bool:
        """Whether any that lives has this name."""
        return any(peer.name == name and not peer.given_up for peer in self._peers.values())
