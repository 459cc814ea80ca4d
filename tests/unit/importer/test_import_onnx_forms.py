"""Forms of export that the fixtures do not have, made by hand: expert loops, constant branches, einsum, old opsets, one row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade_graph import HIDDEN, VOCAB, Graph
from onnx import TensorProto, helper, numpy_helper
from ort_chain import Chain, relative_error
from ort_source import SourceSession

from mesh.errors import UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.sources.onnx import open_source
from mesh.importer.write.blocks import BlockWriter


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
