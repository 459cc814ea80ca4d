"""Optimum's merged decoders: one If on `use_cache_branch`, the decoder with a past on one side and without on the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from places import EXPORTS

from mesh.importer.run import import_model


def branch(source: onnx.ModelProto, prefix: str, past: dict[str, str]) -> onnx.GraphProto:
    """The graph of `source` as a branch: names of its own but for what it takes from outside; `past` stands for the past inputs."""
    outside = {value.name: value.name for value in source.graph.input} | {tensor.name: tensor.name for tensor in source.graph.initializer}
    outside |= past

    def rename(name: str) -> str:
        return outside.get(name, f"{prefix}{name}") if name else name

    graph = onnx.GraphProto(name=f"{prefix}branch")
    for node in source.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}"
        copy.input[:] = [rename(name) for name in node.input]
        copy.output[:] = [rename(name) for name in node.output]
    for output in source.graph.output:
        copy_of = graph.output.add()
        copy_of.CopyFrom(output)
        copy_of.name = rename(output.name)
    return graph


def merge(source: onnx.ModelProto, path: Path) -> Path:
    past = [value for value in source.graph.input if value.name.startswith("past_key_values")]
    nothing = {}
    initializers = list(source.graph.initializer)
    for value in past:
        heads, width = value.type.tensor_type.shape.dim[1].dim_value, value.type.tensor_type.shape.dim[3].dim_value
        nothing[value.name] = f"no_{value.name}"
        initializers.append(numpy_helper.from_array(np.zeros((1, heads, 0, width), np.float32), nothing[value.name]))
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    outputs = [value.name for value in source.graph.output]
    node = helper.make_node("If", ["use_cache_branch"], outputs, "choice")
    node.attribute.append(helper.make_attribute("then_branch", branch(source, "with_", {})))
    node.attribute.append(helper.make_attribute("else_branch", branch(source, "without_", nothing)))
    graph = helper.make_graph([node], "merged", [*source.graph.input, switch], list(source.graph.output), initializers)
    onnx.save(helper.make_model(graph, opset_imports=source.opset_import, ir_version=source.ir_version), path)
    return path


@pytest.mark.parametrize("export", ["llama-script", "gpt2-script", "qwen2-dynamo"])
def test_a_merged_decoder_is_imported_from_the_branch_with_a_past(export: str, tmp_path: Path) -> None:
    path = merge(onnx.load(EXPORTS / f"{export}.onnx"), tmp_path / "decoder_model_merged.onnx")
    manifest = import_model(path, tmp_path / "model")
    plain = import_model(EXPORTS / f"{export}.onnx", tmp_path / "plain")
    assert manifest.report["source_error"] < 1e-4 and manifest.report["source_greedy_equal"] == 1.0
    assert manifest.layers == plain.layers and manifest.cache == plain.cache
