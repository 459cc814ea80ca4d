"""Files from elsewhere, changed at random: each decoder reads them or raises an error of the tree, and takes little memory."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import orjson
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from mesh.errors import ConfigError, CorruptModel, FrameRejected, MeshError
from mesh.importer.sources import gguf as gguf_source
from mesh.importer.sources import onnx as onnx_source
from mesh.importer.sources import safetensors as safetensors_source
from mesh.importer.sources.gguf_file import GgufCheckpoint
from mesh.importer.sources.safetensors_file import SafetensorsCheckpoint
from mesh.lowering.tensors import TensorReader
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.planner.placement import Placement
from mesh.protocol import frame_codec
from mesh.runtime.loading import load_block, read_model
from mesh.settings.schema import CoordinatorConfig, ShardConfig, load_config
from mesh.types import LayerRange

MEGABYTE = 1024 * 1024
Decode = Callable[[Path], Any]


@contextmanager
def little_memory(most: int = 64 * MEGABYTE) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def a_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_custom_alignment(32)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 1])
    for name in ("token_embd", "output", "blk.0.attn_q"):
        writer.add_tensor(f"{name}.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    for name in checkpoint:
        checkpoint.read(name)
    gguf_source.open_source(path)


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "hidden_act": "silu", "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
}  # fmt: skip


def read_safetensors(path: Path) -> None:
    (path.parent / "model.safetensors").write_bytes(path.read_bytes())
    checkpoint = SafetensorsCheckpoint.open(path.parent)
    for name in checkpoint:
        checkpoint.read(name)


def read_config(path: Path) -> None:
    (path.parent / "model.safetensors").write_bytes(save({"model.embed_tokens.weight": np.zeros((16, 8), np.float32)}))
    (path.parent / "config.json").write_bytes(path.read_bytes())
    safetensors_source.open_source(path.parent)


def an_onnx() -> bytes:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Add", ["x", "zeros"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    arrays = {"table": np.ones((20, 8), np.float32), "head": np.ones((8, 20), np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 20])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def a_manifest(**extra: bytes) -> bytes:
    """A manifest that lists the files `extra` with their hashes, so that what is in them is read."""
    names = {"tokenizer": "tokenizer.json", "template": "chat_template.jinja"}
    block = {"files": [], "weight_bytes": 0, "parameters": 0}
    manifest = {
        "name": "m", "architecture": "a", "source": "onnx", "layers": 1, "vocab_size": 3, "context_length": 64,
        "hidden": {"size": 4, "dtype": "float32"}, "cache": [{"kv_heads": 1, "key_dim": 2, "value_dim": 2}], "cache_dtype": "float32",
        "weights": {"bits": 32}, "blocks": [{"name": name, **block} for name in ("embed", "layer_000", "head")],
        "tokenizer": {"chat_template": True},
        "extra_files": [
            {"name": names[key], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for key, data in extra.items()
        ],
    }  # fmt: skip
    return orjson.dumps(manifest)


def a_tokenizer() -> bytes:
    return tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str().encode()


def described(directory: Path, tokenizer: bytes, template: bytes) -> Path:
    (directory / "manifest.json").write_bytes(a_manifest(tokenizer=tokenizer, template=template))
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "chat_template.jinja").write_bytes(template)
    return directory


def read_tokenizer(path: Path) -> None:
    Tokenizer.load(described(path.parent, path.read_bytes(), b"{{ messages }}"))


def read_template(path: Path) -> None:
    Tokenizer.load(described(path.parent, a_tokenizer(), path.read_bytes())).apply_chat_template([{"role": "user", "content": "a"}])


TEMPLATE = b"{% for message in messages %}{{ message.role | upper }}: {{ message['content'] ~ 1 }}{% endfor %}{{ bos_token }}"
PLACEMENT = (
    b'{"model": "m", "total_layers": 2, "ranges": [{"layers_start": 0, "layers_end": 2, "shards": [{"shard_id": 1, "node": "a"}]}],'
    b' "nodes": [{"name": "a", "memory_bytes": 1}]}'
)
YAML = b"shard:\n  shard_id: 1\n  layers_start: 0\n  layers_end: 2\nresources: &a\n  max_memory_gb: 1.5\n  when: 2020-01-02\n"


def from_writer(write: Callable[[Path], None], path: Path) -> bytes:
    write(path)
    return path.read_bytes()


DECODERS: dict[str, tuple[Callable[[Path], bytes], Decode]] = {
    "gguf": (lambda path: from_writer(a_gguf, path), read_gguf),
    "safetensors": (lambda path: save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)}), read_safetensors),
    "config.json": (lambda path: orjson.dumps(CONFIG), read_config),
    "onnx": (lambda path: an_onnx(), onnx_source.open_source),
    "block": (lambda path: an_onnx(), read_model),
    "manifest": (lambda path: a_manifest(), lambda path: Manifest.parse(path.read_bytes(), str(path))),
    "tokenizer": (lambda path: a_tokenizer(), read_tokenizer),
    "template": (lambda path: TEMPLATE, read_template),
    "placement": (lambda path: PLACEMENT, Placement.load),
    "yaml": (lambda path: YAML, lambda path: load_config(path, ShardConfig)),
}
SUFFIXES = {"onnx": ".onnx", "block": ".onnx", "gguf": ".gguf", "yaml": ".yaml"}
EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


@st.composite
def changed(draw: st.DrawFn, whole: bytes) -> bytes:
    """A few bytes changed, numbers made extreme, a piece cut out, doubled or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(("byte", "u32", "u64", "cut", "double", "text", "end"))):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "u32":
                data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(EXTREMES)) & (2**32 - 1))
            case "u64":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(EXTREMES)))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "double":
                data[at:at] = data[at : at + 40]
            case "text":
                data[at : at + 1] = draw(
                    st.sampled_from((b"[", b"{", b'"', b"null", b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"*a", b"{{"))
                )
            case "end":
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
def test_a_changed_file_is_read_or_refused_by_an_error_of_the_tree(name: str, tmp_path: Path) -> None:
    make, decode = DECODERS[name]
    path = tmp_path / f"file{SUFFIXES.get(name, '.json')}"
    whole = make(path)

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        path.write_bytes(data.draw(changed(whole)))
        with little_memory():
            try:
                decode(path)
            except MeshError as error:
                assert len(str(error)) < 5000

    attempt()


