"""Micro services: what `nats micro ls` shows, with typed requests and errors of mesh/errors.py."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import nats.micro
import nats.micro.request
import nats.micro.service
import orjson

from mesh.bus.connection import Bus, Received
from mesh.bus.mapping import mapped
from mesh.errors import MeshError, MessageRejected
from mesh.protocol import documents
from mesh.protocol.headers import UNREAD_HEADER
from mesh.protocol.topics import Address
from mesh.telemetry.seldom import Seldom

__all__ = ["Endpoint", "Service", "endpoint_data", "semantic"]

log = logging.getLogger("mesh.bus")
seldom = Seldom(log)

R = TypeVar("R")

_VERSION: Final = re.compile(r"(?P<release>\d+\.\d+\.\d+)(?P<early>a|b|rc|\.dev)?(?P<rest>.*)")
_INTERNAL = MeshError("an internal error; the log of the service says more")


def semantic(version: str) -> str:
    """A version of a Python package as micro services have it: 0.2.0rc1 is 0.2.0-rc1, and 0.2.0.post1 is 0.2.0+post1."""
    found = _VERSION.fullmatch(version)
    if found is None or (not found["early"] and not found["rest"]):
        return version
    rest = re.sub(r"[^0-9A-Za-z]+", ".", (found["early"] or "") + found["rest"]).strip(".")
    return f"{found['release']}{'-' if found['early'] else '+'}{rest}"


@dataclass(frozen=True)
class Endpoint(Generic[R]):
    """One address. `handler` returns the reply of the address's topic, or raises a MeshError. It returns None where it has answered
    itself, or where there is no reply.

    `concurrent`: each request is a task of its own, and the handler itself refuses what is too much. Otherwise requests are handled one
    after the other.

    `most_bytes`: a longer request is not even read; it is answered with the error `too_large(size in bytes)`. By default the bound of the
    topic's type.
    """

    name: str
    to: Address[Any, R]
    handler: Callable[[Received], Awaitable[R]]
    concurrent: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    most_bytes: Callable[[], int] | None = None
    too_large: Callable[[int], MeshError] | None = None

    def most(self) -> int:
        return self.to.topic.request.limit_bytes if self.most_bytes is None else self.most_bytes()

    def refusal(self, size: int) -> MeshError:
        return documents.too_large(self.to.topic.request, size, self.most()) if self.too_large is None else self.too_large(size)


class Service:
    """A running micro service; `stop` ends it. $SRV.STATS shows the result of `stats` as each endpoint's data."""

    def __init__(self, bus: Bus, inner: nats.micro.service.Service) -> None:
        self._bus = bus
        self._inner = inner

    @classmethod
    async def start(
        cls,
        bus: Bus,
        *,
        name: str,
        version: str,
        description: str,
        endpoints: Sequence[Endpoint[Any]],
        metadata: dict[str, str] | None = None,
        stats: Callable[[], dict[str, Any]] | None = None,
    ) -> Service:
        config = nats.micro.service.ServiceConfig(
            name=name,
            version=semantic(version),
            description=description,
            metadata=metadata or {},
            stats_handler=None if stats is None else lambda _endpoint: stats(),
        )
        with mapped(f"starting the service {name}"):
            service = cls(bus, await nats.micro.add_service(bus.client, config))
        for endpoint in endpoints:
            await service.add(endpoint)
        return service

    @property
    def id(self) -> str:
        return self._inner.id

    async def add(self, endpoint: Endpoint[Any]) -> None:
        """Serve one more address."""

        async def handle(request: nats.micro.request.Request) -> None:
            received = Received(request.subject, request._msg.reply, request.data, request.headers or {})
            if UNREAD_HEADER in received.headers:
                await self._fail(endpoint, received, endpoint.refusal(_size(received.headers[UNREAD_HEADER])))
            elif endpoint.concurrent:
                self._bus.spawn(self._answer(endpoint, received), f"request on {received.subject}")
            else:
                await self._answer(endpoint, received)

        with mapped(f"serving {endpoint.to}"):
            await self._inner.add_endpoint(
                name=endpoint.name,
                subject=endpoint.to.subject,
                handler=handle,
                # Without a queue every instance should hear it; in this protocol that takes a queue group for each instance.
                queue_group=endpoint.to.topic.queue or f"one-{self.id}",
                metadata=endpoint.metadata,
            )
        added = self._inner._endpoints[-1]._subscription
        if added is not None:
            self._bus.limit(added._id, endpoint.most)

    async def remove(self, name: str) -> None:
        """Stop serving the endpoints of this name."""
        for endpoint in [e for e in self._inner._endpoints if e._name == name]:
            self._inner._endpoints.remove(endpoint)
            if endpoint._subscription is not None:
                self._bus.unlimit(endpoint._subscription._id)
            with mapped(f"ending {endpoint._subject}"):
                await endpoint._stop()

    async def stop(self) -> None:
        try:
            with mapped("ending the service"):
                await self._inner.stop()
        except MeshError as error:  # the server is gone, so the service is too
            log.debug("%s", error)

    async def _answer(self, endpoint: Endpoint[Any], received: Received) -> None:
        try:
            reply = await endpoint.handler(received)
        except MeshError as error:
            await self._fail(endpoint, received, error)
        except Exception as error:
            self._bus.counters["handler_errors"] += 1
            seldom.error(f"answering {received.subject}", error)
            await self._fail(endpoint, received, _INTERNAL)
        else:
            if reply is not None:
                await self._bus.respond(received, reply)

    async def _fail(self, endpoint: Endpoint[Any], received: Received, error: MeshError) -> None:
        for shown in self._inner._endpoints:  # nats-py counts errors that a handler raises, but then cannot reply with a body
            if shown._subject == endpoint.to.subject:
                shown._num_errors += 1
                shown._last_error = f"{error.code}: {error}"
        await self._bus.respond_error(received, error)


def _size(header: str) -> int:
    """The number in UNREAD_HEADER, which a sender may have written too."""
    return int(header) if header.isdecimal() and len(header) < 20 else 0


def endpoint_data(answer: bytes, endpoint: str) -> bytes:
    """What a service shows as the data of one endpoint, as JSON, in an answer to $SRV.STATS. MessageRejected: it shows none; the service
    is of another version, or another one."""
    try:
        return orjson.dumps(next(one["data"] for one in orjson.loads(answer)["endpoints"] if one["name"] == endpoint))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, StopIteration):
        raise MessageRejected(f"a service shows no data of {endpoint}") from None
