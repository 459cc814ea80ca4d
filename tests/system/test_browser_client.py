"""OpenAI's own JavaScript client in a web page of another origin: what a browser lets through, and what the client sends."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, chromium
from edge_tools import edge, token, verifier

from mesh.client import MeshClient
from mesh.local.mesh import LocalMesh

PACKAGE = "openai@6"
PAGE = """<!doctype html><title>a page of another origin</title><script type="module">
import OpenAI from "/node_modules/openai/index.mjs";
const client = (options) => new OpenAI({ baseURL: document.title, dangerouslyAllowBrowser: true, maxRetries: 0, ...options });
const ask = { model: "tiny", messages: [{ role: "user", content: "rain" }], temperature: 0, max_tokens: 8 };
const tries = {
  async whole(options) { return (await client(options).chat.completions.create(ask)).choices[0].message.content; },
  async streamed(options) {
    let text = "";
    for await (const part of await client(options).chat.completions.create({ ...ask, stream: true })) text += part.choices[0]?.delta?.content ?? "";
    return text;
  },
  async turns(options) {
    const first = (await client(options).chat.completions.create(ask)).choices[0].message;
    const messages = [...ask.messages, first, { role: "user", content: "and snow?" }];
    return (await client(options).chat.completions.create({ ...ask, messages })).choices[0].finish_reason;
  },
  async models(options) { return (await client(options).models.list()).data.map((model) => model.id).join(); },
  async refused(options) { return client(options).chat.completions.create({ ...ask, model: "another" }).then(() => "no error", (error) => `${error.status} ${error.code}`); },
};
window.run = async (url, options) => {
  document.title = url;
  const found = {};
  for (const [name, what] of Object.entries(tries)) found[name] = await what(options).catch((error) => `${error.status} ${error.message}`);
  window.found = found;
};
window.ready = true;
</script>"""  # noqa: E501


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012 (as declared)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, on a port of its own: another origin than that of any mesh."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder: Path = tmp_path_factory.mktemp("page")
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE} here: {done.stderr.strip()[:200]}")
    (folder / "index.html").write_text(PAGE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def found(browser: Browser, page: str, url: str, key: str) -> dict[str, str]:
    browser.open(f"{page}/index.html")
    browser.until("window.ready")
    browser.js("window.run(...arguments)", f"{url}/v1", {"apiKey": key})
    answers: dict[str, str] = browser.until("window.found")
    return answers


def test_a_page_of_an_allowed_origin_uses_openais_client(mesh: LocalMesh, browser: Browser, page: str) -> None:
    with MeshClient(mesh.url) as native:
        text = native.chat([{"role": "user", "content": "rain"}], max_tokens=8).text
    expected = {"whole": text, "streamed": text, "turns": "length", "models": "tiny", "refused": "404 model_not_found"}
    with edge(mesh.url, cors_origins=(page,), verifier=verifier()) as url:
        assert found(browser, page, url, token("generate")) == expected
        wrong = found(browser, page, url, "wrong")
        assert all(said.startswith("401 ") for said in wrong.values())


def test_a_page_of_another_origin_gets_nothing(mesh: LocalMesh, browser: Browser, page: str) -> None:
    with edge(mesh.url, cors_origins=("https://app.example",), verifier=verifier()) as url:
        assert all(said.startswith("undefined ") for said in found(browser, page, url, token("generate")).values())
