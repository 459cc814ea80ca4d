"""`mesh join`: agree with the other shards on a range, whose blocks the shard then fetches.

Two machines that join at the same moment must not take the same range. So a shard claims its range in the KV bucket `mesh_placement`
before it loads, by compare and set. A claim counts until the shard has its lease and takes the claim back, but for CLAIM_S at most. The
revision of the key is the epoch of the placement: a shard that decided on an older revision is refused and decides again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mesh.bus import Bucket, Bus, ModelStore, announce, files_of, kept_at
from mesh.errors import BadRequest, MessageRejected, ModelNotFound, NobodyListens, ServiceError, Unavailable
from mesh.model.manifest import Manifest
from mesh.model.memory import DEFAULT_CHUNK, predict
from mesh.model.signature import Signers
from mesh.protocol import subjects, topics
from mesh.protocol.message import Label, Message, Natural, Positive
from mesh.protocol.status import ShardLease, StatsRequest
from mesh.settings.defaults import DEFAULT_ROWS
from mesh.shard.join import Held, choose_range, too_big
from mesh.shard.options import ShardOptions
from mesh.types import LayerRange

__all__ = ["place", "withdraw"]

log = logging.getLogger("mesh.shard")

_LOADING = ("loading", "warming")
CLAIM_S = 300.0
_TRIES = 20
_LOOK_AGAIN_S = 2.0
_ANSWER_S = 1.0
_DEFAULT_CONTEXT = 2048


class RangeClaim(Message):
    shard: Label
    layers_start: Natural
    layers_end: Positive
    at_unix_s: float
    host: Label = ""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.layers_end <= self.layers_start:
            raise ValueError(f"layers {self.layers_start}-{self.layers_end} are no range")
        return self


class RangeClaims(Message):
    claims: Annotated[tuple[RangeClaim, ...], Field(max_length=4096, fail_fast=True)] = ()


async def place(
    bus: Bus,
    name: str,
    *,
    model: str | None,
    memory_bytes: int,
    shared: bool = False,
    rows: int | None,
    context: int | None,
    mirror: bool | None = None,
    directory: Path | None,
    layers: LayerRange | None = None,
    signers: Signers | None = None,
    bytes_per_s: float | None = None,
    wait: bool = False,
) -> ShardOptions:
    """Choose a range (unless `layers` gives it) and claim it; the shard fetches its blocks, at most at `bytes_per_s`, while it loads.
    `shared`: `memory_bytes` is what was free on this host, and shards of this host that are still loading take their part of it.
    ModelNotFound: no such model was pushed, unless it is to `wait` for that. UntrustedModel: none of `signers` has signed it. DoesNotFit:
    no range that the mesh needs, or not the one that was given, fits in `memory_bytes`."""
    subjects.check_token(name, "name")
    store = ModelStore(bus, signers)
    manifest = await _manifest(store, model, wait=wait)
    everyone = await _leases(bus)
    if any(lease.shard == name and lease.state != "draining" for lease in everyone):
        raise BadRequest(f"a shard {name} is there already: give another --name", field="name")
    leases = _of(manifest, everyone)
    rows = rows or max((lease.rows for lease in leases), default=DEFAULT_ROWS)
    context = min(context or max((lease.context for lease in leases), default=_DEFAULT_CONTEXT), manifest.context_length)
    layers = await _claim(bus, name, manifest, layers, rows=rows, context=context, memory_bytes=memory_bytes, shared=shared)
    kept = directory or kept_at(manifest)
    files = files_of(manifest, layers, embed=layers.start == 0, head=layers.stop == manifest.layers)
    mirror = any(lease.mirrors for lease in leases) if mirror is None else mirror
    return ShardOptions(
        name=name,
        directory=kept,
        layers=layers,
        rows=rows,
        context=context,
        max_memory_bytes=memory_bytes,
        mirror=mirror,
        signers=signers,
        incoming=store.pulling(manifest, files, kept, bytes_per_s=bytes_per_s),
    )


async def _manifest(store: ModelStore, model: str | None, *, wait: bool) -> Manifest:
    """That of the model of this name, or of the only one."""
    said = False
    while True:
        try:
            return await store.manifest(model or await store.only_name())
        except ModelNotFound as error:
            if not wait:
                raise
            if not said:
                log.warning("%s; waiting for it", error)
            said = True
        await asyncio.sleep(_LOOK_AGAIN_S)


async def _leases(bus: Bus) -> list[ShardLease]:
    """Of all models. A lease outlives a shard that was killed by some seconds: it does not count where nobody listens in its place."""
    found = await _written(bus)
    return [lease for lease, gone in zip(found, await asyncio.gather(*(_is_gone(bus, lease) for lease in found)), strict=True) if not gone]


async def _is_gone(bus: Bus, lease: ShardLease) -> bool:
    if lease.state in _LOADING:  # it may not listen yet
        return False
    try:
        await bus.request(topics.STATS.at(lease.shard), StatsRequest(), timeout_s=_ANSWER_S)
    except NobodyListens:
        return True
    except ServiceError:
        return False
    return False


async def _written(bus: Bus) -> list[ShardLease]:
    found = []
    for entry in await Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S).entries():
        try:
            lease = ShardLease.parse(entry.value or b"")
        except MessageRejected:
            continue
        found.append(lease)
    return found


def _of(manifest: Manifest, leases: Sequence[ShardLease]) -> list[ShardLease]:
    """Those of one model that go on."""
    return [lease for lease in leases if lease.model_hash == manifest.model_hash and lease.state != "draining"]


async def _claim(
    bus: Bus, name: str, manifest: Manifest, wanted: LayerRange | None, *, rows: int, context: int, memory_bytes: int, shared: bool
) -> LayerRange:
    bucket, key = _place_of_claims(bus, manifest.name)

    def needed(layers: LayerRange) -> int:
        embed, head = layers.start == 0, layers.stop == manifest.layers
        return predict(manifest, layers, embed=embed, head=head, rows=rows, context=context, chunk=DEFAULT_CHUNK).total_bytes

    for _ in range(_TRIES):
        entry = await bucket.get(key)
        now = time.time()
        claims = [claim for claim in _claims(entry.value if entry else None) if now - claim.at_unix_s < CLAIM_S and claim.shard != name]
        everyone = await _leases(bus)
        leases = _of(manifest, everyone)
        there = {lease.shard for lease in leases}
        claims = [claim for claim in claims if claim.shard not in there]
        held = [Held(lease.shard, lease.layers, lease.load if lease.state == "ready" else 0.0) for lease in leases]
        held += [Held(claim.shard, LayerRange(claim.layers_start, claim.layers_end)) for claim in claims]
        taken = sum(map(needed, _loading_here(leases, claims))) + _others_here(manifest.model_hash, everyone)
        left = max(memory_bytes - taken, 0) if shared else memory_bytes
        layers = choose_range(manifest.layers, held, needed, left) if wanted is None else _checked(manifest, wanted, needed, left)
        mine = RangeClaim(shard=name, layers_start=layers.start, layers_end=layers.stop, at_unix_s=now, host=socket.gethostname())
        epoch = await bucket.update(key, RangeClaims(claims=(*claims, mine)).to_bytes(), revision=entry.revision if entry else 0)
        if epoch is not None:
            detail = f"{name} takes layers {layers}"
            await announce(bus, "plan_changed", name, model=manifest.name, detail=detail, layers=str(layers), epoch=epoch)
            return layers
    raise Unavailable("other shards keep joining at the same moment: try again")


async def withdraw(bus: Bus, model: str, name: str) -> None:
    """Take back the claim of a shard whose lease is there: from then on its range is taken while the shard lives, and no longer."""
    bucket, key = _place_of_claims(bus, model)
    for _ in range(_TRIES):
        entry = await bucket.get(key)
        claims = _claims(entry.value if entry else None)
        others = tuple(claim for claim in claims if claim.shard != name)
        if entry is None or len(others) == len(claims):
            return
        if await bucket.update(key, RangeClaims(claims=others).to_bytes(), revision=entry.revision) is not None:
            return


def _place_of_claims(bus: Bus, model: str) -> tuple[Bucket, str]:
    return Bucket(bus, subjects.KV_PLACEMENT, durable=True), f"claims.{subjects.token(model)}"


def _loading_here(leases: Sequence[ShardLease], claims: Sequence[RangeClaim]) -> list[LayerRange]:
    """The ranges of shards on this host that do not have their memory yet: the system counts it as free."""
    here = socket.gethostname()
    loading = [lease.layers for lease in leases if lease.host == here and lease.state in _LOADING]
    return loading + [LayerRange(claim.layers_start, claim.layers_end) for claim in claims if claim.host == here]


def _others_here(model_hash: str, leases: Sequence[ShardLease]) -> int:
    """The same of shards of other models on this host, in bytes."""
    here = socket.gethostname()
    loading = [lease for lease in leases if lease.model_hash != model_hash and lease.host == here and lease.state in _LOADING]
    return sum(max(lease.predicted_bytes - lease.memory_bytes, 0) for lease in loading)


def _checked(manifest: Manifest, layers: LayerRange, needed: Callable[[LayerRange], int], memory_bytes: int) -> LayerRange:
    """A range that was asked for. BadLayerRange: the model does not have it. DoesNotFit: it needs more memory."""
    manifest.check_range(layers)
    if needed(layers) > memory_bytes:
        raise too_big(f"layers {layers}", needed(layers), memory_bytes)
    return layers


def _claims(value: bytes | None) -> tuple[RangeClaim, ...]:
    """The claims in `value`. None of a value that cannot be read: the next claim overwrites it."""
    try:
        return RangeClaims.parse(value).claims if value else ()
    except MessageRejected:
        return ()
