"""An HTTP edge in a thread of the test, so that its settings are the test's and any client may be used."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from mesh.bus import BusOptions
from mesh.client import MeshClient
from mesh.gateway import GatewaySettings, HttpEdge, Limits
from mesh.http.listener import ListenerOptions
from mesh.http.tokens import Issuer, Quota, Verifier

SECRET = b"0123456789abcdef0123456789abcdef-secret"


@contextmanager
def edge(
    url: str, *, model: str | None = "tiny", listener: dict[str, Any] | None = None, limits: Any = None, **settings: Any
) -> Iterator[str]:
    """The URL of an edge for the mesh at `url`."""
    options = replace(ListenerOptions(port=0, grace_s=1.0), **(listener or {}))
    made = GatewaySettings(model=model, listener=options, limits=Limits(**(limits or {})), **settings)
    bound = HttpEdge.bind(made)
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            asyncio.run(bound.serve(BusOptions(urls=(url,))))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, name="edge")
    thread.start()
    try:
        yield bound.url
    finally:
        bound.stop()
        thread.join(30)
        assert not thread.is_alive(), "the edge did not end"
        assert not failed, failed


def verifier() -> Verifier:
    return Verifier("HS256", SECRET)


def token(*scopes: str, subject: str = "somebody", now_unix_s: float | None = None, expiry_s: float = 3600, **limits: int) -> str:
    began = time.time() if now_unix_s is None else now_unix_s
    return Issuer("HS256", SECRET).issue(subject, scopes, now_unix_s=began, expiry_s=expiry_s, quota=Quota(**limits))


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def submitted(url: str) -> int:
    """How many generations the coordinators were asked for."""
    with MeshClient(url) as client:
        return sum(coordinator.stats.submitted for coordinator in client.status().coordinators)


def events(response: httpx.Response) -> Iterator[str]:
    """What follows `data: `, as it comes."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
