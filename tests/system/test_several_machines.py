"""docs/several-machines.md, command by command, on three machines that are network namespaces.

What differs from the page is in REPLACED: a tiny model stands for the demo model, unless MESH_TEST_DEMO_MODEL is set. `scp` is
a program that copies to the other machine's folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from demo_model import smollm2_gguf
from doc_pages import Block, blocks_of, commands_of
from namespaces import Host, hosts_on_one_network
from places import DOCS, NATS
from tiny_mesh_model import make_source
from unconnected import unconnected
from waiting import Talking

from mesh.host.process import dying_with_parent

PAGE = DOCS / "several-machines.md"
ADDRESSES = {"A": "10.77.0.1", "B": "10.77.0.2", "C": "10.77.0.3"}
REAL = "MESH_TEST_DEMO_MODEL" in os.environ
REPLACED = {} if REAL else {"SmolLM2-135M-Instruct.Q4_1.gguf": "source", '"total_layers": 30': '"total_layers": 3', "2048": "64"}
SCP = """#!/bin/sh
# scp FILE HOST: to that machine's folder
for last; do :; done
while [ $# -gt 1 ]; do cp -p "$1" "@ROOT@/${last%:}/"; shift; done
"""
COMMAND_S = 120.0


class Machine:
    """A host, its folder, what its shell exports, and what goes on there."""

    def __init__(self, host: Host, folder: Path, bin: Path) -> None:
        self.host = host
        self.folder = folder
        kept = {name: value for name, value in unconnected().items() if not name.startswith("XDG_")}
        self.environment = kept | {"PATH": f"{bin}:{os.environ['PATH']}", "MESH_CACHE_DIR": str(folder / "cache"), "HOME": str(folder)}
        self.exports = ":"

    def run(self, text: str) -> str:
        program = f"{self.exports}; set -e; {text}"
        done = subprocess.run(
            self.host.command("bash", "-c", program),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def begin(self, text: str) -> Talking:
        program = f"{self.exports}; exec env {text}"
        return Talking(dying_with_parent(self.host.command("bash", "-c", program)), cwd=self.folder, env=self.environment)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, Machine]]:
    bin = tmp_path / "bin"
    bin.mkdir()
    shims = {"mesh": f'#!/bin/sh\nexec {sys.executable} -m mesh.cli "$@"\n', "scp": SCP.replace("@ROOT@", str(tmp_path))}
    for name, text in shims.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    server = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert server is not None
    (bin / "nats-server").symlink_to(server)
    for address in ADDRESSES.values():
        (tmp_path / address).mkdir()
    here = tmp_path / ADDRESSES["A"]
    shutil.copytree(NATS, here / "nats")
    if REAL:
        (here / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2_gguf())
    else:
        make_source(here / "source")
    with hosts_on_one_network(*ADDRESSES.values()) as hosts:
        yield {name: Machine(host, tmp_path / ADDRESSES[name], bin) for name, host in zip(ADDRESSES, hosts, strict=True)}


@pytest.mark.slow
def test_the_page_leads_to_a_token_on_three_machines(machines: dict[str, Machine]) -> None:
    said: dict[str, str] = {}
    began = time.monotonic()
    with ExitStack() as running:
        going: dict[str, Talking] = {}
        for block in blocks_of(PAGE):
            if block.not_run:
                continue
            assert block.where, f"{block.place}: say on which machine it runs"
            text = replaced(block.text)
            if block.replaces:
                end(going[block.replaces])
            for name in machines if block.where == "every machine" else [block.where]:
                machine = machines[name]
                if block.ready:
                    talking = running.enter_context(machine.begin(text.strip()))
                    talking.wait(re.escape(block.ready))
                    going[named(block)] = talking
                elif all(command.startswith(("export ", "(umask")) for command in commands_of(text)):
                    machine.run(text)
                    machine.exports = "; ".join([machine.exports, *(line for line in commands_of(text) if line.startswith("export "))])
                else:
                    said[text] = machine.run(text)
        print(f"from an empty folder to tokens on three machines: {time.monotonic() - began:.0f} s")
        for talking in going.values():
            end(talking)
    whole = "\n".join(said.values())
    assert "2 x " in whole or "placement" in whole
    assert "ready" in next(text for command, text in said.items() if command.startswith("mesh status"))
    assert '"status":"ready"' in next(text for command, text in said.items() if "api/v1/health" in command)
    assert '"object":"list"' in next(text for command, text in said.items() if "/v1/models" in command)
    placed = machines["B"].folder / "config.yaml"
    assert "models:smollm2" in placed.read_text() and str(machines["A"].folder) not in placed.read_text()
    assert not list(machines["B"].folder.glob("cache/models/*/head.onnx")), "a shard fetches its own blocks alone"


def replaced(text: str) -> str:
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def named(block: Block) -> str:
    """The command that goes on: `coordinator` of `mesh coordinator`."""
    found = re.search(r"mesh (\w+)", block.text)
    return f"{found[1]} {block.where}" if found and found[1] == "shard" else found[1] if found else "nats-server"


def end(talking: Talking) -> None:
    talking.process.send_signal(signal.SIGTERM)
    talking.ended()
