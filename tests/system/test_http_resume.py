"""A stream over HTTP whose gateway is killed goes on at another one: each token once, none missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import edges
import httpx
import httpx2
import openai
import pytest
from gateway_process import Gateway
from openai.types.chat import ChatCompletionChunk
from places import DOCS
from waiting import until_true

from mesh.local.mesh import LocalMesh, LocalOptions

TOKENS = 240
REQUEST: dict[str, Any] = {"tokens": [5, 17, 33], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.8, "stream": True}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 230,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(LocalOptions(model=model, shards=2, coordinators=2, rows=4, context=256, http=False)) as running:
        yield running


class Front:
    """Two gateways, and where clients ask: at each in turn (`urls`)."""

    def __init__(self, mesh: LocalMesh, gateways: list[Gateway], urls: list[str]) -> None:
        self.mesh = mesh
        self.gateways = gateways
        self.urls = urls
        self.own = [gateway.url() for gateway in gateways]

    def kill_the_busy_one(self) -> None:
        """The gateway that has a stream; its counters say so. The question itself is a request under way."""

        def busy() -> Gateway | None:
            for gateway, url in zip(self.gateways, self.own, strict=True):
                if gateway.process.poll() is None and httpx.get(f"{url}/api/v1/stats").json()["gateway"]["active"] > 1:
                    return gateway
            return None

        # No token comes while the counters are looked at, or the stream could be over before they are.
        shards = [process.pid for name, process in self.mesh.processes.items() if name.startswith("shard")]
        for pid in shards:
            os.kill(pid, signal.SIGSTOP)
        try:
            gateway = until_true(busy, because="counters are counted without a word")
        finally:
            for pid in shards:
                os.kill(pid, signal.SIGCONT)
        os.kill(gateway.process.pid, signal.SIGKILL)


@contextmanager
def front(mesh: LocalMesh, folder: Path, *, nginx: bool) -> Iterator[Front]:
    with ExitStack() as stack:
        gateways = []
        for number in range(2):
            (folder / str(number)).mkdir()
            gateways.append(stack.enter_context(Gateway(folder / str(number), mesh.url, {"gateway": {"listen_port": 0}})))
        urls = [gateway.url() for gateway in gateways]
        if nginx:
            urls = [stack.enter_context(edges.nginx(urls, folder))]
        yield Front(mesh, gateways, urls)


@pytest.fixture(params=["gateways", "nginx"])
def served(plain: LocalMesh, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Front]:
    if request.param == "nginx" and shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with front(plain, tmp_path, nginx=request.param == "nginx") as running:
        yield running


def events(url: str, path: str, body: dict[str, Any], last_id: str | None) -> Generator[tuple[str | None, str], None, None]:
    """(id, data) of each event that is complete. httpx.TransportError where the connection is lost."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    with httpx.stream("POST", f"{url}{path}", json=body, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        id, data = None, None
        for line in answer.iter_lines():
            if line.startswith("id: "):
                id = line.removeprefix("id: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
            elif not line and data is not None:
                yield id, data
                data = None


def resumed(served: Front, path: str, body: dict[str, Any], kill_at: int) -> tuple[list[dict[str, Any]], int]:
    """Every event's document, and how often the stream was begun. A gateway is killed after so many."""
    got: list[dict[str, Any]] = []
    last_id, streams = None, 0
    while True:
        url = served.urls[streams % len(served.urls)]
        streams += 1
        assert streams < 5
        try:
            for id, data in events(url, path, body, last_id):
                if data == "[DONE]":
                    return got, streams
                got.append(json.loads(data))
                last_id = id or last_id
                if got[-1].get("done"):
                    return got, streams
                if len(got) == kill_at:
                    served.kill_the_busy_one()
        except httpx.TransportError:
            continue


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"max_tokens": None}], ids=["tokens", "logprobs", "what-the-context-leaves"])
def test_a_stream_goes_on_at_the_other_gateway(served: Front, extra: dict[str, Any]) -> None:
    body = {name: value for name, value in {**REQUEST, **extra}.items() if value is not None}
    got, streams = resumed(served, "/api/v1/inference", body, kill_at=10)
    *tokens, last = got
    assert streams == 2
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    assert [token["token"] for token in tokens] == last["tokens"] and len(tokens) >= TOKENS
    assert "".join(token["text"] for token in tokens) + last["rest"] == last["text"]


