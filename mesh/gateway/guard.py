"""Routes that need a scope. It is checked before the request's body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from mesh.gateway.auth import Caller
from mesh.gateway.context import gateway_of

__all__ = ["SCOPE_KEY", "caller_of", "guarded"]

SCOPE_KEY = "x-scope"
"""The key in an operation's OpenAPI description that names the scope it needs."""


class Guarded(APIRoute):
    scope: ClassVar[str]

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["openapi_extra"] = {**(options.get("openapi_extra") or {}), SCOPE_KEY: self.scope}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            gate = gateway_of(request).gate
            caller = gate.admit(request.headers.get("authorization"), self.scope)
            request.state.caller = caller
            if not gate.open:
                request.state.note = f" {caller.name!r}"
            return await inner(request)

        return handle


def guarded(scope: str, **options: Any) -> APIRouter:
    """A router whose routes all need `scope`."""
    route = type("Guarded", (Guarded,), {"scope": scope})
    return APIRouter(route_class=route, **options)


def caller_of(request: Request) -> Caller:
    """The caller of a guarded route; a dependency of routes."""
    caller: Caller = request.state.caller
    return caller
