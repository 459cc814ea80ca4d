"""A model whose head is not one product with the vocabulary gives tokens, and a clear error in place of an embedding."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from running import Run
from serving import coordinator, shards
from tiny_mesh_model import make_source

from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.nats_server import NatsServer
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
