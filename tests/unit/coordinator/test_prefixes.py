"""What the core makes of rows that hold what a prompt begins with: where a session goes, what it computes, and whom it shares with."""

from __future__ import annotations

from random import Random

import pytest
from fake_stages import FakeMesh, expected
from hypothesis import given
from hypothesis import strategies as st

from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.prefixes import BLOCK, MOST_DIGESTS, Chain, PrefixIndex
from mesh.coordinator.core.routing import REUSE_WORTH, Replica, Replicas, Reuse
from mesh.coordinator.core.session import GenerationRequest
from mesh.types import LayerRange

RANGES = [LayerRange(0, 3), LayerRange(3, 6)]
PROMPT = tuple(number % 50 for number in range(100))


def make(*, replicas: int = 1, rows: int = 4, mirror: bool = False, strategy: str = "least_loaded") -> FakeMesh:
    mesh = FakeMesh(Core(CoreConfig(6, strategy), Random(0)))  # type: ignore[arg-type]
    for number in range(replicas):
        for layers in RANGES:
            mesh.join(f"s{layers.start}-{number}", layers, rows=rows, context=512, chunk=64, mirrors=mirror)
    return mesh


def ask(mesh: FakeMesh, prompt: tuple[int, ...], *, salt: str | None = "", most: int = 8, id: str = "") -> tuple[int, tuple[int, ...]]:
    """(tokens that were not computed, the answer) of a request that is generated to its end."""
    id = id or f"r{len(mesh.requests)}"
    mesh.submit(GenerationRequest(id, prompt, most, None, salt=salt))
    mesh.settle(Random(len(mesh.requests)))
    assert mesh.tokens[id] == expected(mesh.requests[id])
    return mesh.ended[id].cached, tuple(mesh.tokens[id])


def prefilled(mesh: FakeMesh, since: int) -> int:
    return sum(len(row.tokens) for frame in mesh.frames[since:] for row in frame.rows if not row.decodes)


