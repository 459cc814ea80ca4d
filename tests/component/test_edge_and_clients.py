"""What HTTP clients and web pages do that is harmless, and that an edge therefore takes."""

from __future__ import annotations

import httpx
import pytest
from edge_tools import bearer, edge, token, verifier

from mesh.local.nats_server import NatsServer

PAGE = "https://app.example"
STAINLESS = (
    "authorization,content-type,openai-organization,openai-project,idempotency-key,x-stainless-arch,x-stainless-async,"
    "x-stainless-helper-method,x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-poll-helper,"
    "x-stainless-custom-poll-interval,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)
"""What OpenAI's JavaScript client sends."""


def test_a_page_of_an_allowed_origin_may_send_the_headers_of_its_client(server: NatsServer) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
    with edge(server.url, cors_origins=(PAGE,)) as url, httpx.Client(base_url=url) as http:
        allowed = http.options("/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
        assert set(STAINLESS.split(",")) <= set(allowed.headers["access-control-allow-headers"].replace(" ", "").split(","))
        assert "access-control-allow-credentials" not in allowed.headers
        refused = http.options("/v1/chat/completions", headers={**asked, "origin": "https://other.example"})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_a_page_reads_every_error(server: NatsServer) -> None:
    """A browser shows a page nothing of an answer without these headers, not even its status."""
    limits = {"max_body_bytes": 1000}
    with edge(server.url, cors_origins=(PAGE,), limits=limits, verifier=verifier()) as url, httpx.Client(base_url=url) as http:
        good = {**bearer(token("generate")), "origin": PAGE}
        answers = {
            401: http.post("/v1/chat/completions", json={}, headers={"origin": PAGE}),
            400: http.post("/v1/chat/completions", json={}, headers=good),
            404: http.get("/nowhere", headers=good),
            413: http.post("/v1/chat/completions", content=b"x" * 2000, headers=good),
            415: http.post("/v1/chat/completions", content=b"x", headers={**good, "content-encoding": "gzip"}),
        }
        for status, answer in answers.items():
            assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, PAGE)


@pytest.mark.parametrize("path", ["/api/v1/health/live", "/openapi.json", "/health/live"])
def test_head_is_get_without_a_body(server: NatsServer, path: str) -> None:
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"") and get.content
        volatile = ("x-request-id", "x-trace-id", "date")
        assert [(k, v) for k, v in head.headers.items() if k not in volatile] == [
            (k, v) for k, v in get.headers.items() if k not in volatile
        ]
        assert http.get(path).status_code == 200  # on the same connection: nothing of a body was left on it


def test_head_of_what_is_not_there_or_takes_no_get(server: NatsServer) -> None:
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        assert [http.head(path).status_code for path in ("/nowhere", "/v1/chat/completions")] == [404, 405]


def test_a_slash_at_the_end_changes_nothing(server: NatsServer) -> None:
    with edge(server.url) as url, httpx.Client(base_url=url) as http:
        for path in ("/v1/models", "/api/v1/health/live", "/health/live"):
            with_slash, without = http.get(f"{path}/"), http.get(path)
            assert (with_slash.status_code, with_slash.json()) == (without.status_code, without.json())
        for path in ("/v1/chat/completions/", "/api/v1/inference/"):
            assert http.post(path, json={}).status_code == 400
