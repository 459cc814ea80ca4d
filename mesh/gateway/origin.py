"""Requests that a web page makes its visitor's browser send: which of them are answered.

A browser sends a page's requests to any address that its machine reaches, also to one on loopback. The page cannot read the answers of
another origin, but a generation would run. So where no token is required, which a page would have to know, a request that may change
something is answered only if it comes from no page, from a page of this listener, or from a page of `cors_origins`.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from mesh.gateway.errors import HttpError

__all__ = ["foreign_page"]

_HARMLESS = ("GET", "HEAD", "OPTIONS")
_PORTS = {"http": 80, "https": 443}


def foreign_page(method: str, headers: Headers, allowed: Collection[str]) -> HttpError | None:
    """The error of a request that a page of another origin has caused. None: it may be answered. `allowed`: origins, or `*`."""
    origin = headers.get("origin")
    if method in _HARMLESS or "*" in allowed or origin in allowed:
        return None
    if origin is None:
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    else:
        foreign = not _same(origin, headers.get("host", ""))
    if not foreign:
        return None
    return HttpError(
        f"a page of {(origin or 'another site')[:200]} may not send requests: add it to cors_origins, or set authentication.enabled: true",
        status=403,
        code="foreign_origin",
    )


def _same(origin: str, host: str) -> bool:
    """Whether an origin is the host that was asked. The scheme is not compared, because a proxy may end TLS."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in _PORTS or not parts.netloc or "@" in parts.netloc:
        return False
    named = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    default = port is None or port == _PORTS[parts.scheme]
    return host.lower() in ((named, f"{named}:{_PORTS[parts.scheme]}") if default else (f"{named}:{port}",))
