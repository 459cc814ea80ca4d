"""All checks, in order: this machine, the NATS servers, the rights of the user, the processes, their routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from mesh.bus import Bucket, Bus, BusOptions
from mesh.doctor.findings import Finding, error, ok
from mesh.doctor.machine import check_machine, check_port
from mesh.doctor.needs import Role
from mesh.doctor.processes import check_http, check_processes
from mesh.doctor.rights import check_rights
from mesh.doctor.routes import check_generation, check_routes
from mesh.doctor.server import check_jetstream, check_monitor, check_servers
from mesh.doctor.site import look
from mesh.errors import MeshError, MessageRejected
from mesh.protocol.rights import Binding
from mesh.protocol.status import ShardLease
from mesh.protocol.subjects import KV_SHARDS, LEASE_TTL_S
from mesh.settings.defaults import DEFAULT_HTTP_PORT

__all__ = ["SECTIONS", "DoctorOptions", "examine"]

SECTIONS: Final = ("this machine", "NATS", "permissions", "mesh", "routes")

_CONNECT_S: Final = 3.0
_KEPT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """bus: the servers and the user; None: no mesh is known here, and this machine alone is looked at. role: whose subjects are tried.
    bound: the shard to which the user is bound.
    model: only this one. http_port: of HTTP on this machine. monitor: the address of nats-server's monitoring. generate False: no token
    is generated."""

    bus: BusOptions | None
    role: Role = "operator"
    model: str | None = None
    http_port: int = DEFAULT_HTTP_PORT
    monitor: str | None = None
    generate: bool = True
    step_timeout_s: float = 30.0
    bound: Binding = field(default_factory=Binding)


async def examine(options: DoctorOptions) -> AsyncIterator[tuple[str, Finding | None]]:
    """(section, finding), as they come; (section, None) where a section begins."""
    yield "this machine", None
    for finding in await asyncio.to_thread(lambda: list(check_machine())):
        yield "this machine", finding
    if options.bus is None:
        yield "this machine", check_port("127.0.0.1", options.http_port)
        yield "NATS", None
        advice = "start one with `mesh up MODEL_DIR`, or name the servers of another one: --nats nats://HOST:4222"
        yield "NATS", error("mesh", "no mesh runs on this machine", advice)
        return
    yield "NATS", None
    async for finding in check_servers(options.bus):
        yield "NATS", finding
    try:
        bus = await Bus.connect(options.bus, name="mesh-doctor", timeout_s=_CONNECT_S)
    except MeshError:  # each server has said why
        return
    async with bus:
        async for finding in check_jetstream(bus):
            yield "NATS", finding
        for finding in await asyncio.to_thread(check_monitor, options.monitor):
            yield "NATS", finding
        yield "permissions", None
        async for finding in check_rights(bus, options.role, options.bound):
            yield "permissions", finding
        yield "mesh", None
        site = await look(bus, await _kept(bus))
        for finding in check_processes(site):
            yield "mesh", finding
        async for finding in check_http(site):
            yield "mesh", finding
        if not options.generate:
            return
        yield "routes", None
        for model in site.models if options.model is None else (options.model,):
            async for finding in check_routes(bus, site, model, timeout_s=options.step_timeout_s):
                yield "routes", finding
            if site.coordinators_of(model):
                async for finding in check_generation(options.bus, model):
                    yield "routes", finding
        if not site.models:
            yield "routes", ok("replicas", "there is nothing to try")


async def _kept(bus: Bus) -> tuple[ShardLease, ...]:
    """The leases in JetStream: of shards that have stopped just now, too. Empty where this user may not read them."""
    try:
        async with asyncio.timeout(_KEPT_S):
            entries = await Bucket(bus, KV_SHARDS, ttl_s=LEASE_TTL_S).entries()
    except (MeshError, TimeoutError):
        return ()
    found = []
    for entry in entries:
        try:
            found.append(ShardLease.parse(entry.value or b""))
        except MessageRejected:
            continue
    return tuple(found)
