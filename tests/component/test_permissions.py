"""nats/secure.conf, unchanged: every role works with its own user, and is refused the subjects of other roles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from authority import Authority
from places import NATS
from running import Run
from serving import COMPILED, CONTEXT, until_ready
from waiting import until

from mesh.bus import Bucket, Bus, BusOptions, ModelStore
from mesh.client import AsyncMeshClient
from mesh.coordinator.description import Wanted, find_model
from mesh.coordinator.service import Coordinator, CoordinatorOptions
from mesh.errors import Denied, MeshError, ModelNotFound
from mesh.gateway import GatewaySettings, HttpEdge
from mesh.http.listener import ListenerOptions
from mesh.local.nats_server import NatsServer
from mesh.protocol import subjects
from mesh.protocol.rights import inbox_prefix
from mesh.protocol.roles import ROLES
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.shard.service import Shard, ShardOptions
from mesh.types import even_ranges


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], BusOptions]]:
    """How a role connects."""
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder / "tls")
    pair = authority.issue("server")
    environment = {f"MESH_{role.upper()}_PASSWORD": f"{role}-secret" for role in ROLES}
    environment |= {"MESH_TLS_CERT": str(pair.cert), "MESH_TLS_KEY": str(pair.key)}
    with NatsServer.start(config=NATS / "secure.conf", directory=folder / "server", environment=environment) as server:

        def options(role: str) -> BusOptions:
            return BusOptions(
                (server.url,), user=role, password=f"{role}-secret", tls_ca=str(authority.ca), inbox_prefix=inbox_prefix(role)
            )

        yield options


async def serves(client: AsyncMeshClient) -> bool:
    return (await client.health()).ready


def test_a_mesh_of_least_privilege_answers(run: Run, secure: Callable[[str], BusOptions], model: Path, tmp_path: Path) -> None:
    prompt = [5, 17, 33]
    expected = Pipeline.load(model, context=CONTEXT).complete(prompt, SamplingParams(temperature=0.0), max_tokens=8).ids

    async def work() -> None:
        async with AsyncExitStack() as stack:

            async def bus(role: str) -> Bus:
                return await stack.enter_async_context(await Bus.connect(secure(role), name=role, timeout_s=60))

            await ModelStore(await bus("operator")).push(model)
            running: list[Any] = []
            for number, layers in enumerate(even_ranges(3, 2)):
                each = await bus("shard")
                folder = tmp_path / f"shard-{number}"
                head = layers.stop == 3
                await ModelStore(each).pull("tiny", folder, layers, embed=layers.start == 0, head=head)
                options = ShardOptions(f"p{number}", folder, layers, rows=2, context=CONTEXT, chunk=16, warm_up=False)
                running.append(Shard(each, options, compiled=COMPILED))
            own = await bus("coordinator")
            running.append(Coordinator(own, CoordinatorOptions(await find_model(own, Wanted(name="tiny")))))
            tasks = [asyncio.create_task(one.run()) for one in running]
            try:
                for one, task in zip(running, tasks, strict=True):
                    await until_ready(one.ready, task)
                for role in ("client", "gateway", "coordinator"):
                    async with AsyncMeshClient(options=secure(role)) as client:
                        await until(partial(serves, client), because="these roles may ask for the health of the mesh and not follow leases")
                        answer = await client.generate(tokens=prompt, max_tokens=8, ignore_eos=True, model="tiny")
                        assert list(answer.tokens) == expected
                        assert len((await client.status()).shards) == 2
                        batch = await client.submit_batch([{"tokens": prompt, "max_tokens": 8, "ignore_eos": True}], model="tiny")
                        await client.wait_batch(batch.id, timeout_s=60)
                        (result,) = await client.batch_results(batch.id)
                        assert result.completion is not None and list(result.completion.tokens) == expected
                for role in ("gateway", "coordinator"):  # a coordinator serves HTTP as its own user
                    edge = HttpEdge.bind(GatewaySettings(model="tiny", listener=ListenerOptions(port=0, grace_s=1.0)))
                    serving = asyncio.create_task(edge.serve(secure(role)))
                    try:
                        async with httpx.AsyncClient(base_url=edge.url, timeout=60) as http:
                            body = {"tokens": prompt, "max_tokens": 8, "ignore_eos": True}
                            made = await http.post("/api/v1/inference", json=body)
                            assert made.status_code == 200 and made.json()["tokens"] == expected, (role, made.text)
                            queued = await http.post("/api/v1/batch", json={"requests": [body], "async": True})
                            assert queued.status_code == 202, (role, queued.text)
                            assert (await http.get("/api/v1/health")).status_code == 200
                    finally:
                        edge.stop(now=True)
                        await serving
                assert running[-1].continuity.recorder.counters["written"] and not running[-1].continuity.recorder.counters["failed"]
            finally:
                for one in running:
                    one.stop()
                await asyncio.gather(*tasks)

    run(work())


def test_a_mesh_without_a_model_says_so_to_those_who_may_not_make_the_store(run: Run, secure: Callable[[str], BusOptions]) -> None:
    """The first test of this module has pushed: this one begins anew."""

    async def work() -> None:
        async with await Bus.connect(secure("operator"), name="operator", timeout_s=60) as operator:
            await operator.client.jetstream().delete_object_store(subjects.OBJECTS_MODELS)
        for role in ("coordinator", "shard"):
            async with await Bus.connect(secure(role), name=role, timeout_s=60) as bus:
                assert await ModelStore(bus).names() == []
                with pytest.raises(ModelNotFound, match="mesh push"):
                    await ModelStore(bus).manifest("tiny")

    run(work())


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("client", "mesh.v1.control.p0.drain"),
        ("client", "mesh.v1.tiny.layers.0-2.p0"),
        ("client", "mesh.v1.tiny.tokens.c"),
        ("client", "$KV.mesh_shards.p0"),
        ("client", "$KV.mesh_sessions.tiny.x"),
        ("client", "$KV.mesh_batches.x.end.0"),
        ("client", "mesh.v1.tiny.generate.x"),
        ("client", "mesh.v1.tiny.inspect.c"),
        ("client", "mesh.v1.dead.tiny"),
        ("client", "$JS.API.STREAM.INFO.KV_mesh_batches"),
        ("client", "$JS.API.STREAM.INFO.mesh_batch"),
        ("client", "$JS.API.STREAM.MSG.GET.KV_mesh_batches"),
        ("client", "$JS.API.DIRECT.GET.KV_mesh_batches.$KV.mesh_batches.x.end.0"),
        ("client", "$JS.API.CONSUMER.CREATE.KV_mesh_sessions"),
        ("gateway", "$KV.mesh_batches.x.end.0"),
        ("gateway", "$KV.mesh_sessions.tiny.x"),
        ("gateway", "$JS.API.STREAM.INFO.KV_mesh_sessions"),
        ("gateway", "$JS.API.DIRECT.GET.KV_mesh_sessions.$KV.mesh_sessions.tiny.x"),
        ("client", "$JS.API.STREAM.DELETE.OBJ_mesh_models"),
        ("gateway", "mesh.v1.control.p0.drain"),
        ("gateway", "mesh.v1.events.left"),
        ("shard", "mesh.v1.tiny.generate"),
        ("shard", "mesh.v1.control.p0.drain"),
        ("shard", "$O.mesh_models.C.x"),
        ("shard", "$JS.API.CONSUMER.MSG.NEXT.KV_mesh_shards.x"),
        ("shard", "$JS.API.CONSUMER.MSG.NEXT.mesh_batch.x"),
        ("shard", "$JS.API.STREAM.PURGE.OBJ_mesh_models"),
        ("client", "$JS.API.CONSUMER.MSG.NEXT.OBJ_mesh_models.x"),
        ("gateway", "$JS.API.CONSUMER.MSG.NEXT.OBJ_mesh_models.x"),
        ("monitor", "$JS.API.CONSUMER.MSG.NEXT.OBJ_mesh_models.x"),
        ("shard", "$KV.mesh_sessions.x"),
        ("shard", "$KV.mesh_batches.x.end.0"),
        ("shard", "$JS.API.STREAM.MSG.GET.KV_mesh_sessions"),
        ("shard", "$JS.API.STREAM.INFO.KV_mesh_batches"),
        ("shard", "$JS.API.DIRECT.GET.KV_mesh_sessions.$KV.mesh_sessions.tiny.x"),
        ("shard", "$JS.API.STREAM.DELETE.KV_mesh_shards"),
        ("coordinator", "mesh.v1.control.p0.drain"),
        ("coordinator", "mesh.v1.control.p0.load"),
        ("coordinator", "$O.mesh_models.C.x"),
        ("coordinator", "$KV.mesh_shards.p0"),
        ("coordinator", "$KV.mesh_placement.p0"),
        ("coordinator", "$JS.API.STREAM.DELETE.KV_mesh_shards"),
    ],
)
def test_a_role_may_not_publish_on_subjects_of_another_role(run: Run, secure: Callable[[str], BusOptions], role: str, subject: str) -> None:
    async def work() -> None:
        async with (
            await Bus.connect(secure("operator"), name="o", timeout_s=60) as operator,
            await Bus.connect(secure(role), name=role, timeout_s=60) as bus,
        ):
            arrived = asyncio.Event()

            async def note(received: Any) -> None:
                arrived.set()

            refused = asyncio.Event()
            original = bus.client._error_cb

            async def on_error(error: Exception) -> None:
                if "permissions violation" in str(error).lower() and subject.lower() in str(error).lower():
                    refused.set()
                await original(error)

            bus.client._error_cb = on_error
            if not subject.startswith("$JS"):
                await operator.subscribe(subject, note)
                await operator.flush()
            await bus.publish(subject, b"{}")
            await asyncio.wait_for(refused.wait(), 60)
            await bus.flush()
            await operator.flush()
            assert not arrived.is_set()

    run(work())


def test_a_role_may_not_listen_to_answers_or_tokens_of_another_role(run: Run, secure: Callable[[str], BusOptions]) -> None:
    async def work() -> None:
        for role, subject in (("client", "_INBOX.gateway.>"), ("client", "mesh.v1.tiny.tokens.*"), ("shard", "_INBOX.client.>")):
            async with (
                await Bus.connect(secure("operator"), name="o", timeout_s=60) as operator,
                await Bus.connect(secure(role), name=role, timeout_s=60) as bus,
            ):
                heard = asyncio.Event()

                async def note(received: Any, heard: asyncio.Event = heard) -> None:
                    heard.set()

                try:
                    await bus.subscribe(subject, note)
                    await bus.flush()
                except MeshError:
                    continue
                await operator.publish(subject.replace("*", "c").replace(">", "x"), b"secret")
                await operator.flush()
                await bus.flush()
                assert not heard.is_set(), (role, subject)

    run(work())


def test_a_wrong_password_is_denied(run: Run, secure: Callable[[str], BusOptions]) -> None:
    from dataclasses import replace

    with pytest.raises(Denied):
        run(Bus.connect(replace(secure("shard"), password="client-secret"), name="t", timeout_s=60))


def test_leases_are_written_by_shards_alone(run: Run, secure: Callable[[str], BusOptions]) -> None:
    async def work() -> None:
        async with await Bus.connect(secure("client"), name="client", timeout_s=60) as bus:
            with pytest.raises(MeshError):
                await Bucket(bus, subjects.KV_SHARDS, ttl_s=5.0).put("ghost", b"{}")

    run(work())
