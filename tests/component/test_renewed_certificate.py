"""A listener shows the certificate that lies there now, and the one before it as long as the new files do not fit."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from authority import Authority
from running import Run
from waiting import Heard

from mesh.http.listener import Listener, ListenerOptions, Tls


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Listener]:
    listener = Listener.bind(ListenerOptions(port=0, tls=Tls(str(folder / "server.crt"), str(folder / "server.key"))))
    task = asyncio.create_task(listener.serve(app))
    try:
        yield listener
    finally:
        listener.stop()
        await task


def shown(port: int, ca: Path, name: str | None) -> bytes:
    """The certificate that a client sees. ssl.SSLCertVerificationError: `ca` did not sign it."""
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = name is not None
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw, context.wrap_socket(raw, server_hostname=name) as secured:
        secured.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert secured.recv(100).startswith(b"HTTP/1.1 200")
        certificate = secured.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate


def test_a_renewed_certificate_is_shown_without_a_new_start(run: Run, tmp_path: Path) -> None:
    first, second = Authority(tmp_path / "first"), Authority(tmp_path / "second")
    old, new = first.issue("a"), second.issue("b")
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(old.cert, here / "server.crt")
    shutil.copy(old.key, here / "server.key")

    async def work() -> None:
        async with serving(here) as listener:
            look = asyncio.to_thread
            before = await look(shown, listener.port, first.ca, "localhost")
            with Heard("mesh.http") as heard:
                shutil.copy(new.key, here / "server.key")  # its certificate is still on its way
                assert await look(shown, listener.port, first.ca, "localhost") == before
                await heard.wait("serves on")
                shutil.copy(new.cert, here / "server.crt")
                after = await look(shown, listener.port, second.ca, "localhost")
                assert after != before
                assert await look(shown, listener.port, second.ca, None) == after  # a client that names nobody
                (here / "server.crt").unlink()
                assert await look(shown, listener.port, second.ca, "localhost") == after

    run(work())
