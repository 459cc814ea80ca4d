"""GGUF files: the same blocks as from the Hugging Face weights they were made of, and llama.cpp's own logits."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from demo_model import smollm2_gguf
from ort_chain import Chain, relative_error
from tiny_gguf import write_gguf
from tiny_models import LLAMA, logits_of, make_model

from mesh.cli import main
from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.sources import gguf_file
from mesh.importer.sources.gguf import open_source
from mesh.importer.verify.verify import runtime_logits
from mesh.importer.write.blocks import BlockWriter
from mesh.lowering.experts import ExpertWeight
from mesh.model.manifest import Manifest
from mesh.runtime.loading import load_block

BASE = {**LLAMA, "vocab_size": 288, "max_position_embeddings": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE),
    "llama-linear": ("Llama", {**BASE, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}}),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", {**BASE, "head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 5}),
}
PROMPT = np.random.default_rng(1).integers(0, 288, 23).tolist()


def run(path: Path, out: Path) -> np.ndarray:
    out.mkdir()
    source = open_source(path)
    source.write_blocks(BlockWriter(out), ImportOptions(), lambda *_: None)
    return Chain(out, source.cache)(PROMPT)


def llama_cpp_logits(path: Path) -> np.ndarray:
    """[len(PROMPT), vocab] of llama.cpp with a float32 cache."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, n_threads=1, flash_attn=False, verbose=False)
    model.eval(PROMPT)
    logits = np.array(model.scores[: len(PROMPT)])
    model.close()
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_blocks_agree_with_transformers_and_llama_cpp(name: str, tmp_path: Path) -> None:
    model = make_model(*MODELS[name])
    write_gguf(tmp_path / "model.gguf", model)
    got = run(tmp_path / "model.gguf", tmp_path / "out")
    assert relative_error(got, logits_of(model, PROMPT)) < 1e-4
    # llama.cpp takes GELU from a 16-bit table
    assert relative_error(got, llama_cpp_logits(tmp_path / "model.gguf")) < (1e-3 if name == "gemma3" else 1e-4)


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """llama3 scaling comes as a tensor of factors."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_model("Llama", {**BASE, "rope_parameters": {**rope, "original_max_position_embeddings": 32}})
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    assert factors.max() > 7.9
    write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    assert relative_error(run(tmp_path / "model.gguf", tmp_path / "out"), logits_of(model, PROMPT)) < 1e-4


def test_yarn_is_that_of_llama_cpp(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = make_model("Llama", {**BASE, "rope_parameters": rope})
    write_gguf(tmp_path / "model.gguf", model)
    got = run(tmp_path / "model.gguf", tmp_path / "out")
    assert relative_error(got, llama_cpp_logits(tmp_path / "model.gguf")) < 1e-4
    assert relative_error(got, logits_of(model, PROMPT)) < 1e-4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_tensors_give_the_weights_that_they_stand_for(kind: str, tmp_path: Path) -> None:
    """Against a float32 file with the same values; rows are dequantized a few at a time."""
    quantization = gguf.GGMLQuantizationType[kind]
    model = make_model("Llama", {**BASE, "intermediate_size": 96})
    write_gguf(tmp_path / "quantized.gguf", model, quantization)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            array = parameter.data.numpy()
            array[:] = gguf.quants.dequantize(gguf.quants.quantize(array, quantization), quantization)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "DEQUANTIZE_ELEMENTS", 320)
        got = run(tmp_path / "quantized.gguf", tmp_path / "out")
    # rows of q and k are permuted in the file, which quantization of rows does not notice
    assert relative_error(got, logits_of(model, PROMPT)) < 1e-4


def test_a_file_whose_weights_all_have_fewer_bits_is_said_to_round_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "model.gguf", make_model("Llama", {**BASE, "intermediate_size": 96}), gguf.GGMLQuantizationType.Q8_0)
    assert main(["import", str(tmp_path / "model.gguf"), str(tmp_path / "model"), "--products", "bfloat16", "--quiet"]) == 0
    assert Manifest.load(tmp_path / "model").weights.inputs is None
    printed = capsys.readouterr().out
    assert "no weights of 16 bits are here, so products stay float32: give --bits 16 too" in printed and "products of" not in printed


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_experts_stay_quantized_and_give_the_tokens_of_32_bits(kind: str, tmp_path: Path) -> None:
    """The import compares the blocks with onnxruntime; the other holds the numbers that the codes stand for."""
    write_gguf(
        tmp_path / "model.gguf", make_model("Mixtral", {**MODELS["mixtral"][1], "intermediate_size": 96}), gguf.GGMLQuantizationType[kind]
    )
    kept = import_model(tmp_path / "model.gguf", tmp_path / "kept")
    assert kept.weights.kept == kind
    held = [each for each in load_block(tmp_path / "kept", "layer_001").weights.values() if isinstance(each, ExpertWeight)]
    assert [(each.codes.group, each.codes.minimum is not None) for each in held] == [(32, kind == "Q4_1")] * 3
    (tmp_path / "wide").mkdir()
    blocks = open_source(tmp_path / "model.gguf").write_blocks(BlockWriter(tmp_path / "wide"), ImportOptions(bits=32), lambda *_: None)
    wide = kept.model_copy(update={"blocks": blocks})
    tokens = np.asarray(PROMPT, np.int64)
    got, expected = (np.concatenate(list(runtime_logits(tmp_path / name, each, tokens))) for name, each in (("kept", kept), ("wide", wide)))
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
    assert relative_error(got, expected) < 1e-5
    for small, large in zip(kept.blocks, blocks, strict=True):
        assert small.parameters == large.parameters and small.weight_bytes < 0.4 * large.weight_bytes


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_quants_made_by_llama_cpp_stay_near_the_original(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp makes these files")
    model = make_model("Llama", {**BASE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2})
    write_gguf(tmp_path / "model.gguf", model)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = 1
    paths = (tmp_path / "model.gguf", tmp_path / "small.gguf")
    assert llama_cpp.llama_model_quantize(*(os.fsencode(path) for path in paths), parameters) == 0
    checkpoint = gguf_file.GgufCheckpoint(paths[1])
    used = {entry.kind for entry in checkpoint._entries.values()}
    assert used & {gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q5_K", "Q6_K")}
    whole = gguf_file.GgufCheckpoint(paths[0])
    bound = {"Q4_K_M": 0.09, "Q5_K_M": 0.05, "Q6_K": 0.025}[kind]
    for name in checkpoint:
        got, want = checkpoint.read(name), whole.read(name)
        assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)
    # llama.cpp rounds activations to 8 bits where weights are quantized
    got, want = run(paths[1], tmp_path / "out"), llama_cpp_logits(paths[1])
    assert np.linalg.norm(got - want) < 0.06 * np.linalg.norm(want)


def test_a_split_model_is_opened_by_its_first_part(tmp_path: Path) -> None:
    model = make_model("Llama", BASE)
    write_gguf(tmp_path / "model.gguf", model)
    whole = gguf.GGUFReader(tmp_path / "model.gguf")
    half = len(whole.tensors) // 2
    for part, tensors in enumerate((whole.tensors[:half], whole.tensors[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-{part + 1:05d}-of-00002.gguf", "llama")
        for field in whole.fields.values():
            if part == 0 and field.name.startswith(("llama.", "tokenizer.")):
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.count", 2)
        writer.add_uint16("split.no", part)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    got = run(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out")
    assert relative_error(got, logits_of(model, PROMPT)) < 1e-4
    with pytest.raises(ModelNotFound, match=r"give the first"):
        open_source(tmp_path / "m-00002-of-00002.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, make_model("Llama", BASE))
    return path.read_bytes()


def test_truncated_files_are_named_with_their_sizes(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-500])
    with pytest.raises(CorruptModel, match=rf"cut.gguf is truncated: it has {len(whole) - 500:,} bytes where .* {len(whole):,}"):
        open_source(path)
    for length in (5, 20, 300, 3000):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptModel, match=rf"is truncated: it has {length:,} bytes"):
            open_source(path)
    for content in (b"", b"PK\x03\x04 something else"):
        path.write_bytes(content)
        with pytest.raises(CorruptModel, match=r"not a GGUF file"):
            open_source(path)
    with pytest.raises(ModelNotFound, match=r"not a file"):
        open_source(tmp_path / "missing.gguf")


def replaced(whole: bytes, old: bytes, new: bytes) -> bytes:
    assert whole.count(old) >= 1 and len(old) == len(new)
    return whole.replace(old, new)


def test_an_unsupported_decoder_is_refused_by_name(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(UnsupportedModel, match=r"GGUF version 1"):
        open_source(path)
    path.write_bytes(replaced(whole, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"bertx"))
    with pytest.raises(UnsupportedModel, match=r"architecture 'bertx' is not supported: the installed gguf package does not know it"):
        open_source(path)
    dimensions = b"llama.rope.dimension_count" + struct.pack("<I", 4)
    path.write_bytes(replaced(whole, dimensions + struct.pack("<I", 16), dimensions + struct.pack("<I", 8)))
    with pytest.raises(UnsupportedModel, match=r"rotation over 8 of 16 dimensions"):
        open_source(path)
    path.write_bytes(replaced(whole, b"blk.2.attn_q.weight", b"blk.2.attn_z.weight"))
    with pytest.raises(CorruptModel, match=r"no tensor blk.2.attn_q.weight"):
        open_source(path)
    path.write_bytes(replaced(whole, b"llama.block_count" + struct.pack("<II", 4, 3), b"llama.block_count" + struct.pack("<II", 4, 2)))
    with pytest.raises(UnsupportedModel, match=r"no use for the tensor blk.2"):
        open_source(path)
    counted = b"llama.block_count" + struct.pack("<I", 4)
    path.write_bytes(replaced(whole, counted + struct.pack("<I", 3), counted + struct.pack("<I", 1 << 26)))
    with pytest.raises(CorruptModel, match=r"llama\.block_count is 67,108,864 where at most 16,384 is believed"):
        open_source(path)


def test_smollm2_answers_in_its_chat_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    from mesh.model.tokenizer import Tokenizer

    source = open_source(smollm2_gguf())
    source.write_blocks(BlockWriter(tmp_path), ImportOptions(bits=16), lambda *_: None)
    info, files = source.write_tokenizer(tmp_path)
    assert info is not None and [file.name for file in files] == ["tokenizer.json", "chat_template.jinja"]
    tokenizer = Tokenizer(Backend.from_file(str(tmp_path / "tokenizer.json")), info, (tmp_path / "chat_template.jinja").read_text())
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is artificial intelligence?"}])
    chain = Chain(tmp_path, source.cache, slots=96)
    logits, stream, text = chain(tokenizer.encode(prompt, add_special=False))[-1], tokenizer.stream(), ""
    want = "Artificial intelligence (AI) is a branch of computer science that deals with making machines think and behave like humans."
    while len(text) < len(want):
        token = int(logits.argmax())
        assert token not in info.eos_ids
        text += stream.push(token)
        logits = chain([token])[0]
    assert text.startswith(want)
