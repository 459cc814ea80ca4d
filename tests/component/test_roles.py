"""Every subject of the mesh, tried by every role on a real server with the generated configuration: allowed or denied as its rights say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import Run
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.bus.inspect import denied
from mesh.doctor.rights import check_rights
from mesh.errors import Denied, NobodyListens
from mesh.local.nats_server import NatsServer
from mesh.pki.server import ServerOptions, server_config
from mesh.pki.users import User, UserFolder
from mesh.protocol.rights import STORES, Binding, covers
from mesh.protocol.roles import ROLES, Role
from mesh.protocol.topics import TOPICS, Topic
from mesh.types import LayerRange

OTHERS = ("alice", "bob")
API = "$JS.API"


@dataclass(frozen=True)
class Site:
    server: NatsServer
    folder: UserFolder

    def user(self, name: str) -> User:
        return next(user for user in self.folder.users() if user.name == name)

    def options(self, name: str, *, inbox: str | None = None) -> BusOptions:
        return BusOptions((self.server.url,), nkey_seed=str(self.folder.seed(name)), inbox_prefix=inbox or self.user(name).inbox)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    path = tmp_path_factory.mktemp("roles")
    folder = UserFolder(path / "users")
    for role in ROLES:
        folder.add(role, role)
    for name in OTHERS:
        folder.add(name, "client")
    folder.add("shard-1", "shard", shard="shard-1", layers=LayerRange(0, 10))
    config = path / "nats.conf"
    config.write_text(server_config(ServerOptions(sync_interval="10s"), folder.users()))
    with NatsServer.start(config=config, directory=path / "server") as server:
        yield Site(server, folder)


def subject_of(topic: Topic[object, object]) -> str:
    return topic.pattern(SHARD="shard-1", A_B="0-10").replace("*", "x")


def of_streams() -> list[str]:
    """What JetStream is asked about each stream, and what nobody but an operator may ask."""
    found = [f"{API}.INFO", f"{API}.STREAM.NAMES", f"{API}.STREAM.LIST"]
    for store in STORES:
        verbs = ("INFO", "CREATE", "UPDATE", "PURGE", "MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE", "PEER.REMOVE")
        found += [f"{API}.STREAM.{verb}.{store.stream}" for verb in verbs]
        found += [f"{API}.CONSUMER.{verb}.{store.stream}" for verb in ("CREATE", "LIST", "NAMES")]
        found += [f"{API}.CONSUMER.{verb}.{store.stream}.x" for verb in ("CREATE", "INFO", "DELETE", "DURABLE.CREATE", "MSG.NEXT")]
        found += [f"{API}.DIRECT.GET.{store.stream}", f"{API}.DIRECT.GET.{store.stream}.$KV.x.y", f"$JS.ACK.{store.stream}.x.1.1.1.1.0"]
    return found


_WRITTEN = """
    $KV.mesh_shards.shard-1 $KV.mesh_placement.claims.x $KV.mesh_sessions.x.y $KV.mesh_batches.x.batch $KV.mesh_batches.x.end.0
    $KV.mesh_batches.x.running.0 $KV.other.x $O.mesh_models.C.x $O.mesh_models.M.x $O.other.M.x mesh.v1.servertraces.x other.subject
    mesh.v2.x.generate
"""
_WIDE = """
    mesh.v1.servertraces.x mesh.v1.> > $KV.> $KV.mesh_sessions.> $O.> $JS.> $JS.API.> $SYS.ACCOUNT.*.DISCONNECT _INBOX.> other.subject
    $SRV.> $SRV.PING $SRV.PING.mesh-shard $SRV.STATS.mesh-shard.x $SRV.PING.mesh-coordinator $SRV.INFO.mesh-coordinator.x
"""
PUBLISHED = (
    *(subject_of(topic) for topic in TOPICS),
    *_WRITTEN.split(),
    *(f"_INBOX.{name}.x" for name in (*ROLES, *OTHERS)),
    *(f"$SRV.{verb}{end}" for verb in ("PING", "INFO", "STATS") for end in ("", ".mesh-shard", ".mesh-coordinator.x")),
    *of_streams(),
)
HEARD = (
    *(subject_of(topic) for topic in TOPICS),
    *(topic.pattern() for topic in TOPICS),
    *_WIDE.split(),
    *(f"_INBOX.{name}.>" for name in (*ROLES, *OTHERS)),
)


def expected(role: Role, topic: Topic[object, object], *, sends: bool) -> bool:
    """By the topic's own data, apart from how rights are made of it."""
    return role in ("operator", *(topic.sends if sends else topic.hears))


@pytest.mark.parametrize("role", [role for role in ROLES if role != "system"])
def test_a_role_may_do_what_its_rights_say_and_nothing_else(site: Site, run: Run, role: Role) -> None:
    async def work() -> tuple[set[str], set[str]]:
        async with await Bus.connect(site.options(role), name=role) as bus:
            publish, subscribe = await denied(bus, publish=PUBLISHED, subscribe=HEARD)
            return set(publish), set(subscribe)

    refused, deaf = run(work())
    rights = site.user(role).rights
    for subject in PUBLISHED:
        assert (subject not in refused) == any(covers(pattern, subject) for pattern in rights.publish), f"{role} publishes {subject}"
    for subject in HEARD:
        assert (subject not in deaf) == any(covers(pattern, subject) for pattern in rights.subscribe), f"{role} subscribes {subject}"
    for topic in TOPICS:
        subject = subject_of(topic)
        assert (subject not in refused) == expected(role, topic, sends=True), f"{role} publishes {subject}"
        assert (subject not in deaf) == expected(role, topic, sends=False), f"{role} subscribes {subject}"
    if role != "operator":
        assert {f"_INBOX.{name}.>" for name in (*ROLES, *OTHERS)} - deaf == {f"_INBOX.{role}.>"}, "its own inboxes alone"
        assert ("$KV.mesh_sessions.x.y" in refused) == (role != "coordinator")


