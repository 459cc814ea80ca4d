"""Frames: what travels between coordinator and shards on the token path. Binary, little-endian, one message a frame.

A step is a frame that visits every stage of its route and comes back:

    coordinator --PREFILL/DECODE, token ids--> stage 0 --the same, hidden state--> stage 1 ... last stage --TOKENS/ACK--> coordinator

It carries its route, so a stage knows the next subject from the frame alone; and a row of the table for each session in it.
A stage that cannot take some of the rows leaves them out and tells the coordinator with a GAP frame.

    header     magic "SMsh", version u8, kind u8, flags u16, model hash 8 bytes, wave u32, step u64, hop u8, hops u8,
               reason u8, tensors u8, rows u16, timings u8, route length u16, coordinator length u8, tokens u32
    route      for each hop: start u16, stop u16, name length u8, name
    coordinator, traceparent (26 bytes, when flag TRACED)
    rows       session u64 [n], epoch u32 [n], position u32 [n], slot u32 [hops, n], tokens i32 [m]
    timings    for each stage passed: queue, compute, codec, in microseconds, u32 each
    tensors    for each: dtype u8, rank u8, dimensions u32, stored bytes u32; then their bytes, each 16-byte aligned
    checksum   CRC-32 of all before it

Reading never trusts a length: whatever is wrong is a FrameRejected whose `reason` is one of REASONS.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np

from mesh import subjects, wire
from mesh.errors import FrameRejected
from mesh.frame import Flags, Frame, Gap, Hop, Kind, Timing
from mesh.types import LayerRange

__all__ = ["MAX_FRAME_BYTES", "REASONS", "VERSION", "Flags", "Frame", "Gap", "Hop", "Kind", "Timing", "decode", "encode", "overhead_bytes"]

VERSION: Final = 1
MAGIC: Final = b"SMsh"
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024  # NATS's own largest max_payload; also the most a compressed frame may unfold to
MAX_ROWS: Final = 4096
MAX_HOPS: Final = 64
MAX_TENSORS: Final = 4

REASONS: Final = (
    "truncated",
    "magic",
    "version",
    "checksum",
    "kind",
    "flags",
    "length",
    "route",
    "rows",
    "tensor",
    "model",
    "too_large",
    "input",
)
"""Everything a rejected frame is counted under."""

_HEADER = struct.Struct("<4sBBH8sIQBBBBHBHBI")
_HOP = struct.Struct("<HHB")
_TIMING = struct.Struct("<III")
_TENSOR = struct.Struct("<BB")
_CRC = struct.Struct("<I")
_TRACE = struct.Struct("<B16s8sB")
_ALIGN = 16


_ALL_FLAGS: Final = sum(Flags)
_FLAGS: Final = tuple(Flags(bits) for bits in range(_ALL_FLAGS + 1))  # making a member anew is slow
_BF16, _ZSTD, _TRACED, _FINAL = (int(flag) for flag in (Flags.BF16, Flags.ZSTD, Flags.TRACED, Flags.FINAL))
_KINDS: Final = {int(kind): kind for kind in Kind}
_GAPS: Final = {int(gap): gap for gap in Gap}


def reject(reason: str, message: str) -> FrameRejected:
    assert reason in REASONS
    return FrameRejected(f"frame rejected: {message}", reason=reason)


# -- writing -----------------------------------------------------------------------------------------------------------


def encode(frame: Frame) -> bytes:
    """The frame as one message. A ValueError is a frame that was put together wrongly, never the network's fault."""
    n, m, hops = frame.rows, len(frame.tokens), len(frame.route)
    problem = _shape_problem(frame.kind, n, m, hops, frame.hop, len(frame.tensors), frame.flags, frame.reason)
    if problem is not None:
        raise ValueError(problem[1])
    if len(frame.epochs) != n or len(frame.positions) != n or frame.slots.shape != (hops, n):
        raise ValueError(f"row table of {n} sessions, {len(frame.epochs)} epochs, {len(frame.positions)} positions, {frame.slots.shape}")
    flags = int(frame.flags) & ~_TRACED | (_TRACED if frame.traceparent else 0)
    name = subjects.check_token(frame.coordinator, "coordinator").encode()
    route = _encode_route(frame.route)
    counts = (frame.hop, hops, frame.reason, len(frame.tensors), n, len(frame.timings), len(route), len(name), m)
    header = _HEADER.pack(MAGIC, VERSION, frame.kind, flags, bytes.fromhex(frame.model_hash), frame.wave, frame.step, *counts)
    parts: list[Any] = [
        header,
        route,
        name,
    ]
    if frame.traceparent:
        parts.append(_encode_trace(frame.traceparent))
    for array, dtype in (
        (frame.sessions, "<u8"),
        (frame.epochs, "<u4"),
        (frame.positions, "<u4"),
        (frame.slots, "<u4"),
        (frame.tokens, "<i4"),
    ):
        parts.append(np.ascontiguousarray(array, dtype).tobytes())
    parts.extend(_TIMING.pack(*(min(us, 2**32 - 1) for us in (t.queue_us, t.compute_us, t.codec_us))) for t in frame.timings)
    if frame.tensors:
        _append_tensors(parts, frame.tensors, bf16=bool(flags & _BF16), zstd=bool(flags & _ZSTD))
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    parts.append(_CRC.pack(crc))
    return b"".join(parts)


