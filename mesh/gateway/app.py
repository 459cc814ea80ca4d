"""The HTTP edge as an ASGI application.

listener -> Edge (name, bounds, headers, log) -> route -> scope checked -> body read and checked -> client -> coordinator
                                                                                             \\-> events as tokens come
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from mesh import __version__
from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest, MeshError
from mesh.gateway import native
from mesh.gateway.accounts import Accounts
from mesh.gateway.auth import Gate
from mesh.gateway.batch_routes import batch
from mesh.gateway.context import Gateway
from mesh.gateway.docs_page import docs
from mesh.gateway.embedding_routes import embeddings
from mesh.gateway.errors import error_response, from_http, internal_error
from mesh.gateway.events import ClientGone
from mesh.gateway.health import HealthMonitor
from mesh.gateway.health_routes import health
from mesh.gateway.kept_responses import KeptResponses
from mesh.gateway.known import KnownModels
from mesh.gateway.messages_routes import messages
from mesh.gateway.metrics import gateway_readings, metrics
from mesh.gateway.middleware import Edge
from mesh.gateway.openai_routes import openai
from mesh.gateway.openapi import describe
from mesh.gateway.responses_routes import responses
from mesh.gateway.settings import GatewaySettings
from mesh.gateway.tokenize_routes import tokenizing
from mesh.gateway.tracing import EdgeTracing
from mesh.gateway.usage_routes import usage
from mesh.http.listener import is_loopback
from mesh.protocol.documents import problem_of
from mesh.telemetry.export import SpanExport
from mesh.telemetry.registry import Registry

__all__ = ["create_app"]


def create_app(
    client: AsyncMeshClient,
    settings: GatewaySettings,
    *,
    routes: Iterable[BaseRoute] = (),
    registry: Registry | None = None,
    export: SpanExport | None = None,
    connections: Callable[[], int] = lambda: 0,
    accounts: Accounts | None = None,
) -> ASGIApp:
    """The application of `client`; the caller connects and closes it. `routes`: further routes, such as a dashboard's. They find
    everything at `request.app.state.gateway` (mesh.gateway.context.Gateway). `registry`: the metrics of the process, to which those of this
    edge are added (None: they are its only ones). `connections`: how many are open. `export`: where spans go that leave
    the mesh. `accounts`: what subjects have spent and used (None: this edge counts for itself)."""
    app = FastAPI(
        title="stagemesh",
        version=__version__,
        description="A language model served by a mesh of layer shards.",
        docs_url=None,  # FastAPI's documentation pages load scripts from other hosts
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    models = KnownModels(client, settings.model)
    monitor = HealthMonitor(
        client, models, default=settings.model, fresh_s=settings.health_fresh_s, probe_timeout_s=settings.probe_timeout_s
    )
    registry = Registry("gateway") if registry is None else registry
    gate = Gate(settings.verifier, settings.limits, accounts=accounts)
    gateway = Gateway(client, settings, gate, models, monitor, registry, KeptResponses(client))
    app.state.gateway = gateway
    for router in (native.generate, batch, native.admin, usage, metrics, openai, embeddings, responses, messages, tokenizing, health, docs):
        app.include_router(router)
    app.router.routes.extend(routes)
    app.add_exception_handler(ClientGone, _nobody)
    for kind in (MeshError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    private = settings.verifier is None and is_loopback(settings.listener.host)
    tracing = EdgeTracing(client, ratio=settings.sample_ratio, export=export)
    pages_of = settings.cors_origins if settings.verifier is None else None
    edge = Edge(
        app,
        settings.limits,
        tracing,
        secure=settings.listener.tls is not None,
        plain_names_only=private,
        pages_of=pages_of,
        cors_origins=settings.cors_origins,
    )
    app.state.counters = edge.counters
    registry.add(lambda: gateway_readings(client, edge.counters, gate.accounts, connections))
    registry.spans_dropped.append(lambda: client.spans_dropped)
    return edge


async def _nobody(request: Request, error: Exception) -> Response:
    """The response after the client has left. It is not sent; the log and the counts use its status."""
    return Response(status_code=499)


async def _answer(request: Request, error: Exception) -> Response:
    """The response to any error, in the shape of the API that the path belongs to."""
    if isinstance(error, MeshError):
        ours = error
    elif isinstance(error, HTTPException):
        ours = from_http(error)
    elif isinstance(error, RequestValidationError):
        ours = _wrong_field(error)
    else:
        ours = internal_error()
    return error_response(ours, request.url.path, request.state.request_id)


def _wrong_field(error: RequestValidationError) -> MeshError:
    """The first problem."""
    first: dict[str, Any] = error.errors()[0]
    field, kind, message = problem_of({**first, "loc": first["loc"][1:]})
    if kind == "missing" and not field:
        message = "the body is missing: send a JSON object with content-type application/json"
    return BadRequest(f"{field}: {message}" if field else message, field=field)
