"""How commands find the mesh that runs on this machine, and its password."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from mesh.bus import BusOptions
from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import ConfigError
from mesh.local.running import announced, running_mesh

URL, OTHER = "nats://127.0.0.1:41001", "nats://127.0.0.1:41002"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith(("MESH_NATS", "NATS_"))]:
        monkeypatch.delenv(name)
    return tmp_path / "stagemesh"


def options(*arguments: str) -> BusOptions:
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    return bus_options(parser.parse_args(arguments))


def test_a_command_finds_the_mesh_that_was_started_last_and_its_password(folder: Path) -> None:
    assert running_mesh() is None and options() == BusOptions()
    with announced(URL, user="mesh", password="secret") as file:
        assert file is not None and file.parent == folder and file.stat().st_mode & 0o777 == 0o600
        assert options() == BusOptions((URL,), user="mesh", password="secret")
        with announced(OTHER, user="mesh", password="another"):
            assert options() == BusOptions((OTHER,), user="mesh", password="another")
            assert options("--nats", "localhost:41001").password == "secret"
        assert options().urls == (URL,)
        assert options("--nats", "nats://127.0.0.1:41003") == BusOptions(("nats://127.0.0.1:41003",))
        assert options("--nats", "nats://example.org:41001").password is None, "another machine's server"
        assert options("--nats", URL, "--nats-user", "me").user == "me"
    assert running_mesh() is None and not list(folder.iterdir())


def test_the_environment_is_over_the_mesh_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_NATS_URLS", "nats://example.org:4222")
    with announced(URL, user="mesh", password="secret"):
        assert options() == BusOptions(("nats://example.org:4222",))
        monkeypatch.setenv("MESH_NATS_URLS", URL)
        assert options().password == "secret"


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Contexts as `nats context save` and `nats context select` write them."""
    folder = tmp_path / "config" / "nats"
    (folder / "context").mkdir(parents=True)
    unused = dict.fromkeys(("token", "creds", "nkey", "cert", "key", "ca", "nsc", "inbox_prefix", "socks_proxy", "user_jwt"), "")
    team = {**unused, "description": "", "url": "nats://nats.example.org:4222", "user": "ann", "password": "secret"}
    (folder / "context" / "team.json").write_text(json.dumps(team))
    (folder / "context" / "proxied.json").write_text(json.dumps({**team, "socks_proxy": "socks5://127.0.0.1:1"}))
    return folder


def test_a_context_of_the_nats_command_is_read(contexts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = BusOptions(("nats://nats.example.org:4222",), user="ann", password="secret")
    assert options() == BusOptions() and options("--nats-context", "team") == team
    assert options("--nats-context", "team", "--nats", "other:4222").urls == ("nats://other:4222",)
    with announced(URL, user="mesh", password="pw"):
        monkeypatch.setenv("NATS_CONTEXT", "team")
        assert options() == team, "what was named goes before the mesh that runs here"
        monkeypatch.delenv("NATS_CONTEXT")
        (contexts / "context.txt").write_text("team\n")
        assert options().urls == (URL,), "the mesh that runs here goes before what was selected"
    assert options() == team
    monkeypatch.setenv("MESH_NATS_URLS", "nats://example.org:4222")
    assert options().urls == ("nats://example.org:4222",)


def test_a_context_that_cannot_be_used_is_refused_by_name(contexts: Path) -> None:
    for name, words in {"nobody": "no NATS context nobody", "../team": "no name of a context", "proxied": "socks_proxy"}.items():
        with pytest.raises(ConfigError, match=words):
            options("--nats-context", name)


def test_what_is_left_of_a_mesh_that_was_killed_does_not_count(folder: Path) -> None:
    folder.mkdir()
    for name, said in {"up-1.json": "{", "up-2.json": "[]", "up-41001.json": json.dumps({"url": URL, "pid": 2**22 + 1})}.items():
        (folder / name).write_text(said)
    assert running_mesh() is None


def test_a_file_of_the_password_is_made_anew(folder: Path, tmp_path: Path) -> None:
    """A link that someone has put there is not followed, and a file that others may read is not kept."""
    folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (folder / "up-41001.password").symlink_to(elsewhere)
    with announced(URL, user="mesh", password="secret") as file:
        assert file is not None and not file.is_symlink() and elsewhere.read_text() == "mine"


def test_where_the_files_cannot_be_written_nobody_finds_the_mesh(folder: Path) -> None:
    folder.write_text("no folder")
    with announced(URL, user="mesh", password="secret") as file:
        assert file is None and running_mesh() is None
