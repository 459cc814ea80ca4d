"""What the HTTP edge refuses before it reads a body, and what it writes down nowhere."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_tools import bearer, edge, token, verifier
from gateway_process import Gateway

from mesh.http.listener import Listener, ListenerOptions
from mesh.local.nats_server import NatsServer
from mesh.settings.schema import MetricsSection
from mesh.shard.http import ShardHttp
from mesh.telemetry.metrics_http import MetricsEndpoint
from mesh.telemetry.registry import Registry

FOREIGN = {"origin": "http://evil.example"}
BODY = {"tokens": [1], "max_tokens": 1}
Run = Callable[[Any], Any]


def test_a_page_of_another_origin_generates_nothing_without_a_token(server: NatsServer) -> None:
    """503: it got as far as the mesh, which has no coordinator here."""
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        for headers in (FOREIGN, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
            for path in ("/api/v1/inference", "/v1/chat/completions", "/api/v1/batch"):
                refused = http.post(path, json=BODY, headers=headers)
                assert refused.status_code == 403 and "cors_origins" in refused.text
        assert http.post("/api/v1/inference", json=BODY, headers={"origin": url}).status_code == 503
        assert http.post("/api/v1/inference", json=BODY).status_code == 503
    with edge(server.url, cors_origins=(FOREIGN["origin"],)) as url, httpx.Client(base_url=url) as http:
        assert http.post("/api/v1/inference", json=BODY, headers=FOREIGN).status_code == 503
        assert http.post("/api/v1/inference", json=BODY, headers={"origin": "http://other.example"}).status_code == 403
    with edge(server.url, verifier=verifier()) as url, httpx.Client(base_url=url) as http:
        assert http.post("/api/v1/inference", json=BODY, headers={**FOREIGN, **bearer(token("generate"))}).status_code == 503


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "GZIP"])
def test_a_compressed_body_is_refused_unread(server: NatsServer, encoding: str) -> None:
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        refused = http.post("/api/v1/inference", content=b"\x1f\x8b", headers={"content-encoding": encoding})
        assert refused.status_code == 415 and "Content-Encoding" in refused.text
        assert http.post("/api/v1/inference", json=BODY, headers={"content-encoding": "identity"}).status_code == 503


def test_the_parts_of_a_head_are_bounded(server: NatsServer) -> None:
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        assert http.get("/api/v1/health/live?" + "x" * 8000).status_code == 200
        long = http.get("/api/v1/health/live?" + "x" * 9000)
        assert long.status_code == 414 and long.json()["error"]["code"] == "url_too_long"
        assert http.get("/api/v1/health/live", headers=[(f"x-{number}", "") for number in range(100)]).status_code == 200
        many = http.get("/api/v1/health/live", headers=[(f"x-{number}", "") for number in range(200)])
        assert many.status_code == 431


def test_listeners_without_a_token_answer_to_no_name_of_a_page(run: Run) -> None:
    """The health of a shard, and the metrics."""

    async def work() -> None:
        shard = ShardHttp(Listener.bind(ListenerOptions(port=0, grace_s=0)), check_interval_s=1.0, timeout_s=1.0)
        metrics = MetricsEndpoint.bind(Registry("gateway"), MetricsSection(port=0))
        assert metrics is not None
        tasks = [asyncio.create_task(shard.run()), asyncio.create_task(metrics.run())]
        try:
            async with httpx.AsyncClient() as http:
                for url in (f"{shard.listener.url}/api/v1/health/live", metrics.url):
                    for host, status in (("evil.example", 421), ("evil.example:8080", 421), ("127.0.0.1", 200), ("localhost:1", 200)):
                        assert (await http.get(url, headers={"host": host})).status_code == status
        finally:
            shard.listener.stop(now=True)
            metrics.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(work())


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits of a process are read in /proc")
def test_a_crash_of_a_process_leaves_no_image_of_its_memory(server: NatsServer, tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no process here may write one")
    with Gateway(tmp_path, server.url, {"gateway": {"listen_port": 0}}) as running:
        running.url()
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
    assert "Max core file size        0 " in limits
