"""How many servers keep a JetStream stream: three in a cluster, one otherwise.

If fewer servers of a cluster are up when a stream is created, one server keeps it. A process that opens the stream later, with the cluster
complete, spreads it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import nats.errors
import nats.js.errors

from mesh.bus.connection import Bus

__all__ = ["REPLICAS", "replicated", "spread", "wanted"]

log = logging.getLogger("mesh.bus")

T = TypeVar("T")

REPLICAS: Final = 3
_NOT_SO_MANY: Final = (
    10005,  # no suitable peers for placement
    10023,  # insufficient resources
    10052,  # the stream cannot be assigned
    10074,  # replicas > 1 not supported in non-clustered mode
)


def wanted(bus: Bus) -> int:
    """How many servers should keep a stream. A server tells each client the name of its cluster."""
    return REPLICAS if bus.client._server_info.get("cluster") else 1


async def replicated(bus: Bus, make: Callable[[int], Awaitable[T]]) -> T:
    """Call `make(replicas)` with the largest number that this server's cluster allows."""
    count = wanted(bus)
    if count > 1:
        try:
            return await make(count)
        except nats.js.errors.APIError as error:
            if error.err_code not in _NOT_SO_MANY:
                raise
            log.warning("%s: kept on one server, until the cluster has %d", error.description, count)
    return await make(1)


async def spread(bus: Bus, stream: str) -> None:
    """Keep an existing stream on as many servers as this cluster allows. What is not possible now is left for another time."""
    count = wanted(bus)
    if count == 1:
        return
    js = bus.client.jetstream(timeout=2)
    try:
        config = (await js.stream_info(stream)).config
        if (config.num_replicas or 1) < count:
            await js.update_stream(config, num_replicas=count)
            log.info("%s is kept on %d servers from now on", stream, count)
    except (nats.errors.Error, TimeoutError) as error:
        log.debug("spreading %s: %s", stream, error)