LONG = b"k" * 20_000


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("manifest", b"{", b'{"' + LONG + b'": 1, '),
        ("manifest", b'"onnx"', b'"' + LONG + b'"'),
        ("config.json", b'"llama"', b'"' + LONG + b'"'),
        ("config.json", b'"linear"', b'"' + LONG + b'"'),
        ("config.json", b"{", b'{"head_dim": "' + LONG + b'", '),
        ("config.json", b'"silu"', b'"' + LONG + b'"'),
        ("placement", b"{", b'{"' + LONG + b'": 1, '),
        ("placement", b'"layers_start": 0', b'"layers_start": "' + LONG + b'"'),
        ("yaml", b"shard_id", LONG),
        ("yaml", b"shard_id: 1", b"shard_id: " + LONG),
    ],
)
def test_an_error_repeats_the_beginning_of_what_is_long(name: str, old: bytes, new: bytes, tmp_path: Path) -> None:
    make, decode = DECODERS[name]
    path = tmp_path / f"file{SUFFIXES.get(name, '.json')}"
    path.write_bytes(make(path).replace(old, new, 1))
    with pytest.raises(MeshError) as caught:
        decode(path)
    assert len(str(caught.value)) < 1000
    assert name != "config.json" or "kkkk" in str(caught.value)


# -- what random changes seldom find -------------------------------------------------------------------------------------------


