"""What one hostile caller does to a bystander: its longest gap between tokens, and what the processes take in memory.

    python bench/hostile.py MODEL_DIR [--shards 1] [--seconds 8] [--only NAME,...] [--json]

Two bystanders stream all the time, one over HTTP and one over NATS, from a process of their own. Each hostile caller is another process
that repeats one call for some seconds. A line has the bystanders' longest gap before and during the call, how many of their generations
went wrong, the answers that the caller got, and the memory of the coordinator before, at its most, and afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from load_tools import resident_bytes

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.errors import MeshError
from mesh.local.mesh import LocalMesh, LocalOptions

PROMPT, TOKENS = [5, 17, 33], 60
MEGABYTE = 1024 * 1024


# -- hostile callers -------------------------------------------------------------------------------------------------------


def _object_of_unknown_keys(count: int) -> dict[str, Any]:
    return {"tokens": [1], **{f"key{index}": index for index in range(count)}}


def _nested(depth: int) -> bytes:
    return b'{"tokens": [1], "messages": ' + b"[" * depth + b"]" * depth + b"}"


BODIES: dict[str, Callable[[], bytes]] = {
    "unknown-keys": lambda: json.dumps(_object_of_unknown_keys(180_000)).encode(),
    "wrong-tokens": lambda: json.dumps({"tokens": ["x"] * 700_000}).encode(),
    "token-numbers": lambda: json.dumps({"tokens": [10**18] * 180_000}).encode(),
    "huge-numbers": lambda: b'{"tokens": [' + b"9" * 3_000_000 + b"]}",
    "wrong-messages": lambda: json.dumps({"messages": [{"role": 1}] * 250_000}).encode(),
    "many-messages": lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * 80_000}).encode(),
    "message-keys": lambda: json.dumps({"messages": [{"role": "user", "content": "a", **_object_of_unknown_keys(150_000)}]}).encode(),
    "long-prompt": lambda: json.dumps({"prompt": "what is rain? " * 65_000}).encode(),
    "long-word": lambda: json.dumps({"prompt": "a" * 900_000}).encode(),
    "escapes": lambda: b'{"prompt": "' + b"\\u00e9" * 600_000 + b'"}',
    "stop-texts": lambda: json.dumps({"tokens": [1], "stop": ["x"] * 800_000}).encode(),
    "long-stop": lambda: json.dumps({"tokens": [1], "stop": ["x" * 3_000_000]}).encode(),
    "nested": lambda: _nested(1_500_000),
    "shallow-lists": lambda: b'{"tokens": [' + b"[]," * 1_200_000 + b"[]]}",
    "not-json": lambda: b"{" * 3_900_000,
    "attempt": lambda: b'{"tokens": [1], "session": "s", "attempt": 1' + b"0" * 30 + b"}",
    "max-tokens": lambda: b'{"tokens": [1], "max_tokens": 1' + b"0" * 30 + b"}",
    "null-keys": lambda: json.dumps({"tokens": ["x"], **{f"key{index}": None for index in range(180_000)}}).encode(),
    "many-stops": lambda: json.dumps({"model": "tiny", "prompt": "a", "stop": [["x"]] * 100_000}).encode(),
    "seed": lambda: b'{"tokens": [1], "seed": 1' + b"0" * 30 + b"}",
    "temperature": lambda: b'{"tokens": [1], "temperature": 1e999, "top_p": -1e308}',
}


async def call_http(url: str, path: str, body: bytes, until: float, answers: Counter[str]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=4)) as http:

        async def one() -> None:
            while time.monotonic() < until:
                try:
                    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
                    answers[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1

        await asyncio.gather(*(one() for _ in range(4)))


async def call_nats(url: str, model: str, body: bytes, until: float, answers: Counter[str]) -> None:
    async with await Bus.connect(BusOptions((url,)), name="hostile", direct=False) as bus:

        async def one() -> None:
            while time.monotonic() < until:
                try:
                    await bus.ask(f"mesh.v1.{model}.generate", body, timeout_s=10)
                    answers["ok"] += 1
                except MeshError as error:
                    answers[error.code] += 1

        await asyncio.gather(*(one() for _ in range(4)))


async def held_connections(url: str, until: float, answers: Counter[str]) -> None:
    """Send heads whose bodies never come. Each is answered early."""
    parts = urlsplit(url)
    head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
    writers: list[asyncio.StreamWriter] = []
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(head)
            answers[(await reader.readline()).decode().strip()] += 1
            writers.append(writer)
        except OSError as error:
            answers[type(error).__name__] += 1
            await asyncio.sleep(0.01)
    for writer in writers:
        writer.close()


async def poison_batch(url: str, model: str, until: float, answers: Counter[str]) -> None:
    async with await Bus.connect(BusOptions((url,)), name="hostile", direct=False) as bus:
        number = 0
        while time.monotonic() < until:
            number += 1
            for tail in ("x.notanumber", f"b{number}.99999999999999999999999", f"b{number}.0"):
                await bus.publish(f"mesh.v1.batches.{model}.{tail}", b"\xff not a request")
            answers["published"] += 3
            await bus.flush()
            await asyncio.sleep(0.2)


async def forged_replies(url: str, model: str, until: float, answers: Counter[str]) -> None:
    async with await Bus.connect(BusOptions((url,)), name="hostile", direct=False) as bus:
        body = json.dumps({"tokens": [1], "max_tokens": 1}).encode()
        while time.monotonic() < until:
            for reply in (*(f"$KV.mesh_shards.shard-{number}" for number in range(2)), f"mesh.v1.{model}.coordinators"):
                await bus.publish(f"mesh.v1.{model}.generate", body, reply=reply)
                await bus.publish("$SRV.PING", b"", reply=reply)
            answers["published"] += 6
            await bus.flush()
            await asyncio.sleep(0.05)


async def garbage_frames(url: str, model: str, until: float, answers: Counter[str]) -> None:
    async with (
        await Bus.connect(BusOptions((url,)), name="hostile", direct=False) as bus,
        AsyncMeshClient(url, model=model) as client,
    ):
        status = await client.status()
        subjects = [f"mesh.v1.{model}.tokens.{one.name}" for one in status.coordinators]
        subjects += [f"mesh.v1.{model}.layers.{lease.layers}.{lease.shard}" for lease in status.shards]
        while time.monotonic() < until:
            for subject in subjects:
                for data in (b"", b"\0" * 64, b"\xff" * 100_000, bytes(range(256)) * 1000):
                    await bus.publish(subject, data)
                    answers["published"] += 1
            await bus.flush()


OTHERS: dict[str, Callable[[str, str, str, float, Counter[str]], Awaitable[None]]] = {
    "held-connections": lambda http, nats, model, until, answers: held_connections(http, until, answers),
    "poison-batch": lambda http, nats, model, until, answers: poison_batch(nats, model, until, answers),
    "forged-replies": lambda http, nats, model, until, answers: forged_replies(nats, model, until, answers),
    "garbage-frames": lambda http, nats, model, until, answers: garbage_frames(nats, model, until, answers),
}
PATHS = {
    "http": "/api/v1/inference",
    "openai": "/v1/chat/completions",
    "batch": "/api/v1/batch",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "tokenize": "/tokenize",
    "embeddings": "/v1/embeddings",
}
WAYS = ("nats", *PATHS)


def hostile(name: str, http: str, nats: str, model: str, seconds: float) -> None:
    """The process of a hostile caller. It prints the answers that it got."""
    answers: Counter[str] = Counter()
    until = time.monotonic() + seconds
    if name in OTHERS:
        asyncio.run(OTHERS[name](http, nats, model, until, answers))  # type: ignore[arg-type]
    else:
        way, _, body_name = name.partition(":")
        body = BODIES[body_name]()
        if way == "batch":
            body = b'{"requests": [' + body + b"]}"
        if way == "nats":
            asyncio.run(call_nats(nats, model, body, until, answers))
        else:
            asyncio.run(call_http(http, PATHS[way], body, until, answers))
    print(json.dumps(dict(answers.most_common(4))))


# -- bystanders --------------------------------------------------------------------------------------------------------------


@dataclass
class Bystander:
    """The times of a bystander's tokens, and its errors."""

    times: list[float] = field(default_factory=list)
    done: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    expected: list[int] = field(default_factory=list)

    def longest(self, since: float, until: float) -> float:
        """The longest time without a token, seconds."""
        inside = [since, *(at for at in self.times if since <= at <= until), until]
        return max(b - a for a, b in pairwise(inside))

    def finished(self, tokens: list[int]) -> None:
        self.done += 1
        self.expected = self.expected or tokens
        self.wrong += tokens != self.expected


