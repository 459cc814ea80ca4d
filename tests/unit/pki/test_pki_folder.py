"""A private authority in a folder: what it issues, how its files are kept, and how it changes."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mesh.errors import BadRequest, ConfigError
from mesh.pki.certificates import facts, is_signed_by, read_certificates
from mesh.pki.folder import PkiFolder

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def pki(tmp_path: Path) -> PkiFolder:
    folder = PkiFolder(tmp_path / "pki")
    folder.init(now=NOW)
    folder.issue("server", kind="server", hosts=("nats.example.org", "10.0.0.1", "::1"), now=NOW)
    folder.issue("shard-1", kind="client", now=NOW)
    return folder


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def of(file: Path) -> list[str]:
    return [facts(each).name for each in read_certificates(file.read_bytes(), "test")]


def test_certificates_say_what_they_are_for_and_how_long(pki: PkiFolder) -> None:
    authority, server, client = (
        facts(read_certificates(file.read_bytes(), "test")[0]) for file in (pki.ca, pki.certificate("server"), pki.certificate("shard-1"))
    )
    assert (authority.kind, server.kind, client.kind) == ("authority", "server", "client")
    assert server.hosts == ("nats.example.org", "10.0.0.1", "::1") and client.hosts == ()
    assert authority.ends - NOW == timedelta(days=3650) and server.ends - NOW == timedelta(days=90)
    assert server.begins < NOW, "a clock that is a little behind takes it"


def test_keys_are_their_owners_alone_and_fit_their_certificates(pki: PkiFolder) -> None:
    assert mode(pki.path) == 0o700
    for name in ("ca", "server", "shard-1"):
        assert mode(pki.key(name)) == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.certificate("server"), pki.key("server"))


def test_nothing_is_replaced_unasked(pki: PkiFolder) -> None:
    before = {file: file.read_bytes() for file in pki.path.iterdir()}
    with pytest.raises(ConfigError, match="nothing was written"):
        pki.init()
    with pytest.raises(ConfigError, match="nothing was written"):
        pki.issue("server", kind="server", hosts=("a",))
    assert {file: file.read_bytes() for file in pki.path.iterdir()} == before
    pki.issue("server", kind="server", hosts=("a",), replace=True)
    assert pki.certificate("server").read_bytes() != before[pki.certificate("server")]


@pytest.mark.parametrize("host", ["", "a b", "-a", "1.2.3", "a..b", "a/b", "x" * 300])
def test_a_host_that_is_none_is_refused(pki: PkiFolder, host: str) -> None:
    with pytest.raises(BadRequest):
        pki.issue("other", kind="server", hosts=(host,))
    with pytest.raises(BadRequest):
        pki.issue("other", kind="server")
    for name in ("ca", "../x", "a/b", ""):
        with pytest.raises(BadRequest):
            pki.issue(name, kind="client")
    assert not pki.certificate("other").exists()


def test_a_renewed_certificate_is_as_the_one_before_with_another_key(pki: PkiFolder) -> None:
    key, before = pki.key("server").read_bytes(), facts(read_certificates(pki.certificate("server").read_bytes(), "test")[0])
    assert pki.renew(now=NOW + timedelta(days=80)) == ["server", "shard-1"]
    after = facts(read_certificates(pki.certificate("server").read_bytes(), "test")[0])
    assert (after.name, after.kind, after.hosts) == (before.name, before.kind, before.hosts)
    assert after.ends == before.ends + timedelta(days=80) and pki.key("server").read_bytes() != key
    assert mode(pki.key("server")) == 0o600
    with pytest.raises(ConfigError, match="nobody"):
        pki.renew(["nobody"])


def test_an_authority_changes_in_three_steps_and_every_certificate_is_trusted_in_each(pki: PkiFolder) -> None:
    def trusted() -> bool:
        bundle = read_certificates(pki.ca.read_bytes(), "test")
        return all(
            any(is_signed_by(read_certificates(pki.certificate(name).read_bytes(), "test")[0], each) for each in bundle)
            for name in pki.names
        )

    (old,) = of(pki.ca)
    leaf = pki.certificate("server").read_bytes()
    pki.new_authority(now=NOW)
    assert len(of(pki.ca)) == 2 and trusted() and pki.certificate("server").read_bytes() == leaf
    assert any("mesh pki rotate" in one.advice for one in pki.show(now=NOW))
    with pytest.raises(ConfigError, match="under way"):
        pki.new_authority(now=NOW)
    with pytest.raises(ConfigError, match="still signed"):
        pki.finish()
    pki.renew(now=NOW)
    assert trusted() and any("--finish" in one.advice for one in pki.show(now=NOW))
    pki.finish()
    (new,) = of(pki.ca)
    assert new != old and trusted() and not any(one.advice for one in pki.show(now=NOW))
    pki.issue("late", kind="client", now=NOW)


def test_show_says_when_and_what_to_do(pki: PkiFolder) -> None:
    assert not any(one.advice for one in pki.show(now=NOW))
    soon = {one.facts.name: one for one in pki.show(now=NOW + timedelta(days=75))}
    assert "soon" in soon["server"].advice and "mesh pki rotate server" in soon["server"].advice and not soon["server"].expired
    late = {one.facts.name: one for one in pki.show(now=NOW + timedelta(days=91))}
    assert late["server"].expired and "expired" in late["server"].advice
    other = PkiFolder(pki.path.parent / "other")
    other.init(now=NOW)
    pki.certificate("shard-1").write_bytes(other.ca.read_bytes())
    assert any("not signed by this authority" in one.advice for one in pki.show(now=NOW))


def test_a_folder_without_an_authority_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mesh pki init"):
        PkiFolder(tmp_path).issue("a", kind="client")
