"""Which tokens the gateway accepts, and how many requests each may make."""

from __future__ import annotations

from typing import Any

import pytest
from edge_tools import token, verifier

from mesh.errors import BadRequest, Busy, Denied
from mesh.gateway.auth import Gate, NotAuthenticated
from mesh.gateway.generation import Cost, cost_of
from mesh.gateway.settings import Limits
from mesh.http.listener import is_loopback
from mesh.http.tokens import Quota


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def gate(clock: Clock, **limits: int) -> Gate:
    return Gate(verifier(), Limits(quota=Quota(**limits)), clock)


def test_without_a_verifier_everyone_may_do_everything() -> None:
    caller = Gate(None, Limits(quota=Quota(1))).admit(None, "admin")
    for _ in range(5):
        caller.charge(1_000_000)
    assert caller.may("admin")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer abc", "bearer  ", f"Token {'x' * 20}"])
def test_a_request_without_a_token_is_refused(header: str | None) -> None:
    with pytest.raises(NotAuthenticated):
        gate(Clock()).admit(header, "generate")
    assert gate(Clock()).identify(header) is None


def test_a_scope_is_needed_and_admin_has_them_all() -> None:
    door = gate(Clock())
    generate, admin = f"Bearer {token('generate')}", f"bearer {token('admin')}"
    assert door.admit(generate, "generate").name == "somebody"
    for scope in ("batch", "admin"):
        with pytest.raises(Denied, match=f"needs the scope {scope}") as caught:
            door.admit(generate, scope)
        assert caught.value.code == "denied"
        door.admit(admin, scope)


def test_requests_a_minute_are_counted_for_each_subject_and_come_back_evenly() -> None:
    clock = Clock()
    door = gate(clock)
    one, same = (f"Bearer {token('generate', requests_per_minute=3)}" for _ in range(2))
    other = f"Bearer {token('generate', subject='another', requests_per_minute=3)}"
    for header in (one, same, one):
        door.admit(header, "generate").charge(1)
    with pytest.raises(Busy) as caught:
        door.admit(one, "generate").charge(1)
    assert caught.value.retry_after_s == pytest.approx(20)
    door.admit(other, "generate").charge(1)
    clock.now += 19.9
    with pytest.raises(Busy):
        door.admit(one, "generate").charge(1)
    clock.now += 0.2
    door.admit(one, "generate").charge(1)


def test_reserved_tokens_that_were_not_used_are_given_back() -> None:
    clock = Clock()
    door = gate(clock, tokens_per_minute=600)
    header = f"Bearer {token('generate')}"
    first = door.admit(header, "generate")
    charged = first.charge(600)
    with pytest.raises(Busy):
        door.admit(header, "generate").charge(1)
    first.settle(charged, 100)
    second = door.admit(header, "generate")
    second.settle(second.charge(500), 700)  # a long prompt: 200 tokens of debt
    with pytest.raises(Busy) as caught:
        door.admit(header, "generate").charge(1)
    assert caught.value.retry_after_s == pytest.approx(20.1)
    clock.now += 20.2
    door.admit(header, "generate").charge(1)


def test_a_batch_counts_as_many_requests_and_one_larger_than_a_minute_has_is_refused() -> None:
    clock = Clock()
    door = gate(clock, requests_per_minute=10)
    header = f"Bearer {token('batch')}"
    door.admit(header, "batch").charge(1, requests=8)
    with pytest.raises(Busy):
        door.admit(header, "batch").charge(1, requests=8)
    clock.now += 60
    with pytest.raises(BadRequest, match="25 requests"):
        door.admit(header, "batch").charge(1, requests=25)
    door.admit(header, "batch").charge(1, requests=10)


