"""How fast `mesh pull` brings a model, and what a streaming session notices of it.

    python bench/pull.py MODEL_DIR [--rounds 5] [--parts loopback,cluster,resumed,streaming] [--out results.json]

loopback   one nats-server: the command, with an empty cache folder each time
cluster    three nats-servers with TLS and certificates on both sides, every object kept on all three; the user is a shard's
resumed    the command is ended by SIGKILL half-way, and run again
streaming  a session streams through three shards, undisturbed and while one, five and five limited pulls run; each pull has a cache folder
           of its own, as on five machines

Everything runs on this machine. The speed is the command's own figure: from the first request to the last file in its place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from edges import free_ports

from mesh.bus import Bus, BusOptions, ModelStore, files_of
from mesh.client import AsyncMeshClient
from mesh.commands.bench import percentiles
from mesh.errors import MeshError
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.pki.folder import PkiFolder
from mesh.pki.server import Cluster, ServerOptions, TlsFiles, server_config
from mesh.pki.users import UserFolder
from mesh.settings.units import parse_bytes, parse_seconds

SAID = re.compile(r"of which (\S+ \S+) came from the mesh in (.+)")
STREAMED, CONTEXT = 400, 512
LIMIT = "20MB/s"


@dataclass
class Place:
    """A folder to pull into, and a cache folder; both new."""

    folder: Path

    def command(self, name: str, flags: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "mesh.cli", "pull", name, str(self.folder / "model"), "--quiet", *flags]

    def start(self, name: str, flags: Sequence[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "MESH_CACHE_DIR": str(self.folder / "cache")}
        return subprocess.Popen(self.command(name, flags), env=environment, stdout=subprocess.PIPE, text=True)

    @property
    def bytes_there(self) -> int:
        return sum(path.stat().st_size for path in (self.folder / "model").glob("*.data"))


@contextmanager
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="mesh-pull-"))
    try:
        yield Place(folder)
    finally:
        shutil.rmtree(folder)


def ended(process: subprocess.Popen[str]) -> tuple[int, float]:
    """(bytes that came over the network, seconds) as the command says."""
    said, _ = process.communicate(timeout=280)
    found = SAID.search(said)
    if process.returncode or found is None:
        raise SystemExit(f"mesh pull ended with {process.returncode}: {said}")
    return parse_bytes(found[1]), parse_seconds(found[2])


def pulled(name: str, flags: Sequence[str], rounds: int) -> list[float]:
    """MB/s of each round."""
    speeds = []
    for _ in range(rounds):
        with place() as here:
            count, took_s = ended(here.start(name, flags))
            speeds.append(count / took_s / 1e6)
            print(f"{speeds[-1]:.0f} MB/s", file=sys.stderr, flush=True)
    return speeds


def resumed(name: str, flags: Sequence[str], total: int) -> dict[str, float]:
    with place() as here:
        process = here.start(name, [*flags, "--pull-rate", "100MB/s"])
        while here.bytes_there < total / 2:
            assert process.poll() is None, "it ended before it was half done"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        count, took_s = ended(here.start(name, flags))
        Manifest.load(here.folder / "model").verify_all(here.folder / "model")
        return {"total_mb": total / 1e6, "second_mb": count / 1e6, "second_s": took_s}


async def push(options: BusOptions, model: Path) -> Manifest:
    """As soon as JetStream has a leader."""
    async with await Bus.connect(options, name="bench", timeout_s=30) as bus:
        while True:
            try:
                await bus.ask("$JS.API.INFO", b"", timeout_s=1.0)
                break
            except MeshError:
                await asyncio.sleep(0.2)
        return await ModelStore(bus).push(model)


# -- three servers with TLS --------------------------------------------------------------------------------------------


@contextmanager
def secure_cluster(folder: Path) -> Iterator[tuple[BusOptions, list[str]]]:
    """(the operator's connection, the flags of a shard's)"""
    pki, users = PkiFolder(folder / "pki"), UserFolder(folder / "users")
    pki.init(name="bench")
    pki.issue("server", kind="both", hosts=["127.0.0.1"], days=1)
    users.add("operator", "operator")
    users.add("shard-1", "shard", shard="shard-1")
    for name in ("operator", "shard-1"):
        pki.issue(name, kind="client", days=1)
    tls = TlsFiles(pki.certificate("server"), pki.key("server"), pki.ca)
    ports = free_ports(6)
    routes = tuple(f"nats://127.0.0.1:{port}" for port in ports[3:])
    with ExitStack() as stack:
        for number in range(3):
            own = folder / f"n{number}"
            own.mkdir()
            cluster = Cluster(name="bench", listen=f"127.0.0.1:{ports[3 + number]}", routes=routes)
            options = ServerOptions(name=f"n{number}", port=ports[number], tls=tls, cluster=cluster)
            config = own / "nats.conf"
            config.write_text(server_config(options, users.users()))
            stack.enter_context(NatsServer.start(config=config, port=ports[number], directory=own))
        urls = tuple(f"tls://127.0.0.1:{port}" for port in ports[:3])
        seed = {name: str(users.seed(name)) for name in ("operator", "shard-1")}
        inbox = {user.name: user.inbox for user in users.users()}
        operator = BusOptions(
            urls, nkey_seed=seed["operator"], tls_ca=str(pki.ca), tls_cert=str(pki.certificate("operator")),
            tls_key=str(pki.key("operator")), inbox_prefix=inbox["operator"],
        )  # fmt: skip
        flags = ["--nats", ",".join(urls), "--nats-nkey", seed["shard-1"], "--nats-inbox-prefix", inbox["shard-1"]]
        flags += ["--nats-ca", str(pki.ca), "--nats-cert", str(pki.certificate("shard-1")), "--nats-key", str(pki.key("shard-1"))]
        yield operator, flags


# -- beside a session --------------------------------------------------------------------------------------------------


async def streamed(url: str, model: str) -> list[float]:
    """When each token of one session came."""
    async with AsyncMeshClient(options=BusOptions(urls=(url,)), model=model) as client:
        request: dict[str, Any] = {"max_tokens": STREAMED, "ignore_eos": True, "temperature": 0}
        async with client.stream(tokens=list(range(100, 116)), **request) as stream:
            return [chunk.received_s async for chunk in stream if chunk.token is not None]


def beside(url: str, model: str, count: int, flags: Sequence[str]) -> dict[str, float]:
    """The gaps of a session in ms, and the MB/s of all `count` pulls together, which begin when it does."""

    async def work() -> tuple[list[float], float]:
        session = asyncio.create_task(streamed(url, model))
        with ExitStack() as stack:
            pulls = [stack.enter_context(place()).start(model, ["--nats", url, *flags]) for _ in range(count)]
            done = await asyncio.gather(*(asyncio.to_thread(ended, each) for each in pulls))
            times = await session
        return [b - a for a, b in pairwise(times)], sum(size / took_s for size, took_s in done)

    gaps, speed = asyncio.run(work())
    found = percentiles(gaps)
    assert found is not None
    return {
        "pulls": count,
        "median_ms": found["p50"] * 1e3,
        "p99_ms": found["p99"] * 1e3,
        "longest_ms": found["max"] * 1e3,
        "session_s": sum(gaps),
        "mb_per_s": speed / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="loopback,cluster,resumed,streaming")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = args.parts.split(",")
    manifest = Manifest.load(args.model)
    total = sum(file.bytes for file in files_of(manifest))
    results: dict[str, Any] = {"mb": total / 1e6}
    if {"loopback", "resumed"} & set(parts):
        with NatsServer.start() as server:
            asyncio.run(push(BusOptions((server.url,)), args.model))
            flags = ["--nats", server.url]
            if "loopback" in parts:
                results["loopback_mb_per_s"] = pulled(manifest.name, flags, args.rounds)
            if "resumed" in parts:
                results["resumed"] = resumed(manifest.name, flags, total)
    if "cluster" in parts:
        with place() as here, secure_cluster(here.folder) as (operator, flags):
            asyncio.run(push(operator, args.model))
            results["cluster_mb_per_s"] = pulled(manifest.name, flags, args.rounds)
    if "streaming" in parts:
        with LocalMesh(LocalOptions(model=args.model, shards=3, rows=2, context=CONTEXT, http=False)) as mesh:
            asyncio.run(push(BusOptions((mesh.url,)), args.model))
            cases: list[tuple[int, list[str]]] = [(0, []), (1, []), (5, []), (5, ["--pull-rate", LIMIT])]
            results["streaming"] = []
            for count, flags in cases:
                results["streaming"].append({**beside(mesh.url, manifest.name, count, flags), "flags": flags})
                print(results["streaming"][-1], file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
