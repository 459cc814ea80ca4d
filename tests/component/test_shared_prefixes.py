"""Prompts that begin as earlier ones did: what is reused, through how many coordinators, and by whom."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from edge_tools import bearer, edge, token, verifier
from oracle import Oracle
from serving import CONTEXT, coordinator, shards
from system_tools import raw
from waiting import until

from mesh.client import AsyncMeshClient, Completion
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.types import even_ranges

RANGES = even_ranges(3, 2)
PROMPT = [(7 * place) % 95 for place in range(40)]


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model, context=CONTEXT)


async def ask(client: AsyncMeshClient, tokens: list[int], max_tokens: int = 4, **more: Any) -> Completion:
    return await client.generate(tokens=tokens, max_tokens=max_tokens, ignore_eos=True, **more)


def cached(usage: Mapping[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_turns_and_copies_have_the_tokens_of_a_whole_prompt(server: NatsServer, model: Path, run: Any, oracle: Oracle) -> None:
    async def chat() -> None:
        async with shards(server.url, model, RANGES) as running, coordinator(server.url, model) as serving:
            async with AsyncMeshClient(server.url, model="tiny") as client:
                first = await ask(client, PROMPT)
                following = [*PROMPT, *first.tokens, 1, 2]
                second = await ask(client, following)
                other = [*PROMPT[:16], *range(10, 20)]
                third = await ask(client, other)
                answers = [(PROMPT, first, 0), (following, second, 32), (other, third, 16)]
                async with client.stream(tokens=PROMPT, max_tokens=CONTEXT - len(PROMPT), ignore_eos=True) as long:
                    chunks = [await anext(long)]
                    beside = [*PROMPT[:32], 3, 3, 3]
                    answers.append((beside, await ask(client, beside), 32))
                    chunks += [chunk async for chunk in long]
                assert [chunk.token.id for chunk in chunks if chunk.token] == oracle.greedy(PROMPT, CONTEXT - len(PROMPT))
            for prompt, answer, reused in answers:
                assert list(answer.tokens) == oracle.greedy(prompt, 4) and answer.usage.cached_tokens == reused
            counts = serving.core.counts()
            assert (counts["prefix_misses"], counts["prefix_hits"] >= 3) == (0, True)
            assert all(shard.state.reused["copied"] >= 1 and shard.state.reused["taken"] >= 1 for shard in running)
            assert all(shard.lease(0.0).kept_rows == shard.state.kept_rows > 0 for shard in running)

    run(chat())


def test_a_row_that_was_needed_meanwhile_costs_a_whole_prompt(server: NatsServer, model: Path, run: Any, oracle: Oracle) -> None:
    async def work() -> None:
        async with shards(server.url, model, RANGES, rows=1), coordinator(server.url, model) as serving:
            async with AsyncMeshClient(server.url, model="tiny") as client:
                await ask(client, PROMPT, cache_salt="a")
                await ask(client, PROMPT, cache_salt="b")
                last = await ask(client, PROMPT, cache_salt="a")
                assert last.usage.cached_tokens == 0 and list(last.tokens) == oracle.greedy(PROMPT, 4)
            assert serving.core.counts()["prefix_misses"] == 2

    run(work())


def test_one_coordinator_goes_on_with_what_another_has_left(server: NatsServer, model: Path, run: Any) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, RANGES),
            coordinator(server.url, model) as one,
            coordinator(server.url, model) as two,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            while not all(each.continuity.peers.watched() for each in (one, two)):  # they hear each other's heartbeats
                await client.coordinators()

            async def at(serving: Any) -> int:
                address = topics.GENERATE_AT.at("tiny", serving.continuity.instance)
                answer = await raw(server.url, address.subject, {"tokens": PROMPT, "max_tokens": 2, "ignore_eos": True})
                return cached(orjson.loads(answer.data)["usage"])

            assert [await at(one), await at(two), await at(one)] == [0, 32, 32]

    run(work())


@pytest.mark.parametrize(("setting", "expected"), [("off", [0, 0, 0]), ("tenant", [0, 0, 32]), ("all", [0, 32, 32])])
def test_the_setting_says_who_shares(server: NatsServer, model: Path, run: Any, setting: Any, expected: list[int]) -> None:
    async def work() -> None:
        async with shards(server.url, model, RANGES) as running, coordinator(server.url, model, prefix_reuse=setting) as serving:
            async with AsyncMeshClient(server.url, model="tiny") as client:
                answers = [await ask(client, PROMPT, cache_salt=salt) for salt in ("a", None, "a")]
            assert [answer.usage.cached_tokens for answer in answers] == expected
            stats = serving.stats()
            assert (stats.prefix_hits, stats.reused_tokens, stats.prompt_tokens) == (sum(map(bool, expected)), sum(expected), 120)
            assert all(shard.state.kept_rows == 0 for shard in running) is (setting == "off")

    run(work())


def test_callers_with_tokens_of_their_own_share_nothing(server: NatsServer, model: Path, run: Any) -> None:
    text = "".join(chr(33 + number) for number in PROMPT)
    messages = [{"role": "user", "content": text}]

    def over_http(url: str) -> str:
        with httpx.Client(base_url=url, timeout=60) as http:

            def post(path: str, body: dict[str, Any], scope: str, subject: str) -> Any:
                answer = http.post(path, json=body, headers=bearer(token(scope, subject=subject)))
                assert answer.status_code in (200, 202), answer.text
                return answer.json()

            def chat(subject: str) -> int:
                asked = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0}
                return cached(post("/v1/chat/completions", asked, "generate", subject)["usage"])

            assert [chat("alice"), chat("bob"), chat("alice"), chat("bob")] == [0, 0, 32, 32]
            one = {"model": "tiny", "messages": messages, "max_tokens": 3}
            answered = post("/api/v1/batch", {"requests": [one]}, "batch", "carol")
            assert cached(answered["usage"]) == cached(answered["results"][0]["result"]["usage"]) == 0
            return str(post("/api/v1/batch", {"requests": [one], "async": True}, "batch", "dave")["id"])

    async def work() -> None:
        async with shards(server.url, model, RANGES), coordinator(server.url, model):
            with edge(server.url, verifier=verifier()) as url:
                kept = await asyncio.to_thread(over_http, url)
            async with AsyncMeshClient(server.url, model="tiny") as client:
                await client.wait_batch(kept, timeout_s=60)
                (result,) = await client.batch_results(kept)
                assert result.completion is not None and result.completion.usage.cached_tokens == 0

    run(work())


def texts_with(mark: str) -> set[str]:
    """The texts with `mark` that containers and objects of this process have."""
    gc.collect()
    every = (text for each in gc.get_objects() for text in gc.get_referents(each))
    return {text for text in every if type(text) is str and mark in text}  # isinstance asks some objects things


def test_a_caller_with_another_salt_each_time_leaves_nothing_behind(model: Path, run: Any) -> None:
    """Of its salts the client, the coordinator and the shards know those of the last requests; of its rows as many as shards have. The
    server is its own: on another, the coordinator takes over what other tests have left, and knows records of sessions meanwhile."""
    rows, at_once, count = 2, 8, 120

    async def work(server: NatsServer) -> None:
        async with shards(server.url, model, RANGES, rows=rows) as running, coordinator(server.url, model) as serving:
            async with AsyncMeshClient(server.url, model="tiny") as client:
                gate = asyncio.Semaphore(at_once)

                async def one(number: int) -> None:
                    async with gate:
                        answer = await ask(client, PROMPT, 1, cache_salt=f"never-the-same-{number}.")
                        assert answer.usage.cached_tokens == 0

                await asyncio.gather(*map(one, range(count)))

                def few_are_known() -> bool:
                    known = {salt for text in texts_with("never-the-same-") for salt in re.findall(r"never-the-same-\d+\.", text)}
                    return 0 < len(known) <= at_once

                await until(few_are_known, because="the last records and spans of the requests are written after their answers")
            assert serving.core.counts()["finished"] == count
            serving.core.check()  # also that no more is remembered of a shard than it can hold
            assert all(0 < shard.state.kept_rows <= rows for shard in running)

    with NatsServer.start() as own:
        run(work(own))
