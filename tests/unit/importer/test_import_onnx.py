"""Exported decoders against their own blocks, both in stock onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from ort_chain import Chain, relative_error
from ort_source import SourceSession
from places import EXPORTS

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.sources.onnx import OnnxSource, open_source
from mesh.importer.write.blocks import BlockWriter

NAMES = sorted(path.stem for path in EXPORTS.glob("*.onnx"))
ARCHITECTURES = ("bloom", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3")
SLOTS = 320
STEPS = 256


def nothing(_what: str, _done: int, _total: int) -> None:
    pass


def imported(source: OnnxSource, directory: Path, options: ImportOptions | None = None) -> Chain:
    source.write_blocks(BlockWriter(directory), options or ImportOptions(), nothing)
    return Chain(directory, source.cache, SLOTS)


def prompt_for(source: OnnxSource) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, source.vocab_size, 29)]


def test_every_architecture_has_an_export() -> None:
    assert {name.split("-")[0] for name in NAMES} >= set(ARCHITECTURES) | {"genai"}


@pytest.mark.parametrize("export", NAMES)
def test_blocks_of_an_export_agree_with_it_and_generate_the_same_256_tokens(export: str, tmp_path: Path) -> None:
    path = EXPORTS / f"{export}.onnx"
    source = open_source(path)
    chain, original = imported(source, tmp_path), SourceSession(path)
    prompt = prompt_for(source)
    expected = original(prompt)
    logits = chain(prompt)
    assert relative_error(logits, expected) < 1e-4
    in_chunks = Chain(tmp_path, source.cache, SLOTS)
    chunks = np.concatenate([in_chunks(prompt[start:end]) for start, end in ((0, 6), (6, 7), (7, 23), (23, 29))])
    assert relative_error(chunks, expected) < 1e-4
    worst, tokens = 0.0, []
    for _ in range(STEPS):
        token = int(expected[-1].argmax())
        assert int(logits[-1].argmax()) == token
        tokens.append(token)
        expected, logits = original([token]), chain([token])
        worst = max(worst, relative_error(logits, expected))
    assert worst < 1e-4
    assert len(set(tokens)) > 1, "the fixture repeats one token: it would hide a wrong position or cache"


@pytest.mark.parametrize(
    ("export", "window", "softcap", "alibi"),
    [
        ("llama-dynamo", None, 0.0, False),
        ("mistral-dynamo", 12, 0.0, False),
        ("mistral-nopast", 12, 0.0, False),
        ("bloom-script", None, 0.0, True),
        ("genai-packed", 10, 0.0, False),
        ("genai-gemma", None, 4.0, False),
    ],
)
def test_masks_are_recognised(export: str, window: int | None, softcap: float, alibi: bool) -> None:
    source = open_source(EXPORTS / f"{export}.onnx")
    for rule in source.rules:
        assert rule.window == window
        assert rule.softcap == pytest.approx(softcap, rel=1e-3)
        assert (rule.slopes is not None) == alibi
    assert all(info.window == window for info in source.cache)


def test_gemma3_layers_have_windows_of_their_own() -> None:
    source = open_source(EXPORTS / "gemma3-dynamo.onnx")
    assert [rule.window for rule in source.rules] == [9, None, 9, None]


def test_alibi_slopes_are_those_of_the_paper() -> None:
    slopes = open_source(EXPORTS / "bloom-dynamo.onnx").rules[0].slopes
    # six heads: the four of a power of two, then every second one of eight
    assert slopes == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], rel=1e-4)


def test_a_table_of_positions_limits_the_context() -> None:
    assert open_source(EXPORTS / "gpt2-dynamo.onnx").context_length == 320
    assert open_source(EXPORTS / "opt-dynamo.onnx").context_length == 320


def test_the_configuration_beside_an_export_says_context_and_architecture(tmp_path: Path) -> None:
    shutil.copyfile(EXPORTS / "llama-dynamo.onnx", tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 640}')
    source = open_source(tmp_path)
    assert (source.architecture, source.context_length, source.name) == ("llama", 640, tmp_path.name)


def test_grouped_queries_are_cached_once_per_key_head() -> None:
    info = open_source(EXPORTS / "llama-script.onnx").cache[0]
    assert (info.kv_heads, info.key_dim) == (2, 8)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (ImportOptions(bits=16), 5e-3),
        (ImportOptions(bits=8, group_size=16), 6e-2),
        (ImportOptions(bits=4, group_size=16), 0.9),
        (ImportOptions(dtype="float16"), 2e-2),
    ],
)
@pytest.mark.parametrize("export", ["llama-dynamo", "gpt2-script"])
def test_blocks_of_fewer_bits_stay_near_their_source(export: str, options: ImportOptions, tolerance: float, tmp_path: Path) -> None:
    path = EXPORTS / f"{export}.onnx"
    source = open_source(path)
    error = relative_error(imported(source, tmp_path, options)(prompt_for(source)), SourceSession(path)(prompt_for(source)))
    assert 0 < error < tolerance


def test_blocks_hold_no_operator_of_another_domain_and_one_attention_a_layer(tmp_path: Path) -> None:
    for export in ("genai-llama", "llama-script"):
        source = open_source(EXPORTS / f"{export}.onnx")
        blocks = source.write_blocks(BlockWriter(tmp_path), ImportOptions(), nothing)
        for block in blocks:
            model = onnx.load(tmp_path / f"{block.name}.onnx", load_external_data=False)
            assert {node.domain for node in model.graph.node} <= {""}
            assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
            kinds = [node.op_type for node in model.graph.node]
            expected = (1, 2) if block.name.startswith("layer") else (0, 0)
            assert (kinds.count("Attention"), kinds.count("TensorScatter")) == expected


# --- what cannot be imported ---------------------------------------------------------------------------------------------


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)


def attention_model(path: Path, *, causal: bool = True, logits: str = "logits", op: str = "Relu", domain: str = "") -> Path:
    """One layer of one head without a cache; `op` is its activation."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        *(helper.make_node("MatMul", ["x", name], [f"{name}_out"]) for name in ("wq", "wk", "wv")),
        helper.make_node("Transpose", ["wk_out"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["wq_out", "kt"], ["raw"]),
        helper.make_node("Shape", ["raw"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["low"], value=numpy_helper.from_array(np.array([-1e9], np.float32))),
        helper.make_node("Trilu", ["low", "one"], ["mask"], upper=1),
        helper.make_node("Add", ["raw", "mask"], ["scores"]) if causal else helper.make_node("Identity", ["raw"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "wv_out"], ["context"]),
        helper.make_node("Add", ["x", "context"], ["y"]),
        helper.make_node(op, ["y"], ["z"], domain=domain, name="activation"),
        helper.make_node("MatMul", ["z", "head"], [logits]),
    ]
    arrays = {"table": weights(20, 8), "head": weights(8, 20), "one": np.array(1), **{name: weights(8, 8) for name in ("wq", "wk", "wv")}}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["b", "t", 20])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_a_graph_of_three_axes_without_heads_is_one_head(tmp_path: Path) -> None:
    path = attention_model(tmp_path / "m.onnx")
    source = open_source(path)
    assert (source.layers, source.cache[0].kv_heads, source.cache[0].key_dim) == (1, 1, 8)
    prompt = prompt_for(source)
    assert relative_error(imported(source, tmp_path)(prompt), SourceSession(path)(prompt)) < 1e-5


