"""Callers share rows, steps and the queue: who asks more often does not get more."""

from __future__ import annotations

from random import Random

import pytest
from fake_stages import FakeMesh, expected

from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.routing import Hop
from mesh.coordinator.core.scheduler import Scheduler
from mesh.coordinator.core.session import GenerationRequest, Session, State
from mesh.errors import Busy
from mesh.types import LayerRange

CHUNK = 64


def make(*, rows: int, queue: int = 64) -> FakeMesh:
    mesh = FakeMesh(Core(CoreConfig(2, queue_limit=queue), Random(0)))
    mesh.join("s", LayerRange(0, 2), rows=rows, context=512, chunk=CHUNK)
    return mesh


def ask(mesh: FakeMesh, name: str, caller: str, *, prompt: int = 3, most: int = 5) -> None:
    mesh.submit(GenerationRequest(name, tuple(number % 50 for number in range(prompt)), most, None, caller=caller))


def test_a_caller_with_few_sessions_does_not_wait_for_a_crowd() -> None:
    """Two rows, which the crowd has; the one that came last is the first that gets a row."""
    mesh, random = make(rows=2), Random(1)
    for number in range(8):
        ask(mesh, f"crowd{number}", "crowd")
    ask(mesh, "one", "somebody")
    while "one" not in mesh.ended:
        assert mesh.deliver(random)
    assert len(mesh.ended) <= 4, "it has waited for more than the sessions that had rows"
    mesh.settle(random)
    assert all(mesh.tokens[name] == expected(request) for name, request in mesh.requests.items())


def test_sessions_of_one_caller_go_by_arrival() -> None:
    mesh, random = make(rows=1), Random(2)
    for number in range(6):
        ask(mesh, f"r{number}", "somebody")
    mesh.settle(random)
    assert list(mesh.ended) == [f"r{number}" for number in range(6)]


@pytest.mark.parametrize(("caller", "may_wait"), [("somebody", 6), ("", 8)])
def test_a_named_caller_leaves_room_in_the_queue(caller: str, may_wait: int) -> None:
    mesh = make(rows=1, queue=8)
    for number in range(12):
        ask(mesh, f"r{number}", caller)
    assert len(mesh.rejected) == 12 - 1 - may_wait
    error = mesh.rejected["r11"].error
    assert isinstance(error, Busy) and ("yours" in str(error)) == bool(caller)
    ask(mesh, "other", "another")
    assert ("other" in mesh.rejected) == (not caller)
    mesh.settle(Random(3))


def session(number: int, caller: str, prompt: int) -> Session:
    request = GenerationRequest(f"s{number}", tuple(range(prompt)), 10, None, caller=caller)
    made = Session(request, number, 0.0, state=State.PREFILLING)
    made.route, made.rows = (Hop(LayerRange(0, 2), "a"),), {0: number}
    return made


def parts(sessions: list[Session], *, late: tuple[int, list[Session]] = (-1, [])) -> list[list[tuple[str, int]]]:
    """Of each frame: (caller, tokens of prompts). `late`: sessions that come before that frame."""
    callers = {each.key: each.caller for each in (*sessions, *late[1])}
    scheduler = Scheduler(lambda route: CHUNK, lambda route: 1, lambda route: True, 2.5)
    for each in sessions:
        scheduler.begin(each)
    frames: list[list[tuple[str, int]]] = []
    while True:
        if len(frames) == late[0]:
            for each in late[1]:
                scheduler.begin(each)
        out = next(iter(scheduler.plan()), None)
        if out is None:
            return frames
        frames.append([(callers[row.key], len(row.tokens)) for row in out.rows])
        scheduler.landed(out.frame, 0.01)


def tokens_of(frames: list[list[tuple[str, int]]], caller: str) -> int:
    return sum(tokens for frame in frames for whose, tokens in frame if whose == caller)


def test_callers_have_as_many_tokens_of_their_prompts_computed() -> None:
    many = [session(number, "many", 300) for number in range(1, 9)]
    frames = parts([*many, session(9, "one", 600)])
    until = max(index for index, frame in enumerate(frames) if any(caller == "one" for caller, _ in frame)) + 1
    assert abs(tokens_of(frames[:until], "many") - tokens_of(frames[:until], "one")) <= 2 * CHUNK
    assert tokens_of(frames, "many") == 8 * 300 and tokens_of(frames, "one") == 600


def test_who_comes_later_is_not_owed_what_others_had_before() -> None:
    first = [session(number, "first", 500) for number in (1, 2)]
    frames = parts(first, late=(5, [session(3, "later", 400)]))
    both = frames[5 : 5 + 2 * 400 // CHUNK]
    assert abs(tokens_of(both, "first") - tokens_of(both, "later")) <= 2 * CHUNK


def test_within_a_caller_a_short_prompt_overtakes_a_long_one() -> None:
    frames = parts([session(1, "", 1000)], late=(2, [session(2, "", 10)]))
    assert frames[2][0] == ("", 10)
