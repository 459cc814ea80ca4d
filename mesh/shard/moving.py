"""A shard moves to another range of the layers that it holds: nothing is loaded and nothing is compiled.

    no new sessions -> the open ones end, or the time is up -> queued frames are computed -> the stage changes -> new rows, a new
    instance, the subjects of the new range -> ready

To coordinators it is a shard that started anew. Sessions that were still open continue on another replica of the old range.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from mesh.bus import Bus, announce
from mesh.errors import BadRequest, Unavailable
from mesh.model.manifest import Manifest
from mesh.protocol.control import Load, Loaded
from mesh.protocol.instance import new_instance
from mesh.runtime.engine import Engine
from mesh.shard.options import ShardOptions, Status
from mesh.shard.state import ShardState, tag_of
from mesh.types import LayerRange

__all__ = ["MovableShard", "move"]

log = logging.getLogger("mesh.shard")


class MovableShard(Protocol):
    """What `move` uses of a shard (mesh/shard/service.py)."""

    bus: Bus
    options: ShardOptions
    manifest: Manifest
    state: ShardState
    stage: Engine | None
    instance: str
    ready: asyncio.Event  # set while it serves
    idle: asyncio.Event  # set while no session is open

    @property
    def status(self) -> Status: ...

    async def open_doors(self) -> None: ...

    async def close_doors(self, status: Status) -> None: ...

    async def stop_listening(self) -> None: ...

    async def in_thread(self, work: Callable[[], Any]) -> Any: ...


async def move(shard: MovableShard, message: Load) -> Loaded:
    """Serve the range that `message` names. BadRequest: the shard does not hold all of it. Unavailable: it is not ready, or draining."""
    stage, name = shard.stage, shard.options.name
    if not shard.ready.is_set() or stage is None or shard.status != "ready":
        raise Unavailable(f"shard {name} is {shard.status}: ask again when it is ready")
    held = stage.held
    if not held.start <= message.layers_start < message.layers_end <= held.stop:
        raise BadRequest(
            f"shard {name} holds layers {held}, which are not all of {message.layers_start}-{message.layers_end}: "
            "give a range of these, or start it with more overlap_layers",
            field="layers_start",
        )
    layers = LayerRange(message.layers_start, message.layers_end)
    old = shard.state
    if layers == old.shape.layers:
        return Loaded(shard=name, layers_start=layers.start, layers_end=layers.stop, sessions=0, took_s=0.0)
    log.info("from layers %s to %s, %d sessions open", old.shape.layers, layers, old.sessions)
    old.drain()
    await shard.close_doors("draining")
    try:
        await asyncio.wait_for(shard.idle.wait(), message.timeout_s)
    except TimeoutError:
        log.warning("%d sessions are still open after %g s; they continue on other replicas", old.sessions, message.timeout_s)
    began = time.perf_counter()
    sessions = old.sessions
    await shard.stop_listening()
    await shard.in_thread(partial(stage.serve, layers))  # after what is queued
    shard.instance = new_instance(after=shard.instance)
    shard.state = ShardState(replace(old.shape, layers=layers, tag=tag_of(shard.instance)))
    shard.idle.set()
    await shard.open_doors()
    took_s = time.perf_counter() - began
    log.info("ready: layers %s after %.0f ms", layers, took_s * 1e3)
    detail = f"{name} serves layers {layers}, before {old.shape.layers}"
    await announce(shard.bus, "plan_changed", name, model=shard.manifest.name, detail=detail, layers=str(layers))
    return Loaded(shard=name, layers_start=layers.start, layers_end=layers.stop, sessions=sessions, took_s=took_s)