def gguf_header(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def gguf_pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


ALIGNMENT = "general.alignment"
BOMBS = {
    "many tensors": gguf_header(tensors=2**40, rest=bytes(8 * MEGABYTE)),
    "many pairs": gguf_header(pairs=2**40, rest=bytes(8 * MEGABYTE)),
    "many dimensions": gguf_header(tensors=1, rest=struct.pack("<QI", 0, 2**20) + bytes(8 * MEGABYTE)),
    "a long array": gguf_header(pairs=1, rest=gguf_pair("a", 9, struct.pack("<IQ", 0, 20_000_000)) + bytes(20 * MEGABYTE)),
    "nested arrays": gguf_header(pairs=1, rest=gguf_pair("a", 9, nested(5000))),
    "alignment 0": gguf_header(pairs=1, rest=gguf_pair(ALIGNMENT, 4, struct.pack("<I", 0)) + bytes(64)),
    "alignment 3": gguf_header(pairs=1, rest=gguf_pair(ALIGNMENT, 4, struct.pack("<I", 3)) + bytes(64)),
    "alignment text": gguf_header(pairs=1, rest=gguf_pair(ALIGNMENT, 8, struct.pack("<Q", 1) + b"x") + bytes(64)),
    "parts": gguf_header(pairs=1, rest=gguf_pair("split.count", 4, struct.pack("<I", 2**31)) + bytes(64)),
    "a size of zero": gguf_header(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 0, 0, 0) + bytes(64)),
    "no whole block": gguf_header(tensors=1, rest=struct.pack("<QIQIQ", 0, 1, 33, 2, 0) + bytes(64)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_gguf_header_is_bounded_before_anything_is_made_of_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(BOMBS[name])
    with little_memory(16 * MEGABYTE), pytest.raises(CorruptModel, match=r"no model has|not made of blocks"):
        GgufCheckpoint(path)


def test_a_safetensors_header_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with little_memory(), pytest.raises(CorruptModel, match="are the most"):
        SafetensorsCheckpoint.open(tmp_path)


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Range"])
def test_an_onnx_count_is_bounded_before_anything_is_made_of_it(op: str, tmp_path: Path) -> None:
    model = onnx.load_from_string(an_onnx())
    arrays = {
        "sizes": np.array([2**20, 2**20]),
        "one": np.ones((1, 1), np.float32),
        "end": np.array(2**40),
        "zero": np.array(0),
        "step": np.array(1),
    }
    inputs = {"ConstantOfShape": ["sizes"], "Expand": ["one", "sizes"], "Tile": ["one", "sizes"], "Range": ["zero", "end", "step"]}[op]
    model.graph.initializer.extend([numpy_helper.from_array(arrays[name], name) for name in inputs])
    model.graph.node.insert(0, helper.make_node(op, inputs, ["bomb"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["bomb"], ["most"], keepdims=0))
    model.graph.node.insert(2, helper.make_node("Cast", ["most"], ["number"], to=TensorProto.FLOAT))
    model.graph.node[-1].input[0] = "z"
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Add", ["y", "number"], ["z"]))
    path = tmp_path / "bomb.onnx"
    path.write_bytes(model.SerializeToString())
    with little_memory(), pytest.raises(MeshError):
        onnx_source.open_source(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)),
        "a: &a [*a]\n",
        "a: 2020-99-99\n",
        "a: 0b\n? [x]\n: 1\n",
        "a: " + "9" * 5000 + "\n",
        "a: " + "[" * 5000 + "\n",
        "a: " + "x" * (5 * MEGABYTE),
    ],
    ids=["aliases", "itself", "date", "key", "number", "deep", "long"],
)
def test_a_configuration_that_is_a_bomb_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path, CoordinatorConfig)


SHAPES = [(0,), (0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 4, (0, 0), (1, 0, 2**31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zstd", [False, True])
def test_a_tensor_of_zero_or_extreme_sizes_is_read_or_refused(shape: tuple[int, ...], zstd: bool) -> None:
    from mesh.protocol.tensor_codec import WireError, unpack

    with little_memory():
        try:
            tensor = unpack(0, shape, b"", 0, 0, bf16=False, zstd=zstd, limit_bytes=frame_codec.MAX_FRAME_BYTES)
            assert tensor.shape == shape
        except WireError:
            assert zstd or max(shape) > 1


@pytest.mark.parametrize("flags", [frame_codec.Flags(0), frame_codec.Flags.BF16, frame_codec.Flags.ZSTD])
def test_a_changed_frame_with_a_right_checksum_is_read_or_refused(flags: frame_codec.Flags) -> None:
    one = np.ones(2)
    route = (frame_codec.Hop(LayerRange(0, 1), "s"), frame_codec.Hop(LayerRange(1, 2), "t"))
    frame = frame_codec.Frame(
        frame_codec.Kind.DECODE, "0" * 16, "c", route, one.astype(np.uint64), one.astype(np.uint32), one.astype(np.uint32),
        np.ones((2, 2), np.uint32), one.astype(np.int32), step=1, hop=1, flags=flags, tensors=(np.ones((2, 1, 4), np.float32),),
    )  # fmt: skip
    whole = frame_codec.encode(frame)

    @settings(max_examples=300, deadline=None, database=None)
    @given(changed(whole[:-4]))
    def attempt(body: bytes) -> None:
        with little_memory():
            try:
                frame_codec.decode(body + struct.pack("<I", zlib.crc32(body)))
            except FrameRejected as error:
                assert error.reason

    attempt()


# -- bombs of tokenizers and templates, which are read in the coordinator's own process too -------------------------------------


def grown_tokenizer(**parts: Any) -> bytes:
    return orjson.dumps(orjson.loads(a_tokenizer()) | parts)


TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
FIXED = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [TEN] * 9}},
        {"decoder": {"type": "Sequence", "decoders": [TEN] * 9}},
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TEN] * 5}] * 5}},
    ],
    ids=["normalizer", "decoder", "one step", "prepend", "nested"],
)
def test_a_tokenizer_that_would_make_a_text_grow_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with little_memory(), pytest.raises(CorruptModel, match="times as long"):
        Tokenizer.load(described(tmp_path, grown_tokenizer(**parts), b""))


