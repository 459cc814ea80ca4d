"""TLS and every kind of credentials, against a nats-server that demands them. A refusal is immediate and says what to do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, Identity, Pair, credentials
from running import Run

from mesh.bus import Bus, BusOptions
from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import ConfigError, Denied, MeshError
from mesh.local.nats_server import NatsServer
from mesh.settings.schema import NatsSection


async def hello(options: BusOptions, *, timeout_s: float = 30) -> bytes:
    """What comes back of a publish to oneself."""
    async with await Bus.connect(options, name="t", timeout_s=timeout_s) as bus:

        async def answer(received: Any) -> None:
            await bus.publish(received.reply, b"hello " + received.data)

        await bus.subscribe("mesh.v1.x", answer)
        return bytes((await bus.ask("mesh.v1.x", b"mesh", timeout_s=timeout_s)).data)


def flags(*arguments: str, section: NatsSection | None = None) -> BusOptions:
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    return bus_options(parser.parse_args(arguments), section)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """Demands TLS and a password."""
    folder = tmp_path_factory.mktemp("tls-server")
    yield from _serve(folder, authority.issue("server"), authority, 'authorization { user: "shard", password: "right" }')


@pytest.fixture(scope="module")
def mutual_server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """Demands a certificate of the client."""
    folder = tmp_path_factory.mktemp("mutual-server")
    yield from _serve(folder, authority.issue("server"), authority, "", verify=True)


def _serve(folder: Path, pair: Pair, authority: Authority, more: str, *, verify: bool = False) -> Iterator[NatsServer]:
    tls = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}", ca_file: "{authority.ca}", verify: {str(verify).lower()} }}'
    (folder / "server.conf").write_text(f"{tls}\n{more}\n")
    with NatsServer.start(config=folder / "server.conf", directory=folder) as server:
        yield server


def test_a_password_over_tls(run: Run, tls_server: NatsServer, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("right\n")
    options = flags(
        "--nats", tls_server.url, "--nats-ca", str(authority.ca), "--nats-user", "shard", "--nats-password-file", str(tmp_path / "password")
    )
    assert run(hello(options)) == b"hello mesh"
    assert "right" not in repr(options)
    wrong = BusOptions((tls_server.url,), user="shard", password="wrong", tls_ca=str(authority.ca))
    with pytest.raises(Denied, match="refuses these credentials"):
        run(hello(wrong))


def test_the_environment_gives_the_same_settings(
    run: Run, tls_server: NatsServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"URLS": tls_server.url, "USER": "shard", "PASSWORD": "right", "TLS_CA_FILE": str(authority.ca)}.items():
        monkeypatch.setenv(f"MESH_NATS_{key}", value)
    assert run(hello(flags())) == b"hello mesh"


def test_a_server_whose_authority_is_unknown_is_refused_at_once(run: Run, tls_server: NatsServer, tmp_path: Path) -> None:
    other = Authority(tmp_path, "another authority")
    for ca in (str(other.ca), None):  # None: the system's authorities
        url = tls_server.url.replace("nats://", "tls://")
        with pytest.raises(Denied, match=r"certificate is not to be trusted .* --nats-ca"):
            run(hello(BusOptions((url,), user="shard", password="right", tls_ca=ca)))


def test_a_client_shows_its_certificate(run: Run, mutual_server: NatsServer, authority: Authority) -> None:
    pair = authority.issue("shard")
    shown = BusOptions((mutual_server.url,), tls_ca=str(authority.ca), tls_cert=str(pair.cert), tls_key=str(pair.key))
    assert run(hello(shown)) == b"hello mesh"
    with pytest.raises(MeshError):
        run(hello(BusOptions((mutual_server.url,), tls_ca=str(authority.ca)), timeout_s=3))


def test_an_nkey(run: Run, tmp_path: Path) -> None:
    user = Identity("user")
    (tmp_path / "user.nk").write_bytes(user.seed)
    (tmp_path / "server.conf").write_text(f"authorization {{ users: [ {{ nkey: {user.public} }} ] }}\n")
    with NatsServer.start(config=tmp_path / "server.conf", directory=tmp_path) as server:
        assert run(hello(flags("--nats", server.url, "--nats-nkey", str(tmp_path / "user.nk")))) == b"hello mesh"
        (tmp_path / "other.nk").write_bytes(Identity("user").seed)
        with pytest.raises(Denied):
            run(hello(flags("--nats", server.url, "--nats-nkey", str(tmp_path / "other.nk"))))


def test_a_credentials_file(run: Run, tmp_path: Path) -> None:
    conf, creds = credentials(tmp_path)
    (tmp_path / "server.conf").write_text(conf)
    with NatsServer.start(config=tmp_path / "server.conf", directory=tmp_path) as server:
        assert run(hello(flags("--nats", server.url, "--nats-creds", str(creds)))) == b"hello mesh"
        with pytest.raises(Denied):
            run(hello(BusOptions((server.url,))))


def test_a_token(run: Run, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text("authorization { token: s3cret }\n")
    (tmp_path / "token").write_text("s3cret")
    with NatsServer.start(config=tmp_path / "server.conf", directory=tmp_path) as server:
        assert run(hello(flags("--nats", server.url, "--nats-token-file", str(tmp_path / "token")))) == b"hello mesh"


def test_flags_are_over_the_file_and_replace_its_user() -> None:
    section = NatsSection(urls=("nats://a:1",), user="shard", password="one", tls_ca_file="ca.pem")  # type: ignore[arg-type]
    kept = flags(section=section)
    assert (kept.urls, kept.user, kept.password, kept.tls_ca) == (("nats://a:1",), "shard", "one", "ca.pem")
    other = flags("--nats-nkey", "user.nk", "--nats", "b:2", section=section)
    assert (other.urls, other.user, other.password, other.nkey_seed, other.tls_ca) == (("nats://b:2",), None, None, "user.nk", "ca.pem")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nats-user", "a", "--nats-creds", "b"), "credentials_file and user each say who connects"),
        (("--nats-password-file", "a"), "a password is of a user"),
        (("--nats-cert", "a"), "tls_cert_file and tls_key_file belong together"),
        (("--nats", "http://a"), "is not a NATS URL"),
        (("--nats-inbox-prefix", "a.*"), "is no subject"),
        (("--nats-user", "a", "--nats-password-file", "/nowhere"), "/nowhere: No such file"),
    ],
)
def test_options_that_exclude_each_other_are_an_error_of_one_line(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        flags(*arguments)
    assert "\n" not in str(caught.value)


def test_damaged_tls_files_are_named(run: Run, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    pair, other = authority.issue("a"), authority.issue("b")
    for options in (
        BusOptions(tls_ca=str(tmp_path / "no.pem")),
        BusOptions(tls_cert=str(tmp_path / "no.pem"), tls_key=str(pair.key)),
        BusOptions(tls_cert=str(pair.cert), tls_key=str(other.key)),
        BusOptions(tls_cert=str(pair.cert), tls_key="/nowhere.key"),
    ):
        with pytest.raises(ConfigError, match=r"no\.pem|a\.crt|nowhere"):
            run(hello(options))
