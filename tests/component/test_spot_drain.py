"""The program that a spot instance waits with: a metadata service of the same protocol tells it that the instance is taken back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from places import ROOT

PROGRAM = ROOT / "terraform" / "modules" / "spot" / "files" / "spot_drain.py"


class Metadata(ThreadingHTTPServer):
    """IMDSv2 as AWS documents it: a session by PUT, then GET with its token; 404 for what there is not. `said`: path -> text."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.said = {"instance-id": "i-1", "autoscaling/target-lifecycle-state": "InService"}
        self.asked = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self._answer(200, "token" if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        path = self.path.removeprefix("/latest/meta-data/")
        if self.headers["X-aws-ec2-metadata-token"] != "token":
            self._answer(401, "")
        elif path in self.server.said:
            self._answer(200, self.server.said[path])
        else:
            self._answer(404, "")
        if path == "autoscaling/target-lifecycle-state":
            self.server.asked.set()

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("spot/instance-action", '{"action": "terminate", "time": "2026-11-27T00:02:00Z"}'),
        ("events/recommendations/rebalance", '{"noticeTime": "2026-11-27T00:00:00Z"}'),
        ("autoscaling/target-lifecycle-state", "Terminated"),
    ],
)
def test_a_notice_drains_the_shard_and_then_lets_the_instance_go(metadata: Metadata, tmp_path: Path, path: str, text: str) -> None:
    done = tmp_path / "done"
    note = tmp_path / "note.sh"
    note.write_text(f'#!/bin/sh\necho "$0 $*" >> {done}\n')
    note.chmod(0o755)
    words = ["--unit", "mesh-join.service", "--group", "g", "--hook", "drain", "--region", "eu-central-1", "--metadata", metadata.url]
    command = [sys.executable, str(PROGRAM), *words, "--aws", f"{note} aws", "--systemctl", f"{note} systemctl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert metadata.asked.wait(30)  # it has asked for everything once, and nothing has been said
            assert process.poll() is None and not done.exists()
            metadata.said[path] = text
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["drain", "drained", "completed"]
    stopped, completed = done.read_text().splitlines()
    assert stopped.endswith("systemctl stop mesh-join.service")
    assert "complete-lifecycle-action" in completed and "--instance-id i-1" in completed and "CONTINUE" in completed
