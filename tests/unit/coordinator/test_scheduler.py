"""Lanes and chunks: which frame goes out when."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from fake_stages import FakeMesh, Sampled, expected, next_token, session_of

from mesh.coordinator.core.events import CancelSession, FrameOut, Result, ResultRow, Tick
from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.session import TERMINAL, TRANSITIONS, Act, GenerationRequest, IllegalTransition, Session, State
from mesh.errors import BadRequest, Busy, PromptTooLong, Unavailable
from mesh.protocol.frame import EMBEDDED
from mesh.types import LayerRange

RANGES = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]


def make(
    *, rows: int = 8, queue: int = 4, context: int = 512, chunk: int = 16, replicas: int = 1, strategy: str = "least_loaded"
) -> FakeMesh:
    mesh = FakeMesh(Core(CoreConfig(6, strategy, queue_limit=queue), Random(0)))  # type: ignore[arg-type]
    for number in range(replicas):
        for layers in RANGES:
            mesh.join(f"s{layers.start}-{number}", layers, rows=rows, context=context, chunk=chunk)
    return mesh


def ask(mesh: FakeMesh, name: str, prompt: int, most: int) -> GenerationRequest:
    request = GenerationRequest(name, tuple(range(prompt)), most, None)
    mesh.submit(request)
    return request


def run_until(mesh: FakeMesh, condition: Callable[[], object], random: Random) -> None:
    while not condition():
        assert mesh.deliver(random), "nothing is under way any more"


def test_every_transition_is_in_the_table_and_no_other_is_possible() -> None:
    for state in State:
        for act in Act:
            session = Session(GenerationRequest("a", (1,), 1, None), 1, 0.0, state=state)
            if act in TRANSITIONS[state]:
                session.act(act)
                assert session.state is TRANSITIONS[state][act]
            else:
                with pytest.raises(IllegalTransition):
                    session.act(act)
    assert all(not TRANSITIONS[state] for state in TERMINAL)


def test_as_many_decode_batches_are_in_flight_as_there_are_stages() -> None:
    mesh, random = make(), Random(1)
    requests = [ask(mesh, f"r{number}", 3, 30) for number in range(6)]
    run_until(mesh, lambda: all(len(mesh.tokens[r.id]) >= 5 for r in requests), random)
    decodes = [flight for flight in mesh.flights.values() if flight.decode]
    assert sorted(len(flight.sessions) for flight in decodes) == [2, 2, 2]
    mesh.settle(random)
    assert all(mesh.tokens[r.id] == expected(r) for r in requests)


@pytest.mark.parametrize(("sessions", "batches"), [(2, [1, 1]), (5, [1, 2, 2]), (7, [3, 4]), (8, [4, 4]), (12, [4, 4, 4]), (32, [16, 16])])
def test_decode_batches_fill_the_rows_that_a_stage_computes_anyway(sessions: int, batches: list[int]) -> None:
    mesh, random = make(rows=32), Random(1)
    requests = [ask(mesh, f"r{number}", 3, 60) for number in range(sessions)]

    def settled() -> bool:
        decodes = [flight for flight in mesh.flights.values() if flight.decode]
        return sorted(len(flight.sessions) for flight in decodes) == batches

    run_until(mesh, lambda: all(len(mesh.tokens[r.id]) >= 20 for r in requests) and settled(), random)
    mesh.settle(random)
    assert all(mesh.tokens[r.id] == expected(r) for r in requests)


def test_shards_that_share_a_processor_take_one_decode_batch_at_a_time() -> None:
    mesh, random = FakeMesh(Core(CoreConfig(6, "least_loaded", queue_limit=4), Random(0))), Random(1)
    for layers, processor in zip(RANGES, ("a", "b", "a"), strict=True):
        mesh.join(f"s{layers.start}", layers, rows=8, context=512, chunk=16, processor=processor)
    requests = [ask(mesh, f"r{number}", 3, 30) for number in range(4)]
    most = 0
    while mesh.deliver(random):
        decodes = [flight for flight in mesh.flights.values() if flight.decode]
        most = max(most, len(decodes) if len(mesh.flights) == len(decodes) else 0)
    assert most == 2
    assert all(mesh.tokens[r.id] == expected(r) for r in requests)


def test_a_single_session_is_one_frame_at_a_time() -> None:
    mesh, random = make(), Random(2)
    request = ask(mesh, "r", 3, 10)
    while mesh.deliver(random):
        assert len(mesh.flights) <= 1
    assert mesh.tokens["r"] == expected(request)


def test_while_others_decode_a_long_prompt_goes_in_parts_with_their_steps() -> None:
    mesh, random = make(chunk=128), Random(3)
    short = ask(mesh, "short", 3, 200)
    run_until(mesh, lambda: len(mesh.tokens["short"]) >= 2, random)
    ask(mesh, "long", 300, 4)
    began = len(mesh.frames)
    while len(mesh.tokens["long"]) == 0:
        assert mesh.deliver(random)
        assert len(mesh.flights) <= len(RANGES)
    if "short" not in mesh.ended:
        parts = [sum(len(row.tokens) for row in out.rows if len(row.tokens) > 1) for out in mesh.frames[began:]]
        assert max(parts) < 128, "no whole chunk"
    assert any(out.kind == "packed" for out in mesh.frames[began:])
    mesh.settle(random)
    assert mesh.tokens["short"] == expected(short)


def test_a_crowd_is_prefilled_together() -> None:
    mesh, random = make(rows=32, queue=32, chunk=64), Random(3)
    requests = [ask(mesh, f"r{number}", 8, 3) for number in range(32)]
    run_until(mesh, lambda: all(mesh.tokens[request.id] for request in requests), random)
    with_prompts = [out for out in mesh.frames if any(len(row.tokens) > 1 for row in out.rows)]
    assert len(with_prompts) <= 12, "four frames would hold all prompts, if none of the sessions decoded"
    mesh.settle(random)
    assert all(mesh.tokens[request.id] == expected(request) for request in requests)


def test_a_prompt_fills_every_stage_while_no_session_decodes() -> None:
    mesh, random = make(), Random(4)
    ask(mesh, "long", 300, 4)
    run_until(mesh, lambda: len(mesh.flights) == 3, random)


def test_a_short_prompt_overtakes_a_long_one_and_is_not_overtaken_for_ever() -> None:
    mesh, random = make(), Random(5)
    ask(mesh, "decoding", 3, 400)
    run_until(mesh, lambda: mesh.tokens["decoding"], random)
    ask(mesh, "long", 400, 2)
    run_until(mesh, lambda: session_of(mesh, "long").sent >= 32, random)
    ask(mesh, "short", 10, 2)
    run_until(mesh, lambda: mesh.tokens["short"], random)
    assert not mesh.tokens["long"]
    number = 0
    while not mesh.tokens["long"]:  # short ones come again and again
        if mesh.session(f"s{number}") is None:
            number += 1
            ask(mesh, f"s{number}", 10, 2)
        assert number < 60, "the long prompt starves"
        mesh.deliver(random)


def test_a_full_queue_refuses_at_once_with_a_time() -> None:
    mesh = make(rows=2, queue=3)
    for number in range(5):
        ask(mesh, f"r{number}", 3, 5)
    assert not mesh.rejected
    ask(mesh, "late", 3, 5)
    error = mesh.rejected["late"].error
    assert isinstance(error, Busy) and error.retry_after_s > 0


def test_a_request_longer_than_every_row_is_refused_at_once() -> None:
    mesh = make(context=32)
    ask(mesh, "long", 30, 5)
    error = mesh.rejected["long"].error
    assert isinstance(error, PromptTooLong) and error.limit == 27


def test_without_a_complete_chain_a_request_waits_and_then_fails_saying_so() -> None:
    mesh = make()
    mesh.kill("s2-0")
    ask(mesh, "r", 3, 5)
    mesh.now = 29.0
    mesh.event(Tick())
    assert not mesh.ended
    mesh.now = 30.5
    mesh.event(Tick())
    assert isinstance(mesh.ended["r"].error, Unavailable) and "have no shard that is ready" in str(mesh.ended["r"].error)


def test_a_request_that_waited_for_a_shard_goes_on_when_it_comes() -> None:
    mesh, random = make(), Random(6)
    mesh.kill("s2-0")
    request = ask(mesh, "r", 3, 5)
    mesh.now = 20.0
    mesh.join("s2-1", RANGES[1])
    mesh.settle(random)
    assert mesh.tokens["r"] == expected(request)


def test_a_cancelled_session_keeps_its_row_until_its_frame_is_back() -> None:
    mesh, random = make(rows=1), Random(7)
    ask(mesh, "first", 3, 50)
    run_until(mesh, lambda: len(mesh.tokens["first"]) == 3 and len(mesh.flights) == 1, random)
    mesh.event(CancelSession("first"))
    second = ask(mesh, "second", 3, 5)
    assert session_of(mesh, "second").state is State.QUEUED
    mesh.settle(random)
    assert mesh.tokens["second"] == expected(second)


def test_a_shard_that_dies_costs_no_token_and_repeats_none() -> None:
    mesh, random = make(replicas=2), Random(8)
    requests = [ask(mesh, f"r{number}", 20, 20) for number in range(6)]
    run_until(mesh, lambda: all(len(mesh.tokens[r.id]) >= 5 for r in requests), random)
    mesh.kill("s2-0")
    mesh.settle(random)
    assert all(mesh.tokens[r.id] == expected(r) for r in requests)
    assert all(mesh.ended[r.id].reason == "length" for r in requests)


def test_a_step_that_never_comes_back_is_done_again() -> None:
    mesh, random = make(), Random(9)
    request = ask(mesh, "r", 3, 10)
    run_until(mesh, lambda: len(mesh.tokens["r"]) == 4 and mesh.flights, random)
    mesh.boxes.clear()
    while mesh.core.counters.restarts == 0:
        due = mesh.core.deadline()
        assert due is not None and due <= mesh.now + 1
        mesh.now = max(due, mesh.now)
        mesh.event(Tick())
        mesh.settle(random)
    assert mesh.tokens["r"] == expected(request) and mesh.core.counters.restarts == 1 and mesh.now < 2


@pytest.mark.parametrize("strategy", ["least_loaded", "round_robin"])
def test_sessions_spread_over_replicas(strategy: str) -> None:
    mesh = make(replicas=2, strategy=strategy)
    for number in range(8):
        ask(mesh, f"r{number}", 3, 5)
    held = {shard: len(keys) for shard, keys in mesh.core._state.replicas.held().items()}
    assert min(held.values()) >= 2 and sum(held.values()) == 24


def test_frames_hold_rows_that_lie_together() -> None:
    mesh, random = make(rows=9), Random(10)
    requests = [ask(mesh, f"r{number}", 3, 40) for number in range(9)]
    run_until(mesh, lambda: all(len(mesh.tokens[r.id]) >= 6 for r in requests), random)
    last: list[FrameOut] = [frame for frame in mesh.frames if frame.kind == "decode"][-3:]
    for frame in last:
        rows = [row.rows[0] for row in frame.rows]
        assert rows == list(range(rows[0], rows[0] + 3))


def test_a_frame_brings_back_hidden_states_for_half_of_its_tokens_at_most() -> None:
    """They come back as float32, and hidden states may have gone as 16 bits: a frame that fits has an answer that fits."""
    mesh, random = make(rows=8, chunk=4), Random(1)
    requests = [GenerationRequest(f"r{number}", (number,), 0, None, embed=True) for number in range(8)]
    for request in requests:
        mesh.submit(request)
    mesh.settle(random)
    assert max(sum(row.wants for row in frame.rows) for frame in mesh.frames) == 2
    assert [mesh.states[request.id] for request in requests] == [next_token(request.prompt) for request in requests]
    assert all(mesh.ended[request.id].reason == "stop" for request in requests) and mesh.core.idle


def test_a_token_in_place_of_a_hidden_state_ends_the_session() -> None:
    """As a shard of another version would answer."""
    mesh, random = make(), Random(1)
    mesh.submit(GenerationRequest("r", (1, 2, 3), 0, None, embed=True))
    run_until(mesh, lambda: mesh.frames, random)
    (row,) = mesh.frames[0].rows
    mesh.event(Result(mesh.frames[0].frame, (ResultRow(row.key, 2, Sampled(5)),)))
    assert mesh.ended["r"].reason == "error" and isinstance(mesh.ended["r"].error, Unavailable)
    assert not mesh.tokens["r"] and not mesh.states
    mesh.settle(random)
    assert mesh.core.idle


def test_a_hidden_state_that_is_no_vector_ends_its_session_alone() -> None:
    mesh, random = make(), Random(1)
    for name in ("broken", "whole"):
        mesh.submit(GenerationRequest(name, (1, 2, 3), 0, None, embed=True))
    run_until(mesh, lambda: mesh.frames, random)
    frame = mesh.frames[0]
    broken = session_of(mesh, "broken").key
    answers = [ResultRow(row.key, 2, Sampled(EMBEDDED, 7, finite=row.key != broken)) for row in frame.rows]
    mesh.event(Result(frame.frame, tuple(answers)))
    assert isinstance(mesh.ended["broken"].error, BadRequest) and "NaN or infinite" in str(mesh.ended["broken"].error)
    mesh.settle(random)
    assert mesh.ended["whole"].reason == "stop" and list(mesh.states) == ["whole"] and mesh.core.idle
