"""Forms of export that the fixtures do not have, made by hand: expert loops, constant branches, einsum, old opsets, one row."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from ort_chain import Chain, relative_error
from ort_source import SourceSession

from mesh.errors import UnsupportedModel
from mesh.importer.sources.onnx import open_source
from mesh.importer.sources.source import ImportOptions
from mesh.importer.write.blocks import BlockWriter

HIDDEN, HEADS, VOCAB = 16, 2, 24


@dataclass
class Graph:
    """A decoder of one layer without a cache, built step by step."""

    opset: int = 18
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(value)
        return name

    def normal(self, *shape: int, scale: float = 0.4) -> str:
        rng = np.random.default_rng(self.seed + len(self.weights))
        return self.const(rng.normal(0, scale, shape).astype(np.float32))

    def embedding(self) -> str:
        return str(self.op("Gather", self.normal(VOCAB, HIDDEN, scale=1.0), "input_ids"))

    def heads(self, x: str) -> str:
        split = self.op("Reshape", self.op("MatMul", x, self.normal(HIDDEN, HIDDEN)), self.const([0, 0, HEADS, HIDDEN // HEADS]))
        return str(split)

    def unsqueeze(self, x: str, axis: int) -> str:
        """Axes are an input since opset 13, and an attribute before."""
        if self.opset >= 13:
            return str(self.op("Unsqueeze", x, self.const([axis])))
        return str(self.op("Unsqueeze", x, axes=[axis]))

    def mask(self) -> str:
        """float [T, T], very low above the diagonal."""
        length = self.op("Shape", "input_ids")
        length = self.op("Gather", length, self.const([1]))
        positions = self.op("Range", self.const(0), self.op("Squeeze", length), self.const(1))
        rows, columns = self.unsqueeze(positions, 1), self.unsqueeze(positions, 0)
        zero, low = self.const(np.float32(0)), self.const(np.float32(-1e9))
        return str(self.op("Where", self.op("Greater", columns, rows), low, zero))

    def attention(self, x: str) -> str:
        q, k, v = (self.op("Transpose", self.heads(x), perm=[0, 2, 1, 3]) for _ in range(3))
        raw = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Div", raw, self.const(np.float32(8**0.5))), self.mask())
        context = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=3), v), perm=[0, 2, 1, 3])
        merged = self.op("Reshape", context, self.const([0, 0, HIDDEN]))
        return str(self.op("Add", x, self.op("MatMul", merged, self.normal(HIDDEN, HIDDEN))))

    def save(self, path: Path, x: str, batch: int | str = "batch") -> Path:
        self.nodes.append(helper.make_node("MatMul", [x, self.normal(HIDDEN, VOCAB)], ["logits"]))
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, "t"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, "t", VOCAB])],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8), path)
        return path


def agrees(path: Path, directory: Path) -> None:
    source = open_source(path)
    source.write_blocks(BlockWriter(directory), ImportOptions(), lambda *_: None)
    chain, prompt = Chain(directory, source.cache, 64), [int(t) for t in np.random.default_rng(3).integers(0, VOCAB, 21)]
    expected = SourceSession(path)(prompt)
    got = np.concatenate([chain(prompt[:9]), chain(prompt[9:10]), chain(prompt[10:])])
    assert relative_error(got, expected) < 1e-5


def experts(g: Graph, x: str, *, adds: bool) -> str:
    """Two of three experts a token, each over the rows that where() finds; put back as torch's exporter does."""
    flat = g.op("Reshape", x, g.const([-1, HIDDEN]))
    weights, chosen = g.op("TopK", g.op("Softmax", g.op("MatMul", flat, g.normal(HIDDEN, 3)), axis=-1), g.const([2]), outputs=2)
    hot = g.op("OneHot", chosen, g.const([3]), g.const([0, 1]), axis=-1)
    by_expert = g.op("Transpose", hot, perm=[2, 1, 0])
    total = g.op("ConstantOfShape", g.op("Shape", flat), value=numpy_helper.from_array(np.zeros(1, np.float32)))
    empty = total
    for expert in range(3):
        found = g.op("NonZero", g.op("Cast", g.op("Gather", by_expert, g.const(expert), axis=0), to=TensorProto.BOOL))
        place, row = (g.op("Squeeze", part, g.const([0])) for part in g.op("Split", found, num_outputs=2, axis=0, outputs=2))
        inner = g.op("Relu", g.op("MatMul", g.op("Gather", flat, row, axis=0), g.normal(HIDDEN, 20)))
        where = g.op("Concat", g.op("Unsqueeze", row, g.const([1])), g.op("Unsqueeze", place, g.const([1])), axis=1)
        weight = g.op("Unsqueeze", g.op("GatherND", weights, where), g.const([1]))
        update = g.op("Mul", g.op("MatMul", inner, g.normal(20, HIDDEN)), weight)
        if adds:
            total = g.op("ScatterND", total, g.op("Unsqueeze", row, g.const([1])), update, reduction="add")
        else:
            index = g.op("Expand", g.op("Unsqueeze", row, g.const([1])), g.op("Shape", update))
            total = g.op("Add", total, g.op("ScatterElements", empty, index, update, axis=0))
    return str(g.op("Add", x, g.op("Reshape", total, g.op("Shape", x))))


@pytest.mark.parametrize("adds", [True, False])
def test_a_loop_over_experts_becomes_static(adds: bool, tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path / "m.onnx", experts(g, g.attention(g.embedding()), adds=adds))
    agrees(path, tmp_path)
    layer = onnx.load(tmp_path / "layer_000.onnx", load_external_data=False)
    assert "NonZero" not in {node.op_type for node in layer.graph.node}


