"""The list of passes, and what a single one does to a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mesh.importer.graph.decoder import Draft
from mesh.importer.passes.casts import name_types
from mesh.importer.passes.identities import drop_identities, drop_single_input_nodes
from mesh.importer.passes.pipeline import PIPELINE, Pass, Repeat, run_passes
from mesh.importer.passes.sequences import rewrite_sequences
from mesh.importer.passes.sinks import append_sinks


def draft_of(*nodes: ir.Node, x: ir.Value, output: ir.Value) -> Draft:
    output.name = "logits"
    return Draft(Path("m.onnx"), ir.Model(ir.Graph([x], [output], nodes=nodes, opset_imports={"": 24}), ir_version=12))


def test_every_pass_of_the_list_says_why_it_stands_where_it_stands() -> None:
    flat = [each for step in PIPELINE for each in (step.passes if isinstance(step, Repeat) else (step,))]
    assert all(each.why for each in flat)
    assert len({each.run for each in flat}) == len(flat)


def test_a_repeat_ends_when_its_last_pass_changes_nothing() -> None:
    calls: list[str] = []
    left = [True, True, False]

    def first(_draft: Draft) -> bool:
        calls.append("first")
        return True

    def last(_draft: Draft) -> bool:
        calls.append("last")
        return left.pop(0)

    x = ir.Value(name="x")
    draft = draft_of(x=x, output=x)
    run_passes(draft, (Repeat((Pass(first, "a"), Pass(last, "b")), "both"),))
    assert calls == ["first", "last"] * 3


def test_nodes_that_hand_their_input_on_are_removed_and_a_used_dropout_mask_is_not() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [x])
    dropout = ir.node("Dropout", [relu.outputs[0]])
    kept = ir.node("Dropout", [dropout.outputs[0]], num_outputs=2)
    one = ir.node("Concat", [kept.outputs[0]], attributes={"axis": 0})
    masked = ir.node("Where", [kept.outputs[1], one.outputs[0], x])
    draft = draft_of(relu, dropout, kept, one, masked, x=x, output=masked.outputs[0])
    assert drop_single_input_nodes(draft)
    assert [node.op_type for node in draft.model.graph] == ["Relu", "Dropout", "Where"]
    assert not drop_single_input_nodes(draft)


def test_a_cast_to_the_type_of_another_value_no_longer_depends_on_that_value() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    least = ir.Value(name="least", const_value=ir.tensor(np.array([-7, 3])), shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    like = ir.node("CastLike", [least, x])
    total = ir.node("Add", [like.outputs[0], x])
    draft = draft_of(like, total, x=x, output=total.outputs[0])
    draft.model.graph.register_initializer(least)
    draft.model.graph.outputs[0].dtype = ir.DataType.FLOAT
    assert name_types(draft) and not name_types(draft)
    assert [node.op_type for node in draft.model.graph] == ["Cast", "Add"]
    (got,) = ReferenceEvaluator(ir.to_proto(draft.model)).run(None, {"x": np.array([0.5, 1], np.float32)})
    assert np.array_equal(got, np.array([-6.5, 4], np.float32))


def test_the_parts_of_a_split_sequence_become_slices() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 6]), type=ir.TensorType(ir.DataType.FLOAT))
    numbers = {n: ir.Value(name=f"c{n}", const_value=ir.tensor(np.array(n)), shape=ir.Shape([])) for n in (0, 1, 3, -1)}
    halves = ir.node("SplitToSequence", [x, numbers[3]], attributes={"axis": -1})
    first, last = (ir.node("SequenceAt", [halves.outputs[0], numbers[place]]) for place in (0, -1))
    sizes = ir.Value(name="sizes", const_value=ir.tensor(np.array([1, 2])), shape=ir.Shape([2]))
    uneven = ir.node("SplitToSequence", [first.outputs[0], sizes], attributes={"axis": -1})
    second = ir.node("SequenceAt", [uneven.outputs[0], numbers[1]])
    joined = ir.node("Concat", [last.outputs[0], second.outputs[0]], attributes={"axis": 1})
    draft = draft_of(halves, first, last, uneven, second, joined, x=x, output=joined.outputs[0])
    for value in (*numbers.values(), sizes):
        draft.model.graph.register_initializer(value)
    assert rewrite_sequences(draft) and not rewrite_sequences(draft)
    assert [node.op_type for node in draft.model.graph] == ["Slice", "Slice", "Slice", "Concat"]
    for value in draft.model.graph.inputs[0], *draft.model.graph.outputs:
        value.dtype = ir.DataType.FLOAT
    given = np.arange(12, dtype=np.float32).reshape(2, 6)
    (got,) = ReferenceEvaluator(ir.to_proto(draft.model)).run(None, {"x": given})
    assert np.array_equal(got, np.concatenate([given[:, 3:], given[:, 1:3]], 1))


def constant_of(name: str, array: np.ndarray) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape), type=kind)


def test_a_sink_that_is_written_as_a_factor_becomes_one_more_score() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 3, 4, 5]), type=ir.TensorType(ir.DataType.FLOAT))
    values = constant_of("v", np.random.default_rng(0).standard_normal((1, 1, 5, 6)).astype(np.float32))
    sinks = constant_of("sinks", np.array([-3, 0.5, 9], np.float32).reshape(1, 3, 1))
    last = constant_of("last", np.array([-1]))
    total = ir.node("ReduceLogSumExp", [x, last], attributes={"keepdims": 0})
    share = ir.node("Sigmoid", [ir.node("Sub", [total.outputs[0], sinks]).outputs[0]])
    softmax = ir.node("Softmax", [x], attributes={"axis": -1})
    weighted = ir.node("MatMul", [softmax.outputs[0], values])
    factor = ir.node("Unsqueeze", [share.outputs[0], last])
    product = ir.node("Mul", [weighted.outputs[0], factor.outputs[0]])
    after = ir.node("Neg", [product.outputs[0]])
    difference = share.inputs[0].producer() if share.inputs[0] is not None else None
    assert difference is not None
    draft = draft_of(total, difference, share, softmax, weighted, factor, product, after, x=x, output=after.outputs[0])
    for value in (values, sinks, last):
        draft.model.graph.register_initializer(value)
    draft.model.graph.outputs[0].dtype = ir.DataType.FLOAT
    given = 3 * np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    (before,) = ReferenceEvaluator(ir.to_proto(draft.model)).run(None, {"x": given})
    assert append_sinks(draft) and not append_sinks(draft)
    (result,) = ReferenceEvaluator(ir.to_proto(draft.model)).run(None, {"x": given})
    np.testing.assert_allclose(np.asarray(result), np.asarray(before), rtol=1e-5, atol=1e-6)
    assert softmax.inputs[0] is not x


def test_an_output_behind_an_identity_keeps_its_name() -> None:
    """onnxruntime runs the source, and knows the logits by the name they have there."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [x])
    same = ir.node("Identity", relu.outputs)
    draft = draft_of(relu, same, x=x, output=same.outputs[0])
    assert drop_identities(draft)
    assert [value.name for value in draft.model.graph.outputs] == ["logits"]
    assert [node.op_type for node in draft.model.graph] == ["Relu"]


def test_an_identity_whose_output_has_a_shape_of_another_rank_is_removed() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [x])
    relu.outputs[0].shape = ir.Shape([2])
    same = ir.node("Identity", relu.outputs)
    same.outputs[0].shape = ir.Shape([2, 1])
    last = ir.node("Neg", same.outputs)
    draft = draft_of(relu, same, last, x=x, output=last.outputs[0])
    assert drop_identities(draft)
    assert [node.op_type for node in draft.model.graph] == ["Relu", "Neg"]
    assert relu.outputs[0].shape == ir.Shape([2])
