"""The logs of a mesh of processes: a request can be followed by its id, and nothing secret is in any line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_process import Gateway
from waiting import until_true

from mesh.client import MeshClient
from mesh.http.tokens import Issuer
from mesh.local.mesh import LocalMesh, LocalOptions

SECRET = "a-secret-of-at-least-32-characters!"
PROMPT = "xyzzy plugh frobnicate"
SESSION = "my-own-secret-session-0001"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PASSWORD = "mnatspasswordsecret"


def logged(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.log")}


@pytest.fixture
def mesh(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[LocalMesh]:
    monkeypatch.setenv("MESH_LOGGING_LEVEL", "debug")
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setenv(name, value)
    options = LocalOptions(model=model, shards=2, rows=2, context=64, logs=tmp_path / "logs", http=False, password=PASSWORD)
    with LocalMesh(options) as running:
        yield running


def gateway_of(mesh: LocalMesh, folder: Path) -> Gateway:
    content: dict[str, Any] = {
        "gateway": {"listen_port": 0},
        "authentication": {"enabled": True, "secret_key": SECRET},
        "logging": {"level": "debug", "file": str(folder / "logs" / "gateway.log")},
    }
    return Gateway(folder, mesh.url, content, MESH_NATS_USER="mesh", MESH_NATS_PASSWORD=PASSWORD)


def lines_of(text: str, request: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, text.splitlines()) if line.get("request") == request]


@pytest.mark.slow
def test_a_request_is_followed_by_its_id_and_no_secret_is_logged(mesh: LocalMesh, tmp_path: Path) -> None:
    token = Issuer("HS256", SECRET.encode()).issue("team-a", ("generate",), now_unix_s=time.time(), expiry_s=600)
    folder = tmp_path / "logs"
    with gateway_of(mesh, tmp_path) as gateway:
        until_true(lambda: (folder / "gateway.log").exists() and "HTTP on" in (folder / "gateway.log").read_text(), because="it is a file")
        said = next(json.loads(line) for line in (folder / "gateway.log").read_text().splitlines() if "HTTP on" in line)
        url = said["message"].removeprefix("HTTP on ")
        headers = {"authorization": f"Bearer {token}", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        body = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            made = http.post("/api/v1/inference", json=body)
            assert made.status_code == 200, made.text
            assert http.get("/api/v1/batch/b-secret-of-a-batch").status_code == 403
        gateway.process.terminate()
        gateway.ended()
    with MeshClient(options=mesh.bus, model="tiny") as client:
        answer = client.generate(PROMPT, max_tokens=8, ignore_eos=True, session=SESSION)
    id = made.json()["id"]
    mesh.stop()
    logs = logged(folder)
    assert set(logs) == {"gateway", "coordinator-1", "shard-1", "shard-2"}

    (access,) = [line for line in lines_of(logs["gateway"], id) if line["logger"] == "mesh.access"]
    assert access["route"] == "/api/v1/inference" and access["status"] == 200 and access["seconds"] > 0 and access["trace"] == TRACE
    assert access["http_request"] == made.headers["x-request-id"]
    (ended,) = [line for line in lines_of(logs["coordinator-1"], id) if line["logger"] == "mesh.coordinator.access"]
    assert (ended["tokens"], ended["reason"], ended["restarts"], ended["name"][:2]) == (8, "length", 0, "c-")
    for name in ("shard-1", "shard-2"):
        (opened,) = lines_of(logs[name], id)
        assert "opened row" in opened["message"] and opened["shard"] == opened["name"] == name
    assert answer.request != id and lines_of(logs["coordinator-1"], answer.request)

    everything = "".join(logs.values()) + gateway.said
    assert answer.text and made.json()["text"]
    for secret in (PROMPT, "frobnicate", SESSION, token, SECRET, PASSWORD, made.json()["text"], answer.text, "b-secret-of-a-batch"):
        assert secret not in everything, secret


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"MESH_LOGGING_CONTENT": "true"}], indirect=True)
def test_texts_are_logged_where_they_are_asked_for(mesh: LocalMesh, tmp_path: Path) -> None:
    with MeshClient(options=mesh.bus, model="tiny") as client:
        answer = client.generate(PROMPT, max_tokens=4, ignore_eos=True)
    mesh.stop()
    (line,) = [line for line in lines_of(logged(tmp_path / "logs")["coordinator-1"], answer.request) if line["logger"] == "mesh.content"]
    assert line["prompt"] == PROMPT and line["answer"] == answer.text
