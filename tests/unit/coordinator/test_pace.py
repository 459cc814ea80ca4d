"""How large a chunk of a prompt is while others decode."""

from __future__ import annotations

from mesh.coordinator.core.events import FrameOut
from mesh.coordinator.core.pace import REVIEW_AFTER, Pace
from mesh.coordinator.core.routing import Hop
from mesh.coordinator.core.scheduler import Scheduler
from mesh.coordinator.core.session import GenerationRequest, Session, State
from mesh.types import LayerRange

CHUNK = 256
ROUTE = (Hop(LayerRange(0, 2), "a"), Hop(LayerRange(2, 4), "b"))


def session(number: int, prompt: int, state: State) -> Session:
    made = Session(GenerationRequest(f"s{number}", tuple(range(prompt)), 1000, None), number, 0.0, state=state)
    made.route, made.rows = ROUTE, {0: number, 1: number}
    return made


def chunks_beside_a_decoder(prompt: int, *, step_s: float, token_s: float, decoding: bool = True) -> list[int]:
    """Sizes of the chunks of a prompt; a step takes `step_s`, a chunk `token_s` for each of its tokens."""
    scheduler = Scheduler(lambda route: CHUNK, lambda route: 2)
    decoder, arriving = session(1, 3, State.DECODING), session(2, prompt, State.PREFILLING)
    decoder.history.append(0)
    if decoding:
        scheduler.resume(decoder)
    scheduler.begin(arriving)
    sizes: list[int] = []
    out: list[FrameOut] = scheduler.plan()
    while out:
        frame = out.pop(0)
        tokens = len(frame.rows[0].tokens)
        assert scheduler.landed(frame.frame, step_s if frame.kind == "decode" else token_s * tokens) is not None
        if frame.kind == "prefill":
            sizes.append(tokens)
        scheduler.check()
        if arriving.sent < prompt or frame.kind == "prefill":
            out += scheduler.plan()
    return sizes


def test_a_chunk_that_takes_as_long_as_a_step_is_whole() -> None:
    assert chunks_beside_a_decoder(700, step_s=0.005, token_s=0.00003) == [256, 256, 188]


def test_a_chunk_that_takes_much_longer_than_a_step_is_sent_in_parts() -> None:
    assert chunks_beside_a_decoder(700, step_s=0.03, token_s=0.002) == [256, 64, 64, 64, 64, 64, 64, 60]


def test_every_chunk_is_whole_while_no_session_decodes() -> None:
    assert chunks_beside_a_decoder(700, step_s=0.03, token_s=0.002, decoding=False) == [256, 256, 188]


def seen(pace: Pace, *, step_s: float, whole_s: float) -> Pace:
    for _ in range(16):
        pace.step(step_s)
    pace.chunk(CHUNK, CHUNK, whole_s)
    return pace


def test_chunks_are_whole_again_when_parts_or_steps_say_that_there_is_time() -> None:
    pace = seen(Pace(), step_s=0.03, whole_s=0.6)
    assert pace.size(CHUNK) == 64
    for _ in range(5):
        pace.chunk(64, CHUNK, 0.015)  # the first whole one was a program's first run
    assert pace.size(CHUNK) == CHUNK
    pace = seen(Pace(), step_s=0.03, whole_s=0.6)
    for _ in range(16):
        pace.step(0.25)  # many more rows decode
    assert pace.size(CHUNK) == CHUNK


def test_a_size_that_was_ruled_out_once_is_tried_again_after_many_parts() -> None:
    pace = seen(Pace(), step_s=0.03, whole_s=0.6)
    tried = 0
    for _ in range(2 * REVIEW_AFTER + 2):
        size = pace.size(CHUNK)
        pace.chunk(size, CHUNK, 0.6 * size / CHUNK)
        tried += size == CHUNK
    assert tried == 2


def test_sizes_that_a_stage_rounds_up_and_clocks_that_stand_still_say_nothing() -> None:
    pace = seen(Pace(), step_s=0.03, whole_s=0.05)
    pace.chunk(100, CHUNK, 9.0)
    pace.chunk(CHUNK, CHUNK, 0.0)
    pace.step(0.0)
    assert pace.size(CHUNK) == CHUNK
    assert seen(Pace(), step_s=0.03, whole_s=0.6).size(1) == 1
