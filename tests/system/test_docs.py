"""Every command of README, docs/ and nats/README.md is run as it stands, on one mesh of a tiny model, so that no page goes stale.

What stands for something of the reader's own (a name, an id, an address) is replaced: Reader.places. What cannot be run here is in NOT_RUN
with the reason; its words are checked by tests/unit/commands/test_words_of_pages.py all the same. docs/several-machines.md has a test of
its own. Where there is no `nats` command, a stand-in speaks to the same subjects.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, Block, blocks_of, commands_of, label
from places import DOCS, NATS, ROOT
from tiny_mesh_model import make_source
from unconnected import unconnected
from waiting import Talking

from mesh.bus import BusOptions
from mesh.client import MeshClient

STARTS = "starts a mesh of its own, as test_up.py does"
ANOTHER = "needs a server or a program of the reader's own"
# page -> beginning of a command -> why it is not run
NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {"make test": "is what runs this"},
    "docs/doctor.md": {"mesh doctor --role shard": "needs a server that knows the user: test_doctor.py"},
    "docs/http.md": {'curl -H "Authorization: Bearer $TOKEN" ...': "is a part of a command"},
    "docs/logging.md": {"mesh up": STARTS},
    "docs/metrics.md": {"OTEL_EXPORTER_OTLP_ENDPOINT": STARTS},
    "docs/security.md": {
        "mesh up": STARTS,
        "nats-server -c": "test_roles.py starts servers with such files",
        "nats-server --signal": "test_rotation.py does",
        "mesh nats config --listen 0.0.0.0:4222 --cert": "needs certificates of another authority",
        "nsc ": ANOTHER,
    },
    "docs/threat-model.md": {"mesh join": "runs until it is stopped: test_signed_models.py"},
    "docs/tracing.md": {"OTEL_EXPORTER_OTLP_ENDPOINT": STARTS, "curl ": "needs a collector"},
    "docs/troubleshooting.md": {"journalctl": ANOTHER},
    "nats/README.md": {
        "MESH_LEAF_PASSWORD": "test_leaf_site.py starts both",
        "MESH_HUB": "test_leaf_site.py starts both",
        "mesh shard --config shard.yaml": "test_leaf_site.py starts it",
        "mesh status --nats nats://nats.example.org": ANOTHER,
    },
}
GOES_ON = ("nats sub ", "nats kv watch ")
"""What runs until it is stopped."""
NO_SUCH = ("mesh trace --failed",)
"""What may find nothing on this mesh, and then says so with exit code 2."""
CONFIG = "distributed: {shards_count: 2}\nauthentication: {secret_key: 0123456789abcdef0123456789abcdef, api_keys_file: keys.yaml}\n"
COMMAND_S = 120.0
TOOLS = Path(__file__).parents[1] / "tools"


class Reader:
    """Someone who types what the pages say: a folder with a mesh that runs, and the words in place of the pages' own."""

    def __init__(self, folder: Path, environment: dict[str, str], mesh: Talking) -> None:
        self.folder = folder
        self.environment = environment
        url = mesh.wait(r"NATS (nats://[^,\s]+), user (\S+), password in (\S+)")
        http = mesh.wait(r"HTTP (http://[^,\s]+)")[1]
        mesh.wait("Ctrl-C ends it")
        password = Path(url[3]).read_text().strip()
        with MeshClient(options=BusOptions((url[1],), user=url[2], password=password)) as client:
            answer = client.generate(tokens=[5, 17, 33], max_tokens=8, ignore_eos=True)
            status = client.status()
            (coordinator,) = status.coordinators
            shard = status.shards[0]
        self.environment |= {"NATS_URL": url[1], "NATS_USER": url[2], "NATS_PASSWORD": password, "TOKEN": "none"}
        self.places = {
            ".venv/bin/mesh": "mesh",
            "SRC": "source",
            "models/NAME": "models/name",
            "http://127.0.0.1:8080": http,
            "http://127.0.0.1:8081": http,
            "http://coordinator:8080": http,
            "http://shard-1:8080": shard.http or shard.metrics.removesuffix("/metrics"),
            "nats://10.0.1.100:4222": url[1],
            "nats://HOST:4222": url[1],
            "HOST 4222": url[1].removeprefix("nats://").replace(":", " "),
            "nats://127.0.0.1:PORT": url[1],
            "$(cat FILE)": password,
            "/etc/prometheus/": "",
            "mesh plan MODEL": "mesh plan models/smollm2",
            "mesh trace 9f2c6b1d4e8a7c3f5b0d": f"mesh trace {answer.request}",
            "mesh trace ID": f"mesh trace {answer.request}",
            '"ID"': f'"{answer.request}"',
            "9d1c2b3a...": answer.request,
            " coordinator.log": " logs/coordinator-1.log",
            "mesh.v1.M.": "mesh.v1.tiny.",
            "COORDINATOR": coordinator.name,
            "SESSION": answer.session,
            "layers.0-10": f"layers.{shard.layers}",
            "0123456789abcdef": shard.model_hash,
        }

    def typed(self, command: str) -> str:
        for old, new in self.places.items():
            command = command.replace(old, new)
        return command

    def run(self, block: Block, command: str) -> None:
        text = self.typed(command)
        limit = "timeout -s INT 2 " if text.startswith(GOES_ON) else ""
        done = subprocess.run(
            ["bash", "-c", f"{limit}{text}"], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=COMMAND_S
        )
        right = {124, 130, 0} if limit else {0, 2} if text.startswith(NO_SUCH) else {0}
        assert done.returncode in right, f"{block.place}: {text}\n{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Reader]:
    for tool in ("bash", "curl", "jq", "nc", "free"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here, which the pages use")
    folder, bin = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("bin")
    programs = {"mesh": f'exec {sys.executable} -m mesh.cli "$@"'}
    if shutil.which("nats") is None:
        programs["nats"] = f'exec {sys.executable} {TOOLS / "nats_stand_in.py"} "$@"'
    for name, text in programs.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    (folder / "models").mkdir()
    shutil.copytree(model, folder / "models" / "smollm2")
    make_source(folder / "source")
    shutil.copytree(NATS, folder / "nats")
    (folder / "config.yaml").write_text(CONFIG)
    environment = unconnected() | {"PATH": f"{bin}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(folder), "XDG_CONFIG_HOME": str(folder)}
    up = [sys.executable, "-m", "mesh.cli", "up", "models/smollm2", "--shards", "2", "--rows", "4", "--context", "160", "--logs", "logs"]
    with Talking(up, cwd=folder, env={**environment, "MESH_LOGGING_LEVEL": "debug"}) as mesh:
        reader = Reader(folder, environment, mesh)
        token = subprocess.run(
            [sys.executable, "-m", "mesh.cli", "token", "issue", "--config", "config.yaml", "--subject", "me"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        (folder / "token").write_text(token.stdout)
        yield reader


RUN = [page for page in PAGES if page != DOCS / "several-machines.md" and blocks_of(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=label)
def test_every_command_of_the_page_runs(reader: Reader, page: Path) -> None:
    reasons = NOT_RUN.get(label(page), {})
    used = set()
    for block in blocks_of(page):
        if block.not_run:
            continue
        for command in commands_of(block.text):
            reason = next((beginning for beginning in reasons if command.startswith(beginning)), None)
            if reason is not None:
                used.add(reason)
            elif command.startswith("make "):
                reader.run(block, command.replace("make ", f"make -n -C {ROOT} ", 1))
            else:
                reader.run(block, command)
    assert used == reasons.keys(), f"no command begins so any more: {sorted(reasons.keys() - used)}"


def test_the_table_of_reasons_names_pages_that_are_there() -> None:
    assert {label(page) for page in RUN} >= NOT_RUN.keys()
    assert all(reason for reasons in NOT_RUN.values() for reason in reasons.values())
