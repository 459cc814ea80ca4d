"""What the loss of a shard costs: nothing with a mirror, a prefill of the history with a new replica, and never a token."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from fake_stages import FakeMesh, expected, session_of

from mesh.coordinator.core.events import Announcement, CloseRow, Connection, Probe, ProbeAnswered, ReplicaGone, RowOpened, Suspicion, Tick
from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.routing import Replica, Replicas
from mesh.coordinator.core.session import GenerationRequest
from mesh.errors import Unavailable
from mesh.types import LayerRange

RANGES = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]


def make(*, replicas: int = 2, mirror: bool = False, rows: int = 8) -> FakeMesh:
    mesh = FakeMesh(Core(CoreConfig(6), Random(0)))
    for number in range(replicas):
        for layers in RANGES:
            mesh.join(f"s{layers.start}-{number}", layers, rows=rows, context=256, chunk=16, mirrors=mirror)
    return mesh


def begin(mesh: FakeMesh, random: Random, *, prompt: int = 40, most: int = 60, until: int = 5) -> GenerationRequest:
    request = GenerationRequest("r", tuple(number % 50 for number in range(prompt)), most, None)
    mesh.submit(request)
    while len(mesh.tokens["r"]) < until:
        assert mesh.deliver(random)
    return request


def route(mesh: FakeMesh) -> list[str]:
    """The shard of each stage, also while rows are only asked for."""
    session = session_of(mesh, "r")
    assert session.choices is not None
    return [str(choice.shard) for choice in session.choices]


def prefilled(mesh: FakeMesh, since: int) -> int:
    return sum(len(row.tokens) for frame in mesh.frames[since:] if frame.kind == "prefill" for row in frame.rows)


def pass_time(mesh: FakeMesh, random: Random, until: Callable[[], object], most_s: float = 60.0) -> float:
    """Let every deadline pass and every message arrive, until the condition holds. Returns the seconds that this took."""
    began = mesh.now
    mesh.settle(random)
    while not until():
        due = mesh.core.deadline()
        assert due is not None, "nothing will ever happen"
        mesh.now = max(mesh.now, due)
        assert mesh.now - began < most_s
        mesh.event(Tick())
        mesh.settle(random)
    return mesh.now - began


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("until", [0, 5], ids=["mid-prefill", "mid-decode"])
def test_a_mirror_steps_in_and_nothing_is_computed_again(stage: int, until: int) -> None:
    mesh, random = make(mirror=True), Random(stage)
    request = begin(mesh, random, prompt=90, until=until)
    if until == 0:
        while session_of(mesh, "r").done == 0:
            mesh.deliver(random)
    else:
        mesh.deliver(random)
    dead, done, since = route(mesh)[stage], session_of(mesh, "r").done, len(mesh.frames)
    mesh.kill(dead)
    assert dead not in route(mesh)
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request)
    # what was still on its way to the mirror is sent again
    assert prefilled(mesh, since) <= (90 - done + 2 * 16 if until == 0 else 8)
    assert mesh.core.counters.failovers == 1
    assert [pause.kind for pause in mesh.core.pauses] == ["mirror"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_a_mirror_the_history_is_computed_again_once(stage: int) -> None:
    mesh, random = make(), Random(stage)
    request = begin(mesh, random)
    before, since, given = route(mesh), len(mesh.frames), len(mesh.tokens["r"])
    mesh.kill(before[stage])
    after = route(mesh)
    assert [a == b for a, b in zip(before, after, strict=True)] == [index != stage for index in range(3)]
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request)
    assert prefilled(mesh, since) == 40 + given
    assert [pause.kind for pause in mesh.core.pauses] == ["replay"]


def test_an_answer_that_comes_after_the_shard_was_asked_again_does_not_close_the_row() -> None:
    """The close and the later request go by different subjects, so the close could arrive first and take what the row holds."""
    mesh = make(mirror=True)
    mesh.submit(GenerationRequest("r", (1, 2, 3), 5, None))
    session = session_of(mesh, "r")
    first, mirror = route(mesh)[0], session.mirrors[0]
    mesh.kill(first)
    assert (session.epoch, route(mesh)[0]) == (2, mirror)
    late = mesh.core.handle(RowOpened(session.key, 1, 0, mirror, 0), mesh.now)
    assert not [effect for effect in late if isinstance(effect, CloseRow)]
    unknown = RowOpened(session.key + 1, 1, 0, mirror, 0)
    assert mesh.core.handle(unknown, mesh.now) == [CloseRow(unknown.key, 1, mirror)]
    mesh.settle(Random(0))
    assert mesh.tokens["r"] == expected(mesh.requests["r"])


@pytest.mark.parametrize("mirror", [False, True])
def test_the_replacement_dies_too(mirror: bool) -> None:
    mesh, random = make(replicas=3, mirror=mirror), Random(1)
    request = begin(mesh, random)
    mesh.kill(route(mesh)[1])
    mesh.kill(route(mesh)[1])  # before it has said anything
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request)


def test_with_no_replica_left_it_waits_for_one_to_join() -> None:
    mesh, random = make(replicas=1), Random(2)
    request = begin(mesh, random)
    mesh.kill("s2-0")
    mesh.settle(random)
    for _ in range(20):
        mesh.now += 1.0
        mesh.event(Tick())
    assert not mesh.ended
    mesh.join("late", RANGES[1], context=256)
    mesh.settle(random)
    assert mesh.ended["r"].reason == "length" and mesh.tokens["r"] == expected(request)


def test_a_session_fails_only_after_failover_timeout_with_an_error_that_names_it() -> None:
    mesh, random = make(replicas=1), Random(3)
    begin(mesh, random)
    mesh.kill("s2-0")
    mesh.settle(random)
    mesh.now += 29.5
    mesh.event(Tick())
    assert not mesh.ended
    mesh.now += 1.0
    mesh.event(Tick())
    error = mesh.ended["r"].error
    assert isinstance(error, Unavailable) and "30 s" in str(error) and "layers 2-4" in str(error)


def test_a_wait_that_another_coordinator_began_goes_on() -> None:
    mesh, random = make(replicas=1), Random(3)
    mesh.kill("s2-0")
    mesh.submit(GenerationRequest("r", (1, 2), 5, None, waited_s=20.0))
    took = pass_time(mesh, random, lambda: "r" in mesh.ended)
    assert took == pytest.approx(CoreConfig(6).failover_timeout_s - 20.0, abs=0.5)
    error = mesh.ended["r"].error
    assert isinstance(error, Unavailable) and error.waited_s == CoreConfig(6).failover_timeout_s


@pytest.mark.parametrize(
    ("ranges", "missing"),
    [
        ([], ["0-6"]),
        ([(2, 4)], ["0-2", "4-6"]),
        ([(0, 2), (2, 4), (4, 6)], []),
        ([(0, 3), (2, 6)], ["3-6"]),
        ([(0, 2), (1, 4), (4, 6)], ["2-4"]),
    ],
)
def test_the_layers_that_no_shard_serves(ranges: list[tuple[int, int]], missing: list[str]) -> None:
    replicas = Replicas(6, "least_loaded", Random(0))
    for number, (start, stop) in enumerate(ranges):
        replicas.seen(Replica(f"s{number}", LayerRange(start, stop), 4, 4, 64, 16))
    assert list(map(str, replicas.missing())) == missing


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_unreported_death_is_found_by_asking(stage: int) -> None:
    mesh, random = make(), Random(stage)
    request = begin(mesh, random, until=30)
    mesh.kill(route(mesh)[stage], noticed=False)
    mesh.settle(random)
    waited = pass_time(mesh, random, lambda: "r" in mesh.ended)
    assert mesh.tokens["r"] == expected(request)
    assert mesh.core.counters.suspected == 0 and waited < 0.1  # medians are 0 here: the floor


def test_a_connection_that_ends_is_a_reason_to_ask_at_once() -> None:
    mesh, random = make(), Random(5)
    request = begin(mesh, random)
    mesh.kill(route(mesh)[0], noticed=False)
    mesh.event(Suspicion())
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request) and mesh.now == 0.0


def test_a_shard_that_does_not_answer_is_left_and_its_late_frames_change_nothing() -> None:
    mesh, random = make(), Random(6)
    request = begin(mesh, random, until=30)
    slow = route(mesh)[1]
    mesh.shards[slow].stopped = True
    mesh.settle(random)
    waited = pass_time(mesh, random, lambda: mesh.core.counters.suspected)
    assert 1.0 <= waited <= 2.0
    mesh.shards[slow].stopped = False
    late = mesh.core.counters.late
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request)
    assert mesh.core.counters.late > late and mesh.core.counters.suspected == 1
    assert not mesh.shards[slow].reservations


def test_a_slow_step_is_awaited_while_its_shard_confirms_that_it_has_it() -> None:
    mesh, random = make(), Random(7)
    request = begin(mesh, random, until=30)
    while not mesh.flights or not any(key[1].startswith("s0") and box for key, box in mesh.boxes.items()):
        mesh.deliver(random)
    (number,) = mesh.flights
    held, mesh.boxes = mesh.boxes, {}
    for _ in range(40):
        mesh.now += 0.1
        mesh.event(Tick())
        asks = [(pair, message) for pair, box in mesh.boxes.items() for message in box if isinstance(message, Probe)]
        mesh.boxes = {}
        for pair, message in asks:
            mesh.event(ProbeAnswered(pair[1], message.asked_at, frozenset((number,)) if pair[1].startswith("s0") else frozenset()))
    assert mesh.core.counters.restarts == 0
    mesh.boxes = held
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.restarts == 0


def test_a_frame_that_was_lost_everywhere_is_sent_again_and_nothing_is_prefilled() -> None:
    mesh, random = make(replicas=1), Random(8)
    request = begin(mesh, random, until=30)
    while not mesh.flights:
        mesh.deliver(random)
    mesh.boxes.clear()
    since = len(mesh.frames)
    pass_time(mesh, random, lambda: "r" in mesh.ended)
    assert mesh.tokens["r"] == expected(request) and prefilled(mesh, since) == 0
    assert [pause.kind for pause in mesh.core.pauses] == ["resend"]


def test_no_shard_is_suspected_while_this_side_is_disconnected() -> None:
    mesh, random = make(replicas=1), Random(9)
    request = begin(mesh, random)
    while not mesh.flights:
        mesh.deliver(random)
    mesh.boxes.clear()  # the server takes with it what is under way
    mesh.event(Connection(False))
    for _ in range(100):
        mesh.now += 1.0
        mesh.event(Tick())
    assert not mesh.ended and mesh.core.deadline() is None and not mesh.core.counters.asked
    mesh.event(Connection(True))
    pass_time(mesh, random, lambda: "r" in mesh.ended, most_s=2.0)
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.suspected == 0


@pytest.mark.parametrize("mirror", [False, True])
def test_a_shard_that_drains_is_left_at_once_where_another_can_take_over(mirror: bool) -> None:
    mesh, random = make(mirror=mirror), Random(10)
    request = begin(mesh, random)
    leaving = route(mesh)[1]
    mesh.lease(leaving, draining=True)
    assert leaving not in route(mesh)
    mesh.settle(random)
    assert not mesh.shards[leaving].reservations
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.failovers == 1


def test_a_shard_that_drains_alone_is_used_until_the_end() -> None:
    mesh, random = make(replicas=1), Random(11)
    request = begin(mesh, random)
    mesh.lease("s2-0", draining=True)
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.restarts == 0


def test_the_death_of_a_mirror_disturbs_no_session() -> None:
    mesh, random = make(mirror=True), Random(12)
    request = begin(mesh, random)
    session = session_of(mesh, "r")
    assert len(session.mirrors) == 3
    mesh.kill(session.mirrors[1])
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.restarts == 0


def test_failovers_and_suspicions_are_announced() -> None:
    mesh, random = make(), Random(13)
    begin(mesh, random)
    dead = route(mesh)[2]
    told = [effect for effect in mesh.core.handle(ReplicaGone(dead), mesh.now) if isinstance(effect, Announcement)]
    assert [(event.kind, event.who) for event in told] == [("failed_over", dead)]


def test_a_suspected_shard_that_says_its_lease_is_preferred_again_only_when_it_has_answered() -> None:
    """It may be cut off in one direction: what it says arrives, and it hears nothing."""
    mesh, random = make(replicas=2), Random(3)
    for name in [name for name in mesh.shards if name.endswith("-0")]:
        mesh.core._state.replicas.suspect(name)
        mesh.shards[name].stopped = True
        mesh.lease(name)
    for number in range(4):
        mesh.submit(GenerationRequest(f"r{number}", (1, 2), 1, None))
        session = mesh.session(f"r{number}")
        assert session is not None and all(shard.endswith("-1") for shard in session.shards), "it went to a shard that is suspected"
        mesh.settle(random)
    for shard in mesh.shards.values():
        shard.stopped = False
    mesh.settle(random)
    assert not any(entry.suspected for entry in mesh.core._state.replicas._entries.values())
