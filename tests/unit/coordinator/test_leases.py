from __future__ import annotations

from mesh.coordinator.core.leases import ANSWER_S, GONE_S, OVERDUE_S, Leases
from mesh.protocol.instance import new_instance


def test_a_shard_that_is_silent_is_probed_and_stays_while_it_answers() -> None:
    leases = Leases()
    assert leases.heard("a", "1", 0.0)
    assert leases.check(OVERDUE_S - 0.1) == ([], [])
    now = OVERDUE_S
    while now < 10 * GONE_S:
        assert leases.check(now) == (["a"], [])
        leases.answered("a", now + 0.01)
        now += OVERDUE_S + 0.1
    assert leases.instance("a") == "1"


def test_a_shard_that_neither_speaks_nor_answers_is_gone_once() -> None:
    leases = Leases()
    leases.heard("a", "1", 0.0)
    assert leases.check(OVERDUE_S) == (["a"], [])
    assert leases.check(GONE_S - 0.1) == (["a"], [])
    assert leases.check(GONE_S) == ([], ["a"])
    assert leases.check(2 * GONE_S) == ([], []) and leases.instance("a") is None
    assert leases.heard("a", "1", 3 * GONE_S), "its next lease brings it back"


def test_a_shard_is_not_gone_before_a_probe_has_waited() -> None:
    leases = Leases()
    leases.heard("a", "1", 0.0)
    assert leases.check(100.0) == (["a"], [])
    assert leases.check(100.0 + ANSWER_S / 2) == (["a"], [])
    assert leases.check(100.0 + ANSWER_S) == ([], ["a"])


def test_silence_does_not_count_while_nobody_could_be_heard() -> None:
    leases = Leases()
    leases.heard("a", "1", 0.0)
    leases.check(OVERDUE_S)
    leases.excuse(100.0)
    assert leases.check(100.0 + OVERDUE_S - 0.1) == ([], [])


def test_of_two_instances_the_later_one_counts_while_it_is_heard() -> None:
    leases = Leases()
    assert leases.heard("a", "1", 0.0) and leases.heard("a", "2", 0.1)
    assert not leases.heard("a", "1", 0.2) and leases.instance("a") == "2"
    assert leases.heard("a", "1", 0.1 + OVERDUE_S) and leases.instance("a") == "1"


def test_an_instance_sorts_after_the_one_that_it_replaces_whatever_the_clocks_say() -> None:
    first = new_instance()
    assert new_instance(after=first) > first
    ahead = "f" + first[1:]
    assert new_instance(after=ahead) > ahead
    assert new_instance(after="no instance at all")
