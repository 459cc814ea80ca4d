"""API keys: which are accepted, and what a changed file changes."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest
import yaml
from edge_tools import token, verifier

from mesh.errors import ConfigError, Denied
from mesh.http.keys import Credentials, KeyFile, add_key
from mesh.http.tokens import Claims, Quota


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_accepted_with_its_scopes_and_quota_and_the_file_does_not_have_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "team-a", ["generate", "batch"], Quota(concurrent_sessions=2))
    other = add_key(path, "team-b", ["admin"], Quota())
    keys = KeyFile(path)
    assert keys.verify(key) == Claims("team-a", frozenset({"generate", "batch"}), Quota(concurrent_sessions=2))
    assert keys.verify(other).allows("generate")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = key.split("_", 2)[2]
    assert secret not in path.read_text()
    changed = key[:-1] + ("a" if key[-1] != "a" else "b")
    for wrong in (key[:-1], changed, "mesh_", key.replace("mesh_", ""), other[:18] + key[18:], key + "x", ""):
        with pytest.raises(Denied):
            keys.verify(wrong)


def test_a_changed_file_is_read_again_and_a_wrong_one_keeps_the_keys_of_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    first = add_key(path, "a", ["generate"], Quota())
    keys = KeyFile(path, clock, beside=lambda work: work())
    second = add_key(path, "b", ["generate"], Quota())
    with pytest.raises(Denied):
        keys.verify(second)  # the file is looked at once a second
    clock.now += 1.1
    assert keys.verify(second).subject == "b" and keys.verify(first).subject == "a"
    with caplog.at_level(logging.ERROR):
        for wrong in (b"- {id: 1}", b"\xff\xfe\x00", b"a: 1", None):
            path.unlink() if wrong is None else path.write_bytes(wrong)
            clock.now += 1.1
            assert keys.verify(first).subject == "a"
    assert sum("stay valid" in record.getMessage() for record in caplog.records) == 4
    path.write_text("")
    clock.now += 1.1
    with pytest.raises(Denied):
        keys.verify(first)


def test_nobody_waits_for_a_file_that_is_slow(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    first = add_key(path, "a", ["generate"], Quota())
    keys = KeyFile(path, clock)
    old = path.read_text()
    path.unlink()
    os.mkfifo(path)  # whoever reads it waits until somebody has written
    for _ in range(3):
        clock.now += 1.1
        assert keys.verify(first).subject == "a"
    (reader,) = [thread for thread in threading.enumerate() if thread.name == "API keys"]
    second = add_key(tmp_path / "more.yaml", "b", ["generate"], Quota())
    path.write_text(old + (tmp_path / "more.yaml").read_text())
    reader.join(60)
    assert keys.verify(second).subject == "b" and keys.verify(first).subject == "a"


def test_a_file_that_is_wrong_is_an_error_at_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="mesh token key"):
        KeyFile(path)
    add_key(path, "a", ["generate"], Quota())
    entry = yaml.safe_load(path.read_text())[0]
    for wrong in ([{**entry, "scopes": ["root"]}], [{**entry, "sha256": "x"}], [{**entry, "key": "x"}], [entry, entry], {"a": entry}, "x"):
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(ConfigError, match=r"keys\.yaml"):
            KeyFile(path)
        with pytest.raises(ConfigError, match=r"keys\.yaml"):
            add_key(path, "b", ["generate"], Quota())
    path.write_text("&a [*a, *a]")
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        KeyFile(path)


@pytest.mark.parametrize("scopes", [[], ["root"]])
def test_a_key_without_a_scope_is_not_made(tmp_path: Path, scopes: list[str]) -> None:
    with pytest.raises(ConfigError, match="scope"):
        add_key(tmp_path / "keys.yaml", "a", scopes, Quota())
    with pytest.raises(ConfigError):
        add_key(tmp_path / "keys.yaml", "", ["generate"], Quota())
    with pytest.raises(ConfigError):
        add_key(tmp_path / "keys.yaml", "a", ["generate"], Quota(requests_per_minute=0))
    assert not (tmp_path / "keys.yaml").exists()


def test_tokens_and_keys_are_accepted_side_by_side(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.yaml", "a", ["generate"], Quota())
    keys = KeyFile(tmp_path / "keys.yaml")
    both = Credentials(verifier(), keys)
    assert both.verify(key).subject == "a" and both.verify(token("generate")).subject == "somebody"
    with pytest.raises(Denied, match="no API key"):
        Credentials(None, keys).verify(token("generate"))
