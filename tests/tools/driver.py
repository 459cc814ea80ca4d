"""A coordinator reduced to what a test says: it opens sessions, sends frames and waits for what comes back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from serving import unique

from mesh.bus import Bus, BusOptions, Received
from mesh.model.manifest import Manifest
from mesh.protocol import frame_codec, subjects, topics
from mesh.protocol.control import Close, Closed, Open, Opened
from mesh.protocol.frame_codec import Flags, Frame, Hop, Kind
from mesh.protocol.sampling import SamplingParams
from mesh.protocol.status import Heartbeat, ShardStats, StatsRequest
from mesh.shard.service import Shard
from mesh.types import LayerRange, even_ranges


class Driver:
    """One route of shards, and the sessions on it."""

    def __init__(self, bus: Bus, manifest: Manifest, running: Sequence[Shard]) -> None:
        self.bus = bus
        self.manifest = manifest
        self.name = unique("c")
        self.route = tuple(Hop(shard.state.shape.layers, shard.options.name) for shard in running)
        self.answers: asyncio.Queue[Frame] = asyncio.Queue()
        self.rows: dict[int, list[Opened]] = {}
        self.flags = Flags(0)
        self._step = itertools.count(1)

    @classmethod
    @asynccontextmanager
    async def on(cls, url: str, model: Path, running: Sequence[Shard]) -> AsyncIterator[Driver]:
        async with await Bus.connect(BusOptions((url,)), name="driver") as bus:
            driver = cls(bus, Manifest.load(model), running)
            await bus.subscribe(subjects.tokens(driver.manifest.name, driver.name), driver._take)
            # the first use of a program compiles it, which on a busy machine takes longer than a coordinator may be silent
            await bus.send(topics.HEARTBEATS.at(driver.manifest.name), Heartbeat(coordinator=driver.name, ttl_s=600))
            yield driver

    async def _take(self, received: Received) -> None:
        self.answers.put_nowait(frame_codec.decode(received.data, model_hash=self.manifest.model_hash))

    async def open(
        self, session: int, prompt_length: int, sampling: SamplingParams | None = None, *, epoch: int = 1, keep: int = 0
    ) -> None:
        message = self.opening(session, prompt_length, sampling, epoch=epoch, keep=keep)
        self.rows[session] = [await self.bus.request(topics.OPEN.at(hop.shard), message, timeout_s=10) for hop in self.route]

    def opening(self, session: int, prompt_length: int, sampling: SamplingParams | None = None, *, epoch: int = 1, keep: int = 0) -> Open:
        return Open(
            session=session,
            epoch=epoch,
            coordinator=self.name,
            model_hash=self.manifest.model_hash,
            prompt_length=prompt_length,
            keep=keep,
            sampling=sampling or SamplingParams(temperature=0.0),
        )

    async def close(self, *sessions: int) -> list[Closed]:
        message = Close(coordinator=self.name, sessions=sessions)
        return [await self.bus.request(topics.CLOSE.at(hop.shard), message, timeout_s=10) for hop in self.route]

    def frame(self, kind: Kind, sessions: Sequence[int], positions: Sequence[int], tokens: Sequence[int], **fields: Any) -> Frame:
        stage_rows = [[self.rows[session][hop].row for session in sessions] for hop in range(len(self.route))]
        return Frame(
            kind,
            self.manifest.model_hash,
            self.name,
            self.route,
            np.array(sessions, np.uint64),
            np.array([self.rows[session][0].epoch for session in sessions], np.uint32),
            np.array(positions, np.uint32),
            np.array(stage_rows, np.uint32),
            np.array(tokens, np.int32),
            step=next(self._step),
            **{"flags": self.flags, **fields},
        )

    async def send(self, frame: Frame) -> None:
        await self.bus.publish(frame.subject(self.manifest.name), frame_codec.encode(frame))

    async def answer(self) -> Frame:
        return await asyncio.wait_for(self.answers.get(), 60)

    async def prefill(self, session: int, prompt: Sequence[int], *, start: int = 0, chunk: int = 16) -> Frame:
        """All chunks, in flight together; the answer to the last. Those before are acknowledged."""
        pieces = [prompt[at : at + chunk] for at in range(0, len(prompt), chunk)]
        for index, piece in enumerate(pieces):
            flags = self.flags | (Flags.FINAL if index == len(pieces) - 1 else Flags(0))
            await self.send(self.frame(Kind.PREFILL, [session], [start + index * chunk], piece, flags=flags))
        for _ in pieces[:-1]:
            assert (await self.answer()).kind is Kind.ACK
        return await self.answer()

    async def decode(self, sessions: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Frame:
        await self.send(self.frame(Kind.DECODE, sessions, positions, tokens))
        return await self.answer()

    async def generate(self, session: int, prompt: Sequence[int], count: int, sampling: SamplingParams | None = None) -> list[int]:
        await self.open(session, len(prompt), sampling)
        answer = await self.prefill(session, prompt)
        assert answer.kind is Kind.TOKENS, answer
        tokens = [int(answer.tokens[0])]
        while len(tokens) < count:
            answer = await self.decode([session], [len(prompt) + len(tokens) - 1], tokens[-1:])
            assert answer.kind is Kind.TOKENS, answer
            tokens.append(int(answer.tokens[0]))
        return tokens

    async def stats(self, hop: int = 0) -> ShardStats:
        return await self.bus.request(topics.STATS.at(self.route[hop].shard), StatsRequest(), timeout_s=10)


def ranges(shards: int) -> list[LayerRange]:
    return even_ranges(3, shards)
