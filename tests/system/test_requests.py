"""What a client may ask, what it is answered, and what happens to its rows when it leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from oracle import Oracle
from running import Run
from system_tools import all_rows_free, raw

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient, MeshClient
from mesh.errors import BadRequest, Busy, PromptTooLong
from mesh.local.mesh import LocalMesh
from mesh.protocol import topics
from mesh.protocol.control import Close
from mesh.protocol.frame_codec import decode
from mesh.protocol.generation import Cancel

SUBJECT = topics.GENERATE.at("tiny").subject
LONG: dict[str, Any] = {"tokens": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}


def test_a_plain_request_is_answered_by_one_document(mesh: LocalMesh, run: Run, oracle: Oracle) -> None:
    answer = run(raw(mesh.url, SUBJECT, {"tokens": [5, 17, 33], "max_tokens": 4}))
    document = orjson.loads(answer.data)
    assert document["done"] is True
    assert document["tokens"] == oracle.greedy([5, 17, 33], 4)
    assert document["finish_reason"] == "length"
    nothing = {"cached_tokens": 0}
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": nothing}
    assert document["timing"]["hops"]["steps"] == 3


def test_a_prompt_and_messages_become_the_tokens_of_their_text(mesh: LocalMesh, oracle: Oracle) -> None:
    with MeshClient(mesh.url) as client:
        plain = client.generate("rain", max_tokens=6, raw=True)
        assert list(plain.tokens) == oracle.greedy([ord(c) - 32 for c in "rain"], 6)
        assert plain.text == "".join(chr(32 + token) if token < 95 else "<unk>" for token in plain.tokens)
        chat = client.chat([{"role": "user", "content": "rain"}], max_tokens=6)
        assert list(chat.tokens) == oracle.greedy([ord(c) - 32 for c in "u:rain;a:"], 6)
        assert client.generate("rain", max_tokens=6).tokens == chat.tokens


def test_a_stop_text_ends_the_text_before_it(mesh: LocalMesh) -> None:
    with MeshClient(mesh.url) as client:
        whole = client.generate("snow", max_tokens=12, raw=True)
        assert whole.text is not None
        stop = whole.text[5:8]
        cut = client.generate("snow", max_tokens=12, raw=True, stop=[stop])
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        with client.stream("snow", max_tokens=12, raw=True, stop=[stop]) as stream:
            assert "".join(chunk.text for chunk in stream) == cut.text


def test_log_probabilities_come_with_each_token(mesh: LocalMesh) -> None:
    with MeshClient(mesh.url) as client:
        answer = client.generate(tokens=[1, 2, 3], max_tokens=3, logprobs=2)
    assert answer.logprobs is not None
    assert [token.id for token in answer.logprobs] == list(answer.tokens)
    for token in answer.logprobs:
        assert token.logprob is not None and token.logprob <= 0
        assert len(token.top) == 2 and token.top[0][0] == token.id and token.top[0][1] == pytest.approx(token.logprob)


@pytest.mark.parametrize(
    ("request_", "field", "status"),
    [
        ({"max_tokens": 3}, "exactly one of prompt, messages and tokens", "400"),
        ({"prompt": "a", "tokens": [1]}, "exactly one of prompt, messages and tokens", "400"),
        ({"tokens": [1], "max_tokens": 0}, "max_tokens", "400"),
        ({"tokens": [1], "max_tokens": "many"}, "max_tokens", "400"),
        ({"tokens": [], "max_tokens": 3}, "the prompt is empty", "400"),
        ({"tokens": [96], "max_tokens": 3}, "token 96 is not in the vocabulary", "400"),
        ({"tokens": [1], "temperature": 200}, "temperature", "400"),
        ({"tokens": [1], "top_p": 0}, "top_p", "400"),
        ({"tokens": [1], "colour": "red"}, "colour", "400"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "400"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role", "400"),
        ({"tokens": [1] * 60, "max_tokens": 10}, "shorten the prompt", "400"),
        ({"tokens": [1], "stop": [""]}, "a stop text is empty", "400"),
        ({"tokens": [1], "session": "no spaces"}, "session", "400"),
    ],
)
def test_a_malformed_request_is_answered_by_an_error_that_names_the_field(
    mesh: LocalMesh, run: Run, request_: dict[str, Any], field: str, status: str
) -> None:
    answer = run(raw(mesh.url, SUBJECT, {"max_tokens": 3} | request_))
    assert answer.headers["Nats-Service-Error-Code"] == status
    assert field in answer.headers["Nats-Service-Error"]
    assert orjson.loads(answer.data)["retryable"] is False


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"7"])
def test_a_request_that_is_not_a_json_object_is_answered_by_an_error(mesh: LocalMesh, run: Run, data: bytes) -> None:
    answer = run(raw(mesh.url, SUBJECT, data))
    assert answer.headers["Nats-Service-Error-Code"] == "400"


def test_the_client_raises_errors_of_the_one_tree(mesh: LocalMesh) -> None:
    with MeshClient(mesh.url, retries=0) as client:
        with pytest.raises(BadRequest) as caught:
            client.generate(tokens=[1], max_tokens=3, temperature=200)
        assert caught.value.field == "temperature"
        with pytest.raises(BadRequest) as caught:
            client.generate(tokens=[1], colour="red")  # type: ignore[call-arg]
        assert caught.value.field == "colour"
        with pytest.raises(PromptTooLong):
            client.generate(tokens=[1] * 60, max_tokens=30)


def test_a_stream_left_early_frees_its_rows(mesh: LocalMesh, run: Run) -> None:
    async def leave() -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            for _ in range(3):
                async with client.stream(**LONG) as stream:
                    async for chunk in stream:
                        if chunk.index == 2:
                            break
            await all_rows_free(mesh)
            status = await client.status()
            assert sum(c.live for c in status.coordinators) == 0
            assert sum(c.stats.cancelled for c in status.coordinators) >= 3

    run(leave())


def test_a_client_that_vanishes_without_a_word_frees_its_rows(mesh: LocalMesh, run: Run) -> None:
    async def vanish() -> None:
        bus = await Bus.connect(BusOptions(urls=(mesh.url,)), name="vanishing")
        seen = asyncio.Event()

        async def note(received: Received) -> None:
            if b'"index"' in received.data:
                seen.set()

        inbox = bus.new_inbox()
        await bus.subscribe(inbox, note)
        await bus.publish(SUBJECT, orjson.dumps(LONG | {"stream": True}), reply=inbox)
        await seen.wait()
        await bus.client.close()
        await all_rows_free(mesh)

    run(vanish())


@pytest.mark.parametrize("says_so", [True, False], ids=["cancels", "says nothing"])
def test_a_client_that_leaves_takes_part_in_at_most_two_more_steps_and_frees_its_rows(mesh: LocalMesh, run: Run, says_so: str) -> None:
    """Steps as the first stage gets them. A marker on the same way splits them into those before the client had gone and after."""
    steps: list[set[int] | None] = []
    closed: list[int] = []
    events: asyncio.Condition = asyncio.Condition()
    cancel, name = "", f"leaving-{says_so}"

    async def note(document: Received) -> None:
        nonlocal cancel
        async with events:
            cancel = orjson.loads(document.data).get("cancel", cancel)
            events.notify_all()

    async def step(received: Received) -> None:
        async with events:
            steps.append(None if received.data == b"marker" else set(decode(received.data).sessions.tolist()))
            events.notify_all()

    async def close(received: Received) -> None:
        async with events:
            closed.extend(Close.parse(received.data).sessions)
            events.notify_all()

    async def go() -> None:
        first = topics.OPEN_ANY.at("tiny", mesh.ranges[0]).subject
        async with (
            await Bus.connect(BusOptions(urls=(mesh.url,)), name="leaving") as bus,
            AsyncMeshClient(mesh.url, model="tiny") as others,
        ):
            before = (await others.status()).coordinators[0].stats.cancelled
            await bus.subscribe(f"{first}.*", step)
            await bus.subscribe("mesh.v1.control.*.close", close)
            inbox = bus.new_inbox()
            subscription = await bus.subscribe(inbox, note)
            await bus.publish(SUBJECT, orjson.dumps(LONG | {"stream": True, "session": name}), reply=inbox)
            async with events:
                await events.wait_for(lambda: cancel and len(steps) >= 2)
            (key,) = set().union(*(keys for keys in steps if keys))
            beside = asyncio.create_task(others.generate(**LONG))
            async with events:
                await events.wait_for(lambda: any(keys and keys - {key} for keys in steps))
            if says_so:
                await bus.publish(cancel, Cancel(request=name).to_bytes())
            await subscription.stop()
            await bus.publish(f"{first}.marker", b"marker")
            async with events:
                await events.wait_for(lambda: closed.count(key) == len(mesh.ranges) and None in steps)
            assert sum(key in keys for keys in steps[steps.index(None) :] if keys) <= 2
            await beside
            assert (await others.status()).coordinators[0].stats.cancelled == before + 1
        await all_rows_free(mesh)

    run(go())


def test_a_repeated_request_of_the_same_name_is_the_same_generation(mesh: LocalMesh, run: Run) -> None:
    async def twice() -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            first = await client.generate(tokens=[9, 8, 7], max_tokens=5, seed=1, session="once")
            before = sum(c.stats.submitted for c in (await client.status()).coordinators)
            second = await client.generate(tokens=[9, 8, 7], max_tokens=5, seed=1, session="once")
            after = sum(c.stats.submitted for c in (await client.status()).coordinators)
            assert first.tokens == second.tokens and before == after
            with pytest.raises(BadRequest):
                await client.generate(tokens=[9, 8, 6], max_tokens=5, seed=1, session="once")

    run(twice())


def test_a_full_queue_is_busy_at_once_and_accepted_requests_go_on(mesh: LocalMesh, run: Run) -> None:
    """4 rows and 16 places in the queue: of 30 at once the rest is refused with a time, and what was accepted is right."""

    async def overload() -> None:
        async with AsyncMeshClient(mesh.url, model="tiny", retries=0) as client:

            async def one() -> None:
                try:
                    ended.append((await client.generate(**LONG)).tokens)
                except Busy as error:
                    assert error.retry_after_s > 0
                    ended.append(None)

            ended: list[tuple[int, ...] | None] = []
            await asyncio.gather(*(one() for _ in range(30)))
            right = [tokens for tokens in ended if tokens is not None]
            assert ended[0] is None, "a refusal came no sooner than an answer"
            assert 20 <= len(right) < 30
            assert len(set(right)) == 1 and len(right[0]) == 60

    run(overload())


def test_status_and_health_list_shards_and_coordinators(mesh: LocalMesh) -> None:
    with MeshClient(mesh.url) as client:
        assert client.models() == ["tiny"]
        assert client.health().ready
        status = client.status()
        assert [str(shard.layers) for shard in status.shards] == ["0-2", "2-3"]
        assert all(shard.state == "ready" for shard in status.shards)
        missing: Any = client.health("another")
        assert not missing.ready and "another" in missing.reason
