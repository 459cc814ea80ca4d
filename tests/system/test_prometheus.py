"""Debian's Prometheus scrapes a running mesh: every query of every panel and alert, and an alert that comes and goes.

`make test-monitoring` runs this file. It takes two minutes, so `make test` leaves it out (MESH_TEST_PROMETHEUS).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import dashboards
import httpx
import pytest
import yaml
from clusters import free_ports

from mesh.host.process import dying_with_parent
from mesh.local.mesh import LocalMesh, LocalOptions

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
PROMETHEUS = shutil.which("prometheus")
FIXTURES = Path(__file__).parents[1] / "fixtures"
DEADLINE_S = 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: apt install prometheus)"),
    pytest.mark.skipif(not os.environ.get("MESH_TEST_PROMETHEUS"), reason="takes two minutes: make test-monitoring"),
]


class Prometheus:
    """A running server with the shipped configuration; scrapes and evaluations come every second instead of every 15."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """Alert -> pending or firing."""
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        return {alert["labels"]["alertname"]: alert["state"] for alert in answer["data"]["alerts"]}

    def until(self, holds: Callable[[], bool], what: str) -> float:
        """Seconds until it holds."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < DEADLINE_S, f"{what}: {self.alerts()}"
            time.sleep(0.25)  # Prometheus can only be asked
        return time.monotonic() - began


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(LocalOptions(model=model, shards=2, rows=4, context=64)) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(mesh: LocalMesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["scrape_timeout"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yml", folder)
    command = [sys.executable, "-m", "mesh.cli", "status", "--nats", mesh.url, "--prometheus-targets", str(folder / "mesh-targets.json")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    (port,) = free_ports(1)
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(dying_with_parent([str(PROMETHEUS), *arguments]), stdout=log, stderr=log)
    try:
        running = Prometheus(folder, f"http://127.0.0.1:{port}")
        running.until(lambda: _ready(running.url), (folder / "log").read_text())
        yield running
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def traffic(mesh: LocalMesh) -> Iterator[None]:
    """Requests, right and wrong ones, again and again."""
    ending = threading.Event()
    body = {"tokens": [5, 17, 33], "max_tokens": 30, "ignore_eos": True}

    def load() -> None:
        with httpx.Client(base_url=mesh.http_urls[0], timeout=60) as http:
            while not ending.is_set():
                http.post("/api/v1/inference", json=body)
                http.post("/api/v1/inference", json={"prompt": "a b", "max_tokens": 2})
                http.post("/api/v1/inference", json={"max_tokens": 1})
                ending.wait(0.1)

    thread = threading.Thread(target=load)
    thread.start()
    yield
    ending.set()
    thread.join()


@pytest.fixture(scope="module")
def gpu(prometheus: Prometheus) -> Iterator[None]:
    """What a shard on an H200 reported before and after a load (bench/gpu.py), scraped as if that shard were here."""
    texts, asked = [(FIXTURES / f"gpu_metrics_{when}.txt").read_bytes() for when in ("before", "after")], count()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(texts[next(asked) >= 3])

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        targets = prometheus.folder / "mesh-targets.json"
        groups = json.loads(targets.read_text())
        groups.append({"targets": [f"127.0.0.1:{server.server_port}"], "labels": {"role": "shard"}})
        targets.write_text(json.dumps(groups))
        prometheus.until(lambda: bool(prometheus.query('rate(mesh_shard_busy_seconds_total{shard="gpu-1"}[10s]) > 0')), "the GPU's shard")
        yield
        targets.write_text(json.dumps(groups[:-1]))
        server.shutdown()


def _expanded(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$__rate_interval", "10s").replace("$model", ".*").replace("$shard", ".*")


def test_every_panel_and_every_alert_is_answered(prometheus: Prometheus, traffic: None, gpu: None) -> None:
    prometheus.until(lambda: len(prometheus.query("up == 1")) == 4, "three processes and the GPU's shard")
    prometheus.until(lambda: bool(prometheus.query("rate(mesh_coordinator_tokens_total[10s]) > 0")), "tokens")
    prometheus.until(lambda: bool(prometheus.query("mesh:first_token_late:ratio_rate6h")), "recording rules")
    panels = [panel for _, rows in dashboards.ALL.values() for row in rows for panel in row.panels]
    empty = []
    for panel in panels:
        for query, _ in panel.queries:
            if not prometheus.query(_expanded(query)):
                empty.append(f"{panel.title}: {query}")
    assert not empty
    rules = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        prometheus.query(rule["expr"])
    groups = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert {state for state, _ in health.values()} == {"ok"}, health
    assert prometheus.alerts() == {}, "nothing is wrong with this mesh"


def test_a_killed_shard_raises_its_alerts_and_its_return_clears_them(mesh: LocalMesh, prometheus: Prometheus) -> None:
    wanted = {"MeshShardLost", "MeshRangeDead", "MeshTargetDown"}
    prometheus.until(lambda: len(prometheus.query("up == 1")) >= 3, "three processes")
    mesh.processes["shard-2"].kill()
    mesh.processes["shard-2"].wait()  # nobody supervises it here
    firing = prometheus.until(lambda: wanted <= {name for name, state in prometheus.alerts().items() if state == "firing"}, "alerts")
    mesh.restart("shard-2")
    clear = prometheus.until(lambda: not wanted & set(prometheus.alerts()), "alerts are over")
    print(json.dumps({"firing_after_s": round(firing, 1), "clear_after_s": round(clear, 1)}))