def test_the_system_user_has_nothing_of_the_mesh(site: Site, run: Run) -> None:
    async def work() -> None:
        async with (
            await Bus.connect(site.options("system"), name="system") as system,
            await Bus.connect(site.options("operator"), name="operator") as operator,
        ):
            heard: asyncio.Queue[str] = asyncio.Queue()

            async def note(received: object) -> None:
                heard.put_nowait(str(received))

            await system.subscribe("mesh.v1.>", note)
            await system.require_subscriptions("system")
            await operator.publish("mesh.v1.events.x", b"{}")
            await operator.flush()
            await system.flush()
            assert heard.empty()
            assert (await system.ask("$SYS.REQ.SERVER.PING", b"", timeout_s=30)).data

    run(work())


def test_a_bound_shard_is_refused_the_range_and_the_name_of_another(site: Site, run: Run) -> None:
    async def work() -> None:
        async with await Bus.connect(site.options("shard-1"), name="shard") as bus:
            own = ["mesh.v1.m.layers.0-10", "mesh.v1.m.layers.0-10.shard-1", "mesh.v1.control.shard-1.open"]
            other = ["mesh.v1.m.layers.10-20", "mesh.v1.m.layers.10-20.shard-1", "mesh.v1.m.layers.*.*", "mesh.v1.control.shard-2.open"]
            writes = ["$KV.mesh_shards.shard-2", "mesh.v1.m.shards.shard-2", "$KV.mesh_placement.claims.m", "_INBOX.client.x"]
            publish, subscribe = await denied(bus, publish=["$KV.mesh_shards.shard-1", *writes], subscribe=[*own, *other])
            assert set(publish) == set(writes) and set(subscribe) == set(other)
            found = [finding async for finding in check_rights(bus, "shard", Binding(shard="shard-1", layers=LayerRange(0, 10)))]
            assert [finding.level for finding in found] == ["ok"], found

    run(work())


def test_a_shard_answers_whom_it_hears_once(site: Site, run: Run) -> None:
    async def work() -> None:
        async with (
            await Bus.connect(site.options("shard"), name="shard") as shard,
            await Bus.connect(site.options("alice"), name="alice") as alice,
        ):
            errors: list[str] = []

            async def answer(received: object) -> None:
                await shard.publish(received.reply, b"1")  # type: ignore[attr-defined]
                await shard.publish(received.reply, b"2")  # type: ignore[attr-defined]

            with shard.hearing_errors(lambda error: errors.append(str(error))):
                await shard.subscribe("mesh.v1.shards", answer)
                await shard.require_subscriptions("shard")
                answers = await alice.gather("mesh.v1.shards", b"{}")
                await shard.flush()
            assert [one.data for one in answers] == [b"1"] and len(errors) == 1 and "_inbox.alice" in errors[0].lower()

    run(work())


def test_a_connection_whose_inbox_it_may_not_hear_is_refused_and_the_subject_named(site: Site, run: Run) -> None:
    with pytest.raises(Denied, match=r"_INBOX\.bob\.") as caught:
        run(Bus.connect(site.options("alice", inbox="_INBOX.bob"), name="mesh-client"))
    assert "mesh-client" in str(caught.value) and "--nats-inbox-prefix" in str(caught.value)


def test_a_denied_subscription_is_an_error_at_the_start_that_names_subject_and_role(site: Site, model: Path, run: Run) -> None:
    from mesh.coordinator.service import Coordinator, CoordinatorOptions
    from mesh.shard.service import Shard, ShardOptions

    async def coordinate() -> None:
        async with await Bus.connect(site.options("gateway"), name="test") as bus:
            await Coordinator(bus, CoordinatorOptions(model)).run()

    async def serve() -> None:
        async with await Bus.connect(site.options("shard-1"), name="test") as bus:
            options = ShardOptions("shard-1", model, LayerRange(0, 3), rows=2, context=64, chunk=16, warm_up=False)
            await Shard(bus, options).run()

    with pytest.raises(Denied, match=r"mesh\.v1\.tiny\.layers\.0-3.*a shard of layers 0-3"):
        run(serve())
    with pytest.raises(Denied, match=r"mesh\.v1\.tiny\.generate.*a coordinator"):
        run(coordinate())


def test_the_doctor_names_the_permission_that_is_missing(site: Site, tmp_path: Path, run: Run) -> None:
    text = server_config(ServerOptions(), site.folder.users())
    missing = '            "mesh.v1.*.tokens.*"\n'
    config = tmp_path / "nats.conf"
    config.write_text(text.replace(missing, ""))

    async def work(url: str) -> None:
        for role in ("coordinator", "shard"):
            options = BusOptions((url,), nkey_seed=str(site.folder.seed(role)), inbox_prefix=site.user(role).inbox)
            async with await Bus.connect(options, name="doctor") as bus:
                found = [finding async for finding in check_rights(bus, role)]
                assert [finding.level for finding in found] == ["error"] and "mesh.v1.doctor-nobody.tokens.doctor-nobody" in found[0].found

    with NatsServer.start(config=config, directory=tmp_path / "server") as server:
        run(work(server.url))


def test_a_client_hears_that_nobody_listens(site: Site, run: Run) -> None:
    async def work() -> None:
        async with await Bus.connect(site.options("alice"), name="alice") as bus:
            with pytest.raises(NobodyListens):
                await bus.ask("mesh.v1.nobody.generate", b"{}", timeout_s=30)
            await until(lambda: bus.connected, because="the connection goes on")

    run(work())
