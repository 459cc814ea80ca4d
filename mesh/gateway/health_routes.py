"""Liveness and readiness. They need no token, because load balancers have none; only admins see which shards serve which layers."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import ModelNotFound
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.guard import authorization_of
from mesh.gateway.health import HealthReport
from mesh.gateway.schema import ErrorResponse, HealthResponse, LiveResponse

__all__ = ["health"]

health = APIRouter(tags=["health"])

_NOT_READY: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "No coordinator serves that model"},
    503: {"model": HealthResponse, "description": "No token can be generated now"},
}


@health.get("/api/v1/health", response_model=HealthResponse, responses=_NOT_READY)
@health.get("/api/v1/health/ready", response_model=HealthResponse, responses=_NOT_READY)
@health.get("/health/ready", include_in_schema=False)
@health.get("/health", include_in_schema=False)
async def ready(request: Request, model: str | None = None, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """Whether a token can be generated now: 200, or 503 with the reason. `model`: whether that model can; otherwise the
    gateway's own, or any."""
    report = await gateway.health.check()
    if model is not None:
        if report.models and not any(entry.model == model for entry in report.models):
            raise ModelNotFound(f"no coordinator serves a model {model!r}")
        report = report.of(model)
    caller = gateway.gate.identify(authorization_of(request.headers))
    document = _document(report, details=caller is not None and caller.may("admin"))
    return Response(orjson.dumps(document), 200 if report.ready else 503, media_type="application/json")


@health.get("/api/v1/health/live", response_model=LiveResponse)
@health.get("/health/live", include_in_schema=False)
@health.get("/healthz", include_in_schema=False)
async def live() -> Response:
    """This process answers. /api/v1/health/ready says whether the mesh does."""
    return Response(b'{"status":"live"}', media_type="application/json")


def _document(report: HealthReport, *, details: bool) -> dict[str, Any]:
    models = []
    for entry in report.models:
        ranges = [{"layers": r.layers, "ready": r.ready, "others": r.others} for r in entry.ranges] if details else None
        models.append(
            {
                "model": entry.model,
                "ready": entry.ready,
                "reason": entry.reason,
                "last_step_s": entry.last_step_s,
                "probed": entry.probed,
                "ranges": ranges,
            }
        )
    return {"status": "ready" if report.ready else "not_ready", "reason": report.reason, "models": models}
