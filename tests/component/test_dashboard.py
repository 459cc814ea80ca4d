"""The dashboard's routes over HTTP on a real server with real shards: one look for all viewers, and only while there are some."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from running import Run
from serving import coordinator, shards
from waiting import until

from mesh.client import AsyncMeshClient
from mesh.gateway import GatewaySettings, create_app
from mesh.gateway.dashboard import Watch, routes
from mesh.gateway.dashboard import watch as watch_module
from mesh.http.listener import Listener, ListenerOptions
from mesh.http.tokens import Issuer, Verifier
from mesh.local.nats_server import NatsServer
from mesh.types import even_ranges


@asynccontextmanager
async def dashboard(client: AsyncMeshClient, watch: Watch | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Served on a free port, and a client of it."""
    watching = watch or Watch(client, interval_s=0.2)
    settings = GatewaySettings(listener=ListenerOptions(port=0), **options)
    listener = Listener.bind(settings.listener)
    serving = asyncio.create_task(listener.serve(create_app(client, settings, routes=routes(watching))))
    try:
        async with httpx.AsyncClient(base_url=listener.url, timeout=60) as http:
            yield http
    finally:
        watching.end()
        listener.stop(now=True)
        await serving
        await watching.close()


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    kind = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, orjson.loads(line.removeprefix("data: "))


async def sent(stream: AsyncIterator[tuple[str, Any]], kind: str, holds: Any = lambda data: True) -> Any:
    async for got, data in stream:
        if got == kind and holds(data):
            return data
    raise AssertionError(f"the stream ended before {kind}")


def test_the_page_and_its_parts_are_whole_and_safe(server: NatsServer, run: Run) -> None:
    async def look() -> None:
        async with AsyncMeshClient(server.url) as client, dashboard(client) as http:
            page = await http.get("/")
            assert page.status_code == 200 and "text/html" in page.headers["content-type"]
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "<script>" not in page.text and " style=" not in page.text and "http://" not in page.text
            parts = [part.split('"')[0] for part in page.text.split('"/dashboard/static/')[1:]]
            assert {"base.css", "main.js", "theme.js", "icon.svg"} <= set(parts)
            for part in parts:
                answer = await http.get(f"/dashboard/static/{part}")
                assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
                again = await http.get(f"/dashboard/static/{part}", headers={"If-None-Match": answer.headers["etag"]})
                assert again.status_code == 304 and again.content == b""
            for missing in ("nothing.js", "..%2froutes.py", "%2e%2e/routes.py", "routes.py"):
                assert (await http.get(f"/dashboard/static/{missing}")).status_code == 404

    run(look())


def test_viewers_see_shards_requests_and_events_and_share_one_look(server: NatsServer, model: Path, run: Run) -> None:
    async def look() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url) as client,
        ):
            watch = Watch(client, interval_s=0.2)
            name = serving.manifest.name
            async with dashboard(client, watch) as http, http.stream("GET", "/dashboard/events") as one:
                assert one.headers["content-type"].startswith("text/event-stream")
                stream = events(one)
                kind, before = await anext(stream)
                assert kind == "history"
                assert {("ready", shard.options.name) for shard in running} <= {(e["kind"], e["who"]) for e in before["events"]}

                def whole(data: Any) -> bool:
                    mine = [m for m in data["models"] if m["name"] == name]
                    return bool(mine) and mine[0]["state"] == "ready" and data["error"] is None

                await sent(stream, "snapshot", whole)
                done = await client.generate(tokens=[5, 17, 33], max_tokens=8, ignore_eos=True, model=name)

                def ended(data: Any) -> bool:
                    return any(line["request"] == done.request for m in data["models"] for line in m["recent"])

                seen = await sent(stream, "snapshot", ended)
                (shown,) = [m for m in seen["models"] if m["name"] == name]
                assert {s.options.name for s in running} <= {s["name"] for s in shown["shards"]} and shown["layers"] == 3
                assert shown["latency"]["requests"] >= 1
                trace = (await http.get(f"/dashboard/trace/chatcmpl-{done.request}")).json()
                assert trace["tokens"] == 8 and [stage["shard"] for stage in trace["legs"][0]["stages"]] == [
                    s.options.name for s in running
                ]
                assert (await http.get("/dashboard/trace/unknown")).status_code == 404
                # more viewers: not more looks
                async with http.stream("GET", "/dashboard/events") as two, http.stream("GET", "/dashboard/events") as three:
                    others = [events(two), events(three)]
                    first = [await sent(other, "snapshot") for other in others]
                    assert watch.viewers == 3 and all(first)
                    before = watch.looks
                    for _ in range(5):
                        await sent(stream, "snapshot")
                    assert watch.looks <= before + 6
                running[1].stop()
                event = await sent(stream, "event", lambda data: data["kind"] == "left")
                assert event["who"] == running[1].options.name
                assert (await http.get("/dashboard/snapshot")).json()["models"]
            await until(lambda: not watch.viewers, because="the server notices in its own time that a viewer has left")

    run(look())


