"""The decoders that bench/fuzz.py runs: for each one a function of bytes, which lets only undeclared errors out, and its seeds."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Target = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Decoder:
    """make: imports the decoder, and returns the function. cost: it gets a million inputs divided by this."""

    make: Callable[[], Target]
    cost: int = 1


def _only(*declared: type[Exception]) -> Callable[[Callable[[bytes], Any]], Target]:
    """Let every exception out that the decoder does not declare, and errors whose text has no bound."""

    def wrap(decode: Callable[[bytes], Any]) -> Target:
        def attempt(data: bytes) -> None:
            try:
                decode(data)
            except declared as error:
                if len(str(error)) > 10_000:
                    raise AssertionError(f"an error of {len(str(error))} characters") from error

        return attempt

    return wrap


def _file(suffix: str) -> Path:
    """A file in memory, for decoders that take a path."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
    return folder / f"file{suffix}"


# -- the wire ----------------------------------------------------------------------------------------------------------------


def frame() -> Target:
    from mesh.errors import FrameRejected
    from mesh.protocol.frame_codec import decode

    def with_checksum(data: bytes) -> None:  # so that what is behind the check is reached
        decode(data[:-4] + struct.pack("<I", zlib.crc32(data[:-4])))

    plain, summed = _only(FrameRejected)(decode), _only(FrameRejected)(with_checksum)

    def attempt(data: bytes) -> None:
        plain(data)
        summed(data)

    return attempt


def tensor() -> Target:
    from mesh.protocol.tensor_codec import WireError, unpack

    def attempt(data: bytes) -> None:
        head = data[:10].ljust(10, b"\0")
        code, flags, a, b = struct.unpack("<BBII", head)
        body = data[10:]
        shape = (a & 0xFFFF, b & 0xFFFF) if flags & 4 else (a, b)
        unpack(code, shape, body, 0, len(body), bf16=bool(flags & 1), zstd=bool(flags & 2), limit_bytes=1 << 20)

    return _only(WireError)(attempt)


def messages() -> Target:
    from fuzz_seeds import message_types

    from mesh.errors import BadRequest, MessageRejected

    types = message_types()

    @_only(MessageRejected, BadRequest)
    def attempt(data: bytes) -> None:
        if data:
            types[data[0] % len(types)].parse(data[1:]).to_bytes()

    return attempt


def documents() -> Target:
    from mesh.errors import MessageRejected
    from mesh.gateway.openai_schema import ChatRequest
    from mesh.protocol.documents import read

    return _only(MessageRejected)(lambda data: read(ChatRequest, data, limit_bytes=1 << 20))


def bodies() -> Target:
    from fuzz_seeds import body_types
    from pydantic import ValidationError

    from mesh.errors import MessageRejected
    from mesh.protocol.documents import problem, read

    types = body_types()

    @_only(MessageRejected)
    def attempt(data: bytes) -> None:
        if data:
            kind, body = types[data[0] % len(types)], data[1:]
            try:
                kind.model_validate(read(kind, body, limit_bytes=1 << 20))
            except ValidationError as error:
                problem(error)

    return attempt


def kept() -> Target:
    from mesh.gateway.kept_responses import pack, unpack

    @_only()
    def attempt(data: bytes) -> None:
        unpack(data)
        found = unpack(zlib.compress(data, 1))
        if found is not None:
            pack(found)

    return attempt


def stream() -> Target:
    from mesh.errors import MessageRejected
    from mesh.protocol.stream import parse

    return _only(MessageRejected)(parse)


def split() -> Target:
    from mesh.bus.transport import Incoming

    class Connection:
        """What the splitter does with an asyncio transport."""

        def abort(self) -> None: ...
        def pause_reading(self) -> None: ...

    heard: Callable[[Any], None] = lambda data: None  # noqa: E731

    def attempt(data: bytes) -> None:
        protocol = Incoming({b"1": heard}, {b"2": heard}, {b"3": lambda: 4})
        protocol.connection_made(Connection())  # type: ignore[arg-type]
        half = len(data) // 2
        protocol.data_received(data[:half])
        protocol.data_received(data[half:])
        kept = sum(map(len, protocol._partial)) + sum(map(len, protocol._rest))
        assert kept <= 8 * len(data), f"{kept} bytes are kept of {len(data)}"  # a dropped payload leaves a header

    return attempt


def report() -> Target:
    from mesh.coordinator.server_traces import read_report

    return _only()(read_report)


def traceparent() -> Target:
    from mesh.telemetry.context import TraceContext

    return _only()(lambda data: TraceContext.parse(data.decode("latin-1")))