def test_what_a_call_may_cost_is_known_before_it_begins() -> None:
    """Nothing is lent: what a minute never has is refused for good, what is not left now until it is there. A guess at a prompt is no
    reason to refuse for good."""
    clock = Clock()
    door = gate(clock, tokens_per_minute=50)
    header = f"Bearer {token('batch')}"
    with pytest.raises(BadRequest, match="6,000,000 tokens") as caught:
        door.admit(header, "batch").charge(6_000_000, requests=2)
    assert caught.value.field == "max_tokens"
    assert door.admit(header, "batch").charge(10, prompt=1000) == 50
    with pytest.raises(Busy) as busy:
        door.admit(header, "batch").charge(20)
    assert busy.value.retry_after_s == pytest.approx(24)
    clock.now += 24.1
    assert door.admit(header, "batch").charge(20) == 20
    assert door.accounts.of("somebody").tokens.amount <= 50


def test_the_cost_of_a_call_counts_all_its_requests() -> None:
    limits = Limits(default_max_tokens=100)
    requests: list[dict[str, Any]] = [
        {"prompt": "x" * 40, "max_tokens": 5},
        {"tokens": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "y" * 20}], "max_tokens": 7},
    ]
    assert cost_of(requests, limits) == Cost(requests=3, tokens=5 + 100 + 3 + 7, prompt=15)


def test_the_tokens_own_limit_is_over_the_configured_one() -> None:
    door = gate(Clock(), requests_per_minute=1)
    header = f"Bearer {token('generate', requests_per_minute=5)}"
    for _ in range(5):
        door.admit(header, "generate").charge(1)


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("127.0.0.1.evil.example", False), ("0", False), ("", False)],
)  # fmt: skip
def test_only_this_machine_reaches_loopback(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_a_subject_has_the_limits_of_its_token_then_its_own_then_those_of_all() -> None:
    limits = Limits(quota=Quota(1, 10, 1, 1), subjects={"somebody": Quota(2, None, 2, None)})
    door = Gate(verifier(), limits, Clock())
    assert door.admit(f"Bearer {token('batch', requests_per_minute=5)}", "batch").quota == Quota(5, 10, 2, 1)
    assert door.admit(f"Bearer {token('batch', subject='another')}", "batch").quota == Quota(1, 10, 1, 1)


def test_sessions_at_once_and_requests_of_a_batch_are_bounded() -> None:
    door = gate(Clock(), concurrent_sessions=2, requests_per_batch=3)
    caller = door.admit(f"Bearer {token('batch')}", "batch")
    caller.check_batch(3)
    with pytest.raises(BadRequest, match="4 entries"):
        caller.check_batch(4)
    with pytest.raises(BadRequest, match="3 generations at once"), caller.session(3):
        pass
    with caller.session(), caller.session(), pytest.raises(Busy, match="2 generations at once"), caller.session():
        pass
    with caller.session(2):
        pass
    assert door.accounts.of("somebody").usage.refused == 1


def test_what_one_gateway_says_counts_at_another() -> None:
    """The second gateway has never seen the subject; it forgets at the rate that the first one measured by."""
    clock = Clock()
    here, there = gate(clock), gate(clock)
    header = f"Bearer {token('generate', requests_per_minute=6, tokens_per_minute=600, concurrent_sessions=2)}"
    caller = here.admit(header, "generate")

    def share() -> None:
        for spending in here.accounts.news(100):
            there.accounts.of(spending.subject).hear("here", spending)

    with caller.session(2):
        charged = caller.charge(600, requests=4)
        share()
        with pytest.raises(Busy, match="at once"), there.admit(header, "generate").session():
            pass
        with pytest.raises(Busy, match="tokens a minute"):
            there.admit(header, "generate").charge(1)
        clock.now += 4  # the sessions of a gateway that is not heard any more do not count
        with there.admit(header, "generate").session(2):
            pass
        caller.settle(charged, 100)
    share()
    assert not here.accounts.news(100)
    with pytest.raises(Busy, match="6 times a minute"):
        there.admit(header, "generate").charge(1, requests=3)
    there.admit(header, "generate").charge(500, requests=2)
    clock.now += 120
    there.admit(header, "generate").charge(600, requests=6)
