"""The NATS edge on a real server: limits, errors, leases, models."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import nats.js.client
import orjson
import pytest
from running import Run
from serving import connect
from waiting import until

from mesh.bus import Bucket, Bus, BusOptions, Endpoint, EventLog, LeaseTable, ModelStore, Received, Service, announce
from mesh.errors import (
    Busy,
    ConfigError,
    CorruptModel,
    DeadlineExceeded,
    Denied,
    MeshError,
    MessageRejected,
    ModelNotFound,
    PayloadTooLarge,
    Unavailable,
)
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import MAX_MANIFEST_BYTES, Manifest
from mesh.protocol import subjects
from mesh.protocol.rights import inbox_prefix, inbox_user
from mesh.protocol.status import Heartbeat, StatsRequest
from mesh.protocol.topics import Topic
from mesh.settings.defaults import DEFAULT_INBOX_PREFIX
from mesh.types import LayerRange

FAILS: Topic[StatsRequest, Any] = Topic("fails", StatsRequest, None, "fail")


def test_an_oversize_publish_is_an_error_here_and_the_connection_lives(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            got: asyncio.Queue[Received] = asyncio.Queue()

            async def take(received: Received) -> None:
                got.put_nowait(received)

            await bus.subscribe("big", take)
            limit = bus.max_payload
            headers = {"Key": "value"}
            for data, extra in ((bytes(limit + 1), None), (bytes(limit), headers), (bytes(limit - 20), headers)):
                with pytest.raises(PayloadTooLarge) as caught:
                    await bus.publish("big", data, headers=extra)
                assert caught.value.limit_bytes == limit < caught.value.size_bytes
            with pytest.raises(PayloadTooLarge):
                await bus.ask("big", bytes(limit + 1), timeout_s=1)
            await bus.publish("big", bytes(limit))
            await bus.publish("big", bytes(limit - 24), headers=headers)  # to the byte what the server takes
            assert [len((await got.get()).data) for _ in range(2)] == [limit, limit - 24]
            assert bus.connected and bus.counters["reconnects"] == 0

    run(work())


@pytest.mark.parametrize(("prefix", "user"), [(inbox_prefix("ana"), "ana"), (DEFAULT_INBOX_PREFIX, "")])
def test_replies_to_requests_and_to_streams_say_whose_they_are(run: Run, server: NatsServer, prefix: str, user: str) -> None:
    async def work() -> None:
        async with await Bus.connect(BusOptions((server.url,), inbox_prefix=prefix), name="asking") as bus:
            replies: list[str] = []

            async def take(received: Received) -> None:
                replies.append(received.reply)
                await bus.publish(received.reply, b"")

            await bus.subscribe("whose", take)
            await bus.ask("whose", b"", timeout_s=5)
            assert [inbox_user(reply) for reply in (*replies, bus.new_inbox())] == [user] * 2

    run(work())


def test_remote_errors_are_raised_here_with_their_own_class(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            raised: list[BaseException] = [
                Busy("no row is free", retry_after_s=0.25),
                MessageRejected("a: wrong", field="a"),
                ValueError("a secret of the inside"),
            ]

            async def handler(received: Received) -> None:
                raise raised[int(received.data)]

            service = await Service.start(
                bus, name="t", version="1.0.0", description="", endpoints=[Endpoint("e", FAILS.at(), handler, concurrent=True)]
            )
            for index, kind in enumerate((Busy, MessageRejected, MeshError)):
                with pytest.raises(kind) as caught:
                    await bus.ask("fails", str(index).encode(), timeout_s=5)
                assert "secret" not in str(caught.value)
                assert vars(caught.value) == (vars(raised[index]) if isinstance(raised[index], MeshError) else {})
            message = await bus.client.request("fails", b"0", timeout=5)
            assert message.headers == {"Nats-Service-Error": "no row is free", "Nats-Service-Error-Code": "429"}
            stats = orjson.loads((await bus.ask(f"$SRV.STATS.t.{service.id}", b"", timeout_s=5)).data)
            assert stats["endpoints"][0]["num_errors"] == 4
            await service.stop()
            with pytest.raises(Unavailable, match="nobody listens"):
                await bus.ask("fails", b"0", timeout_s=5)

    run(work())


def test_no_answer_in_time_is_deadline_exceeded(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:

            async def silent(received: Received) -> None:
                pass

            await bus.subscribe("silent", silent)
            with pytest.raises(DeadlineExceeded, match="silent"):
                await bus.request(Topic("silent", StatsRequest, Heartbeat, "keep silent").at(), StatsRequest(), timeout_s=0.1)

    run(work())


def test_a_handler_that_fails_ends_nothing(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            got = asyncio.Event()

            async def handler(received: Received) -> None:
                if received.data == b"bad":
                    Heartbeat.parse(received.data)
                if received.data == b"worse":
                    raise KeyError("x")
                got.set()

            await bus.subscribe("s", handler)
            for data in (b"bad", b"worse", b"good"):
                await bus.publish("s", data)
            await asyncio.wait_for(got.wait(), 10)
            assert bus.counters["rejected"] == 1 and bus.counters["handler_errors"] == 1

    run(work())


def test_leases_appear_change_and_vanish(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            changes: asyncio.Queue[tuple[str, Heartbeat | None]] = asyncio.Queue()
            bucket = Bucket(bus, "leases_test", ttl_s=0.5)
            await bucket.put("there", Heartbeat(coordinator="there").to_bytes())
            table = LeaseTable(bucket, Heartbeat, lambda key, lease: changes.put_nowait((key, lease)))
            await table.start()
            assert set(table.leases) == {"there"}

            async def renew() -> None:
                while True:
                    await bucket.put("kept", Heartbeat(coordinator="kept").to_bytes())
                    await asyncio.sleep(0.1)  # the period of the lease, well below its life of 0.5 s

            keeping = asyncio.create_task(renew())
            seen = [await asyncio.wait_for(changes.get(), 10) for _ in range(3)]
            assert [(key, lease is None) for key, lease in seen] == [("there", False), ("kept", False), ("there", True)]
            await bucket.put("junk", b"\xff")
            await bucket.put("gone", Heartbeat(coordinator="gone").to_bytes())
            await bucket.delete("gone")
            left = [await asyncio.wait_for(changes.get(), 10) for _ in range(2)]
            assert left == [("gone", Heartbeat(coordinator="gone")), ("gone", None)]
            assert table.rejected == 1 and set(table.leases) == {"kept"}
            keeping.cancel()
            assert (await asyncio.wait_for(changes.get(), 10)) == ("kept", None)
            await table.stop()

    run(work())


def test_no_value_ends_a_lease_table(run: Run, server: NatsServer) -> None:
    """Nor does an error of whoever is told of a lease. A value that is no lease leaves the one that was there to its TTL."""

    async def work() -> None:
        async with await connect(server) as bus:
            bucket = Bucket(bus, "odd_leases", ttl_s=5.0)
            told: asyncio.Queue[str] = asyncio.Queue()

            def tell(key: str, lease: Heartbeat | None) -> None:
                told.put_nowait(key)
                if key == "unlucky":
                    raise ValueError(key)

            table = LeaseTable(bucket, Heartbeat, tell)
            await table.start()
            await bucket.put("kept", Heartbeat(coordinator="c").to_bytes())
            assert await told.get() == "kept"
            for number, odd in enumerate((b"", b"null", b"[]", b"\xff\x00", b'{"coordinator": 1}')):
                await bucket.put("kept", odd)
                await bucket.put(f"after_{number}", Heartbeat(coordinator="c").to_bytes())  # a bucket keeps the last value of a key alone,
                assert await told.get() == f"after_{number}"  # so each odd one has to be read before the next is put
            for key in ("unlucky", "later"):
                await bucket.put(key, Heartbeat(coordinator="c").to_bytes())
            assert await told.get() == "unlucky" and await told.get() == "later"
            assert set(table.leases) == {"kept", "unlucky", "later", *(f"after_{number}" for number in range(5))}
            assert (table.rejected, table.failed) == (5, 1)
            await table.stop()

    run(work())


def test_reading_leaves_nothing_in_the_server(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may have a thousand consumers, and consumers of readers that have left count."""
    monkeypatch.setattr("mesh.bus.kv.WATCH_IDLE_S", 0.2)
    monkeypatch.setattr("mesh.bus.events.WATCH_IDLE_S", 0.2)

    async def work(server: NatsServer) -> None:
        async with await connect(server) as bus:
            bucket, events = Bucket(bus, "read_often", ttl_s=5.0), EventLog(bus)
            await bucket.put("there", b"1")
            await events.open()
            await announce(bus, "ready", "there")
            await bus.flush()
            js = bus.client.jetstream()

            async def consumers(stream: str) -> int:
                return (await js.stream_info(stream)).state.consumer_count

            async def none() -> bool:
                return not any([await consumers(stream) for stream in ("KV_read_often", "mesh_events")])

            for _ in range(20):
                assert [entry.value for entry in await bucket.entries()] == [b"1"]
                assert [event.who async for event in events.events(last=1)] == ["there"]
            await until(none, because="an idle consumer is removed by the server in its own time", deadline_s=20)

    with NatsServer.start(directory=tmp_path) as server:
        run(work(server))


