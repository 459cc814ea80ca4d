"""Answers go to inboxes alone: no process of the mesh writes where a caller tells it to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running import Run
from serving import connect, coordinator, shards
from waiting import until

from mesh.bus import Received
from mesh.coordinator.records import SessionRecord, sessions_bucket
from mesh.errors import MessageRejected
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Generate
from mesh.protocol.subjects import is_inbox
from mesh.types import even_ranges

COUNTED = "counters are counted without a word"


@pytest.mark.parametrize("subject", ["_INBOX.a", "_INBOX_client.x.y", "_INBOX.a-b/=+"])
def test_an_inbox_is_below_its_prefix(subject: str) -> None:
    assert is_inbox(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "_INBOX",
        "_INBOXES.a",
        "_INBOX_.a",
        "$KV.mesh_shards.a",
        "$JS.ACK.a",
        "_INBOX.*",
        "_INBOX.a.>",
        "_INBOX..a",
        "a._INBOX.b",
        "_INBOX.a\n",
    ],
)
def test_other_subjects_are_no_inboxes(subject: str) -> None:
    assert not is_inbox(subject)


@pytest.mark.parametrize("reply", ["$KV.mesh_shards.victim", "$KV.mesh_sessions.tiny.x", "mesh.v1.events.left"])
def test_no_process_answers_to_another_subject_than_an_inbox(run: Run, server: NatsServer, model: Path, reply: str) -> None:
    async def work() -> None:
        async with (
            await connect(server) as bus,
            shards(server.url, model, even_ranges(3, 1)) as (shard,),
            coordinator(server.url, model) as serving,
        ):
            places = {
                "MODEL": "tiny",
                "COORDINATOR": serving.name,
                "INSTANCE": serving.continuity.instance,
                "SHARD": shard.options.name,
                "A-B": "0-3",
            }
            asked = [".".join(places.get(word, word) for word in topic.template.split(".")) for topic in topics.TOPICS]
            services = ("mesh-coordinator", "mesh-shard")
            asked += [f"$SRV.{verb}{name}" for verb in ("PING", "INFO", "STATS") for name in ("", *(f".{s}" for s in services))]
            # streams take the first three; gateways hear the last one, and where none does the server itself says so to the reply subject
            others = ("mesh.v1.batches", "mesh.v1.dead", "mesh.v1.events", "mesh.v1.usage")
            asked = [subject for subject in asked if not subject.startswith(others)]
            heard: list[Received] = []

            async def note(received: Received) -> None:
                heard.append(received)

            await bus.subscribe(reply, note)
            await bus.flush()
            before = [serving.stats().refused_replies, shard.bus.refused_replies]
            for subject in asked:
                for body in (b"{}", b"?", Generate(tokens=(1, 2), max_tokens=2, stream=True).to_bytes()):
                    await bus.publish(subject, body, reply=reply)
            # every request of a coordinator (five, three of batches, six of $SRV) and of a shard was dropped
            await until(lambda: serving.stats().refused_replies - before[0] >= 3 * 14, because=COUNTED)
            await until(lambda: shard.bus.refused_replies - before[1] >= 3 * 12, because=COUNTED)
            answer = await bus.ask(topics.GENERATE.at("tiny").subject, Generate(tokens=(1, 2), max_tokens=2).to_bytes(), timeout_s=30)
            assert b'"done":true' in answer.data
            await bus.flush()
            assert not heard
            assert all(bus.refused_replies for bus in serving.connections())

    run(work())


def test_a_session_record_that_answers_elsewhere_is_not_taken_over(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with await connect(server) as bus, shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model) as serving:
            record = SessionRecord(
                session="planted",
                model_hash=serving.manifest.model_hash,
                owner=None,
                epoch=1,
                digest="d",
                message=Generate(tokens=(1, 2), max_tokens=4, seed=1),
                reply="_INBOX.x",
            )
            planted = record.to_bytes().replace(b"_INBOX.x", b"$KV.mesh_shards.victim")
            with pytest.raises(MessageRejected, match="inboxes"):
                SessionRecord.parse(planted)
            heard = asyncio.Event()

            async def note(received: Received) -> None:
                heard.set()

            await bus.subscribe("$KV.mesh_shards.victim", note)
            await sessions_bucket(bus).put("tiny.planted", planted)
            await serving.continuity._adopt(lambda owner: owner is None)
            assert serving.stats().records["rejected"] == 1
            asked = Generate(tokens=(1, 2), max_tokens=4, session="planted", attempt=1)
            await bus.ask(topics.GENERATE.at("tiny").subject, asked.to_bytes(), timeout_s=30)  # its owner may still ask: it begins anew
            await bus.flush()
            assert not heard.is_set()

    run(work())
