"""What HTTP costs: the same generations through the Python client and through HTTP, in turn, on one mesh; and with idle connections.

    python bench/gateway.py MODEL_DIR [--shards 3] [--rounds 40] [--tokens 64] [--idle 990] [--json]
    python bench/gateway.py --nats URL --http URL [...]          on a mesh that runs already

Rounds alternate between the ways, so that other work on this machine affects both. Times are those of the caller: from the call to the
first token, and from token to token. "http" is a bare HTTP/1.1 client on one connection, "openai" is OpenAI's own client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

Times = list[float]
Way = Callable[[int], Awaitable[Times]]


class Bare:
    """A client that keeps one connection and reads server-sent events as they come."""

    def __init__(self, url: str) -> None:
        self._host, self._port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def generate(self, request: dict[str, object]) -> Times:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        body = json.dumps({**request, "stream": True}).encode()
        head = f"POST /api/v1/inference HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        writer.write(head.encode() + body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        times = [began]
        while size := int(await reader.readline(), 16):
            event = await reader.readexactly(size + 2)
            if b'"done":false' in event:
                times.append(time.perf_counter())
        await reader.readline()
        return times

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


def request_of(number: int, tokens: int) -> dict[str, Any]:
    return {"tokens": [(7 * number + i) % 90 for i in range(16)], "max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}


async def one_after_the_other(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    first: dict[str, Times] = {name: [] for name in ways}
    between: dict[str, Times] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            times = await way(number)
            if number >= 2:  # the first two make connections and fill caches
                first[name].append(times[1] - times[0])
                between[name] += [b - a for a, b in pairwise(times[1:])]
    return {
        name: {
            "first_token_ms": 1e3 * statistics.median(first[name]),
            "first_token_p95_ms": 1e3 * sorted(first[name])[round(0.95 * (len(first[name]) - 1))],
            "between_tokens_ms": 1e3 * statistics.median(between[name]),
            "between_tokens_mean_ms": 1e3 * statistics.fmean(between[name]),
            "between_tokens_p95_ms": 1e3 * sorted(between[name])[round(0.95 * (len(between[name]) - 1))],
        }
        for name in ways
    }


async def at_once(url: str, streams: int, tokens: int) -> dict[str, float]:
    """Run this many streams at the same time, each on a connection of its own."""
    clients = [Bare(url) for _ in range(streams)]
    began = time.perf_counter()
    try:
        times = await asyncio.gather(*(client.generate(request_of(number, tokens)) for number, client in enumerate(clients)))
    finally:
        for client in clients:
            await client.close()
    wall_s = time.perf_counter() - began
    between = [b - a for one in times for a, b in pairwise(one[1:])]
    lumps = sum(gap < 0.2 * statistics.median(between) for gap in between) / len(between)
    return {"tokens_per_s": streams * tokens / wall_s, "between_tokens_ms": 1e3 * statistics.median(between), "share_of_lumps": lumps}


async def ten_at_once(client: AsyncMeshClient, model: str, url: str, tokens: int) -> dict[str, float]:
    """The tokens a second of 10 generations at a time, both ways in turn, the best of three of each."""

    async def sdk() -> float:
        began = time.perf_counter()

        async def one(number: int) -> None:
            async with client.stream(model=model, **request_of(number, tokens)) as stream:
                async for _ in stream:
                    pass

        await asyncio.gather(*(one(number) for number in range(10)))
        return 10 * tokens / (time.perf_counter() - began)

    found: dict[str, Times] = {"sdk": [], "http": []}
    for _ in range(4):
        found["sdk"].append(await sdk())
        found["http"].append((await at_once(url, 10, tokens))["tokens_per_s"])
    return {name: max(values[1:]) for name, values in found.items()}


async def with_idle(url: str, idle: int, tokens: int) -> dict[str, object]:
    """Run 10 streams with and without `idle` connections beside them, in turn; and note the answer to one connection more."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    without, beside = [], []
    told = ""
    for _ in range(3):
        without.append(await at_once(url, 10, tokens))
        opened = [await asyncio.open_connection(host, port) for _ in range(idle)]
        beside.append(await at_once(url, 10, tokens))
        more = [await asyncio.open_connection(host, port) for _ in range(10)]  # those of the streams are closed by now
        reader, writer = await asyncio.open_connection(host, port)
        told = (await reader.readline()).decode().strip()
        for _, closing in [*opened, *more, (reader, writer)]:
            closing.close()
        await asyncio.gather(*(closing.wait_closed() for _, closing in [*opened, *more, (reader, writer)]), return_exceptions=True)
        await asyncio.sleep(0.5)
    best = {"without": max(without, key=lambda r: r["tokens_per_s"]), "beside": max(beside, key=lambda r: r["tokens_per_s"])}
    return {"idle": idle, **best, "one_more_is_told": told}


async def measure(nats: str, http: str, args: argparse.Namespace) -> dict[str, object]:
    async with AsyncMeshClient(nats) as client, openai.AsyncOpenAI(base_url=f"{http}/v1", api_key="none", max_retries=0) as official:
        model = (await client.models())[0]
        bare = Bare(http)

        async def sdk(number: int) -> Times:
            times = [time.perf_counter()]
            async with client.stream(model=model, **request_of(number, args.tokens)) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        times.append(time.perf_counter())
            return times

        async def through_http(number: int) -> Times:
            return await bare.generate(request_of(number, args.tokens))

        async def through_openai(number: int) -> Times:
            request = request_of(number, args.tokens)
            times = [time.perf_counter()]
            stream = await official.completions.create(
                model=model, prompt=request["tokens"], max_tokens=args.tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            async for part in stream:
                if part.choices and part.choices[0].text:
                    times.append(time.perf_counter())
            return times

        report: dict[str, object] = {"model": model, "rounds": args.rounds, "tokens": args.tokens}
        alone = await one_after_the_other({"sdk": sdk, "http": through_http, "openai": through_openai}, args.rounds)
        report["alone"] = alone
        report["over_the_sdk_ms"] = {
            way: {key: alone[way][key] - alone["sdk"][key] for key in ("first_token_ms", "between_tokens_ms", "between_tokens_mean_ms")}
            for way in ("http", "openai")
        }
        report["ten_at_once"] = await ten_at_once(client, model, http, args.tokens)
        await bare.close()
    if args.idle:
        await asyncio.sleep(0.5)  # the connections of this are closed by then
        report["idle_connections"] = await with_idle(http, args.idle, args.tokens)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--nats")
    parser.add_argument("--http")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--idle", type=int, default=990)
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with ExitStack() as stack:
        nats, http = args.nats, args.http
        if args.model is not None:
            mesh = stack.enter_context(LocalMesh(LocalOptions(args.model, shards=args.shards, rows=16, context=256)))
            nats, http = mesh.url, mesh.http_urls[0]
        elif nats is None or http is None:
            parser.error("give a model directory, or --nats and --http")
        print(json.dumps(asyncio.run(measure(nats, http, args)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