def _append_tensors(parts: list[Any], tensors: Sequence[np.ndarray], *, bf16: bool, zstd: bool) -> None:
    table, bodies = [], []
    for tensor in tensors:
        code, body = wire.pack(tensor, bf16=bf16, zstd=zstd)
        table.append(_TENSOR.pack(code, tensor.ndim) + struct.pack(f"<{tensor.ndim}II", *tensor.shape, len(body)))
        bodies.append(body)
    parts.extend(table)
    at = sum(len(part) for part in parts)
    for body in bodies:
        parts.append(b"\0" * (-at % _ALIGN))
        parts.append(body)
        at += -at % _ALIGN + len(body)


@lru_cache(maxsize=256)
def _encode_route(route: tuple[Hop, ...]) -> bytes:
    parts = []
    for hop in route:
        name = subjects.check_token(hop.shard, "shard").encode()
        parts.append(_HOP.pack(hop.layers.start, hop.layers.stop, len(name)) + name)
    return b"".join(parts)


def _encode_trace(traceparent: str) -> bytes:
    version, trace, span, flags = traceparent.split("-")
    return _TRACE.pack(int(version, 16), bytes.fromhex(trace), bytes.fromhex(span), int(flags, 16))


def overhead_bytes(rows: int, tokens: int, hops: int) -> int:
    """An upper bound of a frame's size without its tensors' bytes: what sizes a prefill chunk to max_payload."""
    fixed = _HEADER.size + _TRACE.size + subjects.MAX_TOKEN + _CRC.size
    return (
        fixed
        + hops * (_HOP.size + subjects.MAX_TOKEN + _TIMING.size)
        + rows * (16 + 4 * hops)
        + 4 * tokens
        + MAX_TENSORS * (_TENSOR.size + 5 * 4 + _ALIGN)
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def decode(data: bytes, *, model_hash: str | None = None) -> Frame:
    """The frame in `data`; FrameRejected otherwise. `model_hash`: refuse every other model's. Arrays share `data`'s memory."""
    size = len(data)
    if size < _HEADER.size + _CRC.size:
        raise reject("truncated", f"{size} bytes are less than a header")
    if size > MAX_FRAME_BYTES:
        raise reject("too_large", f"{size:,} bytes")
    (magic, version, kind_, flags_, hash_, wave, step, hop, hops, reason_, tensors_, n, timings_, route_len, name_len, m) = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC:
        raise reject("magic", "this is no frame")
    if version != VERSION:
        raise reject("version", f"version {version}, and this side speaks {VERSION}")
    body = size - _CRC.size
    if zlib.crc32(memoryview(data)[:body]) != _CRC.unpack_from(data, body)[0]:
        raise reject("checksum", "its checksum is wrong")
    if model_hash is not None and hash_.hex() != model_hash:
        raise reject("model", f"it is of model {hash_.hex()}, and here is {model_hash}")
    kind, reason = _KINDS.get(kind_), _GAPS.get(reason_)
    if kind is None or reason is None:
        raise reject("kind", f"kind {kind_}, reason {reason_}")
    if flags_ & ~_ALL_FLAGS:
        raise reject("flags", f"flags {flags_:#x}")
    flags = _FLAGS[flags_]
    problem = _shape_problem(kind, n, m, hops, hop, tensors_, flags, reason)
    if problem is not None:
        raise reject(*problem)
    reader = _Reader(data, _HEADER.size, body)
    at = reader.take(route_len + name_len)
    route, coordinator = _read_names(data[at : at + route_len + name_len], hops, name_len)
    traceparent = reader.trace() if flags_ & _TRACED else None
    sessions = reader.array("<u8", n)
    epochs = reader.array("<u4", n)
    positions = reader.array("<u4", n)
    slots = reader.array("<u4", hops * n).reshape(hops, n)
    tokens = reader.array("<i4", m)
    timings = tuple(Timing(*_TIMING.unpack_from(data, reader.take(_TIMING.size))) for _ in range(timings_))
    tensors = reader.tensors(tensors_, bf16=bool(flags_ & _BF16), zstd=bool(flags_ & _ZSTD)) if tensors_ else ()
    if reader.at != body:
        raise reject("length", f"{body - reader.at} bytes too many")
    return Frame(
        kind,
        hash_.hex(),
        coordinator,
        route,
        sessions,
        epochs,
        positions,
        slots,
        tokens,
        wave=wave,
        step=step,
        hop=hop,
        flags=flags,
        reason=reason,
        tensors=tensors,
        timings=timings,
        traceparent=traceparent,
        stored_bytes=size,
    )


def _shape_problem(kind: Kind, n: int, m: int, hops: int, hop: int, tensors: int, flags: Flags, reason: Gap) -> tuple[str, str] | None:
    """(reason, what is wrong) of counts that cannot be."""
    if not 1 <= hops <= MAX_HOPS or hop >= hops:
        return "route", f"hop {hop} of {hops}"
    if not 1 <= n <= MAX_ROWS:
        return "rows", f"{n} rows"
    if kind is Kind.PREFILL:
        good = n == 1 <= m
    elif kind is Kind.DECODE or kind is Kind.TOKENS:
        good = m == n
    else:
        good = m == 0
    if not good:
        return "rows", f"{kind.name} with {n} rows and {m} tokens"
    forward = kind is Kind.PREFILL or kind is Kind.DECODE
    if forward:
        good = tensors == (1 if hop else 0)
    else:
        good = tensors == 0 or (kind is Kind.TOKENS and tensors == 3)
    if not good:
        return "tensor", f"{kind.name} at hop {hop} with {tensors} tensors"
    if int(flags) & _FINAL and kind is not Kind.PREFILL:
        return "flags", f"FINAL on {kind.name}"
    if (reason is Gap.NONE) == (kind is Kind.GAP):
        return "kind", f"{kind.name} with reason {reason.name}"
    return None


@lru_cache(maxsize=256)
def _read_names(data: bytes, hops: int, name_len: int) -> tuple[tuple[Hop, ...], str]:
    """(route, coordinator), which are the same for frame after frame."""
    reader = _Reader(data, 0, len(data))
    route: list[Hop] = []
    for _ in range(hops):
        start, stop, length = _HOP.unpack_from(data, reader.take(_HOP.size))
        layers = LayerRange(start, stop)
        if stop <= start or (route and route[-1].layers.stop != start):
            raise reject("route", f"layers {layers} after {route[-1].layers if route else 'nothing'}")
        route.append(Hop(layers, _name(data, reader.take(length), length)))
    coordinator = _name(data, reader.take(name_len), name_len)
    if reader.at != len(data):
        raise reject("route", f"{len(data) - reader.at} bytes too many")
    return tuple(route), coordinator


def _name(data: bytes, at: int, length: int) -> str:
    text = data[at : at + length].decode("ascii", "replace")
    if not subjects.is_token(text):
        raise reject("route", f"{text!r} is no name")
    return text


class _Reader:
    """A position in a message that never passes its end."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def take(self, count: int) -> int:
        """Move on by `count` bytes; where they begin."""
        at = self.at
        if count > self.end - at:
            raise reject("length", f"{count} bytes are announced where {self.end - at} are left")
        self.at = at + count
        return at

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.data, dtype, count, self.take(count * int(dtype[-1])))

    def trace(self) -> str:
        version, trace, span, flags = _TRACE.unpack_from(self.data, self.take(_TRACE.size))
        return f"{version:02x}-{trace.hex()}-{span.hex()}-{flags:02x}"

    def tensors(self, count: int, *, bf16: bool, zstd: bool) -> tuple[np.ndarray, ...]:
        table = []
        for _ in range(count):
            code, rank = _TENSOR.unpack_from(self.data, self.take(_TENSOR.size))
            if rank > 4:
                raise reject("tensor", f"rank {rank}")
            numbers = struct.unpack_from(f"<{rank + 1}I", self.data, self.take(4 * rank + 4))
            table.append((code, numbers[:-1], numbers[-1]))
        result = []
        for code, shape, stored in table:
            self.take(-self.at % _ALIGN)
            at = self.take(stored)
            try:
                result.append(wire.unpack(code, shape, self.data, at, stored, bf16=bf16, zstd=zstd, limit_bytes=MAX_FRAME_BYTES))
            except wire.WireError as error:
                raise reject("tensor", str(error)) from None
        return tuple(result)
