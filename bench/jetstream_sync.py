"""What each `sync_interval` of JetStream costs: the rate at which batches are submitted, and how long a session record takes to be written.

    python bench/jetstream_sync.py [--rounds 3] [--folder FOLDER]

One nats-server for each setting, all on the same disk, measured in turn in each round; medians of the rounds. FOLDER is on the disk that
JetStream would use (default: the working directory).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from mesh.bus import Bucket, Bus, BusOptions
from mesh.bus.batches import BatchStore
from mesh.local.nats_server import NatsServer
from mesh.protocol.generation import Generate
from mesh.protocol.subjects import KV_SESSIONS

SETTINGS = ("2m", "10s", "1s", "always")
BATCH, RECORDS, RECORD_BYTES, TOGETHER = 200, 300, 4096, 16


async def measure(url: str, round: int) -> dict[str, float]:
    """Requests of a batch a second; milliseconds of a record's write (median, 99 of 100); writes a second where several are under way."""
    async with await Bus.connect(BusOptions((url,)), name="bench") as bus:
        requests = [Generate(prompt=f"{number}: what is rain?", max_tokens=20) for number in range(BATCH)]
        began = time.perf_counter()
        await BatchStore(bus).submit("m", requests, id=f"b{round}")
        batch_s = time.perf_counter() - began
        bucket, record = Bucket(bus, KV_SESSIONS, durable=True), bytes(RECORD_BYTES)
        await bucket.put("warm", record)
        times = []
        for number in range(RECORDS):
            began = time.perf_counter()
            await bucket.put(f"s{number}", record)
            times.append(time.perf_counter() - began)
        times.sort()
        gate = asyncio.Semaphore(TOGETHER)

        async def one(number: int) -> None:
            async with gate:
                await bucket.put(f"t{number}", record)

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(RECORDS)))
        together_s = time.perf_counter() - began
    return {
        "batch requests/s": BATCH / batch_s,
        "record ms": times[len(times) // 2] * 1e3,
        "record p99 ms": times[int(len(times) * 0.99)] * 1e3,
        "records/s, 16 at once": RECORDS / together_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        servers = {}
        for setting in SETTINGS:
            config = folder / f"{setting}.conf"
            config.write_text(f'jetstream {{ store_dir: "./jetstream", sync_interval: {setting} }}\n')
            servers[setting] = stack.enter_context(NatsServer.start(config=config, directory=folder / setting))
        for round in range(args.rounds):
            for setting, server in servers.items():
                found[setting].append(asyncio.run(measure(server.url, round)))
    names = list(found[SETTINGS[0]][0])
    print("| sync_interval | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for setting, rounds in found.items():
        print(f"| {setting} | " + " | ".join(f"{statistics.median(each[name] for each in rounds):,.2f}" for name in names) + " |")


if __name__ == "__main__":
    main()
