"""A client that is not ours: JavaScript, with the NATS project's own package from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from oracle import Oracle

from mesh.local.mesh import LocalMesh

PACKAGE = "@nats-io/transport-node@3"
SCRIPT = """
import { connect } from "@nats-io/transport-node";
const [url, subject] = process.argv.slice(2);
const connection = await connect({ servers: url });
const say = (request) => JSON.stringify(request);
const single = await connection.request(subject, say({ tokens: [5, 17, 33], max_tokens: 6 }), { timeout: 60000 });
const streamed = [];
const answers = await connection.requestMany(
  subject, say({ tokens: [5, 17, 33], max_tokens: 6, stream: true }), { strategy: "sentinel", maxWait: 60000 });
for await (const message of answers) {
  if (message.data.length === 0) break;
  streamed.push(message.json());
  if (streamed.at(-1).done) break;
}
const refused = await connection.request(subject, say({ tokens: [5], max_tokens: 0 }), { timeout: 60000 });
console.log(say({
  single: single.json(), streamed,
  code: refused.headers.get("Nats-Service-Error-Code"), error: refused.headers.get("Nats-Service-Error"),
}));
await connection.close();
"""


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE} here: {done.stderr.strip()[:200]}")
    (folder / "ask.mjs").write_text(SCRIPT)
    return folder


def test_a_javascript_client_generates_streams_and_reads_errors(mesh: LocalMesh, oracle: Oracle, node_project: Path) -> None:
    done = subprocess.run(
        ["node", "ask.mjs", mesh.url, "mesh.v1.tiny.generate"], cwd=node_project, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    expected = oracle.greedy([5, 17, 33], 6)
    assert said["single"]["tokens"] == expected
    first, *tokens, last = said["streamed"]
    assert first["done"] is False and first["cancel"].startswith("mesh.v1.tiny.cancel.")
    assert [message["token"] for message in tokens] == expected
    assert last["done"] is True and last["tokens"] == expected
    assert said["code"] == "400" and "max_tokens" in said["error"]
