"""What a NATS server says of itself, what it permits this user, and what its JetStream keeps: for `mesh doctor` and metrics.

The server refuses a publication or a subscription by an error that comes later, on its own. It answers a flush only after it has handled
everything before it, so after a flush all refusals are there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mesh.bus.connection import DENIED, Bus
from mesh.bus.jetstream import ApiRefused, ask_api
from mesh.errors import NobodyListens, ServiceError

__all__ = ["JetStreamFacts", "ServerFacts", "StreamFacts", "denied", "jetstream_facts", "round_trips_s", "server_facts", "stream_facts"]

_API_S: Final = 3.0
_NOT_FOUND: Final = 404
_NEVER: Final = {"Nats-Expected-Last-Sequence": str(2**62)}
"""A stream stores no message that expects this sequence."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """`cluster`: its name, empty where the server is alone. `others`: addresses of the other servers of the cluster. `tls`: whether this
    connection is encrypted."""

    name: str
    version: str
    cluster: str
    others: tuple[str, ...]
    max_payload: int
    jetstream: bool
    tls: bool


@dataclass(frozen=True, slots=True)
class JetStreamFacts:
    """Of this account. Limits: -1 where there is none."""

    storage_bytes: int
    storage_limit_bytes: int
    memory_bytes: int
    memory_limit_bytes: int
    streams: int


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """`servers`: how many keep it. `behind`: those of them that are away or not up to date. max_bytes: -1 where there is no limit.
    refuses: at its limit it takes no more, instead of dropping what is old."""

    name: str
    durable: bool
    servers: int
    behind: int
    messages: int
    bytes: int
    max_bytes: int
    refuses: bool


def server_facts(bus: Bus) -> ServerFacts:
    """Of the server that this connection is with."""
    said: Mapping[str, Any] = bus.client._server_info
    url = bus.client.connected_url
    return ServerFacts(
        name=str(said.get("server_name", "")),
        version=str(said.get("version", "")),
        cluster=str(said.get("cluster", "")),
        others=tuple(map(str, said.get("connect_urls") or ())),
        max_payload=int(said.get("max_payload", 0)),
        jetstream=bool(said.get("jetstream")),
        tls=bool(said.get("tls_required")) or (url is not None and url.scheme in ("tls", "wss")),
    )


async def round_trips_s(bus: Bus, count: int = 7) -> list[float]:
    """Seconds of so many round trips to the server, sorted."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await bus.flush()
        times.append(time.perf_counter() - began)
    return sorted(times)


async def denied(bus: Bus, *, publish: Iterable[str] = (), subscribe: Iterable[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Try each subject; returns the ones that the server refuses to take from this user, and those it refuses to give it. A stream stores
    nothing of what is published, but processes that listen on a subject get an empty message: name subjects of processes that do not
    exist."""
    publish, subscribe = tuple(dict.fromkeys(publish)), tuple(dict.fromkeys(subscribe))
    refused: dict[str, set[str]] = {"publish": set(), "subscription": set()}

    def note(error: Exception) -> None:
        found = DENIED.search(str(error))
        if found is not None:
            refused[found[1].lower()].add(found[2].lower())

    async def ignore(received: object) -> None:
        pass

    with bus.hearing_errors(note):
        for subject in publish:
            await bus.publish(subject, b"", headers=_NEVER)
        subscriptions = [await bus.subscribe(subject, ignore) for subject in subscribe]
        await bus.flush()
        for subscription in subscriptions:
            await subscription.stop()
    return (
        tuple(subject for subject in publish if subject.lower() in refused["publish"]),
        tuple(subject for subject in subscribe if subject.lower() in refused["subscription"]),
    )


async def jetstream_facts(bus: Bus) -> JetStreamFacts:
    """ServiceError or Unavailable: JetStream is not there, or not for this account."""
    said = await _ask(bus, "INFO")
    limits = said.get("limits") or {}
    return JetStreamFacts(
        storage_bytes=int(said.get("storage", 0)),
        storage_limit_bytes=int(limits.get("max_storage", -1)),
        memory_bytes=int(said.get("memory", 0)),
        memory_limit_bytes=int(limits.get("max_memory", -1)),
        streams=int(said.get("streams", 0)),
    )


async def stream_facts(bus: Bus, name: str) -> StreamFacts | None:
    """A stream; None: it does not exist (yet)."""
    try:
        said = await _ask(bus, f"STREAM.INFO.{name}")
    except ApiRefused:
        return None
    config, state, cluster = said["config"], said["state"], said.get("cluster") or {}
    behind = sum(bool(one.get("offline")) or not one.get("current", True) for one in cluster.get("replicas") or ())
    return StreamFacts(
        name=name,
        durable=config.get("storage", "file") == "file",
        servers=int(config.get("num_replicas", 1)),
        behind=behind,
        messages=int(state.get("messages", 0)),
        bytes=int(state.get("bytes", 0)),
        max_bytes=int(config.get("max_bytes", -1)),
        refuses=config.get("discard") == "new",
    )


async def _ask(bus: Bus, what: str) -> dict[str, Any]:
    """ApiRefused: what is asked about is not there. ServiceError: it is refused for any other reason."""
    try:
        return await ask_api(bus, what, timeout_s=_API_S)
    except NobodyListens:
        raise ServiceError("JetStream is not enabled on this server") from None
    except ApiRefused as error:
        if error.status == _NOT_FOUND:
            raise
        raise ServiceError(error.description) from None
