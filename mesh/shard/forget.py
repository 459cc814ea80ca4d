"""Remove a shard's lease and its claims to ranges by hand (`mesh forget`).

A lease ends by itself when it is not renewed. This is for operators who do not want to wait, and for entries that do not expire: those
of another version, or of a NATS server that was restored from an old copy.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from mesh.bus import Bucket, Bus, announce
from mesh.errors import BadRequest, DeadlineExceeded, MessageRejected, Unavailable
from mesh.protocol import subjects, topics
from mesh.protocol.status import ShardLease, StatsRequest
from mesh.shard.placing import RangeClaims

__all__ = ["Forgotten", "forget"]

_ASK_S = 2.0
_TRIES = 20


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was removed."""

    lease: ShardLease | None
    claims: tuple[str, ...]  # the models that they were of


async def forget(bus: Bus, shard: str, *, force: bool = False) -> Forgotten:
    """Remove what the mesh still has of `shard`. BadRequest: the shard still answers (unless `force`), or nothing is known of it."""
    if not force:
        await _require_ghost(bus, shard)
    leases = Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
    entry = await leases.get(shard)
    lease = None
    if entry is not None:
        with suppress(MessageRejected):  # written by another version: it is removed as well
            lease = ShardLease.parse(entry.value or b"")
        await leases.delete(shard)
        if lease is not None:  # coordinators go by what is said
            await bus.send(topics.LEASE.at(lease.model, shard), lease.model_copy(update={"state": "left"}))
    claims = await _drop_claims(bus, shard)
    if entry is None and not claims:
        raise BadRequest(f"nothing is known of a shard {shard}: `mesh status` shows those there are", field="shard")
    await announce(bus, "forgotten", shard, model="" if lease is None else lease.model, detail="by hand")
    return Forgotten(lease, claims)


async def _require_ghost(bus: Bus, shard: str) -> None:
    try:
        stats = await bus.request(topics.STATS.at(shard), StatsRequest(), timeout_s=_ASK_S)
    except Unavailable:
        return
    except DeadlineExceeded:
        raise BadRequest(
            f"shard {shard} is connected and does not answer: end its process first, or forget it with --force", field="shard"
        ) from None
    raise BadRequest(
        f"shard {shard} lives (instance {stats.instance}, {stats.sessions} sessions): stop it with `mesh drain {shard}`", field="shard"
    )


async def _drop_claims(bus: Bus, shard: str) -> tuple[str, ...]:
    bucket = Bucket(bus, subjects.KV_PLACEMENT, durable=True)
    dropped = []
    for key in [entry.key for entry in await bucket.entries("claims.>")]:
        for _ in range(_TRIES):
            entry = await bucket.get(key)
            try:
                claims = RangeClaims.parse(entry.value).claims if entry is not None and entry.value else ()
            except MessageRejected:
                break
            left = tuple(claim for claim in claims if claim.shard != shard)
            if entry is None or len(left) == len(claims):
                break
            if await bucket.update(key, RangeClaims(claims=left).to_bytes(), revision=entry.revision) is not None:
                dropped.append(key.removeprefix("claims."))
                break
        else:
            raise Unavailable("other shards keep joining at the same moment: try again")
    return tuple(dropped)
