"""A required signature, over a real server: what is fetched from the object store, what a shard and a coordinator read."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import Run
from serving import connect

from mesh.bus import ModelStore
from mesh.coordinator.description import Wanted, find_model
from mesh.coordinator.service import Coordinator, CoordinatorOptions
from mesh.errors import CorruptModel, UntrustedModel
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.model.signature import Signers, load_trusted, make_key, sign, signing_key
from mesh.shard.options import ShardOptions
from mesh.shard.placing import place
from mesh.shard.service import Shard
from mesh.types import LayerRange


def test_only_a_signed_model_is_fetched_placed_and_served(run: Run, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    signers = Signers.load(make_key(tmp_path / "key.pem"))

    async def work(server: NatsServer) -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus, signers)
            await ModelStore(bus).push(copy)
            options = ShardOptions("s", copy, LayerRange(0, 3), context=64, signers=signers)

            async def refused() -> None:
                with pytest.raises(UntrustedModel):
                    await store.pull("tiny", tmp_path / "pulled")
                with pytest.raises(UntrustedModel):
                    await find_model(bus, Wanted(name="tiny"), signers)
                with pytest.raises(UntrustedModel):
                    await find_model(bus, Wanted(path=copy), signers)
                with pytest.raises(UntrustedModel):
                    await place(
                        bus, "j", model=None, memory_bytes=1 << 30, rows=1, context=64, directory=tmp_path / "j", signers=signers,
                    )  # fmt: skip
                with pytest.raises(UntrustedModel):
                    Shard(bus, options)
                with pytest.raises(UntrustedModel):
                    Coordinator(bus, CoordinatorOptions(copy, signers=signers))
                assert not (tmp_path / "pulled").exists() and not (tmp_path / "j").exists()

            await refused()
            sign(copy, signing_key(tmp_path / "key.pem"))
            changed = Manifest.load(copy)
            await ModelStore(bus).push(copy)
            assert (await store.pull("tiny", tmp_path / "pulled")).signature == changed.signature
            shutil.rmtree(tmp_path / "pulled")
            Shard(bus, options)
            Coordinator(bus, CoordinatorOptions(copy, signers=signers))
            changed.model_copy(update={"context_length": 128}).save(copy)
            await ModelStore(bus).push(copy)
            await refused()

    with NatsServer.start() as server:
        run(work(server))


def test_a_tampered_block_ends_the_start_of_a_shard(run: Run, server: NatsServer, model: Path, tmp_path: Path) -> None:
    """One bit of the weights differs; the file's size and times do not."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    path = copy / "layer_001.onnx.data"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    async def work() -> None:
        async with await connect(server) as bus:
            options = ShardOptions("tampered", copy, LayerRange(0, 3), context=64, warm_up=False)
            for kv_cache in (True, False):
                with pytest.raises(CorruptModel, match=r"layer_001\.onnx\.data does not match its checksum"):
                    await Shard(bus, dataclasses.replace(options, kv_cache=kv_cache)).run()

    run(work())


@pytest.mark.parametrize("command", ["shard", "coordinator", "pull", "join"])
def test_the_commands_refuse_an_unsigned_model_in_one_line(command: str, server: NatsServer, model: Path, tmp_path: Path) -> None:
    public = make_key(tmp_path / "key.pem")
    config = tmp_path / "config.yaml"
    arguments = [command, "--config", str(config), "--nats", server.url]
    if command == "shard":
        config.write_text(
            f"shard: {{shard_id: 1, listen_port: 0}}\nresources: {{max_memory_gb: 1}}\n"
            f"model: {{shard_path: {model}, layers_start: 0, layers_end: 3, require_signature: {public}}}\n"
        )
    elif command == "coordinator":
        config.write_text(
            f"coordinator: {{serve_http: false}}\ndistributed: {{shards_count: 1}}\nmodel: {{path: {model}, require_signature: {public}}}\n"
        )
    else:
        push = [sys.executable, "-m", "mesh.cli", "push", str(model), "--quiet", "--nats", server.url]
        subprocess.run(push, check=True, capture_output=True, timeout=120)
        place = (
            ["tiny", str(tmp_path / "out")] if command == "pull" else ["--model", "tiny", "--memory", "1GB", "--dir", str(tmp_path / "out")]
        )
        arguments = [command, *place, "--quiet", "--require-signature", str(public), "--nats", server.url]
    done = subprocess.run([sys.executable, "-m", "mesh.cli", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is not signed" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_keys_of_openssl_are_read(model: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, public, copy = tmp_path / "key.pem", tmp_path / "public.pem", tmp_path / "model"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True, capture_output=True)
    key.chmod(0o600)
    shutil.copytree(model, copy)
    sign(copy, signing_key(key))
    load_trusted(copy, Signers.load(public))
