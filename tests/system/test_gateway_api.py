"""HTTP as its clients see it: curl with the guide's own lines, and what the mesh's API answers."""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_tools import bearer, edge, events, submitted, token, verifier
from running import Run
from system_tools import all_rows_free
from waiting import until_true

from mesh.client import MeshClient
from mesh.local.mesh import LocalMesh

GUIDE = {
    "inference": """curl -X POST http://coordinator:8080/api/v1/inference \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "What is artificial intelligence?",
    "max_tokens": 100,
    "temperature": 0.7
  }'""",
    "batch": """curl -X POST http://coordinator:8080/api/v1/batch \\
  -H "Content-Type: application/json" \\
  -d '{
    "requests": [
      {"prompt": "Explain quantum computing", "max_tokens": 50},
      {"prompt": "What is machine learning?", "max_tokens": 50}
    ]
  }'""",
    "health": "curl http://coordinator:8080/api/v1/health",
}
LONG: dict[str, Any] = {"tokens": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[LocalMesh]:
    """As `mesh up` makes it, with rows long enough for the guide's requests."""
    from mesh.local.mesh import LocalOptions

    with LocalMesh(LocalOptions(model=model, shards=2, rows=4, context=256, coordinator_arguments=("--queue", "8"))) as running:
        yield running


@pytest.fixture(scope="module")
def url(mesh: LocalMesh) -> str:
    return mesh.http_urls[0]


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_curl_commands_work_as_they_stand(url: str, name: str, tmp_path: Path) -> None:
    address = url.removeprefix("http://")
    (tmp_path / ".curlrc").write_text(f'connect-to = "coordinator:8080:{address}"\nsilent\nfail\n')  # instead of a name server
    done = subprocess.run(["bash", "-c", GUIDE[name]], env={"PATH": "/usr/bin:/bin", "CURL_HOME": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done
    answer = json.loads(done.stdout)
    match name:
        case "inference":
            assert len(answer["tokens"]) == 100 and len(answer["text"]) >= 100
            assert answer["usage"].pop("prompt_tokens_details").keys() == {"cached_tokens"}
            assert answer["usage"] == {"prompt_tokens": 37, "completion_tokens": 100, "total_tokens": 137}
        case "batch":
            assert [result["index"] for result in answer["results"]] == [0, 1]
            assert all(result["result"]["usage"]["completion_tokens"] == 50 for result in answer["results"])
            assert answer["usage"]["completion_tokens"] == 100
        case "health":
            assert answer["status"] == "ready" and answer["models"][0]["model"] == "tiny"


def test_inference_gives_the_tokens_of_the_client_whole_and_streamed(mesh: LocalMesh, http: httpx.Client) -> None:
    request: dict[str, Any] = {"prompt": "rain", "max_tokens": 12, "logprobs": 2}
    with MeshClient(mesh.url) as client:
        expected = client.generate(**request)
    whole = http.post("/api/v1/inference", json=request).json()
    assert (whole["tokens"], whole["text"], whole["model"]) == (list(expected.tokens), expected.text, "tiny")
    assert [entry["token"] for entry in whole["logprobs"]] == whole["tokens"]
    assert "".join(entry["piece"] for entry in whole["logprobs"]) == whole["text"]
    with http.stream("POST", "/api/v1/inference", json={**request, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *parts, last = [json.loads(data) for data in events(response)]
    assert [part["token"] for part in parts] == whole["tokens"] and not any(part["done"] for part in parts)
    assert "".join(part["text"] for part in parts) + last["rest"] == last["text"] == whole["text"]
    assert last["done"] and last["usage"] == whole["usage"] and last["finish_reason"] == "length"


def test_without_max_tokens_the_context_is_the_end(http: httpx.Client) -> None:
    answer = http.post("/api/v1/inference", json={"tokens": [1, 2, 3], "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"max_tokens": 3}, "prompt", "exactly one of prompt, messages and tokens"),
        ({"prompt": "a", "tokens": [1]}, "prompt", "exactly one of prompt, messages and tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "1 or more"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens", "whole number"),
        ({"prompt": "a", "colour": "red"}, "colour", "not a key here"),
        ({"prompt": "a", "temperature": -1}, "temperature", "0 or more"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"prompt": 7}, "prompt", "a text"),
        ({"tokens": [96], "max_tokens": 1}, "tokens", "not in the vocabulary"),
        ({"prompt": "a", "model": "another"}, None, "no coordinator serves a model 'another'"),
        ({"prompt": "a", "max_tokens": 300}, None, "shorten the prompt"),
        ([], "", "JSON object"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, body: Any, field: str, says: str) -> None:
    response = http.post("/api/v1/inference", json=body)
    error = response.json()["error"]
    assert response.status_code == (404 if "another" in says else 400)
    assert error["field"] == (field or None) and says in error["message"] and not error["retryable"]
    assert response.json()["request_id"] == response.headers["x-request-id"]


ASKED = "a mesh says how many requests it has when it is asked"

HUGE = b'{"max_tokens": 1' + b"0" * 5000 + b"}"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\xff"}', b'{"prompt": NaN}', HUGE])
def test_invalid_json_is_400(http: httpx.Client, content: bytes) -> None:
    response = http.post("/api/v1/inference", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_large_wrong_body_gets_a_short_answer_that_names_the_key(http: httpx.Client) -> None:
    unknown = {f"key{index}": index for index in range(100_000)}
    for path, body in (
        ("/api/v1/inference", {"prompt": "a", **unknown}),
        ("/api/v1/batch", {"requests": [{"prompt": "a", **unknown}]}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a", **unknown}]}),
    ):
        response = http.post(path, json=body)
        assert response.status_code == 400 and len(response.content) < 2000
        assert "key0 is not a key here: there are" in response.json()["error"]["message"]


def test_a_batch_has_each_result_or_error_in_its_place(http: httpx.Client) -> None:
    requests = [{"prompt": "a", "max_tokens": 3}, {"tokens": [96], "max_tokens": 3}, *({"tokens": [n], "max_tokens": 9} for n in range(20))]
    results = http.post("/api/v1/batch", json={"requests": requests}).json()["results"]
    assert [result["index"] for result in results] == list(range(22))
    assert results[1]["error"]["code"] == "bad_request" and "result" not in results[1]
    assert all(result["result"]["finish_reason"] for result in results if result["index"] != 1)
    assert http.post("/api/v1/batch", json={"requests": []}).status_code == 400
    wrong = http.post("/api/v1/batch", json={"requests": [{"prompt": "a"}, {}]})
    assert wrong.json()["error"]["field"] == "requests.1.prompt"


def test_every_answer_has_a_name_and_headers_for_browsers(http: httpx.Client) -> None:
    named = http.get("/api/v1/health/live", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    for path in ("/api/v1/health", "/nothing", "/openapi.json"):
        headers = http.get(path, headers={"x-request-id": "no spaces, please"}).headers
        assert headers["x-request-id"] != "no spaces, please"
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "default-src 'none'" in headers["content-security-policy"] and "server" not in headers
        assert "access-control-allow-origin" not in headers
    assert (
        http.options("/api/v1/inference", headers={"origin": "https://a.example", "access-control-request-method": "POST"}).status_code
        == 405
    )


def test_stats_list_shards_and_coordinators(http: httpx.Client) -> None:
    stats = http.get("/api/v1/stats").json()
    assert [shard["shard"] for shard in stats["shards"]] == ["shard-1", "shard-2"]
    assert stats["coordinators"][0]["finished"] >= 0 and stats["gateway"]["active"] == 1


def test_a_client_that_leaves_cancels_its_generation(mesh: LocalMesh, url: str, http: httpx.Client, run: Run) -> None:
    before = _counter(mesh, "cancelled")
    with http.stream("POST", "/api/v1/inference", json={**LONG, "max_tokens": 240, "stream": True}) as response:
        next(events(response))
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "max_tokens": 250}).encode()
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /api/v1/inference HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until_true(lambda: http.get("/api/v1/stats").json()["gateway"]["active"] == 2, because=ASKED)  # it and this question
    run(all_rows_free(mesh))
    until_true(lambda: _counter(mesh, "cancelled") == before + 2, because=ASKED)


def test_a_slow_reader_holds_no_row_and_is_let_go(mesh: LocalMesh, run: Run) -> None:
    """The client reads nothing. Its row is free when the generation is over, and its connection is closed after a while."""
    requests = [{**LONG, "max_tokens": 250, "logprobs": 20, "stream": True}] * 3  # of 300 kB each
    before = _counter(mesh, "finished") + _counter(mesh, "cancelled")
    with edge(mesh.url, listener={"write_timeout_s": 1.0, "send_buffer_bytes": 4096}) as url:
        host, port = url.removeprefix("http://").split(":")
        readers = []
        for request in requests:
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((host, int(port)))
            body = json.dumps(request).encode()
            head = f"POST /api/v1/inference HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            reader.sendall(head.encode() + body)
            readers.append(reader)
        until_true(lambda: _counter(mesh, "finished") + _counter(mesh, "cancelled") >= before + 3, because=ASKED)
        run(all_rows_free(mesh))
        with httpx.Client(base_url=url) as client:
            until_true(lambda: client.get("/api/v1/stats").json()["gateway"]["active"] == 1, because=ASKED)
        for reader in readers:
            reader.close()


def test_a_full_mesh_is_429_with_a_time_at_once(http: httpx.Client) -> None:
    """4 rows and 8 places in the queue."""
    refused: list[tuple[httpx.Response, float]] = []
    fine: list[tuple[httpx.Response, float]] = []

    def ask() -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            began = time.perf_counter()
            response = client.post("/api/v1/inference", json={**LONG, "max_tokens": 200})
            (refused if response.status_code == 429 else fine).append((response, time.perf_counter() - began))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fine) >= 12 and len(refused) >= 1
    assert all(response.status_code == 200 and len(response.json()["tokens"]) == 200 for response, _ in fine)
    for response, _ in refused:
        assert int(response.headers["retry-after"]) >= 1 and response.json()["error"]["code"] == "busy"


def test_a_stream_that_waits_for_a_row_says_so(mesh: LocalMesh) -> None:
    """8 callers ask again and again for 4 rows; a stream behind them hears comments until it has one."""
    enough = threading.Event()
    answered: queue.SimpleQueue[int] = queue.SimpleQueue()
    with edge(mesh.url, limits={"keep_alive_s": 0.02}) as url, httpx.Client(base_url=url, timeout=60) as http:
        begun = threading.Barrier(9)

        def hold() -> None:
            begun.wait(60)
            with httpx.Client(base_url=url, timeout=60) as client:
                while not enough.is_set():
                    answered.put(client.post("/api/v1/inference", json={**LONG, "max_tokens": 250}).status_code)

        holding = [threading.Thread(target=hold) for _ in range(8)]
        for thread in holding:
            thread.start()
        begun.wait(60)
        assert [answered.get(timeout=60) for _ in range(4)] == [200] * 4  # the other 4 have the rows now, and these wait again
        with http.stream("POST", "/api/v1/inference", json={**LONG, "max_tokens": 5, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        enough.set()
        for thread in holding:
            thread.join()
        assert answer.status_code == 200 and lines[0] == ": waiting" and json.loads(lines[-1].removeprefix("data: "))["done"]
        assert {answered.get() for _ in range(answered.qsize())} == {200}


def test_an_error_after_the_first_token_is_the_last_event(mesh: LocalMesh) -> None:
    with edge(mesh.url, limits={"request_timeout_s": 0.3}) as url, httpx.Client(base_url=url, timeout=60) as http:
        long = {**LONG, "max_tokens": 250}
        with http.stream("POST", "/api/v1/inference", json={**long, "stream": True}) as answer:
            *_, last = [json.loads(data) for data in events(answer)]
        assert answer.status_code == 200 and last["done"] and last["error"]["code"] == "deadline_exceeded" and last["request_id"]
        whole = http.post("/api/v1/inference", json=long)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "deadline_exceeded"
        chat = {"model": "tiny", "prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=chat) as answer:
            *_, last = events(answer)
        assert json.loads(last)["error"]["type"] == "server_error"


def test_bodies_and_heads_have_bounds(mesh: LocalMesh) -> None:
    with (
        edge(mesh.url, limits={"max_body_bytes": 1000, "max_prompt_chars": 100, "body_timeout_s": 0.5}) as url,
        httpx.Client(base_url=url) as http,
    ):
        too_long = http.post("/api/v1/inference", json={"prompt": "a" * 200, "max_tokens": 1})
        assert too_long.status_code == 400 and "200 characters" in too_long.json()["error"]["message"]
        for _ in range(10):  # the answer arrives, however much of the body was still on its way
            assert http.post("/api/v1/inference", json={"prompt": "a" * 2000}).status_code == 413
            chunked = http.post("/api/v1/inference", content=iter([b"a" * 600] * 3), headers={"content-type": "application/json"})
            assert chunked.status_code == 413
        assert http.get("/api/v1/health/live", headers={"x": "y" * 70_000}).status_code == 431
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(b"POST /api/v1/inference HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
            assert raw.recv(100).startswith(b"HTTP/1.1 408 ")
    with edge(mesh.url, listener={"head_timeout_s": 0.3}) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nhost:")
            assert raw.recv(100) == b""


def test_without_tokens_only_plain_names_are_answered(mesh: LocalMesh, http: httpx.Client) -> None:
    """A hostile page may point a name of its own at this machine; its requests then carry that name."""
    for host in ("coordinator:8080", "localhost", "127.0.0.1:1", "[::1]:8080", "10.0.0.1"):
        assert http.get("/api/v1/health/live", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example"):
        assert http.get("/api/v1/health/live", headers={"host": host}).status_code == 421, host
    with edge(mesh.url, verifier=verifier()) as url:
        assert httpx.get(f"{url}/api/v1/health/live", headers={"host": "mesh.example"}).status_code == 200


def test_pages_of_other_hosts_may_call_only_where_they_are_listed(mesh: LocalMesh) -> None:
    with edge(mesh.url, cors_origins=("https://a.example",)) as url, httpx.Client(base_url=url) as http:
        asked = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = http.options("/api/v1/inference", headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = http.options("/api/v1/inference", headers={**asked, "origin": "https://b.example"})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_without_a_good_token_nothing_is_run(mesh: LocalMesh) -> None:
    expired = token("admin", now_unix_s=time.time() - 7200)
    other = token("generate")[:-4] + "AAAA"
    requests = {
        "/api/v1/inference": {"tokens": [1], "max_tokens": 1},
        "/api/v1/batch": {"requests": [{"tokens": [1], "max_tokens": 1}]},
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 1},
    }
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url) as http:
        before = submitted(mesh.url)
        for path, body in requests.items():
            for headers in ({}, bearer(expired), bearer(other), bearer("x"), {"authorization": "Basic eDp5"}):
                response = http.post(path, json=body, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert http.post(path, content=b"{", headers={"content-type": "application/json"}).status_code == 401  # before it is read
        for path in ("/api/v1/stats", "/metrics", "/v1/models"):
            assert http.get(path).status_code == 401
        assert http.post("/api/v1/batch", json=requests["/api/v1/batch"], headers=bearer(token("generate"))).status_code == 403
        for path in ("/api/v1/stats", "/metrics"):
            assert http.get(path, headers=bearer(token("generate", "batch"))).status_code == 403
        assert http.post("/api/v1/inference", json=requests["/api/v1/inference"], headers=bearer(token("batch"))).status_code == 403
        assert submitted(mesh.url) == before
        for path, body in requests.items():
            assert http.post(path, json=body, headers=bearer(token("generate", "batch"))).status_code == 200
        for path in ("/api/v1/stats", "/metrics"):
            assert http.get(path, headers=bearer(token("admin"))).status_code == 200
        assert submitted(mesh.url) == before + 4
        health = http.get("/api/v1/health")
        assert health.status_code == 200 and health.json()["models"][0]["ranges"] is None
        assert http.get("/api/v1/health", headers=bearer(token("admin"))).json()["models"][0]["ranges"]


def test_a_token_has_its_own_limits(mesh: LocalMesh) -> None:
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url) as http:
        few = bearer(token("generate", requests_per_minute=2))
        body = {"tokens": [1], "max_tokens": 1}
        assert [http.post("/api/v1/inference", json=body, headers=few).status_code for _ in range(3)] == [200, 200, 429]
        assert 1 <= int(http.post("/api/v1/inference", json=body, headers=few).headers["retry-after"]) <= 30
        small = bearer(token("generate", tokens_per_minute=20))
        used = {"tokens": [1] * 10, "max_tokens": 10, "ignore_eos": True}
        assert http.post("/api/v1/inference", json=used, headers=small).status_code == 200
        assert http.post("/api/v1/inference", json=used, headers=small).status_code == 429


# -- health ------------------------------------------------------------------------------------------------------------


def test_health_of_a_mesh_without_shards_is_503_and_the_process_lives(mesh: LocalMesh) -> None:
    with edge(mesh.url, model="another") as url, httpx.Client(base_url=url) as http:
        response = http.get("/api/v1/health")
        assert response.status_code == 503 and response.json()["status"] == "not_ready"
        assert "no coordinator serves another" in response.json()["reason"]
        assert http.get("/api/v1/health/ready", params={"model": "tiny"}).status_code == 200
        assert http.get("/health/live").json() == {"status": "live"}
        missing = http.post("/api/v1/inference", json={"prompt": "a", "max_tokens": 1})
        assert missing.status_code == 503 and "retry-after" in missing.headers


def test_health_is_asked_of_the_mesh_once_by_many(mesh: LocalMesh) -> None:
    with edge(mesh.url) as url:
        before = submitted(mesh.url)

        async def look() -> list[int]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                return [answer.status_code for answer in await asyncio.gather(*(http.get("/api/v1/health") for _ in range(20)))]

        assert asyncio.run(look()) == [200] * 20
        assert submitted(mesh.url) <= before + 1


def _counter(mesh: LocalMesh, name: str) -> int:
    with MeshClient(mesh.url) as client:
        return sum(getattr(coordinator.stats, name) for coordinator in client.status().coordinators)


def test_short_paths_of_health_and_a_page_of_the_api(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ready" and http.get("/healthz").json() == {"status": "live"}
    page = http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "unsafe" not in page.headers["content-security-policy"] and "<script" not in page.text and "http://" not in page.text
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        assert path in page.text and all(method.upper() in page.text for method in operations)
    assert "max_tokens" in page.text
