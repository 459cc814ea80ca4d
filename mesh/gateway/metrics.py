"""The metrics of an HTTP edge, and the route that shows the process's metrics to those who may read statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.bus.metrics import connection_readings
from mesh.client import AsyncMeshClient
from mesh.gateway.accounts import Accounts
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.guard import guarded
from mesh.gateway.middleware import Counters
from mesh.telemetry.registry import Reading

__all__ = ["gateway_readings", "metrics"]

metrics = guarded("admin", tags=["mesh"])


@metrics.get("/metrics", include_in_schema=False)
async def read(request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The metrics of this process, for Prometheus."""
    body, content_type = gateway.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


def gateway_readings(client: AsyncMeshClient, counters: Counters, accounts: Accounts, connections: Callable[[], int]) -> Iterator[Reading]:
    """What an edge reports. `connections`: how many are open."""
    yield counters.durations
    yield "http_server_active_requests", counters.active
    yield "mesh_gateway_connections", connections()
    yield "mesh_gateway_open_streams", counters.streams
    yield "mesh_gateway_retries_total", client.sent_again
    yield "mesh_gateway_tokens_total", accounts.total.prompt_tokens, "prompt"
    yield "mesh_gateway_tokens_total", accounts.total.completion_tokens, "completion"
    yield "mesh_gateway_quota_refusals_total", accounts.total.refused
    bus = client.connection()
    if bus is not None:
        yield from connection_readings("mesh-client", bus)
