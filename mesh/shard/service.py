"""A shard: one layer range on the mesh.

    connect, report "loading" -> load and warm up in the compute thread -> listen, report "ready" -> ... -> drain -> leave

The event loop receives, decides (ShardState) and publishes; the compute thread computes. The life of a frame:

    message -> decode -> admit -> queue -> in the thread: run_step, encode, publish to the frame's next subject
                            \\-> NACK to the coordinator for rows that cannot be computed
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mesh import __version__
from mesh.bus import Bus, Endpoint, EventLog, Pull, Received, Service, Subscription, announce, end_tasks, keep_events
from mesh.bus.spans import SpanPublisher
from mesh.dtypes import NUMPY_DTYPES
from mesh.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    FrameRejected,
    MeshError,
    MessageRejected,
    NobodyListens,
    PayloadTooLarge,
    Replaced,
    ServiceError,
    Unavailable,
    internal_error,
)
from mesh.kernels.library import kernels
from mesh.model.signature import load_trusted
from mesh.protocol import frame_codec, subjects, topics
from mesh.protocol.control import Closed, Drained, Loaded, Open, Opened, OpenedMany, Pong
from mesh.protocol.events import EventKind
from mesh.protocol.failures import ErrorReply
from mesh.protocol.frame import STEPS, traced_headers
from mesh.protocol.frame_codec import Frame, Kind, Nack, StageTiming
from mesh.protocol.instance import new_instance
from mesh.protocol.status import ShardLease, ShardStats, StatsRequest
from mesh.runtime.engine import Engine
from mesh.runtime.executables import forget_loaded
from mesh.runtime.programs import Compiled
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.stage import Stage, StageConfig
from mesh.shard.compute import ComputeThread, run_step
from mesh.shard.gaps import can_replace, others, refuse_gap
from mesh.shard.lease import LeaseKeeper
from mesh.shard.machine import predicted_bytes
from mesh.shard.meter import Meter
from mesh.shard.moving import move
from mesh.shard.options import ShardOptions, Status
from mesh.shard.placing import withdraw
from mesh.shard.reports import lease_of, stats_of
from mesh.shard.start_trace import StartTrace
from mesh.shard.state import ShardShape, ShardState, tag_of
from mesh.telemetry.export import SpanExport
from mesh.telemetry.log_context import log_context
from mesh.types import Progress, no_progress

__all__ = ["Shard", "ShardOptions"]

log = logging.getLogger("mesh.shard")

_EXPIRE_S = 1.5
"""How often the sessions of coordinators that are gone are looked for."""


_PHASES = {kind: kind.name.lower() for kind in Kind}


@dataclass(frozen=True, slots=True)
class _Stepped:
    """The result of a frame from the compute thread. `sent`: it has been published there already."""

    out: Frame
    data: bytes
    encode_s: float
    sent: bool


class _StoppedError(Exception):
    """The shard was told to stop before it was ready."""


class Shard:
    """A shard; see the module's docstring. `run` is its whole life, and `ready` is set while it serves."""

    def __init__(
        self,
        bus: Bus,
        options: ShardOptions,
        *,
        compiled: Compiled | None = None,
        progress: Progress = no_progress,
        start: StartTrace | None = None,
        export: SpanExport | None = None,
    ) -> None:
        """`compiled`: programs to share with other shards of this process. `progress` is called in the compute thread. `start`: the trace
        of the process's start. `export`: where spans go that leave the mesh."""
        self.bus = bus
        self.options = options
        self.instance = new_instance()
        self.manifest = load_trusted(options.directory, options.signers) if options.incoming is None else options.incoming.manifest
        self.meter = Meter()
        self._start = start or StartTrace()
        self._export = export
        self._spans = SpanPublisher(bus)
        self.ready = asyncio.Event()
        self.http_url = ""  # where this process answers HTTP; the lease tells everyone
        self.metrics_url = ""
        self._compiled = compiled
        self._progress = progress
        layers = self.manifest.check_range(options.layers)
        context = min(options.context or self.manifest.context_length, self.manifest.context_length)
        self.state = ShardState(
            ShardShape(
                shard=subjects.check_token(options.name, "shard_id"),
                model_hash=self.manifest.model_hash,
                layers=layers,
                total_layers=self.manifest.layers,
                rows=options.rows,
                context=context,
                vocab_size=self.manifest.vocab_size,
                hidden_size=self.manifest.hidden.size,
                hidden_dtype=NUMPY_DTYPES[self.manifest.hidden.dtype],
                # A session has one decode step or prefill chunk in flight. More than twice that is a coordinator's mistake.
                queue_limit=2 * options.rows + 8,
                tag=tag_of(self.instance),
                carries=self.manifest.has_states and options.kv_cache,
            )
        )
        self.stage: Engine | None = None
        self._compute: ComputeThread | None = None
        self._service: Service | None = None
        self._subscriptions: list[Subscription] = []
        self._lease = LeaseKeeper(
            bus, options.name, self.manifest.name, options.lease_ttl_s, lambda: self.lease(time.monotonic()), self._replaced_by
        )
        self._status: Status = "loading"
        self._stop = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._failure: BaseException | None = None
        self._moving = asyncio.Lock()
        self._drainer: asyncio.Task[Any] | None = None
        self._ends_when_drained = False
        self._encode_s = dict.fromkeys(Kind, 0.0)  # seconds that encoding the last frame of each kind took
        self.started_unix_s = time.time()
        self.predicted_bytes = predicted_bytes(self.manifest, options)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load, serve until `stop`, `drain` or a failure, and leave. Raises the failure."""
        model, shape = self.manifest.name, self.state.shape
        await self._require_alone()
        if self.options.incoming is not None:
            self.options.incoming.start()
            self.bus.spawn(self._time_fetch(self.options.incoming), "timing what is fetched")
        loop = asyncio.get_running_loop()
        self._compute = ComputeThread(loop.call_soon_threadsafe)
        expiring = self.bus.keep(self._expire, "closing the sessions of coordinators that are gone")
        try:
            await self._lease.start()
            if self.options.incoming is not None:
                await withdraw(self.bus, model, self.options.name)
            await self._listen_control()
            await keep_events(EventLog(self.bus))
            await self._announce("joined", f"layers {shape.layers} of {model}")
            log.info("loading layers %s of %s", shape.layers, model)
            with self._start.part("load model"):
                self.stage = await self.in_thread(self._load)
            log.info("kernels: %s", kernels())
            if self.options.warm_up:
                self._set_status("warming")
                log.info("compiling")
                with self._start.part("warm up"):
                    await self.in_thread(partial(self.stage.warm_up, self._progress))
                    await self.in_thread(self.stage.exercise)
            await self.open_doors()
            self._report_start()
            log.info("ready: layers %s of %s, %d rows of %d tokens", shape.layers, model, shape.rows, shape.context)
            await self._stop.wait()
            if isinstance(self._failure, Replaced):
                raise self._failure
            if self._failure is not None:
                raise ServiceError(f"the computation failed ({self._failure!r}): the shard ends, start it again") from self._failure
        except _StoppedError:
            if isinstance(self._failure, Replaced):
                raise self._failure from None
            log.info("told to stop before it was ready")
        except Exception as error:
            if self._failure is not None or not isinstance(error, MeshError):
                forget_loaded()
            raise
        finally:
            self.ready.clear()
            await end_tasks(expiring)
            await self._leave()

    @property
    def computing(self) -> bool:
        """Whether the compute thread is alive. After `run` that means it could not be ended: a compilation cannot be interrupted."""
        return self._compute is not None and self._compute.alive

    @property
    def spans_dropped(self) -> int:
        """Spans of this process that found no place, or could not be sent."""
        return self._spans.dropped + (0 if self._export is None else self._export.dropped)

    @property
    def status(self) -> Status:
        """The state that its lease reports."""
        return self._status

    @property
    def busy_s(self) -> float:
        """Seconds in which the compute thread had work."""
        return 0.0 if self._compute is None else self._compute.busy_s

    @property
    def lease_keeper(self) -> LeaseKeeper:
        return self._lease

    def ping(self, answered: Callable[[], None]) -> None:
        """Call `answered` in the event loop once the compute thread has done all work submitted before."""
        if self._compute is not None:
            self._compute.submit(lambda: None, lambda result, error: answered())

    def stop(self) -> None:
        """End now. Open sessions continue on other replicas, if there are any."""
        self._stop.set()

    def drain(self, timeout_s: float | None = None, *, stop: bool = True) -> int:
        """Take no new sessions. Then, if `stop`, end once none is open, or after `timeout_s` (None: the options' drain_s). Returns how
        many sessions are open. While it drains already, only `stop` counts."""
        count = self.state.drain()
        self._ends_when_drained = self._ends_when_drained or stop
        self._set_status("draining")
        if self._drainer is None or self._drainer.done():
            wait_s = self.options.drain_s if timeout_s is None else timeout_s
            self._drainer = self.bus.spawn(self._drain(wait_s), "drain")
        return count

    # -- answers -------------------------------------------------------------------------------------------------------

    async def on_open(self, received: Received) -> Opened | None:
        message = topics.OPEN.parse(received.data)
        return self._open(message) if self._is_meant(message.instance) else None

    async def on_open_many(self, received: Received) -> OpenedMany | None:
        message = topics.OPEN_MANY.parse(received.data)
        if not any(self._is_meant(one.instance) for one in message.opens):
            return None
        return OpenedMany(answers=tuple(map(self._open_or_refuse, message.opens)))

    def _open_or_refuse(self, message: Open) -> Opened | ErrorReply:
        """One of several: its error is its own."""
        try:
            if not self._is_meant(message.instance):
                raise Unavailable(f"shard {self.options.name} is another process now")
            return self._open(message)
        except MeshError as error:
            return ErrorReply.of(error)
        except Exception as error:
            log.exception("opening a row")
            return ErrorReply.of(internal_error(error))

    def _open(self, message: Open) -> Opened:
        if not self.ready.is_set() or self.stage is None or self._compute is None:
            raise Unavailable(f"shard {self.options.name} is {self._status}: open the session elsewhere, or later")
        if message.sampling.embed and self.stage.last and not self.stage.embeds:
            raise BadRequest(
                f"{self.manifest.name} gives no embeddings: its head has no one product with the vocabulary, before which a hidden state "
                "could be read. Ask another model",
                field="embed",
            )
        reservation = self.state.open(message, time.monotonic())
        if log.isEnabledFor(logging.DEBUG):
            with log_context(request=message.request, trace=message.trace, shard=self.options.name):
                log.debug("opened row %d, of which %d positions are filled", reservation.row, reservation.filled)
        self.idle.clear()
        shape = self.state.shape
        source, reservation.copy_of = reservation.copy_of, None
        if source is not None:
            self._compute.submit(partial(self.stage.copy, source, reservation.row, reservation.filled), self._copied)
        if shape.last:
            set_row = partial(self.stage.open, reservation.row, message.sampling, prompt_length=message.prompt_length)
            self._compute.submit(set_row, self._after_open)
        return Opened(
            **reservation.said,
            shard=shape.shard,
            instance=self.instance,
            layers_start=shape.layers.start,
            layers_end=shape.layers.stop,
            context=shape.context,
            chunk=self.options.chunk,
        )

    async def on_close(self, received: Received) -> Closed:
        closed = self.state.close(topics.CLOSE.parse(received.data), time.monotonic())
        self._note_sessions()
        return Closed(closed=closed, free_rows=self.state.free_rows)

    async def on_drain(self, received: Received) -> Drained:
        message = topics.DRAIN.parse(received.data)
        gap = await self._gap(force=message.force, doing="drains it")
        return Drained(shard=self.options.name, sessions=self.drain(message.timeout_s, stop=message.stop), gap=gap)

    async def on_load(self, received: Received) -> Loaded:
        message = topics.LOAD.parse(received.data)
        if self._moving.locked():
            raise Unavailable(f"shard {self.options.name} is about to serve another range already: ask again later")
        async with self._moving:
            shape = self.state.shape
            same = (shape.layers.start, shape.layers.stop) == (message.layers_start, message.layers_end)
            gap = "" if same else await self._gap(force=message.force, doing="moves it")
            return (await move(self, message)).model_copy(update={"gap": gap})

    async def on_stats(self, received: Received) -> ShardStats:
        topics.STATS.parse(received.data)
        return self.stats()

    async def on_ping(self, received: Received) -> Pong | None:
        message = topics.PING.parse(received.data)
        if not self._is_meant(message.instance):
            return None
        return Pong(shard=self.options.name, instance=self.instance, pending=self.state.pending(message.coordinator))

    async def on_lease_query(self, received: Received) -> ShardLease:
        topics.LEASES.parse(received.data)
        return self.lease(time.monotonic())

    async def on_heartbeat(self, received: Received) -> None:
        try:
            closed = self.state.heartbeat(topics.HEARTBEATS.parse(received.data), time.monotonic())
        except MessageRejected:
            self.meter.rejected["beat"] += 1
            raise
        if closed:
            log.info("closed %d sessions that their coordinator does not know", len(closed))
            self._note_sessions()

    def stats(self) -> ShardStats:
        return stats_of(self)

    # -- frames --------------------------------------------------------------------------------------------------------

    def on_frame(self, data: bytes) -> None:
        arrived, arrived_ns = time.perf_counter(), time.time_ns()
        meter, state = self.meter, self.state
        meter.frames_in += 1
        meter.bytes_in += len(data)
        try:
            frame = frame_codec.decode(data, model_hash=state.shape.model_hash)
            if self.options.mirror and frame.kind in STEPS and frame.route[frame.hop].shard != state.shape.shard:
                self._follow(frame, state.follow(frame))
                return
            admission = state.admit(frame, time.monotonic())
        except FrameRejected as error:
            meter.rejected[error.reason] += 1
            log.debug("%s", error)
            return
        for nack in admission.nacks:
            self._send(nack, frame_codec.encode(nack))
        if admission.nothing:
            return
        if admission.rows is not None:
            frame = frame.only(admission.rows)
        queued = time.perf_counter()
        assert self.stage is not None and self._compute is not None
        came = StageTiming(read_us=int((queued - arrived) * 1e6), arrived_us=arrived_ns // 1000, bytes=len(data))
        work = partial(self._step, self.stage, frame, queued, came)
        self._compute.submit(work, partial(self._stepped, frame))

    def _follow(self, frame: Frame, mine: Frame | None) -> None:
        """Compute a frame as a mirror does: nothing is sent."""
        if mine is None:
            return
        assert self.stage is not None and self._compute is not None
        work = partial(run_step, self.stage, mine, lambda compute_s: StageTiming())
        self._compute.submit(work, partial(self._followed, mine))

    def _followed(self, frame: Frame, result: Frame | None, error: BaseException | None) -> None:
        self.state.done()
        if error is not None:
            self._failed(frame, error, followed=True)

    def _step(self, stage: Engine, frame: Frame, queued: float, came: StageTiming) -> _Stepped:
        """Compute one frame. Runs in the compute thread. `queued`: since when (time.perf_counter) the frame waits for it. `came`: the
        frame's arrival and decoding."""
        codec_us = came.read_us + int(self._encode_s[frame.kind] * 1e6)
        wait_us = int((time.perf_counter() - queued) * 1e6)

        def timing(compute_s: float) -> StageTiming:
            sample_us = int(stage.sampled_s * 1e6)
            return StageTiming(wait_us, int(compute_s * 1e6), codec_us, came.arrived_us, came.bytes, stage.bucket, came.read_us, sample_us)

        out = run_step(stage, frame, timing)
        began = time.perf_counter()
        data = frame_codec.encode(out)
        encode_s = time.perf_counter() - began
        # The next stage is waiting, so the result is sent from this thread if nothing else waits to be sent.
        try:
            sent = self.bus.post_now(out.subject(self.manifest.name), data, headers=traced_headers(out))
        except PayloadTooLarge:
            sent = False  # the event loop meets the same error and reports it
        return _Stepped(out, data, encode_s, sent)

    def _stepped(self, frame: Frame, result: _Stepped | None, error: BaseException | None) -> None:
        """Take in a frame's result. Runs in the event loop."""
        self.state.done()
        if error is not None or result is None:
            self._failed(frame, error)
            return
        self._encode_s[frame.kind] = result.encode_s
        self.meter.stepped(_PHASES[frame.kind], result.out.timings[-1])
        self._send(result.out, result.data, frame, sent=result.sent)

    def _failed(self, frame: Frame, error: BaseException | None, *, followed: bool = False) -> None:
        """A step that the stage refused changed nothing. Any other failure may have damaged the caches, so the shard ends."""
        refused = isinstance(error, MeshError)
        log.error(
            "step %d of decode batch %d: %s",
            frame.step,
            frame.batch,
            error if refused else repr(error),
            exc_info=None if refused else error,
        )
        if not followed:
            self.state.gone_on(frame)
            self._nack(frame, Nack.BAD_INPUT if refused else Nack.FAILED)
        if not refused and self._failure is None:
            self._failure = error
            self._stop.set()

    def _nack(self, frame: Frame, why: Nack) -> None:
        self.state.gaps[why.name.lower()] += frame.rows
        nack = frame.nack(why, range(frame.rows))
        self._send(nack, frame_codec.encode(nack))

    def _send(self, out: Frame, data: bytes, of: Frame | None = None, *, sent: bool = False) -> None:
        """Send `out`, the result of the admitted frame `of`. `sent`: it has been sent already and is only counted."""
        self.meter.frames_out += 1
        self.meter.bytes_out += len(data)
        subject = out.subject(self.manifest.name)
        try:
            sent = sent or self.bus.post(subject, data, headers=traced_headers(out))
        except PayloadTooLarge as error:
            self._too_large(error, of)
            sent = True
        if not sent:
            self.bus.spawn(self._send_later(subject, data, of), "publish")
        elif of is not None:
            self.state.gone_on(of)

    async def _send_later(self, subject: str, data: bytes, of: Frame | None) -> None:
        try:
            await self.bus.publish(subject, data)
        except PayloadTooLarge as error:  # after a reconnection the server may take less
            self._too_large(error, of)
        finally:
            if of is not None:
                self.state.gone_on(of)

    def _too_large(self, error: PayloadTooLarge, of: Frame | None) -> None:
        log.warning("%s", error)
        if of is not None:
            self._nack(of, Nack.TOO_LARGE)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _time_fetch(self, incoming: Pull) -> None:
        with self._start.part("fetch model"):
            await incoming.wait()

    def _report_start(self) -> None:
        spans = self._start.spans(self.options.name, self.state.shape.layers)
        self._spans.put(*spans)
        if self._export is not None:
            self._export.put(lambda: spans)
        log.info("the trace of the start: mesh trace %s", self._start.trace)

    def _load(self) -> Engine:
        options = self.options
        config = StageConfig(
            options.layers,
            rows=options.rows,
            context=options.context,
            chunk=options.chunk,
            max_memory_bytes=options.max_memory_bytes,
            overlap=options.overlap,
        )
        kind = Stage if options.kv_cache else RecomputingStage
        return kind.load(
            options.directory,
            config,
            manifest=self.manifest,
            compiled=self._compiled,
            progress=self._progress,
            arrivals=None if options.incoming is None else options.incoming.arrivals,
        )

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the compute thread and wait for its result. _StoppedError: the shard was told to stop before that."""
        assert self._compute is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._compute.submit(work, done)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([future, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                future.cancel()
                raise _StoppedError
            return future.result()
        finally:
            stopped.cancel()

    def _copied(self, _result: Any, error: BaseException | None) -> None:
        """A row's beginning was copied. If that failed, the caches may be damaged, so the shard ends."""
        if error is not None and self._failure is None:
            log.error("copying a row: %r", error)
            self._failure = error
            self._stop.set()

    def _after_open(self, _result: Any, error: BaseException | None) -> None:
        if error is not None:
            log.error("opening a row: %r", error)

    async def _listen_control(self) -> None:
        name, shape = self.options.name, self.state.shape
        self._service = await Service.start(
            self.bus,
            name=subjects.SERVICE_SHARD,
            version=__version__,
            description=f"layers {shape.layers} of {self.manifest.name}",
            metadata={"shard": name, "instance": self.instance, "model": self.manifest.name, "layers": str(shape.layers)},
            stats=lambda: self.stats().model_dump(mode="json"),
            endpoints=[
                Endpoint("close", topics.CLOSE.at(name), self.on_close),
                Endpoint("drain", topics.DRAIN.at(name), self.on_drain),
                Endpoint("load", topics.LOAD.at(name), self.on_load, concurrent=True),
                Endpoint("ping", topics.PING.at(name), self.on_ping),
                Endpoint("stats", topics.STATS.at(name), self.on_stats),
                Endpoint("lease", topics.LEASES.at(), self.on_lease_query),
            ],
        )

    async def open_doors(self) -> None:
        """Listen to frames and sessions of the present range, and report that the shard is ready."""
        shape = self.state.shape
        await self._listen()
        self._set_status("ready")
        self.ready.set()
        await self._announce("ready", f"layers {shape.layers} of {self.manifest.name}, {shape.rows} rows of {shape.context}")

    async def close_doors(self, status: Status) -> None:
        """Take no new sessions from now on, and report `status`."""
        self._set_status(status)
        if self._service is not None:
            await self._service.remove("open-any")

    async def stop_listening(self) -> None:
        """Stop listening to open sessions as well."""
        self.ready.clear()
        if self._service is not None:
            await self._service.remove("open")
            await self._service.remove("open-many")
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()

    async def _listen(self) -> None:
        assert self._service is not None
        name, model, shape = self.options.name, self.manifest.name, self.state.shape
        follow = subjects.all_frames(model, shape.layers) if self.options.mirror else subjects.frames(model, shape.layers, name)
        self._subscriptions.append(await self.bus.subscribe_direct(follow, self.on_frame))
        self._subscriptions.append(await self.bus.subscribe(topics.HEARTBEATS.at(model), self.on_heartbeat))
        await self._service.add(Endpoint("open", topics.OPEN.at(name), self.on_open))
        await self._service.add(Endpoint("open-many", topics.OPEN_MANY.at(name), self.on_open_many))
        await self._service.add(Endpoint("open-any", topics.OPEN_ANY.at(model, shape.layers), self.on_open))
        await self.bus.require_subscriptions(f"a shard of layers {shape.layers}")

    async def _require_alone(self) -> None:
        """ConfigError if a shard of this name answers. One that does not answer is replaced: this instance is later than it."""
        name = self.options.name
        try:
            other = await self.bus.request(topics.STATS.at(name), StatsRequest(), timeout_s=1.0)
        except (Unavailable, DeadlineExceeded) as error:
            if not isinstance(error, NobodyListens):
                log.warning("a process that does not answer has the name %s: this one takes its place", name)
        else:
            raise ConfigError(f"shard {name} runs already (instance {other.instance}): give this one another shard_id")
        former = await self._lease.former()
        if former >= self.instance:  # its machine's clock is ahead
            self.instance = new_instance(after=former)
            self.state = ShardState(replace(self.state.shape, tag=tag_of(self.instance)))

    async def _expire(self) -> None:
        while True:
            expired = self.state.expire(time.monotonic())
            if expired:
                log.info("closed %d sessions of a coordinator that is gone", len(expired))
                self._note_sessions()
                self._lease.renew()
            await asyncio.sleep(min(_EXPIRE_S, self.options.lease_ttl_s / 3))

    def lease(self, now: float) -> ShardLease:
        """What it says of itself now; `now` is of time.monotonic."""
        return lease_of(self, now)

    async def _gap(self, *, force: bool, doing: str) -> str:
        """The layers that no other shard can serve in the place of this one, as `A-B`, or nothing. BadRequest, unless `force`, where there
        are such layers."""
        if self._status != "ready" or self.stage is None:
            return ""
        mine = self.lease(time.monotonic())
        if not force:
            await refuse_gap(self.bus, mine, self.stage.need.total_bytes, doing)
            return ""
        replaced = can_replace(await others(self.bus, mine), mine.layers, mine.total_layers)
        return "" if replaced else str(mine.layers)

    def _is_meant(self, instance: str | None) -> bool:
        """Whether a request that names `instance` is for this process. Unavailable: it is for an earlier process of this name. False: it
        is for a later one, which answers it; this process ends."""
        if instance is None or instance == self.instance:
            return True
        if instance < self.instance:
            raise Unavailable(f"shard {self.options.name} is another process now (instance {self.instance}): ask again")
        self._replaced_by(None)
        return False

    def _replaced_by(self, lease: ShardLease | None) -> None:
        """A later process of this name serves: end."""
        if self._failure is None:
            name = self.options.name
            where = "" if lease is None else f" (instance {lease.instance}, process {lease.pid} on {lease.host})"
            self._failure = Replaced(
                f"another process serves as shard {name} now{where}, so this one (instance {self.instance}) ends: it was suspended or cut "
                "off, and was replaced. If both are wanted, give one of them another shard_id"
            )
            log.error("%s", self._failure)
            self._stop.set()

    def _set_status(self, status: Status) -> None:
        self._status = status
        self._lease.renew()

    def _note_sessions(self) -> None:
        if self.state.sessions == 0:
            self.idle.set()

    async def _drain(self, timeout_s: float) -> None:
        await self.close_doors("draining")
        try:
            await asyncio.wait_for(self.idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("drained with %d sessions still open after %g s", self.state.sessions, timeout_s)
        await self._announce("drained", f"{self.state.sessions} sessions were still open")
        if self._ends_when_drained:
            self._stop.set()

    async def _leave(self) -> None:
        """Delete the lease and announce the end, if the server can be reached. Never raises."""
        for ending in [s.stop() for s in self._subscriptions] + ([self._service.stop()] if self._service else []):
            await ending
        if self.options.incoming is not None:
            await self.options.incoming.stop()
        if self._compute is not None:
            compute = self._compute
            if not await asyncio.to_thread(compute.stop):
                log.warning("the compute thread is still busy; it ends with the process")
        await self._lease.stop()
        if self.bus.connected:
            await self._announce("left", "")

    async def _announce(self, kind: EventKind, detail: str) -> None:
        await announce(self.bus, kind, self.options.name, model=self.manifest.name, detail=detail, layers=str(self.state.shape.layers))
