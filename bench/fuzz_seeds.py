"""Valid inputs for the decoders of bench/fuzz_targets.py: one function of its name for each."""

from __future__ import annotations

import json
import struct
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from pydantic import BaseModel

if TYPE_CHECKING:
    from mesh.protocol.message import Message


def frame() -> list[bytes]:
    from mesh.protocol import frame_codec
    from mesh.protocol.frame import WANTED, Frame, Hop, Kind
    from mesh.types import LayerRange

    def made(rows: int, tokens: int, flags: frame_codec.Flags, lengths: list[int] | None = None) -> bytes:
        one, route = np.ones(rows), (Hop(LayerRange(0, 1), "s"), Hop(LayerRange(1, 2), "t"))
        example = Frame(
            Kind.PACKED if lengths else Kind.DECODE, "0" * 16, "c", route, one.astype(np.uint64), one.astype(np.uint32),
            one.astype(np.uint32), np.ones((rows, 2), np.uint32), np.ones(tokens, np.int32), step=1, hop=1, flags=flags,
            tensors=(np.ones((tokens, 1, 4), np.float32),), lengths=np.array(lengths, np.uint32) if lengths else None,
        )  # fmt: skip
        return frame_codec.encode(example)

    whole = [made(2, 2, flags) for flags in (frame_codec.Flags(0), frame_codec.Flags.BF16, frame_codec.Flags.ZSTD)]
    whole.append(made(3, 6, frame_codec.Flags(0), [2, 1 | WANTED, 3]))
    return [*whole, *(each[:-4] for each in whole)]


def tensor() -> list[bytes]:
    from mesh.protocol.tensor_codec import pack

    made = []
    for flags in range(4):
        array = np.ones((2, 3), np.float32)
        code, body = pack(array, bf16=bool(flags & 1), zstd=bool(flags & 2))
        made.append(struct.pack("<BBII", code, flags, 2, 3) + bytes(body))
    return made


def message_types() -> tuple[type[Message], ...]:
    """Every message of the mesh's own subjects."""
    from mesh.protocol.message import Message
    from mesh.protocol.topics import TOPICS

    types = [kind for topic in TOPICS for kind in (topic.request, topic.reply) if isinstance(kind, type) and issubclass(kind, Message)]
    return tuple(dict.fromkeys(types))


def messages() -> list[bytes]:
    return [bytes([index]) + orjson.dumps(example(kind)) for index, kind in enumerate(message_types())]


def documents() -> list[bytes]:
    return [body[1:] for body in bodies()]


def body_types() -> tuple[type[BaseModel], ...]:
    """The requests of all HTTP APIs."""
    from mesh.gateway.messages_schema import CountRequest, MessagesRequest
    from mesh.gateway.openai_schema import ChatRequest, CompletionRequest, EmbeddingRequest
    from mesh.gateway.responses_schema import ResponsesRequest
    from mesh.gateway.schema import BatchRequest, InferenceRequest
    from mesh.gateway.tokenize_routes import DetokenizeRequest, TokenizeRequest

    return (
        ChatRequest, CompletionRequest, BatchRequest, InferenceRequest, MessagesRequest, CountRequest, ResponsesRequest, TokenizeRequest,
        DetokenizeRequest, EmbeddingRequest,
    )  # fmt: skip


def bodies() -> list[bytes]:
    chat = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stop": ["x"], "stream": True}
    return [bytes([0]) + orjson.dumps(chat), *(bytes([index]) + orjson.dumps(example(kind)) for index, kind in enumerate(body_types()))]


def example(kind: type[BaseModel]) -> dict[str, Any]:
    """A document with every key of `kind`, from its JSON schema. It need not pass the checks between keys."""
    schema = kind.model_json_schema()
    return dict(_value(schema, schema.get("$defs", {}), 0))


