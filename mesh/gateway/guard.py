"""Routes that need a scope, which is checked before the request's body is read, and bodies that are read within bounds
(mesh/protocol/documents.py)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import BadRequest, MessageRejected
from mesh.gateway.auth import Caller
from mesh.gateway.context import gateway_of
from mesh.gateway.errors import BodyRefused
from mesh.protocol import documents

__all__ = ["SCOPE_KEY", "authorization_of", "caller_of", "guarded"]

SCOPE_KEY = "x-scope"
"""The key in an operation's OpenAPI description that names the scope it needs."""


def authorization_of(headers: Headers) -> str | None:
    """The Authorization header of a request. Anthropic's clients send the token alone, as x-api-key."""
    token = headers.get("x-api-key")
    return headers.get("authorization") or (None if token is None else f"Bearer {token}")


class _Bounded(Request):
    """A request whose JSON is bounded before FastAPI checks it: keys, lengths of lists, parts."""

    model: type[BaseModel]

    async def json(self) -> Any:
        data = await self.body()
        try:
            # the edge has bounded the bytes
            return await gateway_of(self).reading.run(len(data), lambda: documents.read(self.model, data, limit_bytes=len(data)))
        except MessageRejected as error:
            raise BodyRefused(BadRequest(str(error), field=error.field)) from None


class Guarded(APIRoute):
    scope: ClassVar[str]

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["openapi_extra"] = {**(options.get("openapi_extra") or {}), SCOPE_KEY: self.scope}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            gate = gateway_of(request).gate
            caller = gate.admit(authorization_of(request.headers), self.scope)
            request.state.caller = caller
            if not gate.open:
                request.state.caller_name = caller.name
            model = None if self.body_field is None else self.body_field.field_info.annotation
            if isinstance(model, type) and issubclass(model, BaseModel):
                request = _Bounded(request.scope, request.receive)
                request.model = model
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
