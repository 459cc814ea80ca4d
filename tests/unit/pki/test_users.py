"""Users of NATS and the server's configuration that is made from them."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from places import NATS, ROOT

from mesh.errors import BadRequest, ConfigError
from mesh.pki.server import _COMMON, Cluster, ServerOptions, TlsFiles, accounts_with_passwords, server_config
from mesh.pki.users import UserFolder
from mesh.protocol.rights import Binding, covers, inbox_prefix, inbox_user, rights_of, table
from mesh.protocol.roles import ROLES
from mesh.protocol.topics import TOPICS
from mesh.types import LayerRange

TLS = TlsFiles(Path("/a/server.crt"), Path("/a/server.key"), Path("/a/ca.crt"))


def test_seeds_are_their_owners_alone_and_no_user_is_replaced_unasked(tmp_path: Path) -> None:
    folder = UserFolder(tmp_path / "users")
    assert folder.users() == []
    made = folder.add("shard-1", "shard", shard="shard-1", layers=LayerRange(0, 10))
    assert folder.users() == [made]
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700 and stat.S_IMODE(folder.seed("shard-1").stat().st_mode) == 0o600
    assert folder.seed("shard-1").read_text().strip() not in folder.file.read_text()
    with pytest.raises(ConfigError, match="nothing was written"):
        folder.add("shard-1", "shard")
    assert folder.add("shard-1", "shard", replace=True).public != made.public
    for name, role, more in (
        ("../x", "client", {}),
        ("a", "nobody", {}),
        ("a", "client", {"shard": "a"}),
        ("a", "shard", {"layers": LayerRange(0, 1)}),
    ):
        with pytest.raises(BadRequest):
            folder.add(name, role, **more)  # type: ignore[arg-type]
    folder.file.write_text('{"users": [{"name": "x", "role": "client", "public": "} evil"}]}')
    with pytest.raises(ConfigError, match="not a list of users"):
        folder.users()


def test_a_listener_that_others_can_reach_takes_tls(tmp_path: Path) -> None:
    user = UserFolder(tmp_path).add("client", "client")
    for host in ("0.0.0.0", "::", "10.0.0.1", "nats.example.org", ""):
        with pytest.raises(ConfigError, match="TLS"):
            server_config(ServerOptions(host=host), [user])
        assert "verify: true" in server_config(ServerOptions(host=host, tls=TLS), [user])
    with pytest.raises(ConfigError, match="TLS"):
        server_config(ServerOptions(cluster=Cluster("mesh", "0.0.0.0:6222")), [user])
    assert "tls" not in server_config(ServerOptions(), [user])
    cluster = server_config(ServerOptions(host="0.0.0.0", tls=TLS, cluster=Cluster("mesh", "0.0.0.0:6222", ("nats://b:6222",))), [user])
    assert cluster.count("verify: true") == 2
    with pytest.raises(BadRequest):
        server_config(ServerOptions(store='x" } evil {'), [user])


def test_what_a_server_elsewhere_needs(tmp_path: Path) -> None:
    user = UserFolder(tmp_path).add("client", "client")
    text = server_config(ServerOptions(monitor="127.0.0.1:8222", lame_duck="45s", max_file="20GB"), [user])
    assert 'http: "127.0.0.1:8222"' in text and 'lame_duck_duration: "45s"' in text and "max_file_store: 20GB" in text
    assert "http:" not in server_config(ServerOptions(), [user])
    with pytest.raises(ConfigError, match="30 s or more"):
        server_config(ServerOptions(lame_duck="10s"), [user])


def test_no_secret_is_in_a_configuration(tmp_path: Path) -> None:
    folder = UserFolder(tmp_path)
    users = [folder.add(role, role) for role in ROLES]
    text = server_config(ServerOptions(), users)
    for user in users:
        assert user.public in text and folder.seed(user.name).read_text().strip() not in text


def test_the_shipped_files_are_those_that_the_code_makes() -> None:
    assert (NATS / "accounts.conf").read_text() == accounts_with_passwords(), "python -m mesh.pki.server > nats/accounts.conf"
    assert table() in (ROOT / "docs/security.md").read_text(), "write the tables of `python -m mesh.protocol.rights` into docs/security.md"
    settings = {line for line in (NATS / "common.conf").read_text().splitlines() if line and not line.startswith("#")}
    assert settings == {line for line in _COMMON.splitlines() if line and not line.startswith("#")}


def test_each_topic_is_sent_by_a_role_and_heard_by_one_or_a_stream() -> None:
    for topic in TOPICS:
        assert topic.sends, topic.template
        assert topic.hears or "the stream" in topic.listens, topic.template


def test_a_shard_that_is_bound_hears_its_own_name_and_range_alone() -> None:
    bound = rights_of("shard", Binding("_INBOX.s", "s", LayerRange(0, 10)))
    hears = {
        "mesh.v1.m.layers.0-10.s": True,
        "mesh.v1.m.layers.0-10": True,
        "mesh.v1.m.layers.0-10.other": False,
        "mesh.v1.m.layers.10-20.s": False,
        "mesh.v1.m.layers.10-20": False,
        "mesh.v1.control.s.open": True,
        "mesh.v1.control.other.open": False,
        "_INBOX.s.1": True,
        "_INBOX.other.1": False,
    }
    for subject, allowed in hears.items():
        assert any(covers(pattern, subject) for pattern in bound.subscribe) == allowed, subject
    sends = {
        "mesh.v1.m.layers.10-20.other": True,
        "$KV.mesh_shards.s": True,
        "$KV.mesh_shards.other": False,
        "$KV.mesh_placement.claims.m": False,
        "mesh.v1.m.shards.other": False,
    }
    for subject, allowed in sends.items():
        assert any(covers(pattern, subject) for pattern in bound.publish) == allowed, subject
    joins = rights_of("shard", Binding("_INBOX.s", "s"))
    assert any(covers(pattern, "$KV.mesh_placement.claims.m") for pattern in joins.publish), "it claims the range that it takes"
    mirrors = rights_of("shard", replace(Binding("_INBOX.s", "s", LayerRange(0, 10)), mirror=True))
    assert any(covers(pattern, "mesh.v1.m.layers.0-10.*") for pattern in mirrors.subscribe)


@pytest.mark.parametrize(
    ("pattern", "subject", "covered"),
    [
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("a.*", "a.>", False),
        ("a.>", "a.>", True),
        ("a.b", "a.*", False),
        (">", "a", True),
        ("a.*.c", "a.>", False),
    ],
)
def test_a_permission_covers_what_the_server_says(pattern: str, subject: str, covered: bool) -> None:
    assert covers(pattern, subject) == covered


@pytest.mark.parametrize(
    ("reply", "user"),
    [
        (f"{inbox_prefix('ana')}.HXCAN8vLj0aaXYliT7ZMfC.7", "ana"),  # of a request
        (f"{inbox_prefix('ana')}.HXCAN8vLj0aaXYliT7ZMfC", "ana"),  # of a stream
        ("_INBOX.HXCAN8vLj0aaXYliT7ZMfC.7", ""),  # of a connection without a prefix of its own
        ("_INBOX.HXCAN8vLj0aaXYliT7ZMfC", ""),
        ("_INBOX", ""),
        ("elsewhere.ana.HXCAN8vLj0aaXYliT7ZMfC.7", ""),
        ("", ""),
    ],
)
def test_an_inbox_says_whose_it_is(reply: str, user: str) -> None:
    assert inbox_user(reply) == user
