"""A server with a generated configuration: who has no certificate of its authority, or none that is valid now, or no TLS, is refused. A
client refuses a server in the same way. Renewed files are used without a new process."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from running import Run
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.errors import Denied, MeshError
from mesh.local.nats_server import NatsServer
from mesh.pki.folder import PkiFolder
from mesh.pki.server import ServerOptions, TlsFiles, server_config
from mesh.pki.users import UserFolder


@dataclass
class Secure:
    server: NatsServer
    pki: PkiFolder
    users: UserFolder

    @property
    def options(self) -> BusOptions:
        pki = self.pki
        return BusOptions(
            (self.server.url,),
            nkey_seed=str(self.users.seed("client")),
            inbox_prefix="_INBOX.client",
            tls_ca=str(pki.ca),
            tls_cert=str(pki.certificate("client")),
            tls_key=str(pki.key("client")),
        )

    def shows(self, pki: PkiFolder, name: str) -> BusOptions:
        return replace(self.options, tls_cert=str(pki.certificate(name)), tls_key=str(pki.key(name)))


def start(folder: Path, hosts: tuple[str, ...] = ("127.0.0.1",), now: datetime | None = None) -> Secure:
    pki, users = PkiFolder(folder / "pki"), UserFolder(folder / "users")
    pki.init()
    pki.issue("server", kind="server", hosts=hosts, now=now)
    pki.issue("client", kind="client")
    users.add("client", "client")
    tls = TlsFiles(pki.certificate("server"), pki.key("server"), pki.ca)
    config = folder / "nats.conf"
    config.write_text(server_config(ServerOptions(tls=tls), users.users()))
    return Secure(NatsServer.start(config=config, directory=folder / "server"), pki, users)


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    made = start(tmp_path)
    with made.server:
        yield made


async def connects(options: BusOptions) -> bool:
    """ServiceError and the like where it is refused."""
    async with await Bus.connect(options, name="test", timeout_s=2) as bus:
        await bus.flush()
        return bus.connected


def test_who_has_no_valid_certificate_is_refused(secure: Secure, run: Run, tmp_path: Path) -> None:
    assert run(connects(secure.options))
    other = PkiFolder(tmp_path / "other")
    other.init()
    other.issue("client", kind="client")
    secure.pki.issue("late", kind="client", days=1, now=datetime.now(UTC) - timedelta(days=2))
    secure.pki.issue("server-only", kind="server", hosts=("127.0.0.1",))
    refused = {
        "no certificate": replace(secure.options, tls_cert=None, tls_key=None),
        "another authority": secure.shows(other, "client"),
        "expired": secure.shows(secure.pki, "late"),
        "not a client's": secure.shows(secure.pki, "server-only"),
    }
    for why, options in refused.items():
        with pytest.raises(MeshError):
            assert not run(connects(options)), why


def test_a_right_certificate_without_the_right_key_is_refused(secure: Secure, run: Run, tmp_path: Path) -> None:
    stranger = UserFolder(tmp_path / "strangers")
    stranger.add("client", "client")
    for options in (replace(secure.options, nkey_seed=str(stranger.seed("client"))), replace(secure.options, nkey_seed=None)):
        with pytest.raises(Denied):
            run(connects(options))


def test_a_client_in_plain_text_is_refused(secure: Secure) -> None:
    with socket.create_connection(("127.0.0.1", secure.server.port), 30) as plain:
        plain.settimeout(30)
        assert b'"tls_required":true' in plain.recv(65536)
        plain.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        said = b""
        while data := plain.recv(65536):
            said += data
        assert b"PONG" not in said


def test_a_client_refuses_a_server_that_is_not_who_it_should_be(run: Run, tmp_path: Path) -> None:
    made = start(tmp_path / "host", hosts=("nats.example.org",))
    with made.server, pytest.raises(Denied, match="not to be trusted"):
        run(connects(made.options))
    made = start(tmp_path / "expired", now=datetime.now(UTC) - timedelta(days=100))
    with made.server, pytest.raises(Denied, match="not to be trusted"):
        run(connects(made.options))
    made = start(tmp_path / "authority")
    other = PkiFolder(tmp_path / "other")
    other.init()
    with made.server, pytest.raises(Denied, match="not to be trusted"):
        run(connects(replace(made.options, tls_ca=str(other.ca))))


def test_a_client_that_is_to_have_tls_refuses_a_server_without(secure: Secure, run: Run, server: NatsServer) -> None:
    for options in (
        replace(secure.options, urls=(server.url,), nkey_seed=None, inbox_prefix="_INBOX"),
        BusOptions((server.url.replace("nats://", "tls://"),)),
    ):
        with pytest.raises(Denied, match="TLS"):
            run(connects(options))


def test_a_connection_reads_its_files_anew_and_half_written_ones_do_no_harm(secure: Secure, run: Run) -> None:
    async def back(bus: Bus, count: int) -> None:
        await until(lambda: bus.connected and bus.counters["reconnects"] == count, because="a reconnection is counted before it is whole")
        await bus.flush()

    def reload() -> None:
        os.kill(secure.server.pid, signal.SIGHUP)

    async def work() -> None:
        async with await Bus.connect(secure.options, name="test") as bus:
            secure.pki.key("client").write_text("half of a key")
            await bus.client.force_reconnect()
            await back(bus, 1)
            secure.pki.renew(["client"])
            for step in (secure.pki.new_authority, secure.pki.renew, secure.pki.finish):
                step()
                reload()
                await until(lambda: any("Reloaded server configuration" in line for line in secure.server.log), because="the log says it")
            await bus.client.force_reconnect()
            await back(bus, 2)

    old = PkiFolder(secure.pki.path.parent / "old")
    old.path.mkdir()
    for file in (secure.pki.certificate("client"), secure.pki.key("client")):
        (old.path / file.name).write_bytes(file.read_bytes())
    run(work())
    with pytest.raises(MeshError):
        run(connects(secure.shows(old, "client")))
