"""`mesh gateway` and `mesh token` as commands: files, TLS, who may ask, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from authority import Authority
from edge_tools import bearer, edge, events
from gateway_process import Gateway
from running import Run

from mesh.http.listener import Tls
from mesh.local.mesh import LocalMesh
from mesh.local.nats_server import NatsServer

MESH = [sys.executable, "-m", "mesh.cli"]
LONG = {"tokens": [5], "max_tokens": 50, "ignore_eos": True, "stream": True}
SECRET = "0123456789abcdef0123456789abcdef"


def command(*arguments: str, said: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MESH, *arguments], input=said, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_several_gateways_serve_one_mesh_and_end_in_order(mesh: LocalMesh, tmp_path: Path) -> None:
    """Each of three gateways serves the mesh in turn."""
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Gateway(folder, mesh.url, {"gateway": {"listen_port": 0}}) as running:
            url = running.url()
            with httpx.Client(base_url=url, timeout=60) as http:
                assert http.get("/api/v1/health").status_code == 200
                with http.stream(
                    "POST", "/api/v1/inference", json={"tokens": [5], "max_tokens": 50, "ignore_eos": True, "stream": True}
                ) as answer:
                    coming = events(answer)
                    next(coming)
                    running.process.send_signal(signal.SIGTERM)  # a request under way may end
                    last = [json.loads(data) for data in coming][-1]
                assert last["done"] and len(last["tokens"]) == 50
            assert running.process.wait(60) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/api/v1/health/live")


def test_with_tls_tokens_and_client_certificates(mesh: LocalMesh, tmp_path: Path) -> None:
    """The file of the guide: its tls and authentication sections, the secret from the environment."""
    authority = Authority(tmp_path / "tls")
    server, client = authority.issue("server"), authority.issue("client")
    files = {"cert_file": str(server.cert), "key_file": str(server.key), "ca_file": str(authority.ca)}
    content = {
        "gateway": {"listen_host": "0.0.0.0", "listen_port": 0},
        "tls": {**files, "enabled": True, "require_client_certificate": True},
        "authentication": {"enabled": True, "method": "jwt", "secret_key": "${JWT_SECRET}", "token_expiry": "24h"},
    }  # fmt: skip
    with Gateway(tmp_path, mesh.url, content, JWT_SECRET=SECRET) as running:
        url = running.url()
        assert url.startswith("https://")
        config = str(tmp_path / "gateway.yaml")
        issued = command("token", "issue", "--config", config, "--subject", "team-a", JWT_SECRET=SECRET)
        assert issued.returncode == 0, issued.stderr
        token = issued.stdout.strip()
        trust = ssl.create_default_context(cafile=str(authority.ca))
        with httpx.Client(base_url=url, verify=trust) as stranger, pytest.raises(httpx.TransportError):
            stranger.get("/api/v1/health/live")
        trust.load_cert_chain(client.cert, client.key)
        with httpx.Client(base_url=url, verify=trust, timeout=60) as http:
            assert http.get("/api/v1/health").status_code == 200
            assert "strict-transport-security" in http.get("/api/v1/health/live").headers
            body = {"tokens": [5], "max_tokens": 3}
            assert http.post("/api/v1/inference", json=body).status_code == 401
            assert http.post("/api/v1/inference", json=body, headers=bearer(token)).status_code == 200
            assert http.get("/api/v1/stats", headers=bearer(token)).status_code == 403
        running.wait("team-a")
        said = running.said
        assert SECRET not in said and token not in said


def test_a_client_certificate_is_optional_where_it_is_not_required(mesh: LocalMesh, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    pair, other = authority.issue("server"), Authority(tmp_path / "other").issue("client")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    with edge(mesh.url, listener={"tls": Tls(str(pair.cert), str(pair.key), str(authority.ca))}) as url:
        assert httpx.get(f"{url}/api/v1/health/live", verify=trust).status_code == 200
        trust.load_cert_chain(other.cert, other.key)
        with pytest.raises(httpx.TransportError):  # one that is shown must be genuine
            httpx.get(f"{url}/api/v1/health/live", verify=trust)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"gateway": {"listen_host": "0.0.0.0"}},
            "is on because 0.0.0.0 is not loopback, and has no key: set authentication.secret_key",
        ),
        ({"authentication": {"enabled": True, "secret_key": "short"}}, "at least 32"),
        ({"authentication": {"enabled": True, "algorithm": "RS256"}}, "set authentication.public_key_file"),
        ({"authentication": {"algorithm": "none"}}, "authentication.algorithm"),
        ({"authentication": {"algorithm": "RS256", "secret_key": SECRET}}, "RS256 has a key pair and no secret"),
        ({"authentication": {"enabled": True, "secret_key_file": "/nowhere"}}, "authentication.secret_key_file /nowhere"),
        ({"tls": {"cert_file": "/nowhere", "key_file": "/nowhere"}}, "TLS files /nowhere"),
        ({"tls": {"cert_file": "a", "key_file": "b", "require_client_certificate": True}}, "require_client_certificate needs ca_file"),
        ({"gateway": {"listen_port": 70000}}, "gateway.listen_port"),
        ({"gateway": {"listen_host": "203.0.113.7"}, "authentication": {"enabled": False}}, "no such address"),
    ],
)
def test_a_file_that_cannot_be_right_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(yaml.safe_dump(content))
    ended = command("gateway", "--config", str(config))
    assert ended.returncode == 2 and says in ended.stderr, ended.stderr
    assert ended.stderr.count("\n") == 1 and SECRET not in ended.stderr


def test_a_port_that_is_taken_is_named(mesh: LocalMesh, tmp_path: Path) -> None:
    with edge(mesh.url) as url:
        port = url.rpartition(":")[2]
        ended = command("gateway", "--nats", mesh.url, "--http-port", port)
    assert ended.returncode == 2 and f"127.0.0.1:{port}: the port is taken" in ended.stderr


def test_without_a_mesh_it_lives_and_is_not_ready() -> None:
    with NatsServer.start() as server, edge(server.url, model=None) as url, httpx.Client(base_url=url, timeout=60) as http:
        empty = http.get("/api/v1/health")
        assert empty.status_code == 503 and "no coordinator answers" in empty.json()["reason"]
        assert http.post("/api/v1/inference", json={"prompt": "a"}).status_code == 503
        assert http.get("/v1/models").json()["data"] == []
        server.stop()
        lost = http.get("/api/v1/health")
        assert lost.status_code == 503 and lost.json()["status"] == "not_ready"
        assert http.get("/api/v1/health/live").status_code == 200


def test_tokens_are_issued_and_inspected(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    issue = ("token", "issue", "--secret-key-file", str(secret), "--subject", "me")
    token = command(*issue, "--scope", "generate,batch", "--expiry", "2h", "--requests-per-minute", "5").stdout.strip()
    seen = command("token", "inspect", "--secret-key-file", str(secret), said=token)
    shown = json.loads(seen.stdout)
    assert seen.returncode == 0 and shown["verdict"] == "genuine" and shown["algorithm"] == "HS256"
    claims = shown["claims"]
    assert (claims["sub"], claims["scope"], claims["rpm"], claims["exp"] - claims["iat"]) == ("me", "batch generate", 5, 7200)
    other = command("token", "inspect", said=token, MESH_AUTHENTICATION_SECRET_KEY="x" * 32)
    assert other.returncode == 1 and json.loads(other.stdout)["verdict"].startswith("refused: the token's signature")
    unchecked = command("token", "inspect", said=token)
    assert unchecked.returncode == 1 and json.loads(unchecked.stdout)["verdict"].startswith("not checked")
    for arguments, says in [
        (("token", "issue", "--subject", "me"), "there is no key to sign with"),
        ((*issue, "--scope", "root"), "scope root"),
        (("token", "inspect"), "not a JSON Web Token"),
        (("token", "inspect", token), "on standard input"),
        (("status", "--nats", "nats://user:secret@127.0.0.1:1"), "--nats-password-file"),
    ]:
        ended = command(*arguments)
        assert ended.returncode == 2 and says in ended.stderr


def test_a_shard_reports_its_state_and_its_counters(mesh: LocalMesh, run: Run) -> None:
    from mesh.client import MeshClient

    with MeshClient(mesh.url) as client:
        client.generate(tokens=[1, 2, 3], max_tokens=5)
        shards = client.status().shards
    assert [shard.http.startswith("http://127.0.0.1:") for shard in shards] == [True, True]
    for shard in shards:
        health = httpx.get(f"{shard.http}/api/v1/health")
        assert health.status_code == 200
        assert health.json() == {
            "status": "ready", "reason": "", "shard": shard.shard, "model": "tiny", "layers": str(shard.layers), "state": "ready",
        }  # fmt: skip
        stats = httpx.get(f"{shard.http}/api/v1/stats").json()
        assert stats["layers"] == str(shard.layers) and stats["memory_bytes"] > 1e6 and stats["prefill_tokens"] >= 3
        assert httpx.get(f"{shard.http}/nothing").status_code == 404
        assert httpx.post(f"{shard.http}/api/v1/stats").headers["allow"] == "GET, HEAD"
        assert httpx.get(f"{shard.http}/api/v1/health/live").json() == {"status": "live"}
