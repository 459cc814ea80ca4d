"""What every route is given: the client, the settings, who may ask, what is known of the mesh. At `request.app.state.gateway`."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from mesh.client import AsyncMeshClient
from mesh.gateway.auth import Gate
from mesh.gateway.health import HealthMonitor
from mesh.gateway.known import KnownModels
from mesh.gateway.settings import GatewaySettings

__all__ = ["Gateway", "gateway_of"]


@dataclass(frozen=True)
class Gateway:
    """One HTTP edge. `client` is connected by whoever made it."""

    client: AsyncMeshClient
    settings: GatewaySettings
    gate: Gate
    models: KnownModels
    health: HealthMonitor


def gateway_of(request: Request) -> Gateway:
    """A dependency of routes."""
    gateway: Gateway = request.app.state.gateway
    return gateway
