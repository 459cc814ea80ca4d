"""The mesh's HTTP listener against a plain uvicorn.Server on the same application: requests a second, and connections that idle.

    python bench/listener.py [--rounds 3]

Each server runs in a process of its own; this process is the client, over connections that stay open. Both use uvloop and httptools.
Figures are medians of the rounds. The second part opens more connections than are allowed and sends nothing on them. Then it opens some
that send half a request head. It counts the connections that the server still holds after a while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

BODY = json.dumps({"status": "ready"}).encode()
REQUEST = b"GET /api/v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
CONNECTIONS, REQUESTS = 16, 400
LIMIT, EXCESS, HEAD_TIMEOUT_S, WATCHED_S = 100, 50, 2.0, 4.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


def serve(name: str, pipe: Connection) -> None:
    from mesh.host.signals import run_loop

    if name == "ours":
        from mesh.http.listener import Listener, ListenerOptions

        listener = Listener.bind(ListenerOptions(port=0, max_connections=LIMIT, head_timeout_s=HEAD_TIMEOUT_S))
        pipe.send(listener.port)
        run_loop(lambda: listener.serve(app))
    else:
        import uvicorn

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(2048)
            pipe.send(taken.getsockname()[1])
            config = uvicorn.Config(
                app, http="httptools", ws="none", lifespan="off", log_level="critical", access_log=False, server_header=False,
                limit_concurrency=LIMIT, timeout_keep_alive=round(HEAD_TIMEOUT_S),
            )  # fmt: skip
            run_loop(lambda: uvicorn.Server(config).serve(sockets=[taken]))


async def requests_a_second(port: int) -> float:
    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(REQUESTS):
            writer.write(REQUEST)
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(BODY))
        writer.close()
        await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return CONNECTIONS * REQUESTS / (time.perf_counter() - began)


async def still_open(port: int, count: int, says: bytes) -> tuple[int, int]:
    """Open `count` connections that send `says`. Returns how many were answered 503, and how many are open after a while."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    for _, writer in opened:
        if says:
            writer.write(says)

    async def read(reader: asyncio.StreamReader) -> tuple[bool, bool]:
        try:
            found = await asyncio.wait_for(reader.read(), WATCHED_S)
            return found.startswith(b"HTTP/1.1 503"), False
        except TimeoutError:
            return False, True
        except ConnectionError:
            return False, False

    answers = await asyncio.gather(*(read(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.close()
    return sum(refused for refused, _ in answers), sum(held for _, held in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    spawn = multiprocessing.get_context("spawn")
    speeds: dict[str, list[float]] = {"ours": [], "uvicorn": []}
    held: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    for round_ in range(rounds):
        for name, figures in speeds.items():
            near, far = spawn.Pipe()
            process = spawn.Process(target=serve, args=(name, far), daemon=True)
            process.start()
            port = near.recv()
            asyncio.run(requests_a_second(port))  # warm
            figures.append(asyncio.run(requests_a_second(port)))
            if round_ == 0:
                silent = asyncio.run(still_open(port, LIMIT + EXCESS, b""))
                held[name] = silent, asyncio.run(still_open(port, EXCESS, REQUEST[:20]))
            process.terminate()
            process.join()
    for name, figures in speeds.items():
        (refused, silent_held), (_, half_held) = held[name]
        print(f"{name:<8} {statistics.median(figures):,.0f} requests/s ({', '.join(f'{figure:,.0f}' for figure in figures)})")
        print(f"         {LIMIT + EXCESS} silent connections: {refused} refused at once, {silent_held} open after {WATCHED_S:g} s")
        print(f"         {EXCESS} connections with half a head: {half_held} open after {WATCHED_S:g} s")


if __name__ == "__main__":
    main()
