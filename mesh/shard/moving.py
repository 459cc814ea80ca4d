"""A shard that serves another range: of the layers it holds, so nothing is loaded and nothing compiled.

    no new sessions -> the open ones end, or time is up -> what is queued is computed -> the stage changes -> new rows, a new
    instance, the subjects of the new range -> ready

To coordinators it is a shard that started anew: what was open on it goes on on another replica of the old range.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mesh.bus import announce
from mesh.errors import BadRequest, Unavailable
from mesh.protocol.control import Load, Loaded
from mesh.shard.state import ShardState
from mesh.types import LayerRange

if TYPE_CHECKING:
    from mesh.shard.service import Shard

__all__ = ["move"]

log = logging.getLogger("mesh.shard")


async def move(shard: Shard, message: Load) -> Loaded:
    """Serve what `message` says. BadRequest: not all of it is held. Unavailable: the shard is not ready, or draining."""
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
        log.warning("%d sessions are still open after %g s; they go on elsewhere", old.sessions, message.timeout_s)
    began = time.perf_counter()
    sessions = old.sessions
    await shard.stop_listening()
    await shard.in_thread(partial(stage.serve, layers))  # after what is queued
    shard.state = ShardState(replace(old.shape, layers=layers))
    shard.instance = secrets.token_hex(6)
    shard.idle.set()
    await shard.open_doors()
    took_s = time.perf_counter() - began
    log.info("ready: layers %s after %.0f ms", layers, took_s * 1e3)
    detail = f"{name} serves layers {layers}, before {old.shape.layers}"
    await announce(shard.bus, "plan_changed", name, model=shard.manifest.name, detail=detail, layers=str(layers))
    return Loaded(shard=name, layers_start=layers.start, layers_end=layers.stop, sessions=sessions, took_s=took_s)
