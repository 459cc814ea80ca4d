"""The dashboard's routes: a page of static files, and what it shows.

    GET /                               the page
    GET /dashboard/static/NAME          its parts
    GET /dashboard/snapshot             the mesh now, as JSON
    GET /dashboard/events               the same as server-sent events, for as long as someone looks
    GET /dashboard/trace/REQUEST        where the time of a request went

The page and its parts hold nothing of the mesh and are for everyone; the other three are for who `guard` lets pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mesh.client import AsyncMeshClient
from mesh.errors import Busy
from mesh.gateway.dashboard.watch import Watch
from mesh.subjects import is_token

__all__ = ["POLICY", "Guard", "routes"]

Guard = Callable[[Request], Awaitable[Response | None]]
"""None where the request may pass, else what it is answered."""

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ID_PREFIXES = ("chatcmpl-", "cmpl-")


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


async def _anyone(request: Request) -> Response | None:
    return None


def routes(client: AsyncMeshClient, watch: Watch | None = None, *, guard: Guard = _anyone) -> list[Route]:
    """For an ASGI application of Starlette's family. `client` is connected by whoever owns it, and `watch` closed."""
    files = _read_files()
    watching = watch or Watch(client)

    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        return Response("not found\n", 404, media_type="text/plain") if file is None else _answer(request, file)

    async def snapshot(request: Request) -> Response:
        refused = await guard(request)
        return refused or _json(await watching.snapshot())

    async def events(request: Request) -> Response:
        refused = await guard(request)
        if refused is not None:
            return refused
        if watching.full:
            error = Busy("too many pages watch this mesh already: close one", retry_after_s=10.0)
            return _error(429, error.code, str(error), {"Retry-After": "10"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(watching.stream(), media_type="text/event-stream", headers=headers)

    async def trace(request: Request) -> Response:
        refused = await guard(request)
        if refused is not None:
            return refused
        name: str = request.path_params["request"]
        for prefix in _ID_PREFIXES:
            name = name.removeprefix(prefix)
        found = await client.trace(name) if is_token(name) else None
        if found is None:
            return _error(404, "not_found", f"no coordinator remembers request {name[:64]}: the last 64 of each are kept")
        return _json(orjson.dumps(found))

    return [
        Route("/", page, name="dashboard", include_in_schema=False),
        Route("/dashboard/static/{name}", static, include_in_schema=False),
        Route("/dashboard/snapshot", snapshot, include_in_schema=False),
        Route("/dashboard/events", events, include_in_schema=False),
        Route("/dashboard/trace/{request}", trace, include_in_schema=False),
    ]


def _read_files() -> dict[str, _File]:
    """Once, into memory: there are few, and no path from outside is ever joined."""
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
        "Cache-Control": "no-cache",  # kept, and asked for again each time: an upgrade is seen at once
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps({"error": {"code": code, "message": message}})
    return Response(body, status, media_type="application/json", headers={"Cache-Control": "no-store", **(headers or {})})
