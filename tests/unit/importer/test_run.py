"""`mesh import` as a whole: what is verified, what a failure says, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from places import EXPORTS

from mesh.dtypes import CACHE_DTYPES, cache_width
from mesh.errors import ConfigError, CorruptModel, ModelNotFound, UnsupportedModel, VerificationFailed
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.sources.onnx import OnnxSource
from mesh.importer.verify import outside
from mesh.importer.write.blocks import BlockWriter
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import CacheDType, LayerRange


@pytest.mark.parametrize("export", ["llama-dynamo", "genai-llama", "bloom-nopast"])
def test_a_source_too_large_to_run_whole_is_compared_part_by_part(export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "WHOLE_SOURCE_BYTES", 0)
    report = import_model(EXPORTS / f"{export}.onnx", tmp_path / "model").report
    assert report["source_error"] < 1e-4
    assert report["source_greedy_equal"] == 1.0


def damage(monkeypatch: pytest.MonkeyPatch, name: str, amount: float) -> None:
    """Let the importer write one block's weights wrongly."""
    original = OnnxSource.write_blocks

    def write_blocks(self: OnnxSource, writer: BlockWriter, options: ImportOptions, progress: Any) -> Any:
        blocks = original(self, writer, options, progress)
        data = writer.directory / f"{name}.onnx.data"
        values = np.fromfile(data, np.float32)
        (values * amount).astype(np.float32).tofile(data)
        return blocks

    monkeypatch.setattr(OnnxSource, "write_blocks", write_blocks)


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_layer_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    damage(monkeypatch, "layer_001", 1.01)
    if not whole:
        monkeypatch.setattr(outside, "WHOLE_SOURCE_BYTES", 0)
    with pytest.raises(VerificationFailed, match=r"layer 1 is the first that differs from the source.s \(relative error") as caught:
        import_model(EXPORTS / "llama-dynamo.onnx", tmp_path / "model")
    assert caught.value.layer == 1
    assert caught.value.error is not None and caught.value.error > 1e-4
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_import_leaves_nothing_and_a_forced_one_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    import_model(EXPORTS / "llama-dynamo.onnx", out)
    before = Manifest.load(out)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "layer_002":
            raise KeyboardInterrupt

    with pytest.raises(ConfigError, match="--force"):
        import_model(EXPORTS / "llama-dynamo.onnx", out)
    with pytest.raises(KeyboardInterrupt):
        import_model(EXPORTS / "gpt2-dynamo.onnx", out, force=True, progress=interrupt)
    assert Manifest.load(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("options", "error"), [({"bits": 8, "group_size": 32}, 0.2), ({"dtype": "float16"}, 2e-2)])
def test_narrower_models_are_close_to_their_source_and_say_how_close(tmp_path: Path, options: dict[str, Any], error: float) -> None:
    report = import_model(EXPORTS / "qwen2-dynamo.onnx", tmp_path / "model", ImportOptions(**options), report=True).report
    assert 0 < report["source_error"] < error
    assert 0 < report["logits_error_float32"] < error
    assert report["perplexity"] == pytest.approx(report["perplexity_float32"], rel=0.3)


@pytest.mark.parametrize(("kv_cache", "error"), [("float16", 2e-3), ("int8", 2e-2)])
def test_a_narrow_cache_takes_less_and_its_error_is_measured(kv_cache: CacheDType, error: float, tmp_path: Path) -> None:
    export = EXPORTS / "llama-dynamo.onnx"
    plain = import_model(export, tmp_path / "plain")
    narrow = import_model(export, tmp_path / "narrow", ImportOptions(kv_cache=kv_cache))
    assert (narrow.cache_dtype, narrow.hidden.dtype) == (kv_cache, "float32")
    assert narrow.model_hash != plain.model_hash, "one mesh does not mix them: its tokens would change with a failure"
    assert [block.files for block in narrow.blocks] == [block.files for block in plain.blocks]
    assert narrow.report["source_greedy_equal"] == 1.0, "the blocks are compared with their own type of cache"
    assert 0 < narrow.report["kv_cache_logits_error"] < error and narrow.report["kv_cache_greedy_equal"] > 0.95
    need = [predict(each, LayerRange(0, each.layers), embed=True, head=True, rows=4, context=200).cache_bytes for each in (plain, narrow)]
    dim = plain.cache[0].key_dim
    assert need[0] * cache_width(kv_cache, dim) * CACHE_DTYPES[kv_cache].itemsize == need[1] * dim * 4
    stage = Stage.load(tmp_path / "narrow", StageConfig(LayerRange(0, narrow.layers), rows=4, context=200))
    arrays = [array for cache in stage._caches for array in (cache.key, cache.value)]
    assert {array.dtype for array in arrays} == {CACHE_DTYPES[kv_cache]}
    assert sum(array.nbytes for array in arrays) == need[1]


@pytest.mark.parametrize("values", [{"kv_cache": "bfloat16"}, {"dtype": "bfloat16", "kv_cache": "float16"}, {"kv_cache": "int3"}])
def test_a_cache_that_does_not_go_with_the_arithmetic_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a cache of"):
        ImportOptions(**values)


def test_products_of_bfloat16_are_what_the_blocks_say(tmp_path: Path) -> None:
    """Two Casts before the products of an input: onnxruntime and XLA round as the kernels do."""
    export = EXPORTS / "llama-dynamo.onnx"
    plain = import_model(export, tmp_path / "plain", ImportOptions(bits=16))
    manifest = import_model(export, tmp_path / "model", ImportOptions(products="bfloat16"), report=True)
    assert (manifest.weights.inputs, manifest.weights.bits, manifest.hidden.dtype) == ("bfloat16", 16, "float32")
    assert Manifest.load(tmp_path / "model") == manifest and plain.weights.inputs is None
    assert manifest.model_hash != plain.model_hash, "one mesh does not mix them: its tokens would change with a failure"
    assert 1e-4 < manifest.report["logits_error_float32"] < 3e-2 and manifest.report["source_greedy_equal"] > 0.9
    graph = onnx.load(str(tmp_path / "model" / "layer_000.onnx")).graph
    made = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in made and made[node.input[1]].input[0] in types]
    assert len(products) == 7 and {types[made[node.input[1]].input[0]] for node in products} == {onnx.TensorProto.BFLOAT16}
    assert [made[made[node.input[0]].input[0]].attribute[0].i for node in products] == [onnx.TensorProto.BFLOAT16] * 7
    assert len({node.input[0] for node in products}) == 4, "q, k and v share one, and so do gate and up"


@pytest.mark.parametrize("values", [{"bits": 8}, {"bits": 4}, {"bits": 32}, {"dtype": "bfloat16"}, {"dtype": "float16", "bits": 16}])
def test_products_of_bfloat16_have_weights_of_16_bits(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="products of bfloat16 have weights of 16 bits"):
        ImportOptions(products="bfloat16", **values)


def test_a_source_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelNotFound, match="neither"):
        import_model(tmp_path / "notes.txt", tmp_path / "out")
    with pytest.raises(ModelNotFound, match="does not exist"):
        import_model(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises((UnsupportedModel, CorruptModel), match="bert"):  # the second where transformers is there and tries it
        import_model(tmp_path / "bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()