async def by_http(url: str, seen: Bystander) -> None:
    body = {"tokens": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0, "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while True:
            tokens: list[int] = []
            try:
                async with http.stream("POST", "/api/v1/inference", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            document = json.loads(line.removeprefix("data: "))
                            if "token" in document and not document["done"]:
                                seen.times.append(time.perf_counter())
                                tokens.append(document["token"])
                    if answer.status_code != 200:
                        seen.errors[str(answer.status_code)] += 1
                        await asyncio.sleep(0.05)
                        continue
                seen.finished(tokens)
            except httpx.HTTPError as error:
                seen.errors[type(error).__name__] += 1
                await asyncio.sleep(0.05)


async def by_nats(url: str, model: str, seen: Bystander) -> None:
    async with AsyncMeshClient(url, model=model) as client:
        while True:
            tokens: list[int] = []
            try:
                async with client.stream(tokens=PROMPT, max_tokens=TOKENS, ignore_eos=True, temperature=0.0) as chunks:
                    async for chunk in chunks:
                        if chunk.token is not None:
                            seen.times.append(time.perf_counter())
                            tokens.append(chunk.token.id)
                seen.finished(tokens)
            except MeshError as error:
                seen.errors[error.code] += 1
                await asyncio.sleep(0.05)


# -- the run -----------------------------------------------------------------------------------------------------------------


async def measure(mesh: LocalMesh, names: list[str], seconds: float) -> list[dict[str, Any]]:
    model, http = mesh.manifest.name, mesh.http_urls[0]
    seen = {"http": Bystander(), "nats": Bystander()}
    tasks = [asyncio.create_task(by_http(http, seen["http"])), asyncio.create_task(by_nats(mesh.url, model, seen["nats"]))]
    pid = next(process.pid for name, process in mesh.processes.items() if name.startswith("coordinator"))
    rows: list[dict[str, Any]] = []
    try:
        await asyncio.sleep(3.0)
        for name in names:
            before_at, memory_before = time.perf_counter(), resident_bytes(pid)
            counts = {way: (one.done, one.wrong, sum(one.errors.values())) for way, one in seen.items()}
            await asyncio.sleep(2.0)
            began = time.perf_counter()
            command = [sys.executable, __file__, "--call", name, "--http", http, "--nats", mesh.url, "--seconds", str(seconds), model]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            most = memory_before
            reading = asyncio.create_task(process.communicate())
            while not reading.done():
                with suppress(OSError):
                    most = max(most, resident_bytes(pid))
                await asyncio.sleep(0.02)
            ended = time.perf_counter()
            await asyncio.sleep(2.0)
            row: dict[str, Any] = {"call": name, "answers": json.loads((await reading)[0] or b"{}")}
            for way, one in seen.items():
                done, wrong, errors = counts[way]
                row[way] = {
                    "gap_before_ms": round(1e3 * one.longest(before_at, began)),
                    "gap_during_ms": round(1e3 * one.longest(began, ended)),
                    "done": one.done - done,
                    "wrong": one.wrong - wrong,
                    "errors": sum(one.errors.values()) - errors,
                }
            with suppress(OSError):
                row["memory_mb"] = [round(value / MEGABYTE) for value in (memory_before, most, resident_bytes(pid))]
            rows.append(row)
            print(line_of(row), file=sys.stderr, flush=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    ways = "  ".join(
        f"{way} {row[way]['gap_before_ms']:>4} -> {row[way]['gap_during_ms']:>5} ms, {row[way]['done']} done"
        + (f", {row[way]['wrong']} wrong" if row[way]["wrong"] else "")
        + (f", {row[way]['errors']} errors" if row[way]["errors"] else "")
        for way in ("http", "nats")
    )
    memory = " / ".join(str(value) for value in row.get("memory_mb", ["gone"]))
    return f"{row['call']:<24} {ways}  {memory} MB  {row['answers']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", default="", help="names of calls, separated by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--http", help=argparse.SUPPRESS)
    parser.add_argument("--nats", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        hostile(args.call, args.http, args.nats, args.model, args.seconds)
        return
    names = [*OTHERS, *(f"{way}:{body}" for way in WAYS for body in BODIES)]
    chosen = [name for name in names if not args.only or any(part in name for part in args.only.split(","))]
    with LocalMesh(LocalOptions(model=Path(args.model), shards=args.shards, rows=4, context=512)) as mesh:
        rows = asyncio.run(measure(mesh, chosen, args.seconds))
    if args.json:
        print(json.dumps(rows, indent=2))
    worst = max(max(row[way]["gap_during_ms"] for way in ("http", "nats")) for row in rows)
    wrong = sum(row[way]["wrong"] + row[way]["errors"] for row in rows for way in ("http", "nats"))
    print(f"{len(rows)} callers: the longest gap of a bystander {worst} ms; wrong or failed {wrong}")


if __name__ == "__main__":
    main()
