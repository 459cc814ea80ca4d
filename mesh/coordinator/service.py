"""The life of a coordinator: its parts are made and connected, it starts, it says that it lives, it stops.

What it does in between is in the files beside this one; mesh/coordinator/__init__.py has the way of a request through them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from mesh import __version__
from mesh.bus import Bus, Endpoint, EventLog, Service, announce, end_tasks, keep_events
from mesh.coordinator.batch import BatchWorker
from mesh.coordinator.continuity import Continuity
from mesh.coordinator.core.events import CancelSession, FrameLost
from mesh.coordinator.core.expectations import ExpectedShards
from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.pace import SLOWDOWN
from mesh.coordinator.core.routing import Strategy
from mesh.coordinator.crashes import report_lost
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.effects import Effects
from mesh.coordinator.generations import GenerationMeter
from mesh.coordinator.intake import Intake
from mesh.coordinator.jobs import Jobs
from mesh.coordinator.kept import KeptPrefixes
from mesh.coordinator.listeners import Listeners
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.prompt_pool import PromptPool
from mesh.coordinator.replies import Job
from mesh.coordinator.requests import PrefixReuse, Requests
from mesh.coordinator.shards import Shards
from mesh.coordinator.tokenizing import Tokenizing
from mesh.coordinator.trace import SHOWN_SESSIONS
from mesh.coordinator.tracing import Tracing
from mesh.errors import MeshError, Unavailable
from mesh.model.signature import Signers, load_trusted
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import events, subjects, topics
from mesh.protocol.frame_codec import Flags
from mesh.protocol.instance import new_instance
from mesh.protocol.status import CoordinatorStats, Heartbeat, Hops
from mesh.settings.schema import ReuseScope
from mesh.telemetry.context import TraceSampling
from mesh.telemetry.export import SpanExport

__all__ = ["SERVICE_NAME", "Coordinator", "CoordinatorOptions"]

log = logging.getLogger("mesh.coordinator")

SERVICE_NAME = subjects.SERVICE_COORDINATOR

EXACT = Flags(0)
"""Hidden states travel as they were computed."""
_HEARTBEAT_SESSIONS = 2000
"""A heartbeat does not name the sessions where there are more than these: it would be too long."""
_HEARTBEAT_TTL_S = 12.0
_HEARTBEATS_MISSED = 2.4
"""Two heartbeats in a row may be lost before a coordinator is taken to be gone."""
_LONGEST_TTL_S = 3600.0
_CHECK_S = 30.0
"""How often it is looked whether the stream of events is still there."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """model: a model directory, of which only the manifest and the tokenizer are read. queue_limit: requests that may wait. step_slowdown:
    how many times as long a step may take because of prompts (docs/tuning.md). flags: how hidden states travel (Flags.BF16,
    Flags.ZSTD). health_check_interval_s: between heartbeats to the shards, and between looks whether all expected shards are there.
    pool_bytes: what the requests that are held may take together. sampling: which traces are kept for others. signers: one of them
    must have signed the model (None: no signature is asked for). prefix_reuse: which sessions may begin with what earlier ones have left
    at the shards (docs/prefix-reuse.md)."""

    model: Path
    name: str = ""
    strategy: Strategy = "least_loaded"
    queue_limit: int = 256
    failover_timeout_s: float = 30.0
    step_timeout_s: float = 15.0
    step_slowdown: float = SLOWDOWN
    open_timeout_s: float = 2.0
    flags: Flags = EXACT
    health_check_interval_s: float = 3.0
    expected: ExpectedShards | None = None
    pool_bytes: int | None = None
    sampling: TraceSampling = field(default_factory=TraceSampling)
    signers: Signers | None = None
    prefix_reuse: ReuseScope = "tenant"


class Coordinator:
    """`run` is its whole life; `ready` is set while it serves. `http_url`, `metrics_url`: where this process serves HTTP and its metrics,
    which `stats` says. `export`: where spans go that leave the mesh."""

    def __init__(self, bus: Bus, options: CoordinatorOptions, export: SpanExport | None = None) -> None:
        self.bus = bus
        self.options = options
        self.name = subjects.check_token(options.name or f"c-{secrets.token_hex(4)}", "name")
        self.manifest = load_trusted(options.model, options.signers)
        has_text = self.manifest.tokenizer is not None
        self.tokenizer = Tokenizer.load(options.model, self.manifest, template=False) if has_text else None
        self.prompts = PromptPool(options.model, digest=self.manifest.digest) if has_text else None
        self.ready = asyncio.Event()
        self.http_url: str | None = None
        self.metrics_url = ""
        self._stop = asyncio.Event()
        self._service: Service | None = None
        self._front: Bus | None = None  # the connection by which requests come
        model, model_hash = self.manifest.name, self.manifest.model_hash
        config = CoreConfig(
            self.manifest.layers,
            options.strategy,
            options.queue_limit,
            options.failover_timeout_s,
            options.step_timeout_s,
            options.step_slowdown,
        )
        self.core = Core(config, Random(secrets.randbits(64)))
        instance = new_instance()
        self.requests = Requests(
            self.manifest,
            self.tokenizer,
            self.prompts,
            context=self._context,
            most_preparing=max(options.queue_limit, 1),
            # What a row with states holds is nothing that another session could begin with.
            reuse=PrefixReuse("off" if self.manifest.has_states else options.prefix_reuse, exact=Flags.BF16 not in options.flags),
        )
        jobs: dict[str, Job] = {}
        self.tracing = Tracing(
            bus, options.sampling, export, name=self.name, instance=instance, model=model, core=self.core, job_of=jobs.get
        )
        self.meter = self.tracing.meter
        self.generations = GenerationMeter(model)
        self.outbox = Outbox(
            bus,
            model=model,
            model_hash=model_hash,
            name=self.name,
            instance=instance,
            flags=options.flags,
            clock=self.meter,
            frame_lost=lambda frame, error: self.driver.handle_soon(FrameLost(frame, error=error), "frame lost"),
        )
        self.driver = CoreDriver(bus, self.core, self.outbox)
        self.jobs = Jobs(
            bus,
            jobs,
            self.driver,
            self.outbox,
            manifest=self.manifest,
            tokenizer=self.tokenizer,
            requests=self.requests,
            pool_bytes=options.pool_bytes,
        )
        self.shards = Shards(
            bus,
            self.core,
            self.driver,
            self.outbox,
            self._announce_soon,
            model=model,
            model_hash=model_hash,
            coordinator=instance,
            expected=options.expected,
            open_timeout_s=options.open_timeout_s,
            opened=self.tracing.opened,
            context_of=self.tracing.traces.context_of,
        )
        self.continuity = Continuity(
            bus,
            self.jobs,
            self.shards.close_all,
            model=model,
            model_hash=model_hash,
            name=self.name,
            instance=instance,
            heartbeat_ttl_s=min(max(_HEARTBEAT_TTL_S, _HEARTBEATS_MISSED * options.health_check_interval_s), _LONGEST_TTL_S),
            random=Random(secrets.randbits(64)),
            announce=self._announce_soon,
            waited_s=lambda session: self.core.waited_s(session, time.monotonic()),
        )
        self.kept = KeptPrefixes(
            bus, self.driver, self.outbox, model=model, instance=instance, alone=lambda: not self.continuity.peers.watched()
        )
        self.effects = Effects(
            bus, self.jobs, self.outbox, self.shards, self.continuity, self.tracing, self._announce_soon, self.generations, self.kept
        )
        self.driver.carry_out = self.effects.carry_out
        self.intake = Intake(
            bus,
            self.core,
            self.driver,
            self.jobs,
            self.outbox,
            self.continuity,
            self.meter,
            name=self.name,
            manifest=self.manifest,
            tokenizer=self.tokenizer,
            requests=self.requests,
        )
        self.listeners = Listeners(
            bus,
            jobs,
            instance=instance,
            settled=self.intake.settled,
            gone=lambda session: self.driver.handle_now(CancelSession(session, gone=True)),
        )
        self._events = EventLog(bus)
        self.batches = BatchWorker(
            bus, self.core, model, self.continuity.instance, lambda session: self.driver.handle_now(CancelSession(session))
        )
        bus.on_change(self._on_connection)

    async def run(self) -> None:
        """Serve until `stop`."""
        model = self.manifest.name
        heartbeats: asyncio.Task[Any] | None = None
        try:
            if self.prompts is not None:
                await self.prompts.start()
            await self.tracing.start()
            self._front = front = await self.bus.another("mesh-requests")
            await self.intake.start(front)
            await self.listeners.start()
            await self.kept.start()
            await self.shards.start()
            await keep_events(self._events)
            await self.continuity.start()
            heartbeats = self.bus.keep(self._send_heartbeats, "heartbeats")  # not before: the others answer them
            self._service = await Service.start(
                front,
                name=SERVICE_NAME,
                version=__version__,
                description=f"generation with {model}",
                metadata={"coordinator": self.name, "model": model, "model_hash": self.manifest.model_hash},
                stats=lambda: self.stats().document(),
                endpoints=[
                    Endpoint(
                        "generate",
                        topics.GENERATE.at(model),
                        self.intake.on_generate,
                        concurrent=True,
                        most_bytes=self.requests.most_bytes,
                        too_large=self.requests.too_large,
                    ),
                    *Tokenizing(self.manifest, self.requests, self.prompts).endpoints(),
                    *self.batches.endpoints(),
                ],
            )
            await self.batches.start()
            for bus in (front, self.bus):
                await bus.require_subscriptions("a coordinator")
            self.ready.set()
            await self._announce("coordinator_joined", self.name, f"serves {model}")
            self.bus.spawn(report_lost(self.bus, self._events, model, self.name), "coordinators that crashed")
            log.info("ready: %s serves %s as %s", self.name, model, topics.GENERATE.at(model))
            await self._stop.wait()
        finally:
            self.ready.clear()
            if heartbeats is not None:
                await end_tasks(heartbeats)
            await self._leave()

    def stop(self) -> None:
        """End. What is being generated is left to the other coordinators, or to the next one."""
        self._stop.set()

    def stats(self) -> CoordinatorStats:
        """For $SRV.STATS: counts since the start, means of decode steps."""
        now, last_step_at = time.monotonic(), self.meter.last_step_at
        load, expected = self.core.load(now), self.options.expected
        sessions, recent = self.tracing.traces.summary(self.core.sessions(now, SHOWN_SESSIONS))
        return CoordinatorStats(
            coordinator=self.name,
            instance=self.continuity.instance,
            pid=os.getpid(),
            unix_s=time.time(),
            model=self.manifest.name,
            vocab_size=self.manifest.vocab_size,
            context=load.context,
            max_prompt_characters=self.requests.max_prompt_characters,
            live=load.live,
            queued=load.queued,
            capacity=load.capacity,
            serving=load.context is not None,
            last_step_s=None if last_step_at is None else now - last_step_at,
            http=self.http_url,
            metrics=self.metrics_url,
            rejected_frames=dict(self.intake.rejected),
            refused_replies=sum(bus.refused_replies for bus in self.connections()),
            resumed=self.continuity.resumed,
            records=dict(self.continuity.recorder.counters),
            batches=dict(self.batches.counters),
            remade=self.remade(),
            errors=self.errors(),
            spans=self.tracing.counters,
            prompts={} if self.prompts is None else dict(self.prompts.counters),
            expected=None if expected is None else expected.as_dict(self.core.replicas()),
            hops=Hops.model_validate(self.meter.hops.as_dict()),
            sessions=sessions,
            recent=recent,
            **self.core.counts(),
        )

    def _context(self) -> int | None:
        return self.core.load(time.monotonic()).context

    def remade(self) -> dict[str, int]:
        """What was lost in JetStream and made again, and how often."""
        return {"sessions": self.continuity.recorder.bucket.remade, "events": self._events.remade, "batches": self.batches.remade}

    def connections(self) -> tuple[Bus, ...]:
        """The connection of frames and documents, then the one by which requests come, if it is there."""
        return (self.bus,) if self._front is None else (self.bus, self._front)

    def errors(self) -> dict[str, int]:
        """What failed unexpectedly, by where."""
        of = sum((bus.counters for bus in self.connections()), Counter[str]())
        counts = {"tasks": of["task_failures"], "handlers": of["handler_errors"], "outbox": self.outbox.failed}
        return counts | self.effects.counters | self.driver.counters

    async def _leave(self) -> None:
        if self._service is not None:
            await self._service.stop()
        await self.batches.stop()
        await self.outbox.send()
        self.driver.freeze()
        released = await self.continuity.hand_over()
        gone = Unavailable("the coordinator is going away: send the request again")
        for job in [job for id, job in self.jobs.table.items() if id not in released]:
            self.outbox.error(job.reply, gone, job.epoch, job.id)
        await self.outbox.send()
        if self.bus.connected:
            await self.shards.close_all(self.continuity.instance)
            await self.bus.send(topics.HEARTBEATS.at(self.manifest.name), self.continuity.heartbeat(leaving=True))
            await self._announce("coordinator_left", self.name, f"{len(released)} sessions were left to others" if released else "")
        self.driver.stop()
        await self.shards.stop()
        await self.listeners.stop()
        await self.kept.stop()
        await self.intake.stop()
        await self.tracing.stop()
        if self._front is not None:
            await self._front.close()
        if self.prompts is not None:
            await self.prompts.stop()

    async def _send_heartbeats(self) -> None:
        """By these, shards know whose rows to keep. A client whose request waits is told so, which also shows whether it still listens."""
        checked_at = time.monotonic()
        while True:
            try:
                complete = self.core.load(time.monotonic()).context is not None  # otherwise the core says what is missing, more often
                for place, session in enumerate(self.core.waiting() if complete else ()):
                    job = self.jobs.table.get(session)
                    if job is not None and job.message.stream:
                        self.outbox.waiting(job, job.waiting(place))
                await self.outbox.send()
                await self.bus.send(topics.HEARTBEATS.at(self.manifest.name), self._heartbeat())
            except MeshError as error:
                log.warning("%s", error)
            self.shards.report_lacking()
            if time.monotonic() - checked_at >= _CHECK_S and self.bus.connected:
                checked_at = time.monotonic()
                self.bus.spawn(keep_events(self._events), "events")
            await asyncio.sleep(self.options.health_check_interval_s)

    def _heartbeat(self) -> Heartbeat:
        """With the keys of the sessions that hold rows: shards close what is missing twice."""
        keys = self.core.session_keys()
        return self.continuity.heartbeat().model_copy(update={"sessions": keys if len(keys) <= _HEARTBEAT_SESSIONS else None})

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self.bus.spawn(keep_events(self._events), "events")  # the server may have lost them

    async def _announce(self, kind: events.EventKind, who: str, detail: str) -> None:
        await announce(self.bus, kind, who, model=self.manifest.name, detail=detail, coordinator=self.name)

    def _announce_soon(self, kind: events.EventKind, who: str, detail: str) -> None:
        self.bus.spawn(self._announce(kind, who, detail), "event")
