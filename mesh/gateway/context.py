"""What every route gets at `request.app.state.gateway`: the client, the settings, the check of tokens, the known models."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from mesh.client import AsyncMeshClient
from mesh.gateway.auth import Gate
from mesh.gateway.health import HealthMonitor
from mesh.gateway.kept_responses import KeptResponses
from mesh.gateway.known import KnownModels
from mesh.gateway.settings import GatewaySettings
from mesh.host.turns import Turns
from mesh.telemetry.registry import Registry

__all__ = ["Gateway", "gateway_of"]


@dataclass(frozen=True)
class Gateway:
    """One HTTP edge. The code that made `client` connects and closes it. `responses`: those that are kept for a while. `reading`: the turns
    in which large bodies are read."""

    client: AsyncMeshClient
    settings: GatewaySettings
    gate: Gate
    models: KnownModels
    health: HealthMonitor
    metrics: Registry
    responses: KeptResponses
    reading: Turns = field(default_factory=Turns)


def gateway_of(request: Request) -> Gateway:
    """The Gateway of a request; a dependency of routes."""
    gateway: Gateway = request.app.state.gateway
    return gateway