def test_an_encoder_is_refused_with_what_it_attends_to(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"attends to later positions .* an encoder"):
        open_source(attention_model(tmp_path / "m.onnx", causal=False))


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"operator acme\.Frobnicate \(node activation\)"):
        open_source(attention_model(tmp_path / "m.onnx", op="Frobnicate", domain="acme"))
    with pytest.raises(UnsupportedModel, match=r"Frobnicate \(node activation\) is not known"):
        open_source(attention_model(tmp_path / "n.onnx", op="Frobnicate"))


def test_a_graph_without_logits_is_refused(tmp_path: Path) -> None:
    model = onnx.load(EXPORTS / "llama-dynamo.onnx")
    del model.graph.output[0]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModel, match="no output is named 'logits'"):
        open_source(tmp_path / "m.onnx")


def test_a_cache_that_keeps_a_window_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """transformers' default cache of a windowed model drops what lies before the window."""
    model = onnx.load(EXPORTS / "mistral-dynamo.onnx")
    whole = model.graph.output[1].name
    for node in model.graph.node:
        node.input[:] = [name if name != whole else "whole" for name in node.input]
        node.output[:] = [name if name != whole else "whole" for name in node.output]
    bounds = {"start": -11, "end": np.iinfo(np.int64).max, "axis": 2}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([number]), name) for name, number in bounds.items())
    model.graph.node.append(helper.make_node("Slice", ["whole", *bounds], [whole]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModel, match=r"keeps the last 11 positions only .*sliding window.*DynamicCache\(\)"):
        open_source(tmp_path / "m.onnx")


def test_truncated_and_missing_files_are_corrupt(tmp_path: Path) -> None:
    whole = (EXPORTS / "llama-dynamo.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptModel, match="not a whole ONNX model"):
        open_source(tmp_path / "m.onnx")
    onnx.save(
        onnx.load(EXPORTS / "llama-dynamo.onnx"), tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0
    )
    data = tmp_path / "e.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CorruptModel, match=r"e\.data has .* bytes where"):
        open_source(tmp_path / "e.onnx")
    data.unlink()
    with pytest.raises(CorruptModel, match=r"e\.data is missing"):
        open_source(tmp_path / "e.onnx")
    with pytest.raises(ModelNotFound, match="does not exist"):
        open_source(tmp_path / "nothing.onnx")


def test_a_fixed_length_is_refused(tmp_path: Path) -> None:
    model = onnx.load(attention_model(tmp_path / "m.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModel, match="exactly 16 tokens"):
        open_source(tmp_path / "m.onnx")
