"""The metrics of a mesh of real processes, over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
from metric_tools import Values, value, values

from mesh.client import MeshClient
from mesh.local.mesh import LocalMesh


def _until(url: str, name: str, least: float) -> Values:
    """A scrape in which `name` is at least `least`: what was written is sent again for a moment (FRESH_S)."""
    deadline = time.monotonic() + 30
    while value(found := _scrape(url), name) < least:
        assert time.monotonic() < deadline, name
    return found


def _scrape(url: str) -> Values:
    answer = httpx.get(url, timeout=10)
    assert answer.status_code == 200
    return values(answer.content)


def test_every_process_answers_and_its_values_move(mesh: LocalMesh) -> None:
    assert set(mesh.metrics_urls) == {"coordinator-1", "shard-1", "shard-2"}
    names = list(mesh.metrics_urls)
    before = {name: _scrape(mesh.metrics_urls[name]) for name in names}
    with httpx.Client(base_url=mesh.http_urls[0], timeout=60) as http:
        body = {"tokens": [5, 17, 33], "max_tokens": 10, "ignore_eos": True}
        assert http.post("/api/v1/inference", json=body).status_code == 200
        assert http.post("/api/v1/inference", json={"max_tokens": 10}).status_code == 400
        assert http.get("/nothing/here").status_code == 404
    tokens = value(before["coordinator-1"], "mesh_coordinator_tokens_total")
    found = _until(f"{mesh.http_urls[0]}/metrics", "mesh_coordinator_tokens_total", tokens + 10)  # without authentication for everyone
    inference = {"http_request_method": "POST", "http_route": "/api/v1/inference"}
    assert value(found, "http_server_request_duration_seconds_count", **inference, http_response_status_code="200") == 1
    assert value(found, "http_server_request_duration_seconds_count", **inference, http_response_status_code="400") == 1
    assert value(found, "http_server_request_duration_seconds_count", http_route="(no route)", http_response_status_code="404") == 1
    assert value(found, "http_server_active_requests") == 1, "this scrape"
    assert value(found, "mesh_coordinator_tokens_total") == tokens + 10
    for name in ("shard-1", "shard-2"):
        frames = [value(each, "mesh_shard_frames_total", direction="in") for each in (before[name], _scrape(mesh.metrics_urls[name]))]
        assert frames[1] - frames[0] == 10
        assert value(before[name], "mesh_build_info", role="shard") == 1
        assert value(before[name], "process_resident_memory_bytes") > 0


def test_prometheus_targets_name_every_process(mesh: LocalMesh, tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    command = [sys.executable, "-m", "mesh.cli", "status", "--nats", mesh.url, "--prometheus-targets", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    targets = json.loads(file.read_text())
    found = {entry["labels"]["process"]: entry["targets"] for entry in targets if entry["labels"]["role"] == "shard"}
    assert found == {name: [url.split("/")[2]] for name, url in mesh.metrics_urls.items() if name.startswith("shard")}
    (coordinator,) = [entry for entry in targets if entry["labels"]["role"] == "coordinator"]
    assert coordinator["targets"] == [mesh.metrics_urls["coordinator-1"].split("/")[2]]
    assert {entry["labels"]["model"] for entry in targets} == {mesh.manifest.name}
    with MeshClient(mesh.url) as client:
        assert {shard.metrics for shard in client.status().shards} == {mesh.metrics_urls["shard-1"], mesh.metrics_urls["shard-2"]}


def test_a_process_that_is_started_again_answers_on_the_same_port(mesh: LocalMesh) -> None:
    url = mesh.metrics_urls["shard-2"]
    started = value(_scrape(url), "process_start_time_seconds")
    mesh.restart("shard-2")
    with MeshClient(mesh.url) as client:
        while not any(
            s.shard == "shard-2" and s.state == "ready" and s.pid == mesh.processes["shard-2"].pid for s in client.status().shards
        ):
            pass
    assert value(_scrape(url), "process_start_time_seconds") > started
