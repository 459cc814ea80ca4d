"""`mesh doctor` on a real server and a real mesh: what is well is said to be, and each fault is found and has its advice."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from authority import Authority
from places import NATS
from running import Run
from serving import coordinator, shards
from waiting import until

from mesh.bus import Bus, BusOptions, EventLog, announce, keep_events
from mesh.bus.inspect import denied, stream_facts
from mesh.client import AsyncMeshClient
from mesh.doctor import DoctorOptions, Finding, examine, worst
from mesh.doctor.machine import check_port
from mesh.doctor.needs import ROLES, Role, needs_of
from mesh.doctor.processes import check_processes
from mesh.doctor.rights import check_rights
from mesh.doctor.server import check_jetstream, check_monitor, check_servers
from mesh.doctor.site import Clock, Site, look
from mesh.host.process import dying_with_parent
from mesh.local.nats_server import NatsServer
from mesh.protocol.rights import inbox_prefix
from mesh.types import LayerRange, even_ranges

SECRETS = {f"MESH_{role.upper()}_PASSWORD": f"{role}-secret" for role in (*ROLES, "system")}


async def of(url: str, **options: object) -> list[Finding]:
    given = DoctorOptions(BusOptions((url,)), **options)  # type: ignore[arg-type]
    return [finding async for section, finding in examine(given) if finding is not None and section != "this machine"]


def said(findings: Sequence[Finding], check: str, level: str) -> list[Finding]:
    found = [finding for finding in findings if finding.check == check and finding.level == level]
    assert all(finding.advice for finding in found) or level == "ok", "a finding that is not well says what to do"
    return found


async def stored(url: str) -> dict[str, int]:
    """How many messages the streams hold that a doctor with every right could write to."""
    async with await Bus.connect(BusOptions((url,)), name="test") as bus:
        facts = {stream: await stream_facts(bus, stream) for stream in ("KV_mesh_sessions", "KV_mesh_shards")}
        return {stream: 0 if one is None else one.messages for stream, one in facts.items()}


async def serves(url: str) -> None:
    async with AsyncMeshClient(url, model="tiny") as client:

        async def ready() -> bool:
            return (await client.health()).ready

        await until(ready, because="the coordinator takes the shards from their leases")


def test_a_mesh_that_is_well_has_no_error_and_every_replica_gives_a_token(server: NatsServer, model: Path, run: Run) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, (*even_ranges(3, 2), LayerRange(0, 2))) as running,
            coordinator(server.url, model),
        ):
            await serves(server.url)
            before = await stored(server.url)  # other tests have used this server
            # these shards compile at their first step
            found = await of(server.url, monitor=server.monitor_url, step_timeout_s=120.0)
            assert worst(found) != "error", [finding for finding in found if finding.level == "error"]
            tokens = said(found, "replicas", "ok")
            assert len(tokens) == 3 and all(any(shard.options.name in one.found for one in tokens) for shard in running)
            assert said(found, "generation", "ok") and said(found, "clocks", "ok") and said(found, "permissions", "ok")
            assert said(found, "model", "ok") and said(found, "versions", "ok")
            # each of the three reports the whole process of this test
            assert said(found, "memory of shards", "ok") or said(found, "memory of shards", "warning")
            assert said(found, "sync_interval", "ok")  # as `mesh up` starts it
            for shard in running:
                assert not shard.state.sessions, "the doctor has closed its rows"
            for stream, messages in (await stored(server.url)).items():
                assert messages <= before[stream] + len(running), "what was tried is not stored"

    run(work())


def test_a_missing_range_is_an_error(server: NatsServer, model: Path, run: Run) -> None:
    async def work() -> None:
        async with shards(server.url, model, [LayerRange(0, 2)]), coordinator(server.url, model):
            found = await of(server.url)
            (gap,) = said(found, "layer ranges", "error")
            assert "2-3" in gap.found and "mesh join --layers 2-3" in gap.advice
            assert said(found, "replicas", "skipped") and said(found, "coordinators", "error")

    run(work())


def test_no_server_is_found_and_nothing_else_is_tried(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = run(of(f"nats://127.0.0.1:{taken.getsockname()[1]}"))
    assert [finding.check for finding in found] == ["NATS"] and said(found, "NATS", "error")


def test_a_server_without_jetstream_is_found(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "plain.conf"
    config.write_text("max_payload: 512KB\n")

    async def work(url: str) -> tuple[list[Finding], list[Finding]]:
        async with await Bus.connect(BusOptions((url,)), name="test") as bus:
            return [f async for f in check_jetstream(bus)], [f async for f in check_servers(BusOptions((url,)))]

    with NatsServer.start(config=config, directory=tmp_path / "server") as plain:
        jetstream, servers = run(work(plain.url))
    assert "off" in said(jetstream, "JetStream", "error")[0].found and said(servers, "max_payload", "warning")


def test_a_server_that_writes_at_once_is_well(tmp_path: Path) -> None:
    config = tmp_path / "always.conf"
    config.write_text(f'jetstream {{ store_dir: "{tmp_path}/jetstream", sync_interval: always }}\n')
    with NatsServer.start(config=config, directory=tmp_path / "server", monitor=True) as running:
        found = check_monitor(running.monitor_url)
    assert said(found, "sync_interval", "ok") and said(found, "disk (JetStream)", "ok")
    assert said(check_monitor(running.monitor_url), "sync_interval", "error")  # it has ended
    assert said(check_monitor(None), "sync_interval", "skipped")


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], BusOptions]]:
    """nats/secure.conf, unchanged: how a role connects."""
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder / "tls")
    pair = authority.issue("server")
    environment = SECRETS | {"MESH_TLS_CERT": str(pair.cert), "MESH_TLS_KEY": str(pair.key)}
    with NatsServer.start(config=NATS / "secure.conf", directory=folder / "server", environment=environment) as server:

        def options(role: str) -> BusOptions:
            return BusOptions(
                (server.url,), user=role, password=f"{role}-secret", tls_ca=str(authority.ca), inbox_prefix=inbox_prefix(role)
            )

        yield options


@pytest.mark.parametrize("role", ROLES)
def test_each_role_of_the_accounts_may_do_what_it_needs(secure: Callable[[str], BusOptions], run: Run, role: Role) -> None:
    async def work() -> list[Finding]:
        async with await Bus.connect(secure(role), name="test") as bus:
            return [finding async for finding in check_rights(bus, role)]

    (finding,) = run(work())
    assert finding.level == "ok", finding


@pytest.mark.parametrize(("user", "role"), [("client", "shard"), ("client", "operator"), ("shard", "coordinator"), ("gateway", "shard")])
def test_the_subjects_that_a_role_lacks_are_named(secure: Callable[[str], BusOptions], run: Run, user: str, role: Role) -> None:
    async def work() -> list[Finding]:
        async with await Bus.connect(secure(user), name="test") as bus:
            found = [finding async for finding in check_rights(bus, role)]
            publish, _ = await denied(bus, publish=["mesh.v1.control.p0.drain"])
            assert publish, "the same connection goes on after a refusal"
            return found

    found = run(work())
    assert said(found, "permissions", "error") and any("mesh.v1." in finding.found for finding in found)


def test_wrong_credentials_are_said_to_be_wrong(secure: Callable[[str], BusOptions], run: Run) -> None:
    async def work() -> list[Finding]:
        return [finding async for finding in check_servers(replace(secure("client"), password="wrong"))]

    assert "credentials" in said(run(work()), "NATS", "error")[0].found


def test_every_role_needs_an_inbox_and_no_subject_of_a_real_process() -> None:
    for role in ROLES:
        needs = needs_of(role, inbox="_INBOX.x")
        assert "_INBOX.x" in needs.subscribe
        for subject in needs.publish:
            # a message without fields has no effect on those who hear these
            known = ("mesh.v1.shards", "mesh.v1.spans", "mesh.v1.usage", "mesh.v1.usage.spent")
            assert "doctor-nobody" in subject or subject in known or subject.startswith("$JS.API."), subject


def test_clocks_versions_and_models_that_differ_are_found(server: NatsServer, model: Path, run: Run) -> None:
    async def work() -> Site:
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            await Bus.connect(BusOptions((server.url,)), name="test") as bus,
        ):
            return await look(bus)

    site = run(work())
    assert all(shard.clock is not None and abs(shard.clock.ahead_s) < 0.5 for shard in site.shards)
    first, second = site.shards[:2]
    other = second.lease.model_copy(update={"model_hash": "0" * 16, "version": "0.0.1"})
    assert second.stats is not None
    full = second.stats.model_copy(update={"machine": second.stats.machine.model_copy(update={"available_bytes": 1, "quota_cores": 0.5})})
    wrong = Site((first, replace(second, lease=other, stats=full, clock=Clock(2.0, 0.001))))
    found = list(check_processes(wrong))
    assert said(found, "model", "error") and said(found, "versions", "warning") and said(found, "memory of shards", "warning")
    assert "is 2 s ahead" in said(found, "clocks", "warning")[0].found
    assert said(found, "threads", "warning")
    far = Site((replace(first, clock=Clock(-60.0, 0.001)),))
    assert said(list(check_processes(far)), "clocks", "error")


def test_a_port_that_is_taken_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert check_port("127.0.0.1", port).level == "warning"
    assert check_port("127.0.0.1", port).level == "ok"


def test_a_low_limit_of_open_files_is_found() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from mesh.doctor.machine import check_machine\n"
        "print([(f.level, f.advice) for f in check_machine() if f.check == 'open files'])"
    )
    done = subprocess.run(dying_with_parent([sys.executable, "-c", program]), capture_output=True, text=True, timeout=60)
    assert "'error'" in done.stdout and "LimitNOFILE" in done.stdout, done.stderr


def test_a_folder_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh.doctor.machine import check_machine

    monkeypatch.setenv("MESH_CACHE_DIR", "/proc/nowhere")
    (finding,) = said(list(check_machine()), "disk (cache)", "error")
    assert "MESH_CACHE_DIR" in finding.advice


def test_a_shard_that_was_killed_is_said_to_be_lost(server: NatsServer, run: Run) -> None:
    async def work() -> list[Finding]:
        async with await Bus.connect(BusOptions((server.url,)), name="test") as bus:
            await keep_events(EventLog(bus))
            await announce(bus, "joined", "killed-shard", model="tiny", detail="")
            await announce(bus, "joined", "gone-shard", model="tiny", detail="")
            await announce(bus, "left", "gone-shard", model="tiny", detail="")
            await bus.flush()

            async def noted() -> bool:
                return {"killed-shard", "gone-shard"} <= {event.who async for event in EventLog(bus).events()}

            await until(noted, because="the stream takes events without an answer")
            return list(check_processes(await look(bus)))

    lost = said(run(work()), "shards", "warning")
    assert any("killed-shard" in finding.found and "mesh forget killed-shard" in finding.advice for finding in lost)
    assert not any("gone-shard" in finding.found for finding in lost)
