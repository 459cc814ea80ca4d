"""The frame codec against msgpack and protobuf: microseconds to encode and decode a frame, and its size.

    python bench/frame_codec.py [--rounds 300]

A decode frame has 32 rows, a prefill frame one row of 256 tokens; both carry a hidden state [tokens, 576] of float32 over a route of
three stages. Every codec returns the same fields as numpy arrays. `next hop` encodes a frame that was decoded before and goes on to the
next stage, as a shard does. A figure is the mean of twenty calls in the fastest of many rounds, because other work on the machine can only
add to it. msgpack must be installed.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-not-found, import-untyped, unused-ignore]
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped, unused-ignore]

from mesh.protocol import frame_codec
from mesh.protocol.frame import Frame, Hop, Kind, StageTiming
from mesh.types import LayerRange

WIDTH = 576
ARRAYS = ("sessions", "epochs", "positions", "stage_rows", "tokens")
DTYPES = {"sessions": "<u8", "epochs": "<u4", "positions": "<u4", "stage_rows": "<u4", "tokens": "<i4"}


def frame(rows: int, tokens: int) -> Frame:
    rng = np.random.default_rng(0)
    route = tuple(Hop(LayerRange(10 * i, 10 * i + 10), f"shard-{i + 1}") for i in range(3))
    return Frame(
        Kind.DECODE if rows == tokens else Kind.PREFILL,
        "0123456789abcdef",
        "coordinator-1",
        route,
        rng.integers(0, 2**63, rows).astype(np.uint64),
        np.ones(rows, np.uint32),
        np.arange(rows, dtype=np.uint32),
        np.tile(np.arange(rows, dtype=np.uint32), (3, 1)),
        np.arange(tokens, dtype=np.int32),
        batch=1,
        step=7,
        hop=1,
        tensors=(rng.standard_normal((tokens, WIDTH)).astype(np.float32),),
        timings=(StageTiming(10, 2000, 30),),
    )


def by_msgpack() -> tuple[Callable[[Frame], bytes], Callable[[bytes], Any]]:
    def encode(f: Frame) -> bytes:
        document = {
            "kind": int(f.kind), "hash": f.model_hash, "coordinator": f.coordinator, "batch": f.batch, "step": f.step, "hop": f.hop,
            "flags": int(f.flags), "reason": int(f.reason), "timings": f.timings,
            "route": [(hop.layers.start, hop.layers.stop, hop.shard) for hop in f.route],
            **{name: getattr(f, name).tobytes() for name in ARRAYS},
            "tensors": [(tensor.dtype.str, tensor.shape, tensor.tobytes()) for tensor in f.tensors],
        }  # fmt: skip
        data: bytes = msgpack.packb(document)
        return data + zlib.crc32(data).to_bytes(4, "little")

    def decode(data: bytes) -> Any:
        assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
        found = msgpack.unpackb(data[:-4])
        arrays = [np.frombuffer(found[name], DTYPES[name]) for name in ARRAYS]
        route = tuple(Hop(LayerRange(start, stop), shard) for start, stop, shard in found["route"])
        return found, arrays, route, [np.frombuffer(body, dtype).reshape(shape) for dtype, shape, body in found["tensors"]]

    return encode, decode


def by_protobuf() -> tuple[Callable[[Frame], bytes], Callable[[bytes], Any]]:
    file = descriptor_pb2.FileDescriptorProto(name="bench_frame.proto", package="bench", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str | None]) -> None:
        made = file.message_type.add(name=name)
        for number, (field, kind, label, of) in enumerate(fields, 1):
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of)

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    u32, u64, text, raw, sub = kinds.TYPE_UINT32, kinds.TYPE_UINT64, kinds.TYPE_STRING, kinds.TYPE_BYTES, kinds.TYPE_MESSAGE
    message("Hop", ("start", u32, one, None), ("stop", u32, one, None), ("shard", text, one, None))
    message("Timing", ("queue", u32, one, None), ("compute", u32, one, None), ("codec", u32, one, None))
    message("Tensor", ("dtype", text, one, None), ("shape", u32, many, None), ("body", raw, one, None))
    message(
        "Frame",
        *((name, u32, one, None) for name in ("kind", "batch", "hop", "flags", "reason")),
        ("step", u64, one, None), ("hash", text, one, None), ("coordinator", text, one, None),
        *((name, raw, one, None) for name in ARRAYS),
        ("route", sub, many, ".bench.Hop"), ("timings", sub, many, ".bench.Timing"), ("tensors", sub, many, ".bench.Tensor"),
    )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Frame"))  # type: ignore[no-untyped-call, unused-ignore]

    def encode(f: Frame) -> bytes:
        made: Any = kind(
            kind=int(f.kind), batch=f.batch, hop=f.hop, flags=int(f.flags), reason=int(f.reason), step=f.step, hash=f.model_hash,
            coordinator=f.coordinator, **{name: getattr(f, name).tobytes() for name in ARRAYS},
        )  # fmt: skip
        for hop in f.route:
            made.route.add(start=hop.layers.start, stop=hop.layers.stop, shard=hop.shard)
        for timing in f.timings:
            made.timings.add(queue=timing.queue_us, compute=timing.compute_us, codec=timing.codec_us)
        for tensor in f.tensors:
            made.tensors.add(dtype=tensor.dtype.str, shape=tensor.shape, body=tensor.tobytes())
        data: bytes = made.SerializeToString()
        return data + zlib.crc32(data).to_bytes(4, "little")

    def decode(data: bytes) -> Any:
        assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
        found: Any = kind.FromString(data[:-4])
        arrays = [np.frombuffer(getattr(found, name), DTYPES[name]) for name in ARRAYS]
        route = tuple(Hop(LayerRange(hop.start, hop.stop), hop.shard) for hop in found.route)
        timings = tuple(StageTiming(timing.queue, timing.compute, timing.codec) for timing in found.timings)
        return found, arrays, route, timings, [np.frombuffer(t.body, t.dtype).reshape(tuple(t.shape)) for t in found.tensors]

    return encode, decode


def microseconds(call: Callable[[], Any], rounds: int) -> float:
    calls = 20
    means = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - began) / calls * 1e6)
    return min(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    codecs = {"ours": (frame_codec.encode, frame_codec.decode), "msgpack": by_msgpack(), "protobuf": by_protobuf()}
    for name, made in (("decode, 32 rows", frame(32, 32)), ("prefill, 256 tokens", frame(1, 256))):
        print(f"{name}: {made.tensors[0].nbytes:,} bytes of hidden state")
        for codec, (encode, decode) in codecs.items():
            data = encode(made)
            encoding, decoding = microseconds(lambda: encode(made), rounds), microseconds(lambda: decode(data), rounds)  # noqa: B023
            print(f"  {codec:<9} encode {encoding:6.1f} us  decode {decoding:6.1f} us  {len(data):,} bytes")
        came = frame_codec.decode(frame_codec.encode(made))
        onward = came.forward(made.tensors[0], StageTiming(10, 2000, 30))
        crc = frame_codec.encode(made)
        print(f"  ours      next hop {microseconds(lambda: frame_codec.encode(onward), rounds):4.1f} us", end="")  # noqa: B023
        print(f"  (a CRC-32 of the frame alone {microseconds(lambda: zlib.crc32(crc), rounds):.1f} us)")  # noqa: B023


if __name__ == "__main__":
    main()
