"""One token through every replica of every range, and one the way that clients take.

For each shard a route is made of it and of one shard of every other range, and one prefill of one token goes along it. The doctor is a
coordinator of its own for that: it opens a row at each shard of the route, sends the frame, and closes the rows. So it needs the rights of
an operator, no coordinator knows of it, and clients cannot choose shards.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import numpy as np

from mesh.bus import Bus, BusOptions
from mesh.bus.inspect import denied
from mesh.client import AsyncMeshClient
from mesh.doctor.findings import Finding, error, ok, skipped, warning
from mesh.doctor.needs import NOBODY
from mesh.doctor.site import ShardSeen, Site
from mesh.errors import Busy, FrameRejected, MeshError
from mesh.protocol import frame_codec, subjects, topics
from mesh.protocol.control import Close, Open
from mesh.protocol.frame import Flags, Frame, Hop, Kind
from mesh.protocol.sampling import SamplingParams
from mesh.settings.units import format_seconds
from mesh.types import LayerRange

__all__ = ["check_generation", "check_routes", "route_through"]

_OPEN_S: Final = 5.0
_STEP_S: Final = 30.0
_CHECK: Final = "replicas"
_TOKEN: Final = 1


async def check_generation(options: BusOptions, model: str, *, timeout_s: float = 60.0) -> AsyncIterator[Finding]:
    """One token, asked for as clients do."""
    began = time.perf_counter()
    try:
        async with AsyncMeshClient(options=options, model=model, retries=0, timeout_s=timeout_s, retry_busy=False) as client:
            answer = await client.generate(tokens=[_TOKEN], max_tokens=1, ignore_eos=True, temperature=0.0)
    except MeshError as reason:
        advice = (
            "wait, or add shards"
            if isinstance(reason, Busy)
            else "see the findings about shards and layer ranges, and the coordinator's log"
        )
        yield (warning if isinstance(reason, Busy) else error)("generation", f"{model}: no token through a coordinator: {reason}", advice)
        return
    yield ok(
        "generation",
        f"{model}: one token through a coordinator in {format_seconds(time.perf_counter() - began)} (request {answer.request})",
    )


async def check_routes(bus: Bus, site: Site, model: str, *, timeout_s: float = _STEP_S) -> AsyncIterator[Finding]:
    """One token through each shard of a model."""
    shards = site.shards_of(model)
    well = [shard for shard in shards if shard.answers and shard.lease.state == "ready"]
    publish = (topics.OPEN.at(NOBODY).subject, topics.CLOSE.at(NOBODY).subject, topics.FRAMES.at(NOBODY, LayerRange(0, 1), NOBODY).subject)
    refused = await denied(bus, publish=publish, subscribe=(topics.TOKENS.at(NOBODY, NOBODY).subject,))
    if any(refused):
        yield skipped(_CHECK, f"{model}: this user may not send frames to shards", "run `mesh doctor` as an operator to try every replica")
        return
    proven: list[ShardSeen] = []
    for shard in shards:
        if not shard.answers:
            yield error(
                _CHECK, f"{shard.name} (layers {shard.lease.layers}) does not answer: no token was sent", "end it and start it again"
            )
            continue
        if shard not in well:
            yield skipped(_CHECK, f"{shard.name} is {shard.lease.state}", "ask again once it is ready")
            continue
        route = route_through(shard, (*proven, *(other for other in well if other not in proven)))
        if route is None:
            yield skipped(
                _CHECK, f"{shard.name}: no route from the first layer to the last goes through it", "start the missing shards first"
            )
            continue
        finding = await _one(bus, model, shard, route, timeout_s)
        if finding.level == "ok":
            proven.append(shard)
        yield finding


def route_through(shard: ShardSeen, others: Sequence[ShardSeen]) -> tuple[ShardSeen, ...] | None:
    """Shards from layer 0 to the last layer, `shard` among them; where there is a choice, the earlier one of `others`. None: there is no
    such route."""
    start, stop, total = shard.lease.layers_start, shard.lease.layers_end, shard.lease.total_layers
    before, after = _chain(0, start, others), _chain(stop, total, others)
    return None if before is None or after is None else (*before, shard, *after)


def _chain(start: int, stop: int, shards: Sequence[ShardSeen]) -> tuple[ShardSeen, ...] | None:
    if start == stop:
        return ()
    for shard in shards:
        if shard.lease.layers_start == start and shard.lease.layers_end <= stop:
            rest = _chain(shard.lease.layers_end, stop, shards)
            if rest is not None:
                return (shard, *rest)
    return None


async def _one(bus: Bus, model: str, shard: ShardSeen, route: tuple[ShardSeen, ...], timeout_s: float) -> Finding:
    """Send one token along `route`, to try `shard`."""
    me, session = f"doctor-{secrets.token_hex(8)}", secrets.randbits(62) + 1
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def arrived(received: object) -> None:
        answers.put_nowait(received.data)  # type: ignore[attr-defined]

    way = " > ".join(one.name for one in route)
    advice = f"see the log of {shard.name} on {shard.lease.host or 'its machine'}; drain it and start it again (`mesh drain {shard.name}`)"
    subscription = await bus.subscribe(topics.TOKENS.at(model, me), arrived)
    try:
        rows = []
        for one in route:
            opening = Open(
                session=session,
                epoch=1,
                coordinator=me,
                model_hash=one.lease.model_hash,
                prompt_length=1,
                sampling=SamplingParams(temperature=0.0),
                instance=one.lease.instance,
            )
            try:
                rows.append((await bus.request(topics.OPEN.at(one.name), opening, timeout_s=_OPEN_S)).row)
            except Busy:
                return skipped(_CHECK, f"{shard.name}: every row of {one.name} is in use", "ask again when fewer sessions run")
            except MeshError as reason:
                return error(_CHECK, f"{shard.name} (layers {shard.lease.layers}): {one.name} opens no row: {reason}", advice)
        began = time.perf_counter()
        frame = _frame(me, session, route, rows)
        await bus.publish(subjects.frames(model, route[0].lease.layers, route[0].name), frame_codec.encode(frame))
        try:
            async with asyncio.timeout(timeout_s):
                answer = frame_codec.decode(await answers.get(), model_hash=shard.lease.model_hash)
        except TimeoutError:
            return error(_CHECK, f"{shard.name} (layers {shard.lease.layers}): no token within {timeout_s:g} s along {way}", advice)
        except FrameRejected as reason:
            return error(_CHECK, f"{shard.name}: an answer that cannot be read along {way}: {reason}", "bring every process to one version")
        took_s = time.perf_counter() - began
        if answer.kind is not Kind.TOKENS:
            blamed = answer.route[answer.hop].shard
            return error(_CHECK, f"{shard.name}: {blamed} refused the step ({answer.reason.name.lower()}) along {way}", advice)
        mine = answer.timings[route.index(shard)] if len(answer.timings) == len(route) else None
        own = "" if mine is None else f", {format_seconds(mine.compute_us / 1e6)} of them its own computing"
        return ok(_CHECK, f"{shard.name} (layers {shard.lease.layers}): one token in {format_seconds(took_s)}{own}")
    finally:
        for one in route:
            await bus.send(topics.CLOSE.at(one.name), Close(coordinator=me, sessions=(session,)))
        await subscription.stop()


def _frame(coordinator: str, session: int, route: Sequence[ShardSeen], rows: Sequence[int]) -> Frame:
    """The prefill of one token."""
    return Frame(
        kind=Kind.PREFILL,
        model_hash=route[0].lease.model_hash,
        coordinator=coordinator,
        route=tuple(Hop(one.lease.layers, one.name) for one in route),
        sessions=np.array([session], np.uint64),
        epochs=np.array([1], np.uint32),
        positions=np.array([0], np.uint32),
        stage_rows=np.array([[row] for row in rows], np.uint32),
        tokens=np.array([_TOKEN], np.int32),
        step=1,
        flags=Flags.FINAL,
    )