def _value(schema: dict[str, Any], defs: dict[str, Any], depth: int) -> Any:
    if "$ref" in schema:
        return _value(defs[schema["$ref"].rpartition("/")[2]], defs, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _value(schema[key][0], defs, depth + 1)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            return {} if depth > 6 else {name: _value(each, defs, depth + 1) for name, each in schema.get("properties", {}).items()}
        case "array":
            item = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
            return [_value(item, defs, depth + 1)] * max(schema.get("minItems", 1), 1)
        case "integer" | "number":
            return max(schema.get("minimum", 1), 1)
        case "boolean":
            return True
        case "string":
            return "a" * max(schema.get("minLength", 1), 32 if "32" in schema.get("pattern", "") else 1)
    return None


def stream() -> list[bytes]:
    from mesh.protocol import stream as documents_of

    timing = dict.fromkeys(documents_of.Timing.__dataclass_fields__, 1.0)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    done = {"done": True, "request": "r", "tokens": [1], "text": "a", "finish_reason": "stop", "usage": usage, "timing": timing}
    token = {"done": False, "index": 0, "text": "a", "token": 1, "id": 1, "epoch": 1}
    accepted = {"done": False, "cancel": "s", "request": "r", "model": "m", "next": 0}
    return [orjson.dumps(each) for each in (done, token, accepted, {"done": False, "waiting": 1, "missing": ["0-1"]})]


def split() -> list[bytes]:
    return [
        b'INFO {"max_payload":1048576}\r\nPING\r\n',
        b"MSG a.b 1 5\r\nhello\r\nMSG a.b 7 reply 0\r\n\r\nPONG\r\n",
        b"HMSG a.b 2 reply 16 16\r\nNATS/1.0 503\r\n\r\n\r\n",
        b"HMSG a 1 12 17\r\nNATS/1.0\r\n\r\nhello\r\n-ERR 'x'\r\n+OK\r\n",
        b"MSG a 1 -20\r\nMSG a 9 -20\r\n",
    ]


def report() -> list[bytes]:
    from mesh.protocol.headers import FRAME_HEADER

    events = [{"type": "in", "ts": "2024-05-01T10:00:00.123456789Z"}, {"type": "eg", "ts": "2024-05-01T10:00:00.2+02:00"}]
    return [orjson.dumps({"request": {"header": {FRAME_HEADER: ["7.1"]}}, "events": events, "server": {"name": "n", "id": "i"}})]


def traceparent() -> list[bytes]:
    return [b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"cc-" + b"a" * 32 + b"-" + b"b" * 16 + b"-00-more"]


def token() -> list[bytes]:
    import jwt

    whole = {"sub": "a", "exp": int(time.time()) + 10**6, "scope": "generate", "rpm": 1, "tpm": 1}
    return [jwt.encode(claims, "k" * 32, algorithm="HS256").encode() for claims in (whole, {"sub": "a"}, {**whole, "scope": 1})]


def manifest() -> list[bytes]:
    digest = "0" * 64
    blocks = [
        {"name": name, "files": [{"name": f"{name}.onnx", "bytes": 1, "sha256": digest}], "weight_bytes": 0, "parameters": 0}
        for name in ("embed", "layer_000", "head")
    ]
    made = {
        "name": "m", "architecture": "a", "source": "onnx", "layers": 1, "vocab_size": 3, "context_length": 64,
        "hidden": {"size": 4, "dtype": "float32"}, "cache": [{"kv_heads": 1, "key_dim": 2, "value_dim": 2, "window": 8}],
        "cache_dtype": "float32", "weights": {"bits": 8, "group_size": 32}, "blocks": blocks,
        "tokenizer": {"bos_id": 0, "eos_ids": [1], "add_bos": True, "chat_template": True},
        "extra_files": [{"name": "tokenizer.json", "bytes": 1, "sha256": digest}], "report": {"a": [1.5, {"b": None}]},
        "signature": {"key": digest, "value": digest * 2},
    }  # fmt: skip
    return [orjson.dumps(made)]


def gguf() -> list[bytes]:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    pairs = [
        text(b"general.alignment") + struct.pack("<II", 4, 32),
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
        text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b"),
        text(b"nested") + struct.pack("<IIQIQ", 9, 9, 1, 4, 1) + struct.pack("<I", 7),
        text(b"float") + struct.pack("<If", 6, 1.5),
    ]
    tensor_entry = text(b"output.weight") + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
    body = b"".join(pairs) + tensor_entry
    return [b"GGUF" + struct.pack("<IQQ", version, 1, len(pairs)) + body + bytes(512) for version in (2, 3)]


def safetensors() -> list[bytes]:
    from safetensors.numpy import save

    return [save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)})]


def quantized() -> list[bytes]:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "block_structure": [128, 128]}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"], "format": "pack-quantized", "input_activations": None}}
    given: list[dict[str, Any]] = [
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "config_groups": groups},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fbgemm_fp8"},
    ]
    return [orjson.dumps({"quantization_config": each}) for each in given] + [
        orjson.dumps({"text_config": {"compression_config": given[2]}})
    ]


def kept() -> list[bytes]:
    from mesh.gateway.kept_responses import KeptResponse, pack

    packed = pack(KeptResponse({"id": "resp_1", "output": []}, [{"role": "user", "content": "a"}]))
    return [packed, zlib.decompress(packed), b'{"response": [], "messages": [1]}']


def index() -> list[bytes]:
    return [orjson.dumps({"metadata": {}, "weight_map": {"a": name}}) for name in ("x.safetensors", "../x", "/etc/passwd", "a/b")]


def tensor_proto() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    made = [numpy_helper.from_array(np.ones((2, 3), kind), "a") for kind in (np.float32, np.int64, np.uint8, np.float16)]
    made += [helper.make_tensor("p", kind, [3], [1, 2, 3]) for kind in (TensorProto.INT4, TensorProto.UINT4, TensorProto.BFLOAT16)]
    for kind in (TensorProto.FLOAT, TensorProto.INT4, TensorProto.FLOAT4E2M1):
        outside = TensorProto(name="e", data_type=kind, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "64")):
            outside.external_data.add(key=key, value=value)
        made.append(outside)
    return [each.SerializeToString() for each in made]


def onnx_source() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Add", ["x", "zeros"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    arrays = {"table": np.ones((20, 8), np.float32), "head": np.ones((8, 20), np.float32)}
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 20])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in arrays.items()])
    return [helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()]


def tokenizer() -> list[bytes]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "_"), normalizers.Prepend("_")])
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+"), "isolated")
    bpe.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.enable_padding(length=8)
    bpe.enable_truncation(8)
    word = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0, False))
    return [each.to_str().encode() for each in (bpe, word, unigram)]


def template() -> list[bytes]:
    return [
        b"{% for message in messages %}{{ message.role | upper }}: {{ message['content'] ~ 1 }}{% endfor %}{{ bos_token }}",
        b"{%- macro m(a, b=1) -%}{{ a * b }}{%- endmacro -%}{% set ns = namespace(x=1) %}{% if ns.x is defined %}{{ m('a') }}{% endif %}",
        b"{% generation %}{{ raise_exception('no') }}{% endgeneration %}{{ tools | tojson(indent=2) }}{% break %}",
        json.dumps({"a": "{{ 'a' * 10 }}"}).encode(),
    ]