def test_a_choice_of_tokens_that_is_not_added_back_is_refused(tmp_path: Path) -> None:
    g = Graph()
    x = g.attention(g.embedding())
    rows = g.op(
        "Squeeze",
        g.op("Slice", g.op("NonZero", g.op("Relu", g.op("ReduceSum", x, g.const([0, 2]), keepdims=0))), g.const([0]), g.const([1])),
    )
    with pytest.raises(UnsupportedModel, match="not added back"):
        open_source(g.save(tmp_path / "m.onnx", g.op("Gather", x, rows, axis=1)))


def test_branches_on_sizes_that_never_vary_are_taken(tmp_path: Path) -> None:
    g = Graph()
    x = g.attention(g.embedding())
    size = g.op("Gather", g.op("Shape", x), g.const([2]))
    branches = {}
    for name, op_type in (("then_branch", "Relu"), ("else_branch", "Neg")):
        node = helper.make_node(op_type, [x], [f"{name}_out"])
        branches[name] = helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)])
    chosen = g.op("If", g.op("Equal", size, g.const([HIDDEN])), **branches)
    agrees(g.save(tmp_path / "m.onnx", chosen), tmp_path)


def test_attention_by_einsum(tmp_path: Path) -> None:
    g = Graph()
    x = g.embedding()
    q, k, v = (g.heads(x) for _ in range(3))
    scores = g.op("Add", g.op("Mul", g.op("Einsum", q, k, equation="bqhd,bkhd->bhqk"), g.const(np.float32(0.5))), g.mask())
    context = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="bhqk,bkhd->bqhd")
    y = g.op("Add", x, g.op("MatMul", g.op("Reshape", context, g.const([0, 0, HIDDEN])), g.normal(HIDDEN, HIDDEN)))
    agrees(g.save(tmp_path / "m.onnx", y), tmp_path)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 21])
def test_opsets(opset: int, tmp_path: Path) -> None:
    g = Graph(opset=opset)
    agrees(g.save(tmp_path / "m.onnx", g.attention(g.embedding())), tmp_path)


def test_an_opset_out_of_range_is_refused(tmp_path: Path) -> None:
    g = Graph(opset=9)
    with pytest.raises(UnsupportedModel, match="opset 9: export it with an opset of 11 to 24"):
        open_source(g.save(tmp_path / "m.onnx", g.embedding()))


def test_an_export_for_one_row_takes_several(tmp_path: Path) -> None:
    g = Graph()
    x = g.attention(g.embedding())
    fixed = g.op("Reshape", g.op("Reshape", x, g.const([1, -1, 4, 4])), g.const([1, -1, HIDDEN]))
    source = open_source(g.save(tmp_path / "m.onnx", fixed, batch=1))
    source.write_blocks(BlockWriter(tmp_path), ImportOptions(), lambda *_: None)
    two = Chain(tmp_path, source.cache, 16)
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, 7))
    two.caches = [[np.zeros((2, *part.shape[1:]), part.dtype) for part in layer] for layer in two.caches]
    embed, layer, head = two.sessions
    positions = np.tile(np.arange(7), (2, 1))
    hidden = embed.run(None, {"input_ids": tokens})[0]
    feeds = {"hidden_in": hidden, "position_ids": positions, "write_indices": positions[:, 0].copy()}
    hidden = layer.run(["hidden_out"], feeds | {"past_key": two.caches[0][0], "past_value": two.caches[0][1]})[0]
    got = head.run(None, {"hidden_in": hidden})[0]
    for row in range(2):
        assert relative_error(got[row], SourceSession(tmp_path / "m.onnx")([int(t) for t in tokens[row]])) < 1e-5


MEASURE = """
import resource
import sys
from pathlib import Path
from mesh.importer.write.blocks import BlockWriter
from mesh.importer.sources.onnx import open_source
from mesh.importer.sources.source import ImportOptions
source = open_source(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.write_blocks(BlockWriter(Path(sys.argv[2])), ImportOptions(), lambda *_: None)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_weights_are_streamed_block_by_block(tmp_path: Path) -> None:
    """A model of 16 blocks of 32 MiB: importing it takes the memory of a few, not of all. Mapped file pages count as well."""
    g = Graph()
    x = g.embedding()
    size, layers = 2048, 8
    data = tmp_path / "m.data"
    external: list[onnx.TensorProto] = []
    with data.open("wb") as file:
        file.truncate(layers * 2 * HIDDEN * 4 * size * 128)
    for layer in range(layers):
        x = g.attention(x)
        inner = x
        for name, dims in ((f"up{layer}", (HIDDEN, size * 128)), (f"down{layer}", (size * 128, HIDDEN))):
            inner = g.op("MatMul", inner, name)
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
            nbytes = 4 * dims[0] * dims[1]
            for key, value in (("location", "m.data"), ("offset", str(len(external) * nbytes)), ("length", str(nbytes))):
                tensor.external_data.add(key=key, value=value)
            external.append(tensor)
        x = g.op("Add", x, inner)
    path = g.save(tmp_path / "m.onnx", x)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.extend(external)
    onnx.save(model, path)
    out = tmp_path / "out"
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEASURE, path, out], capture_output=True, text=True, check=True, env=environment)
    before, after = (int(kib) for kib in run.stdout.split())
    block_kib = 2 * HIDDEN * 4 * size * 128 // 1024
    assert data.stat().st_size // 1024 == layers * block_kib
    assert after - before < 2 * block_kib
