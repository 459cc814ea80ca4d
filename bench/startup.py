"""The time from the start of a shard's process until it serves, with an empty and with a filled compilation cache.

python bench/startup.py models/smollm2 [--ranges 0-10,10-20,20-30] [--rows 8] [--context TOKENS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from os import environ
from pathlib import Path

import yaml

from mesh.host.process import dying_with_parent
from mesh.local.nats_server import NatsServer


def seconds_until_ready(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    process = subprocess.Popen(dying_with_parent(command), stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "ready: layers" in line:
            took = time.perf_counter() - began
            break
    else:
        raise SystemExit(f"the shard ended: {''.join(said[-5:])}")
    process.terminate()
    process.stderr.read()
    process.wait(60)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranges", default="0-10,10-20,20-30")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int)
    given = parser.parse_args()
    with NatsServer.start() as server:
        for layers in given.ranges.split(","):
            start, stop = (int(part) for part in layers.split("-"))
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder) / "shard.yaml"
                performance = {"batch_size": given.rows} | ({"max_sequence_length": given.context} if given.context else {})
                content = {
                    "shard": {"shard_id": 1},
                    "nats": {"urls": [server.url]},
                    "model": {"shard_path": str(given.model.absolute()), "layers_start": start, "layers_end": stop},
                    "resources": {"max_memory_gb": 64},
                    "performance": performance,
                }
                config.write_text(yaml.safe_dump(content))
                command = [sys.executable, "-m", "mesh.cli", "shard", "--config", str(config), "--quiet"]
                cached = {**environ, "MESH_CACHE_DIR": folder}
                cold, warm = (seconds_until_ready(command, cached) for _ in range(2))
            print(f"layers {layers}: ready after {cold:.1f} s with an empty cache, {warm:.1f} s with a filled one", flush=True)


if __name__ == "__main__":
    main()
