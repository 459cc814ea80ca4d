"""When a coordinator gives another one up, and when it does not."""

from __future__ import annotations

from mesh.coordinator.core.peers import GONE_S, SILENT_S, Peers


def names(peers: Peers, now: float) -> list[str]:
    return [peer.instance for peer in peers.gone(now)]


def test_a_coordinator_that_does_not_listen_is_given_up_soon_and_once() -> None:
    peers = Peers("me")
    assert peers.heard("a", "c-a", 0.0)
    peers.missing("a", 1.0)
    assert names(peers, 1.0 + GONE_S / 2) == [] and peers.lives("a")
    assert names(peers, 1.0 + GONE_S) == ["a"]
    assert names(peers, 1.5 + GONE_S) == [] and not peers.lives("a") and peers.given_up("a")


def test_one_that_reconnects_meanwhile_is_not() -> None:
    peers = Peers("me")
    peers.heard("a", "c-a", 0.0)
    peers.missing("a", 1.0)
    assert not peers.answered("a", "c-a", 1.0 + GONE_S / 2)
    assert names(peers, 1.0 + GONE_S) == []


def test_a_coordinator_that_listens_without_answering_is_given_up_later_and_may_come_back() -> None:
    peers = Peers("me")
    peers.heard("a", "c-a", 0.0)
    assert names(peers, SILENT_S - 0.1) == []
    assert names(peers, SILENT_S) == ["a"]
    assert "a" in peers.watched()
    assert not peers.heard("a", "c-a", SILENT_S + 1) and not peers.lives("a"), "only an answer shows that it hears"
    assert peers.answered("a", "c-a", SILENT_S + 1) and peers.lives("a")


def test_heartbeats_alone_do_not_show_that_a_coordinator_hears() -> None:
    peers = Peers("me")
    for tenth in range(10 * round(SILENT_S)):
        peers.heard("a", "c-a", tenth / 10)
    assert names(peers, SILENT_S) == ["a"]


def test_no_peer_is_given_up_for_a_time_in_which_this_side_was_deaf() -> None:
    peers = Peers("me")
    peers.heard("a", "c-a", 0.0)
    peers.missing("a", 0.5)
    peers.excuse(100.0)
    assert names(peers, 100.1) == []
    assert names(peers, 100.0 + SILENT_S) == ["a"]
    peers.excuse(200.0)
    assert not peers.lives("a"), "what was given up stays so until it is heard"


def test_one_that_left_or_is_oneself_is_not_watched() -> None:
    peers = Peers("me")
    assert not peers.heard("me", "c-me", 0.0)
    peers.heard("a", "same-name", 0.0)
    peers.heard("b", "same-name", 0.0)
    peers.left("a")
    assert peers.watched() == ["b"] and not peers.known("a") and peers.known("me")


def test_coordinators_that_left_long_ago_are_forgotten() -> None:
    peers = Peers("me")
    peers.heard("a", "c-a", 0.0)
    peers.gone(SILENT_S)
    peers.gone(1000.0)
    assert peers.watched() == []
