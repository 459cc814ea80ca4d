"""What bench/load.py measures with: clients that note their tokens, a view of the frames on the bus, the memory of processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mesh.bus import Bus, Received
from mesh.client import AsyncMeshClient
from mesh.commands.bench import percentiles
from mesh.errors import FrameRejected, MeshError
from mesh.local.mesh import LocalMesh
from mesh.protocol import frame_codec
from mesh.protocol.control import Close
from mesh.protocol.frame_codec import Kind

SAMPLE_S = 0.5


@dataclass(frozen=True)
class Wish:
    """A greedy request and its right answer."""

    tokens: list[int]
    max_tokens: int
    expected: list[int]


# -- one client ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The perf_counter times of sending and of each token."""

    wish: Wish
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: MeshError | None = None

    @property
    def wrong(self) -> bool:
        return self.error is None and self.tokens != self.wish.expected

    @property
    def wrong_so_far(self) -> bool:
        """Whether a request that was ended early got a wrong token."""
        return self.tokens != self.wish.expected[: len(self.tokens)]

    @property
    def gaps(self) -> list[tuple[float, float]]:
        return list(pairwise(self.token_s))


async def stream(client: AsyncMeshClient, outcome: Outcome, **options: Any) -> Outcome:
    """Send the request of `outcome`, and note each token when it comes."""
    wish = outcome.wish
    outcome.sent_s = time.perf_counter()
    try:
        async with client.stream(tokens=wish.tokens, max_tokens=wish.max_tokens, temperature=0.0, ignore_eos=True, **options) as chunks:
            async for chunk in chunks:
                if chunk.token is not None:
                    outcome.token_s.append(chunk.received_s)
                    outcome.tokens.append(chunk.token.id)
    except MeshError as error:
        outcome.error = error
    return outcome


async def until_token(outcomes: Iterable[Outcome], count: int, tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait until each has `count` tokens. Raises the error of a task."""
    while any(len(outcome.tokens) < count and outcome.error is None for outcome in outcomes):
        await asyncio.sleep(0.002)
        for task in tasks:
            if task.done():
                task.result()


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def milliseconds(values: Sequence[float]) -> dict[str, float] | None:
    found = percentiles(values)
    return None if found is None else {name: round(1e3 * value, 2) for name, value in found.items()}


# -- looking -------------------------------------------------------------------------------------------------------------------


class Tap:
    """Watches on the bus what a coordinator sends to the first stage, and which rows it gives back."""

    def __init__(self, mesh: LocalMesh, bus: Bus) -> None:
        self._mesh, self._bus = mesh, bus
        self.sent: list[tuple[float, Kind, frozenset[int]]] = []  # of frames, with their sessions' keys
        self.closed: dict[int, float] = {}  # key -> the first time a row of it was given back

    async def __aenter__(self) -> Tap:
        first = self._mesh.ranges[0]
        subject = f"mesh.v1.{self._mesh.manifest.name}.layers.{first}.*"
        self._subscriptions = [
            await self._bus.subscribe(subject, self._on_frame),
            await self._bus.subscribe("mesh.v1.control.*.close", self._on_close),
        ]
        await self._bus.flush()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for subscription in self._subscriptions:
            await subscription.stop()

    async def _on_frame(self, received: Received) -> None:
        try:
            frame = frame_codec.decode(received.data)
        except FrameRejected:
            return
        self.sent.append((time.perf_counter(), frame.kind, frozenset(frame.sessions.tolist())))

    async def _on_close(self, received: Received) -> None:
        for key in Close.parse(received.data).sessions:
            self.closed.setdefault(key, time.perf_counter())

    def keys(self) -> set[int]:
        return set().union(*(keys for _, _, keys in self.sent))

    async def until_closed(self, keys: Iterable[int]) -> None:
        while not self.closed.keys() >= set(keys):
            await asyncio.sleep(0.002)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """The resident bytes of every process of the mesh, every SAMPLE_S."""

    def __init__(self, mesh: LocalMesh) -> None:
        assert mesh.server is not None
        self._pids = {name: process.pid for name, process in mesh.processes.items()} | {"nats-server": mesh.server.pid}
        self.samples: list[dict[str, int]] = []

    def look(self) -> None:
        self.samples.append({name: resident_bytes(pid) for name, pid in self._pids.items()})

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(SAMPLE_S)

    def as_dict(self) -> dict[str, list[float]]:
        """The MB of each process at a tenth of the time, at half of it, at the end, and at most."""
        last = len(self.samples) - 1
        points = [self.samples[index] for index in (last // 10, last // 2, last)]
        return {
            name: [round(sample[name] / 1e6, 1) for sample in points] + [round(max(sample[name] for sample in self.samples) / 1e6, 1)]
            for name in self._pids
        }


async def counters(client: AsyncMeshClient) -> Counter[str]:
    names = ("decode_frames", "prefill_frames", "tokens", "prompt_tokens", "restarts", "failovers", "suspected", "asked", "late")
    return Counter({name: sum(int(getattr(c.stats, name)) for c in (await client.status()).coordinators) for name in names})


async def wait_idle(client: AsyncMeshClient) -> None:
    """Wait until every row is free again, as the leases say."""
    while not all(lease.free_rows == lease.rows for lease in (await client.status()).shards):
        await asyncio.sleep(0.2)
