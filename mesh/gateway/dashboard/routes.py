"""The dashboard's routes: a page of static files, and the data that it shows.

    GET /                               the page
    GET /dashboard/static/NAME          its parts
    GET /dashboard/snapshot             the mesh now, as JSON
    GET /dashboard/events               the same as server-sent events, for as long as the page is open
    GET /dashboard/trace/REQUEST        where the time of a request went

The page and its parts hold nothing of the mesh and need no token. The other three need the scope `admin` where tokens are required.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from importlib import resources

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mesh.errors import Busy
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.dashboard.watch import Watch
from mesh.gateway.errors import HttpError
from mesh.gateway.guard import authorization_of
from mesh.protocol.generation import without_prefix
from mesh.protocol.subjects import is_token
from mesh.telemetry.views.document import looked_at

__all__ = ["POLICY", "routes"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def routes(watch: Watch) -> list[Route]:
    """The routes for create_app. The caller ends and closes `watch`."""
    files = _read_files()

    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise HttpError("there is no such file", status=404, code="not_found")
        return _answer(request, file)

    async def snapshot(request: Request) -> Response:
        _admitted(request)
        return _json(await watch.snapshot())

    async def events(request: Request) -> Response:
        _admitted(request)
        if watch.full:
            raise Busy("too many pages watch this mesh already: close one", retry_after_s=10.0)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(watch.stream(), media_type="text/event-stream", headers=headers)

    async def trace(request: Request) -> Response:
        client = _admitted(request).client
        name = without_prefix(request.path_params["request"])
        found = await client.inspect(name) if is_token(name) else None
        if found is None:
            why = f"no coordinator remembers request {name[:64]}: each keeps its last 64"
            raise HttpError(why, status=404, code="not_found")
        return _json(await asyncio.to_thread(lambda: orjson.dumps(looked_at(found))))

    return [
        Route("/", page, include_in_schema=False),
        Route("/dashboard/static/{name}", static, include_in_schema=False),
        Route("/dashboard/snapshot", snapshot, include_in_schema=False),
        Route("/dashboard/events", events, include_in_schema=False),
        Route("/dashboard/trace/{request}", trace, include_in_schema=False),
    ]


def _admitted(request: Request) -> Gateway:
    gateway = gateway_of(request)
    gateway.gate.admit(authorization_of(request.headers), "admin")
    return gateway


def _read_files() -> dict[str, _File]:
    """Read all static files into memory, once. There are few. So a path from outside never reaches the file system."""
    found = {}
    for entry in resources.files(__package__).joinpath("static").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _TYPES:
            body = entry.read_bytes()
            found[entry.name] = _File(body, _TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def _answer(request: Request, file: _File) -> Response:
    headers = {
        "ETag": file.etag,
        "Cache-Control": "no-cache",  # the browser asks each time whether its copy is current, so an upgrade shows at once
        "Content-Security-Policy": POLICY,
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})