def test_choices_go_on_each_from_its_own_place(served: Front) -> None:
    body = {**{name: value for name, value in CHAT.items() if name != "extra_body"}, "ignore_eos": True, "n": 3, "seed": 4}
    whole = httpx.post(f"{served.urls[0]}/v1/chat/completions", json=body, timeout=60).json()
    got, streams = resumed(served, "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}, kill_at=30)
    assert streams == 2
    texts, reasons = {0: "", 1: "", 2: ""}, {}
    for document in got:
        for choice in document["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert reasons == {0: "length", 1: "length", 2: "length"}
    assert got[-1]["usage"] == whole["usage"]
    assert len({document["id"] for document in got}) == 1


def resuming_chat(clients: list[openai.OpenAI], **request: Any) -> Iterator[ChatCompletionChunk]:
    """As docs/http.md has it, with several addresses."""
    last_id = None
    for attempt in range(10):
        headers: dict[str, str] = {"Last-Event-ID": last_id} if last_id else {}
        create = clients[attempt % len(clients)].chat.completions.with_streaming_response.create
        try:
            with create(stream=True, extra_headers=headers, **request) as response:
                id, data = last_id, ""
                for line in response.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "id":
                        id = value
                    elif name == "data":
                        data = value
                    elif not line and data:
                        if data == "[DONE]":
                            return
                        last_id = id
                        yield ChatCompletionChunk.model_validate_json(data)
                        data = ""
        except (httpx2.TransportError, openai.APIConnectionError, openai.InternalServerError):
            continue  # the gateway is gone: another one goes on


def test_openai_s_client_goes_on_and_takes_the_ids(served: Front) -> None:
    clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="any") for url in served.urls]
    request = {**CHAT, "seed": 7}
    right = clients[0].chat.completions.create(**request).choices[0].message.content
    stream = clients[0].chat.completions.create(stream=True, **request)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == right
    text = ""
    for count, chunk in enumerate(resuming_chat(clients, **request), 1):
        text += chunk.choices[0].delta.content or ""
        if count == 2:
            served.kill_the_busy_one()
    assert text == right
    for client in clients:
        client.close()


def test_what_was_generated_is_not_generated_again(plain: LocalMesh, tmp_path: Path) -> None:
    from mesh.client import MeshClient

    def generated() -> int:
        with MeshClient(plain.url) as client:
            return sum(coordinator.stats.tokens for coordinator in client.status().coordinators)

    with front(plain, tmp_path, nginx=False) as served:
        before = generated()
        got, streams = resumed(served, "/api/v1/inference", REQUEST, kill_at=60)
        assert streams == 2 and len(got) == TOKENS + 1
        assert generated() - before < TOKENS + 40  # a few after the last record


def test_a_client_that_left_may_come_back_and_another_request_may_not_use_the_id(plain: LocalMesh, tmp_path: Path) -> None:
    with front(plain, tmp_path, nginx=False) as served:
        coming = events(served.urls[0], "/api/v1/inference", REQUEST, None)
        first = [next(coming) for _ in range(10)]
        coming.close()  # the gateway lives, and is told
        last_id = first[-1][0]
        rest = [json.loads(data) for _, data in events(served.urls[1], "/api/v1/inference", REQUEST, last_id)]
        assert [document.get("index") for document in rest] == [*range(10, TOKENS), None]
        assert [json.loads(data)["token"] for _, data in first] == rest[-1]["tokens"][:10]
        for id, body in ((last_id, {**REQUEST, "tokens": [6]}), ("guess", REQUEST), (f"{last_id}-3", REQUEST)):
            answer = httpx.post(f"{served.urls[0]}/api/v1/inference", json=body, headers={"Last-Event-ID": str(id)}, timeout=60)
            assert answer.status_code == 400, answer.text


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_a_gateway_that_is_back_serves_at_once_when_the_other_one_dies(plain: LocalMesh, tmp_path: Path) -> None:
    def ask() -> int:
        return httpx.post(f"{url}/api/v1/inference", json={"tokens": [5], "max_tokens": 1}, timeout=60).status_code

    with edges.gateways(2, plain.url, tmp_path) as running, edges.nginx([edges.url_of(one) for one in running.values()], tmp_path) as url:
        first, second = running.values()
        first.kill()
        assert [ask() for _ in range(4)] == [200] * 4  # nginx has found the first one gone
        first.revive()
        edges.wait_for(first)
        second.kill()
        assert [ask() for _ in range(4)] == [200] * 4


def test_the_documented_nginx_is_the_one_that_is_tested() -> None:
    page = (DOCS / "http.md").read_text()
    documented = page.partition("```nginx")[2].partition("```")[0]
    directives = {line.partition("#")[0].strip() for line in documented.splitlines()} - {"", "}"}
    asked = {line for line in directives if line.startswith(("proxy_", "client_"))}
    assert asked and asked <= {line.strip() for line in edges.NGINX.splitlines()}
    servers = [line for line in directives if line.startswith("server ") and line.endswith(";")]
    assert servers and all(line.endswith(edges.SERVER.partition("{address}")[2]) for line in servers)