@pytest.mark.parametrize("strategy", ["least_loaded", "round_robin", "queue_group"])
def test_each_turn_of_a_chat_computes_what_is_new(strategy: str) -> None:
    mesh = make(replicas=3, strategy=strategy)
    history = PROMPT
    for turn in range(6):
        began = len(mesh.frames)
        cached, answer = ask(mesh, history)
        assert cached == (0 if turn == 0 else (len(history) - 6) // BLOCK * BLOCK)
        assert prefilled(mesh, began) == len(history) - cached
        history = (*history, *answer, 1, 2, 3, 4, 5)
    assert mesh.core.counters.prefix_hits == 5 and mesh.core.counters.prefix_misses == 0


def test_the_last_token_of_a_prompt_is_computed_in_any_case() -> None:
    mesh = make()
    prompt = PROMPT[: 4 * BLOCK]
    ask(mesh, prompt)
    assert ask(mesh, prompt)[0] == 3 * BLOCK


def test_tenants_share_nothing_and_neither_do_requests_without_a_salt() -> None:
    mesh = make()
    assert [ask(mesh, PROMPT, salt=salt)[0] for salt in ("a", "b", None, None)] == [0, 0, 0, 0]
    assert ask(mesh, PROMPT, salt="a")[0] == 96 and ask(mesh, PROMPT, salt="b")[0] == 96


def test_a_running_session_is_copied_from() -> None:
    """Its row stays its own, and both answers are right."""
    mesh, random = make(), Random(1)
    mesh.submit(GenerationRequest("long", PROMPT, 40, None, salt=""))
    while len(mesh.tokens["long"]) < 3:
        assert mesh.deliver(random)
    assert ask(mesh, (*PROMPT[:80], 7, 7, 7))[0] == 80
    assert mesh.tokens["long"] == expected(mesh.requests["long"])


def test_a_shard_that_was_replaced_has_nothing_and_nothing_is_asked_of_it() -> None:
    mesh = make()
    ask(mesh, PROMPT)
    mesh.kill("s0-0")
    mesh.join("s0-0", RANGES[0], rows=4, context=512, chunk=64, instance="later")
    assert ask(mesh, PROMPT)[0] == 0 and mesh.core.counters.prefix_misses == 0


def test_a_row_that_was_needed_is_a_miss_and_is_not_asked_for_again() -> None:
    """Another coordinator's sessions took it: this one does not know."""
    mesh = make()
    ask(mesh, PROMPT)
    mesh.shards["s0-0"].kept.clear()
    assert ask(mesh, PROMPT)[0] == 0
    assert mesh.core.counters.prefix_misses == 1
    assert ask(mesh, PROMPT)[0] == 96


def test_a_mirror_serves_what_it_followed_after_the_other_has_died() -> None:
    mesh = make(replicas=2, mirror=True)
    _, answer = ask(mesh, PROMPT)
    first = mesh.frames[-1].route
    for hop in first:
        mesh.kill(hop.shard)
    cached, _ = ask(mesh, (*PROMPT, *answer, 1, 2, 3))
    assert cached == (len(PROMPT) + len(answer) - 1) // BLOCK * BLOCK
    assert {hop.shard for hop in mesh.frames[-1].route}.isdisjoint(hop.shard for hop in first)


def test_a_session_that_reused_goes_on_after_a_loss_from_what_is_there() -> None:
    mesh, random = make(replicas=2), Random(2)
    _, answer = ask(mesh, PROMPT)
    request = GenerationRequest("next", (*PROMPT, *answer, 1, 2), 30, None, salt="")
    mesh.submit(request)
    while len(mesh.tokens["next"]) < 4:
        assert mesh.deliver(random)
    mesh.kill(mesh.frames[-1].route[1].shard)
    mesh.settle(random)
    assert mesh.tokens["next"] == expected(request) and mesh.ended["next"].cached == 96 and mesh.core.counters.failovers == 1


def test_another_coordinator_finds_what_it_is_told_of() -> None:
    mesh, other = make(), make()
    ask(mesh, PROMPT)
    other.shards = mesh.shards
    for kept in mesh.kept:
        other.event(kept)
    assert ask(other, (*PROMPT, 1, 2, 3))[0] == 96


def replicas_of(free: dict[str, int], rows: int = 10) -> Replicas:
    replicas = Replicas(1, "least_loaded", Random(0))
    for shard, count in free.items():
        replicas.seen(Replica(shard, LayerRange(0, 1), rows, count, 512, 64))
    return replicas


@pytest.mark.parametrize(("spared", "holder_free", "taken"), [(100, 6, "a"), (100, 4, "b"), (20, 9, "a"), (20, 8, "b")])
def test_load_outweighs_a_short_beginning_before_a_long_one(spared: int, holder_free: int, taken: str) -> None:
    replicas = replicas_of({"a": holder_free, "b": 10})
    choices = replicas.choose(100, 0.0, Reuse(lambda shard: spared if shard == "a" else 0, 100))
    assert choices is not None and choices[0].shard == taken
    assert (taken == "a") == (1 - holder_free / 10 <= REUSE_WORTH * spared / 100)


def test_a_beginning_that_one_stage_lacks_is_worth_nothing() -> None:
    mesh = make(replicas=2)
    ask(mesh, PROMPT)
    for name in list(mesh.shards):
        if name.startswith("s3"):
            mesh.kill(name)
    mesh.join("new", RANGES[1], rows=4, context=512, chunk=64)
    assert ask(mesh, PROMPT)[0] == 0


@given(st.lists(st.integers(0, 3), max_size=100), st.lists(st.integers(0, 3), max_size=100), st.integers(0, 90))
def test_the_index_finds_the_longest_beginning_in_whole_blocks(one: list[int], rest: list[int], same: int) -> None:
    index, other = PrefixIndex(), [*one[:same], *rest]
    held = Chain("s", one).remembered(len(one))
    if held is not None:
        index.note("a", held, 4)
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    found = index.best("a", Chain("s", other), len(other))
    assert (0 if found is None else found.positions) == common // BLOCK * BLOCK
    assert index.best("a", Chain("t", other), len(other)) is None and index.best("b", Chain("s", other), len(other)) is None


def test_a_long_history_is_remembered_by_few_digests() -> None:
    history = [number % 50 for number in range(3 * MOST_DIGESTS * BLOCK + 5)]
    held = Chain("", history).remembered(len(history))
    assert held is not None and held.every == 4 - 1 and len(held.digests) <= MOST_DIGESTS
    index = PrefixIndex()
    index.note("a", held, 1)
    best = index.best("a", Chain("", [*history, 1, 2, 3]), len(history))
    assert best is not None and best.positions == held.positions == 3 * MOST_DIGESTS * BLOCK


def test_a_chain_grows_as_its_history_does() -> None:
    chain, history = Chain("x", PROMPT), [*PROMPT, *range(40)]
    chain.add(history, 120)
    assert chain.digests == Chain("x", history[:120]).digests


def test_the_index_forgets_the_oldest() -> None:
    index = PrefixIndex()
    for first in range(5):
        held = Chain("", [first] * BLOCK).remembered(BLOCK)
        assert held is not None
        index.note("a", held, 3)
    known = [index.best("a", Chain("", [first] * (BLOCK + 1)), BLOCK) is not None for first in range(5)]
    assert known == [False, False, True, True, True]


@pytest.mark.parametrize("mirror", [False, True], ids=["balance", "mirror"])
@pytest.mark.parametrize("seed", range(8))
def test_chats_at_once_with_losses_between_and_within_their_turns(seed: int, mirror: bool) -> None:
    """FakeMesh computes each token from what the rows really hold."""
    mesh, random = make(replicas=2, rows=3, mirror=mirror), Random(seed)
    chats = {number: PROMPT[: 20 + 10 * (number % 3)] for number in range(6)}
    waiting: dict[int, str] = {}
    for step in range(60):
        chat = random.randrange(6)
        if chat not in waiting:
            waiting[chat] = f"c{step}"
            mesh.submit(GenerationRequest(waiting[chat], chats[chat], random.randint(1, 12), None, salt=str(chat % 2)))
        for _ in range(random.randint(0, 150)):
            mesh.deliver(random)
        if random.random() < 0.1:
            shard = random.choice(sorted(mesh.shards))
            layers = mesh.shards[shard].replica.layers
            mesh.kill(shard, noticed=random.random() < 0.5)
            mesh.join(shard, layers, rows=3, context=512, chunk=64, mirrors=mirror, instance=str(step))
        if random.random() < 0.1 and mesh.kept:
            mesh.event(random.choice(mesh.kept))
        for number, id in list(waiting.items()):
            if id in mesh.ended or id in mesh.rejected:
                assert id in mesh.rejected or mesh.ended[id].error is not None or mesh.tokens[id] == expected(mesh.requests[id])
                chats[number] = (*chats[number], *mesh.tokens[id], random.randrange(50), random.randrange(50))
                del waiting[number]
    counters = mesh.core.counters
    assert counters.prefix_hits >= 5 and counters.reused_tokens >= 5 * BLOCK
