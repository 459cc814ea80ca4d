"""How many tokens of prompts a step carries beside the sessions that decode."""

from __future__ import annotations

import pytest

from mesh.coordinator.core.events import FrameOut
from mesh.coordinator.core.pace import LEAST, RECOVERY, SLOWDOWN, Pace
from mesh.coordinator.core.routing import Hop
from mesh.coordinator.core.scheduler import Scheduler
from mesh.coordinator.core.session import GenerationRequest, Session, State
from mesh.coordinator.core.state import CoreConfig
from mesh.types import LayerRange

CHUNK = 256
ROUTE = (Hop(LayerRange(0, 2), "a"), Hop(LayerRange(2, 4), "b"))


def session(number: int, prompt: int, state: State, restarts: int = 0) -> Session:
    made = Session(GenerationRequest(f"s{number}", tuple(range(prompt)), 1000, None), number, 0.0, state=state, restarts=restarts)
    made.route, made.rows = ROUTE, {0: number, 1: number}
    return made


def scheduler_of(*, processors: int = 1, packs: bool = True) -> Scheduler:
    return Scheduler(lambda route: CHUNK, lambda route: processors, lambda route: packs, SLOWDOWN)


def parts_beside(
    decoding: int, prompts: list[int], *, fixed_s: float, each_s: float, packs: bool = True, restarts: int = 0
) -> tuple[list[list[int]], list[float]]:
    """(the parts of prompts in each frame, the seconds of each frame) until all prompts are sent, where `decoding` sessions decode."""
    scheduler = scheduler_of(packs=packs)
    for number in range(decoding):
        decoder = session(number, 3, State.DECODING)
        decoder.history.append(0)
        scheduler.resume(decoder)
    arriving = [session(100 + number, length, State.PREFILLING, restarts) for number, length in enumerate(prompts)]
    keys = {each.key for each in arriving}

    def seconds(out: FrameOut) -> float:
        return fixed_s + each_s * sum(len(row.tokens) for row in out.rows)

    for _ in range(8):  # steps of several sizes, from which the pace is known
        for out in scheduler.plan():
            scheduler.landed(out.frame, seconds(out))
    for each in arriving:
        scheduler.begin(each)
    parts: list[list[int]] = []
    took: list[float] = []
    while any(each.sent < len(each.history) for each in arriving):
        [out] = scheduler.plan()
        scheduler.check()
        parts.append([len(row.tokens) for row in out.rows if row.key in keys])
        took.append(seconds(out))
        scheduler.landed(out.frame, seconds(out))
    return parts, took


def test_a_frame_is_filled_with_whole_prompts_while_no_session_decodes() -> None:
    parts, _ = parts_beside(0, [100, 100, 100, 8], fixed_s=0.01, each_s=0.002)
    assert parts == [[8, 100, 100, 48], [52]]


def test_a_frame_that_ends_a_short_prompt_carries_little_of_a_long_one() -> None:
    fixed_s, each_s = 0.016, 0.002
    parts, took = parts_beside(0, [1000, 16], fixed_s=fixed_s, each_s=each_s)
    assert parts[0][0] == 16 and took[0] <= SLOWDOWN * (fixed_s + each_s * 16) * 1.05
    assert [len(part) for part in parts[1:]] == [1] * (len(parts) - 1) and parts[1] == [256], "then the long one has whole chunks"


@pytest.mark.parametrize("decoding", [4, 16, 32])
def test_prompts_make_a_step_at_most_so_many_times_as_long(decoding: int) -> None:
    fixed_s, each_s = 0.016, 0.002
    parts, took = parts_beside(decoding, [1000, 1000], fixed_s=fixed_s, each_s=each_s)
    assert max(took[4:]) <= SLOWDOWN * (fixed_s + each_s * decoding) * 1.05
    assert min(map(sum, parts[:-1])) >= LEAST
    assert max(took[4:-1]) <= 1.1 * min(took[4:-1]), "steps are equally long"


def test_sessions_that_lost_a_shard_may_make_a_step_longer_than_new_ones() -> None:
    fixed_s, each_s = 0.016, 0.002
    _, took = parts_beside(16, [1000, 1000], fixed_s=fixed_s, each_s=each_s, restarts=1)
    longest = max(took[4:]) / (fixed_s + each_s * 16)
    assert 1.5 * SLOWDOWN < longest <= RECOVERY * SLOWDOWN * 1.05


def test_a_crowd_that_waits_is_not_held_back_by_the_few_that_decode() -> None:
    few, _ = parts_beside(2, [128] * 2, fixed_s=0.016, each_s=0.002)
    many, _ = parts_beside(2, [128] * 30, fixed_s=0.016, each_s=0.002)
    assert sum(many[2]) >= 2 * sum(few[2])


def test_where_a_chunk_takes_as_long_as_a_step_it_goes_out_whole() -> None:
    parts, _ = parts_beside(4, [700], fixed_s=0.005, each_s=0.000003)
    assert parts[-1] == [700 - sum(sum(each) for each in parts[:-1])] and max(map(sum, parts)) == CHUNK - 4


def test_where_stages_compute_segments_in_turn_a_frame_carries_one_prompt() -> None:
    parts, _ = parts_beside(1, [700, 30], fixed_s=0.03, each_s=0.002, packs=False)
    assert {len(each) for each in parts} == {1}
    assert parts[0] == [30] and max(map(sum, parts)) == (CHUNK - 1) // 4


def test_the_first_runs_of_programs_do_not_decide() -> None:
    pace = Pace()
    for seconds in (3.0, *[0.03] * 8):
        pace.step(4, seconds)
    for seconds in (5.0, *[0.06] * 8):
        pace.step(20, seconds)
    assert pace.fixed_tokens == pytest.approx(12, abs=1)
    assert pace.budget(4, 1, CHUNK) == int((SLOWDOWN - 1) * (4 + pace.fixed_tokens))


def test_until_steps_of_two_sizes_were_seen_a_fixed_part_is_assumed() -> None:
    pace = Pace()
    assert pace.budget(0, 5, CHUNK) == CHUNK and pace.budget(1, 1, CHUNK) == LEAST
    for _ in range(9):
        pace.step(16, 0.1)
    assert pace.budget(16, 1, CHUNK) == int((SLOWDOWN - 1) * (16 + 8))


def test_the_slowdown_is_that_of_the_configuration() -> None:
    lenient, strict = (Pace(CoreConfig(6, slowdown=slowdown).slowdown) for slowdown in (5.0, 2.0))
    assert (lenient.budget(32, 1, CHUNK), strict.budget(32, 1, CHUNK)) == (160, 40)