def test_the_bus_reconnects_to_a_server_that_restarted_without_its_memory(run: Run, tmp_path: Path) -> None:
    first = NatsServer.start(directory=tmp_path)

    async def work() -> NatsServer:
        async with await connect(first) as bus:
            back = asyncio.Event()
            bus.on_change(lambda connected: back.set() if connected else None)
            changes: asyncio.Queue[tuple[str, Heartbeat | None]] = asyncio.Queue()
            bucket = Bucket(bus, "leases_test", ttl_s=1.0)
            table = LeaseTable(bucket, Heartbeat, lambda key, lease: changes.put_nowait((key, lease)))
            await table.start()
            await bucket.put("a", Heartbeat(coordinator="a").to_bytes())
            assert (await asyncio.wait_for(changes.get(), 10))[0] == "a"
            first.kill()
            second = NatsServer.start(directory=tmp_path, port=first.port)
            await asyncio.wait_for(back.wait(), 20)
            async with asyncio.timeout(30):
                wanted = None
                while wanted != ("b", Heartbeat(coordinator="b")):
                    await bucket.put("b", Heartbeat(coordinator="b").to_bytes())
                    try:
                        wanted = await asyncio.wait_for(changes.get(), 0.3)
                    except TimeoutError:
                        continue
            assert bus.counters["reconnects"] == 1
            await table.stop()
            return second

    run(work()).stop()
    first.stop()