def test_a_tokenizer_cannot_ask_for_padding(tmp_path: Path) -> None:
    """2^40 tokens of padding would end the process: the library aborts where memory lacks."""
    data = grown_tokenizer(padding={"strategy": {"Fixed": 2**40}, **FIXED}, truncation=None)
    assert Tokenizer.load(described(tmp_path, data, b"{{ messages }}")).encode("ab") == [2]


@pytest.mark.parametrize(
    "text",
    [
        '{{ ("a" * 3000000000) | length }}',
        '{{ "a" | center(3000000000) | length }}',
        '{{ "%03000000000d" | format(1) }}',
        '{% set x = "a" * 3000000000 %}',
        "{% if 9 ** 9 ** 9 ** 9 %}{% endif %}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
    ],
)
def test_a_template_computes_nothing_when_it_is_loaded(text: str, tmp_path: Path) -> None:
    with little_memory():
        assert Tokenizer.load(described(tmp_path, a_tokenizer(), text.encode())).has_chat_template


@pytest.mark.parametrize(
    "text",
    [
        "{% autoescape 9 ** 9 ** 9 ** 9 %}{% endautoescape %}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% if x %}" * 5000,
        "{% break %}",
        "\xff",
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused(text: str, tmp_path: Path) -> None:
    with little_memory(), pytest.raises(CorruptModel, match="chat_template"):
        Tokenizer.load(described(tmp_path, a_tokenizer(), text.encode("latin-1")))


def test_external_data_beyond_its_file_is_refused(tmp_path: Path) -> None:
    """2^60 bytes that are said to be there, in a block and in a source."""
    model = onnx.load_from_string(an_onnx())
    (tmp_path / "w.bin").write_bytes(bytes(640))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([2**29, 2**29])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(2**60))):
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "embed.onnx"
    path.write_bytes(model.SerializeToString())
    with little_memory(), pytest.raises(CorruptModel, match="ends at"):
        load_block(tmp_path, "embed")
    with little_memory(), pytest.raises(CorruptModel, match="ends at"):
        onnx_source.open_source(path)


# -- names that leave the directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", "sub/../../secret.bin"])
def test_external_data_cannot_lie_elsewhere(location: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(640))
    (directory / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load_from_string(an_onnx())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = directory / "embed.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptModel, match=r"outside|ends at"):
        onnx_source.open_source(path)
    with pytest.raises(CorruptModel, match=r"outside|ends at"):
        load_block(directory, "embed")


def test_a_safetensors_index_names_only_files_beside_it(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(save({"a": np.zeros(2, np.float32)}))
    (directory / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", "link.safetensors", str(tmp_path / "secret.safetensors"), "x\0y"):
        (directory / "model.safetensors.index.json").write_bytes(orjson.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CorruptModel):
            SafetensorsCheckpoint.open(directory)


def test_a_snapshot_of_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0f").write_bytes(save({"a": np.zeros(2, np.float32)}))
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0f"))
    assert list(SafetensorsCheckpoint.open(snapshot)) == ["a"]
    (tmp_path / "secret").write_bytes((blobs / "0f").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptModel, match="outside"):
        SafetensorsCheckpoint.open(snapshot)


def test_a_part_of_a_gguf_file_cannot_be_a_link_out(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    first = directory / "m-00001-of-00002.gguf"
    first.write_bytes(gguf_header(pairs=1, rest=gguf_pair("split.count", 4, struct.pack("<I", 2)) + bytes(64)))
    (tmp_path / "secret.gguf").write_bytes(gguf_header(rest=bytes(64)))
    (directory / "m-00002-of-00002.gguf").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(CorruptModel, match="outside"):
        GgufCheckpoint(first)


def test_a_tensor_that_is_not_what_it_says_is_refused_by_its_name() -> None:
    for made in (
        TensorProto(name="t"),
        TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2, 2]),
        TensorProto(name="t", data_type=77),
    ):
        with pytest.raises(CorruptModel, match="tensor 't'"):
            TensorReader(None).read(made)