def test_the_mesh_is_not_looked_at_without_viewers(server: NatsServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        monkeypatch.setattr(watch_module, "LINGER_S", 0.0)
        async with AsyncMeshClient(server.url) as client:
            watch = Watch(client, interval_s=0.05)
            assert orjson.loads(await watch.snapshot())["error"] is None
            assert watch._task is not None
            await asyncio.wait_for(watch._task, 60)
            looks = watch.looks
            assert orjson.loads(await watch.snapshot())["error"] is None and watch.looks == looks + 1
            await watch.close()

    run(look())


def test_the_page_reports_a_mesh_that_cannot_be_reached(run: Run) -> None:
    async def look() -> None:
        client = AsyncMeshClient("nats://127.0.0.1:1")  # never connected
        async with dashboard(client) as http:
            answer = await http.get("/dashboard/snapshot")
            assert answer.status_code == 200 and "does not answer" in answer.json()["error"]

    run(look())


def test_data_needs_a_token_of_scope_admin_where_tokens_are_asked_for(server: NatsServer, run: Run) -> None:
    async def look() -> None:
        secret = b"s" * 32
        verifier, issuer = Verifier("HS256", secret), Issuer("HS256", secret)
        async with AsyncMeshClient(server.url) as client, dashboard(client, verifier=verifier) as http:
            assert (await http.get("/")).status_code == 200 and (await http.get("/dashboard/static/main.js")).status_code == 200
            for path in ("snapshot", "events", "trace/x"):
                assert (await http.get(f"/dashboard/{path}")).status_code == 401
                for scope, status in (("generate", 403), ("admin", 404 if path == "trace/x" else 200)):
                    token = issuer.issue("me", [scope], now_unix_s=time.time(), expiry_s=600)
                    headers = {"Authorization": f"Bearer {token}"}
                    async with http.stream("GET", f"/dashboard/{path}", headers=headers) as answer:
                        assert answer.status_code == status

    run(look())


def test_a_page_that_is_watched_does_not_hold_up_the_end(server: NatsServer, run: Run) -> None:
    async def look() -> None:
        async with AsyncMeshClient(server.url) as client:
            watch = Watch(client, interval_s=600)
            async with dashboard(client, watch) as http, http.stream("GET", "/dashboard/events") as one:
                stream = events(one)
                await sent(stream, "snapshot")
                watch.end()
                assert [kind async for kind, _ in stream] == []

    run(look())


def test_there_is_a_bound_on_viewers(server: NatsServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        monkeypatch.setattr(watch_module, "VIEWERS", 1)
        async with AsyncMeshClient(server.url) as client, dashboard(client) as http, http.stream("GET", "/dashboard/events") as one:
            await anext(events(one))
            refused = await http.get("/dashboard/events")
            assert refused.status_code == 429 and refused.headers["retry-after"]

    run(look())
