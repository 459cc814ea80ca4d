"""What a hop costs by itself: from a nats-py publish to the callback of another connection.

Between two stages it costs more than between two idle processes: a stage reads its weights before it sends, and after that the
processor's caches hold nothing that sending and receiving need. So it is measured twice, the second time between two processes that read
as many bytes as a stage, with every processor, before they send.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from mesh.bus import Bus, BusOptions, Received
from mesh.errors import Unavailable
from mesh.host.signals import run_loop

__all__ = ["bare_hop_between_stages_s", "bare_hop_s"]

_ROUNDS = 400
_READING_ROUNDS = 40
_ENOUGH_BYTES = 256 * 1024 * 1024
"""More than the caches hold."""
_ANSWER_S = 60.0
_STAMP = struct.Struct("<qq")
"""When a message was sent, and how long the one before it took, in nanoseconds of the monotonic clock, which processes share."""


async def bare_hop_s(options: BusOptions, size: int) -> float:
    """Median seconds for `size` bytes between two connections of this process, which does nothing else."""
    reader = _Reader(0)
    async with await Bus.connect(options, name="mesh-bench-b", direct=False) as far:
        return await _median_s(options, await _answer(far, reader), size, _ROUNDS, reader)


async def bare_hop_between_stages_s(options: BusOptions, size: int, stage_bytes: int) -> float:
    """Median seconds for `size` bytes between two processes that each read `stage_bytes` before they send."""
    read = min(stage_bytes, _ENOUGH_BYTES)
    spawn = multiprocessing.get_context("spawn")  # a fork would have this loop's sockets
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_far_side, args=(theirs, options, read), daemon=True)
    process.start()
    theirs.close()
    try:
        there = await asyncio.to_thread(ours.recv)
        return await _median_s(options, there, size, _READING_ROUNDS, _Reader(read))
    except (EOFError, TimeoutError) as error:
        raise Unavailable("the process at the other end of a bare hop does not answer: give --no-hop to do without it") from error
    finally:
        ours.close()  # the other process ends when its end is closed
        await asyncio.to_thread(process.join, 5.0)
        process.kill()


class _Reader:
    """Reads `size` bytes of memory with every processor."""

    def __init__(self, size: int) -> None:
        import numpy as np  # a client is installed without it, and may measure its mesh with --no-hop

        workers = os.cpu_count() or 1
        self._sum = np.sum
        self._parts = np.array_split(np.ones(size // 8), workers) if size else []
        self._pool = ThreadPoolExecutor(workers, "read")

    def read(self) -> None:
        list(self._pool.map(self._sum, self._parts))


async def _answer(bus: Bus, reader: _Reader) -> str:
    """The subject on which messages are sent back, after reading memory."""
    subject = bus.new_inbox()

    async def arrived(received: Received) -> None:
        took_ns = time.monotonic_ns() - _STAMP.unpack_from(received.data)[0]
        reader.read()
        await bus.publish(received.reply, _STAMP.pack(time.monotonic_ns(), took_ns) + received.data[_STAMP.size :])

    await bus.subscribe(subject, arrived)
    await bus.flush()
    return subject


async def _median_s(options: BusOptions, there: str, size: int, rounds: int, reader: _Reader) -> float:
    """The median of the hops to `there` and back."""
    filler = bytes(max(size - _STAMP.size, 0))
    home: asyncio.Queue[tuple[int, int, int]] = asyncio.Queue()
    hops_ns: list[int] = []
    async with await Bus.connect(options, name="mesh-bench-a", direct=False) as near:
        back = near.new_inbox()

        async def arrived(received: Received) -> None:
            home.put_nowait((time.monotonic_ns(), *_STAMP.unpack_from(received.data)))

        await near.subscribe(back, arrived)
        await near.flush()
        for _ in range(rounds):
            reader.read()
            await near.publish(there, _STAMP.pack(time.monotonic_ns(), 0) + filler, reply=back)
            now_ns, sent_ns, there_ns = await asyncio.wait_for(home.get(), _ANSWER_S)
            hops_ns += (there_ns, now_ns - sent_ns)
    return sorted(hops_ns)[len(hops_ns) // 2] / 1e9


def _far_side(pipe: Connection, options: BusOptions, stage_bytes: int) -> None:
    """The other process; it ends when the pipe is closed."""

    async def serve() -> None:
        async with await Bus.connect(options, name="mesh-bench-b", direct=False) as bus:
            pipe.send(await _answer(bus, _Reader(stage_bytes)))
            await asyncio.to_thread(pipe.poll, None)

    run_loop(serve)
