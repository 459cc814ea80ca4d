"""Embeddings that a model cannot make are a clear error of their request: its head is not one product with the vocabulary, or a hidden
state is no vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from edge_tools import edge
from running import Run
from serving import coordinator, shards
from tiny_mesh_model import make_source

from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import sha256
from mesh.types import even_ranges


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a second product of its vocabulary, added to the first."""
    folder = tmp_path_factory.mktemp("mixed")
    path = make_source(folder / "source") / "model.onnx"
    model = onnx.load(path)
    product = [node for node in model.graph.node if node.op_type == "MatMul"][-1]
    logits, product.output[0] = product.output[0], "first"
    weight = next((each for each in model.graph.initializer if each.name == product.input[1]), None)
    assert weight is not None, "the export multiplies with an initializer"
    other = onnx.TensorProto()
    other.CopyFrom(weight)
    other.name = "other"
    model.graph.initializer.append(other)
    model.graph.node.append(onnx.helper.make_node("MatMul", [product.input[0], "other"], ["second"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["first", "second"], [logits]))
    onnx.save(model, path)
    import_model(folder / "source", folder / "mixed", ImportOptions(), name="mixed")
    return folder / "mixed"


def test_a_model_without_a_hidden_state_to_read_says_so_at_once(server: NatsServer, mixed: Path, run: Run) -> None:
    async def ask() -> None:
        async with shards(server.url, mixed, even_ranges(3, 2)), coordinator(server.url, mixed), AsyncMeshClient(server.url) as client:
            answer = await client.generate(tokens=[5, 17], max_tokens=3, ignore_eos=True, model="mixed")
            assert len(answer.tokens) == 3
            with pytest.raises(BadRequest, match="mixed gives no embeddings") as refused:
                await client.embed([[5, 17]], model="mixed")
            assert refused.value.field == "embed"
            assert client.sent_again == 0

    run(ask())


BROKEN = 7


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The tiny model, with NaN in place of the embedding of the token BROKEN."""
    folder = tmp_path_factory.mktemp("holed") / "tiny"
    shutil.copytree(model, folder)
    table = folder / "embed.onnx.data"
    numbers = np.fromfile(table, np.float32)
    numbers.reshape(96, -1)[BROKEN] = np.nan
    numbers.tofile(table)
    manifest = json.loads((folder / "manifest.json").read_text())
    next(file for file in manifest["blocks"][0]["files"] if file["name"] == table.name)["sha256"] = sha256(table)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_hidden_state_that_is_no_vector_is_an_error_of_its_request_alone(server: NatsServer, holed: Path, run: Run) -> None:
    async def ask() -> None:
        async with shards(server.url, holed, even_ranges(3, 2)), coordinator(server.url, holed), AsyncMeshClient(server.url) as client:
            with pytest.raises(BadRequest, match="NaN or infinite") as refused:
                await client.embed([[5, BROKEN]], model="tiny")
            assert refused.value.field == "prompt" and client.sent_again == 0
            (whole,) = (await client.embed([[5, 17]], model="tiny")).vectors
            assert np.isfinite(whole).all()
            with edge(server.url) as url:
                async with httpx.AsyncClient(base_url=url) as http:
                    for encoding in ("float", "base64"):
                        body = {"model": "tiny", "input": [[5, 17], [5, BROKEN]], "encoding_format": encoding}
                        answer = await http.post("/v1/embeddings", json=body)
                        error = answer.json()["error"]
                        assert (answer.status_code, error["param"]) == (400, "input.1") and "NaN or infinite" in error["message"]

    run(ask())