def token() -> Target:
    from mesh.errors import Denied
    from mesh.http.tokens import Verifier, peek

    verifier = Verifier("HS256", b"k" * 32)

    def attempt(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        _only(Denied)(lambda _: verifier.verify(text))(data)
        _only(Denied)(lambda _: peek(text))(data)

    return attempt


# -- files of models ---------------------------------------------------------------------------------------------------------


def manifest() -> Target:
    from mesh.errors import CorruptModel
    from mesh.model.manifest import Manifest

    def attempt(data: bytes) -> None:
        made = Manifest.parse(data, "manifest.json")
        assert Manifest.parse(made.model_dump_json().encode(), "again").digest == made.digest

    return _only(CorruptModel)(attempt)


def gguf() -> Target:
    from mesh.errors import ModelError
    from mesh.importer.sources.gguf_file import GgufCheckpoint

    path = _file(".gguf")

    @_only(ModelError)
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        GgufCheckpoint(path)

    return attempt


def safetensors() -> Target:
    from mesh.errors import ModelError
    from mesh.importer.sources.safetensors_file import SafetensorsCheckpoint

    path = _file(".safetensors").with_name("model.safetensors")

    @_only(ModelError)
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = SafetensorsCheckpoint.open(path.parent)
        for name in checkpoint:
            checkpoint.read(name)

    return attempt


def quantized() -> Target:
    import numpy as np
    from safetensors.numpy import save_file

    from mesh.errors import ModelError
    from mesh.importer.sources.quantized import open_checkpoint

    path = _file("").with_name("config.json")
    words, halves = np.ones((4, 32), np.int32), np.ones((1, 32), np.float16)
    parts: dict[str, Any] = {"qweight": words, "qzeros": words[:1, :4], "scales": halves, "g_idx": np.zeros(32, np.int32)}
    parts |= {"weight_packed": words.T.copy(), "weight_scale": halves.T.copy(), "weight_shape": np.array([32, 32], np.int64)}
    save_file({f"a.{part}": array for part, array in parts.items()}, path.with_name("model.safetensors"))

    @_only(ModelError)
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = open_checkpoint(path.parent)
        for name in checkpoint:
            checkpoint.read(name)

    return attempt


def index() -> Target:
    from mesh.errors import ModelError
    from mesh.importer.sources.safetensors_file import SafetensorsCheckpoint

    path = _file("").with_name("model.safetensors.index.json")

    @_only(ModelError)
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        SafetensorsCheckpoint.open(path.parent)

    return attempt


def tensor_proto() -> Target:
    import onnx

    from mesh.errors import CorruptModel
    from mesh.lowering.tensors import TensorReader

    path = _file(".data").with_name("w.bin")
    path.write_bytes(bytes(4096))

    @_only(CorruptModel)
    def attempt(data: bytes) -> None:
        made = onnx.TensorProto()
        try:
            made.ParseFromString(data)
        except Exception:  # protobuf's own: no tensor
            return
        TensorReader(path.parent).read(made)

    return attempt


def onnx_source() -> Target:
    from mesh.errors import ModelError
    from mesh.importer.sources.onnx import open_source

    path = _file(".onnx")

    @_only(ModelError)
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        open_source(path)

    return attempt


def tokenizer() -> Target:
    from mesh.errors import CorruptModel
    from mesh.model.manifest import TokenizerInfo
    from mesh.model.tokenizer import Tokenizer
    from mesh.model.tokenizer_file import read_backend

    @_only(CorruptModel)
    def attempt(data: bytes) -> None:
        backend = read_backend(data, Path("tokenizer.json"))
        try:
            Tokenizer(backend, TokenizerInfo()).decode([0, 1])
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises plain Exception, which Tokenizer.load maps
                raise

    return attempt


def template() -> Target:
    import jinja2

    from mesh.model.tokenizer import _compile

    return _only(jinja2.TemplateError)(lambda data: _compile(data.decode("utf-8", "replace")))


TARGETS: Final[dict[str, Decoder]] = {
    "frame": Decoder(frame),
    "tensor": Decoder(tensor),
    "messages": Decoder(messages),
    "documents": Decoder(documents),
    "bodies": Decoder(bodies),
    "stream": Decoder(stream),
    "kept": Decoder(kept),
    "split": Decoder(split),
    "report": Decoder(report),
    "traceparent": Decoder(traceparent),
    "token": Decoder(token),
    "manifest": Decoder(manifest),
    "gguf": Decoder(gguf),
    "safetensors": Decoder(safetensors, 4),
    "index": Decoder(index, 4),
    "quantized": Decoder(quantized, 10),
    "tensor_proto": Decoder(tensor_proto),
    "onnx_source": Decoder(onnx_source, 100),
    "tokenizer": Decoder(tokenizer, 10),
    "template": Decoder(template, 20),
}


def seeds(name: str) -> list[bytes]:
    """Valid inputs of a decoder."""
    import fuzz_seeds

    return [bytes(seed) for seed in getattr(fuzz_seeds, name)()]