def stands_still(pid: int) -> bool:
    return all(task.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "T" for task in Path(f"/proc/{pid}/task").iterdir())


def test_a_flush_outlives_the_server_that_it_asked(run: Run, tmp_path: Path) -> None:
    """A shard that has loaded its layers flushes before it says that it is ready; it must not end because a server stood still."""

    async def work(server: NatsServer) -> None:
        async with await connect(server) as bus:
            got = asyncio.Event()

            async def note(received: Received) -> None:
                got.set()

            os.kill(server.pid, signal.SIGSTOP)
            await until(lambda: stands_still(server.pid), because="a thread of the server may run on for a moment, and answer")
            await bus.subscribe("flushed", note)
            flushing = asyncio.create_task(bus.flush())
            await until(lambda: bus._flushes, because="a flush tells nobody that it has begun")
            server.kill()
            server.revive()
            await flushing
            async with await connect(server) as other:
                await other.publish("flushed", b"")
                await asyncio.wait_for(got.wait(), 10)

    with NatsServer.start(directory=tmp_path) as server:
        run(work(server))


def test_compare_and_set(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            bucket = Bucket(bus, "cas_test", durable=True)
            assert await bucket.get("a") is None
            revision = await bucket.update("a", b"1", revision=0)
            assert revision is not None
            assert await bucket.update("a", b"2", revision=0) is None
            assert await bucket.update("a", b"2", revision=revision + 7) is None
            assert await bucket.update("a", b"2", revision=revision) is not None
            entry = await bucket.get("a")
            assert entry is not None and entry.value == b"2"

    run(work())


def test_a_model_is_pushed_and_pulled(run: Run, server: NatsServer, model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            with pytest.raises(ModelNotFound, match="mesh push"):
                await store.manifest("nothing")
            steps: list[tuple[int, int]] = []
            manifest = await store.push(model, lambda what, done, total: steps.append((done, total)))
            assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] > 100_000
            assert "tiny" in await store.names()
            again: list[int] = []
            await store.push(model, lambda what, done, total: again.append(done))
            assert len(again) < len(steps)
            assert await store.pull("tiny", tmp_path / "whole") == manifest
            for file in sorted(model.iterdir()):
                if file.name != "manifest.json":
                    assert (tmp_path / "whole" / file.name).read_bytes() == file.read_bytes()
            assert Manifest.load(tmp_path / "whole") == manifest
            await store.pull("tiny", tmp_path / "part", LayerRange(1, 2), embed=False, head=False)
            names = {file.name for file in (tmp_path / "part").iterdir()}
            assert names == {"manifest.json", "layer_001.onnx", "layer_001.onnx.data"}

    run(work())


def test_right_files_are_left_and_the_others_fetched(run: Run, server: NatsServer, model: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            await store.push(model)
            await store.pull("tiny", tmp_path)
            good, bad = tmp_path / "layer_000.onnx.data", tmp_path / "layer_001.onnx.data"
            stamp = good.stat().st_mtime_ns
            bad.write_bytes(bad.read_bytes()[:-1] + b"\0")
            (tmp_path / "head.onnx").unlink()
            await store.pull("tiny", tmp_path)
            assert good.stat().st_mtime_ns == stamp
            Manifest.load(tmp_path).verify_files(tmp_path, LayerRange(0, 3), checksums=True, embed=True, head=True)
            assert not list(tmp_path.glob(".*"))

    run(work())


def test_a_damaged_object_is_refused_and_leaves_nothing(run: Run, server: NatsServer, model: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(model)
            (file,) = (f for f in manifest.block("layer_002").files if f.name.endswith(".data"))
            inner = await bus.client.jetstream().object_store(subjects.OBJECTS_MODELS)
            right = (model / file.name).read_bytes()
            await inner.put(f"sha256.{file.sha256}", b"\0" + right[1:])
            with pytest.raises(CorruptModel, match=r"layer_002\.onnx\.data"):
                await store.pull("tiny", tmp_path)
            assert not (tmp_path / file.name).exists() and not list(tmp_path.glob(f".{file.name}*"))
            assert not (tmp_path / "manifest.json").exists()
            await inner.put(f"sha256.{file.sha256}", right)

    run(work())


def test_a_planted_manifest_writes_nothing_outside_and_nothing_too_large(
    run: Run, server: NatsServer, model: Path, tmp_path: Path, elsewhere: None
) -> None:
    """A manifest whose file names lead elsewhere, one without end, and an object longer than its manifest says."""

    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(model)
            inner = await bus.client.jetstream().object_store(subjects.OBJECTS_MODELS)
            document = manifest.model_dump_json()
            for name in ("../planted.onnx", "/tmp/planted.onnx", "sitecustomize.py"):
                await inner.put("model.planted", document.replace('"head.onnx"', f'"{name}"').encode())
                with pytest.raises(CorruptModel):
                    await store.pull("planted", tmp_path / "in")
            await inner.put("model.planted", b" " * (MAX_MANIFEST_BYTES + 1))
            with pytest.raises(CorruptModel, match="announced"):
                await store.manifest("planted")
            assert not list(tmp_path.iterdir())
            (file,) = (f for f in manifest.block("layer_002").files if f.name.endswith(".data"))
            right = (model / file.name).read_bytes()
            await inner.put(f"sha256.{file.sha256}", right + b"more" * 1_000_000)
            with pytest.raises(CorruptModel, match="announced"):
                await store.pull("tiny", tmp_path / "in")
            assert not (tmp_path / "in" / file.name).exists() and not list((tmp_path / "in").glob(f".{file.name}*"))
            await inner.put(f"sha256.{file.sha256}", right)
            await inner.delete("model.planted")

    run(work())


def test_wrong_credentials_are_denied_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "auth.conf").write_text('authorization { user: "mesh", password: "right" }\n')
    with NatsServer.start(config=tmp_path / "auth.conf", directory=tmp_path) as server:
        with pytest.raises(Denied):
            run(Bus.connect(BusOptions((server.url,), user="mesh", password="wrong"), name="t", timeout_s=20))

        async def work() -> None:
            async with await Bus.connect(BusOptions((server.url,), user="mesh", password="right"), name="t") as bus:
                assert bus.connected

        run(work())


def test_files_that_are_not_there_are_named(run: Run, server: NatsServer) -> None:
    for options in (
        BusOptions((server.url,), credentials="nowhere.creds"),
        BusOptions((server.url,), tls_ca="nowhere.pem"),
        BusOptions((server.url,), tls_cert="one.pem"),
    ):
        with pytest.raises(ConfigError):
            run(Bus.connect(options, name="t"))


def test_a_bucket_is_read_even_if_the_servers_count_arrives_before_its_entries(
    run: Run, server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py decides that a bucket is empty from what has arrived, and on a busy machine the server's count may arrive first."""
    monkeypatch.setattr(nats.js.client.JetStreamContext.PushSubscription, "delivered", property(lambda self: 0))

    async def work() -> None:
        async with await connect(server) as bus:
            bucket = Bucket(bus, "t_early", ttl_s=60)
            assert await bucket.entries() == []
            for key in "abc":
                await bucket.put(key, key.encode())
            await bucket.delete("c")
            for _ in range(20):  # the account comes first in every second one or so
                assert {entry.key: entry.value for entry in await bucket.entries()} == {"a": b"a", "b": b"b"}
            await bucket.delete("a")
            await bucket.delete("b")
            assert await bucket.entries() == []  # all that was sent are deletions

    run(work())
