"""Two models in one mesh: one NATS server, one gateway, and each model with shards and coordinators of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running import Run
from tiny_chat_model import make_chat_model

from mesh.client import AsyncMeshClient, MeshClient
from mesh.errors import BadRequest
from mesh.local.mesh import LocalMesh, LocalOptions, OtherModel
from mesh.local.running import announced
from mesh.model.manifest import Manifest
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

PROMPT = [5, 17, 33]
LONG = 220
"""Tokens of an answer that is generated while another model's processes die."""
Commands = Any


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def mesh(model: Path, other_model: Path) -> Iterator[LocalMesh]:
    """A secure one, so that the gateway has the rights of its role alone."""
    options = LocalOptions(model=model, rows=4, context=256, secure=True, http_port=0, others=(OtherModel(other_model),))
    with LocalMesh(options) as running:
        yield running


@pytest.fixture(scope="module")
def url(mesh: LocalMesh) -> str:
    (url,) = mesh.http_urls
    return url


@pytest.fixture(scope="module")
def expected(model: Path, other_model: Path) -> dict[str, list[int]]:
    """The tokens of each model by one process."""
    return {
        directory.name: Pipeline.load(directory, context=256).complete(PROMPT, SamplingParams(temperature=0.0), max_tokens=LONG).ids
        for directory in (model, other_model)
    }


@pytest.fixture(scope="module")
def commands(mesh: LocalMesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs a command of the line, which finds the mesh by itself."""
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MESH_NATS")}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, "-m", "mesh.cli", *arguments]
            return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)

        with announced(mesh.url, settings=mesh.settings):
            yield run


def test_every_model_is_listed_and_requests_are_routed_by_name(mesh: LocalMesh, url: str, expected: dict[str, list[int]]) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert sorted(model.id for model in client.models.list()) == ["tiny", "tinychat"]
        with pytest.raises(openai.NotFoundError, match="there is tiny, tinychat"):
            client.completions.create(model="another", prompt="a")
        for name in expected:
            assert client.completions.create(model=name, prompt=PROMPT, max_tokens=3).model == name
    with httpx.Client(base_url=url, timeout=60) as http, MeshClient(options=mesh.bus) as native:
        for name, ids in expected.items():
            request: dict[str, Any] = {"tokens": PROMPT, "max_tokens": 12, "model": name, "ignore_eos": True}
            assert http.post("/api/v1/inference", json=request).json()["tokens"] == ids[:12]
            assert list(native.generate(**request).tokens) == ids[:12]
        unsaid = http.post("/api/v1/inference", json={"prompt": "a"})
        assert unsaid.status_code == 400 and "there are several models, tiny, tinychat" in unsaid.json()["error"]["message"]
        with pytest.raises(BadRequest, match="there are several models, tiny, tinychat"):
            native.generate("a")
        assert {model["model"]: model["ready"] for model in http.get("/api/v1/health").json()["models"]} == {"tiny": True, "tinychat": True}


def test_commands_say_which_model_a_process_serves_and_take_its_name(commands: Commands, expected: dict[str, list[int]]) -> None:
    status = json.loads(commands("status", "--json").stdout)
    assert status["ready"] and sorted(shard["model"] for shard in status["shards"]) == ["tiny", "tinychat"]
    shown = commands("status").stdout
    assert "tiny" in shown and "tinychat" in shown and "shard-2" in shown
    one = json.loads(commands("status", "--json", "--model", "tinychat").stdout)
    assert [shard["shard"] for shard in one["shards"]] == ["shard-2"]
    tokens = ",".join(map(str, PROMPT))
    for name, ids in expected.items():
        done = commands("generate", "--model", name, "--tokens", tokens, "--max-tokens", "5", "--ignore-eos", "--json")
        assert json.loads(done.stdout)["tokens"] == ids[:5]
    unsaid = commands("generate", "a")
    assert unsaid.returncode == 2 and "there are several models, tiny, tinychat" in unsaid.stderr
    assert "tinychat" in commands("trace", "--model", "tinychat").stdout


def test_a_model_whose_processes_are_killed_leaves_the_other_alone(
    mesh: LocalMesh, url: str, run: Run, expected: dict[str, list[int]]
) -> None:
    """Its shard and its coordinator die, again and again, while the other model answers."""
    victims = ("shard-2", "coordinator-2")

    async def stream_meanwhile() -> None:
        async with AsyncMeshClient(options=mesh.bus, model="tiny") as client:
            tokens: list[int] = []
            async with client.stream(tokens=PROMPT, max_tokens=LONG, ignore_eos=True) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    if len(tokens) == 40:
                        for name in victims:
                            os.kill(mesh.processes[name].pid, signal.SIGKILL)
            assert tokens == expected["tiny"]
            assert stream.completion is not None and stream.completion.timing.restarts == 0
            stats = [c.stats for c in await client.coordinators() if c.model == "tiny"]
            assert stats and stats[0].serving and stats[0].failed == 0

    with httpx.Client(base_url=url, timeout=60) as http:
        assert len(http.get("/v1/models").json()["data"]) == 2
        run(stream_meanwhile())
        assert http.post("/api/v1/inference", json={"tokens": PROMPT, "max_tokens": 5, "model": "tiny"}).status_code == 200
        health = http.get("/api/v1/health")
        assert health.status_code == 200, "the gateway serves the other model"
        assert http.get("/api/v1/health", params={"model": "tiny"}).status_code == 200
        for name in victims:
            mesh.restart(name)
        request = {"tokens": PROMPT, "max_tokens": 5, "model": "tinychat", "ignore_eos": True}
        answer = http.post("/api/v1/inference", json=request)
        while answer.status_code == 503:  # the gateway has asked again and again, as long as it waits for a coordinator
            answer = http.post("/api/v1/inference", json=request)
        assert answer.status_code == 200, answer.text
        assert answer.json()["tokens"] == expected["tinychat"][:5]


def test_two_models_of_one_name_are_refused(model: Path, other_model: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(other_model)
    manifest.model_copy(update={"name": "tiny"}).save(tmp_path)
    with pytest.raises(BadRequest, match="have one name, tiny: import one of them under another --name"):
        LocalMesh(LocalOptions(model=model, others=(OtherModel(tmp_path),)))


def test_mesh_up_serves_several_models_and_each_answers(model: Path, other_model: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mesh.cli", "up", str(model), str(other_model), "--rows", "2", "--context", "64", "--http-port", "0"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([*line, "--ask", "hi", "--max-tokens", "3"], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tiny is served by 1 shard" in done.stderr and "tinychat is served by 1 shard" in done.stderr
    assert done.stdout.startswith("tiny:\n") and "\ntinychat:\n" in done.stdout
    wrong = subprocess.run([*line, "--shards", "1,2,3"], capture_output=True, text=True, env=environment, timeout=60)
    assert wrong.returncode == 2 and "--shards has 3 numbers for 2 models" in wrong.stderr
