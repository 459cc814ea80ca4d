"""Frames on the wire, between coordinator and shards. Binary, little-endian, one message for each frame.

A step is a frame that visits every stage of its route and comes back:

    coordinator --PREFILL/DECODE/PACKED, token ids--> stage 0 --the same, hidden state--> stage 1 ... last stage --TOKENS/ACK--> coordinator

A frame carries its route, so a stage knows the next subject from the frame alone. It also carries a table with one row for each session.
A stage that cannot compute some of the rows leaves them out and reports them to the coordinator in a NACK frame.

    header     magic "SMsh", version u8, kind u8, flags u16, model hash 8 bytes, batch u32, step u64, hop u8, hops u8,
               reason u8, tensors u8, rows u16, timings u8, route length u16, coordinator length u8, tokens u32
    route      for each hop: start u16, stop u16, name length u8, name
    coordinator, traceparent (26 bytes, when flag TRACED)
    rows       session u64 [n], epoch u32 [n], position u32 [n], row at each stage u32 [hops, n], in PACKED frames length u32 [n] (the
               highest bit says that a token is wanted), tokens i32 [m]
    timings    for each stage passed: queue, compute, codec, in microseconds, u32 each; time of arrival, in microseconds since 1970,
               u64; bytes of the frame that arrived, rows or tokens computed with padding, microseconds of decoding, microseconds of
               sampling, u32 each
    tensors    for each: dtype u8, rank u8, dimensions u32, stored bytes u32; then their bytes, each 16-byte aligned
    checksum   CRC-32 of all before it

`decode` trusts no length. Anything wrong raises FrameRejected, whose `reason` is one of REASONS.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from mesh.errors import FrameRejected
from mesh.protocol import subjects, tensor_codec
from mesh.protocol.frame import STEPS, WANTED, Flags, Frame, Hop, Kind, Nack, StageTiming
from mesh.types import LayerRange

__all__ = [
    "MAX_FRAME_BYTES",
    "REASONS",
    "VERSION",
    "Flags",
    "Frame",
    "Hop",
    "Kind",
    "Nack",
    "StageTiming",
    "decode",
    "encode",
    "overhead_bytes",
]

VERSION: Final = 3
MAGIC: Final = b"SMsh"
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024  # the largest max_payload of NATS; also the limit of a frame after decompression
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
"""The names under which rejected frames are counted."""

_HEADER = struct.Struct("<4sBBH8sIQBBBBHBHBI")
_COUNTS = struct.Struct("<BHBBBBHBHBI")  # kind and flags, then what follows the step
_HOP = struct.Struct("<HHB")
_TIMING = struct.Struct("<IIIQIIII")
_TENSOR = struct.Struct("<BB")
_TENSOR_OF = tuple(struct.Struct(f"<BB{rank}II") for rank in range(5))  # by rank
_CRC = struct.Struct("<I")
_SUMMED: Final = 0x2144DF1C
"""The CRC-32 of any message that ends with its own CRC-32."""
_MOST_U32: Final = 2**32 - 1
_TRACE = struct.Struct("<B16s8sB")
_HEADERS: Final = 256
"""The most bytes that the NATS headers of a traced frame take."""
_STEP = struct.Struct("<IQ")
_ALIGN = 16
_PADDING = bytes(_ALIGN)
_U8, _U4, _I4 = (np.dtype(name) for name in ("<u8", "<u4", "<i4"))  # made once: numpy looks a name up in every call
_NO_LENGTHS: Final = np.zeros(0, _U4)
_KIND_AT, _HASH_AT, _BATCH_AT, _HOP_AT, _TENSORS_AT, _TIMINGS_AT = 5, 8, 16, 28, 31, 34
"""Offsets in the header."""

_ALL_FLAGS: Final = sum(Flags)
_FLAGS: Final = tuple(Flags(bits) for bits in range(_ALL_FLAGS + 1))  # made once: making a member is slow
_BF16, _ZSTD, _TRACED, _FINAL = (int(flag) for flag in (Flags.BF16, Flags.ZSTD, Flags.TRACED, Flags.FINAL))
_KINDS: Final = {int(kind): kind for kind in Kind}
_NACKS: Final = {int(nack): nack for nack in Nack}


def reject(reason: str, message: str) -> FrameRejected:
    assert reason in REASONS
    return FrameRejected(f"frame rejected: {message}", reason=reason)


# -- writing -----------------------------------------------------------------------------------------------------------


def encode(frame: Frame) -> bytes:
    """The frame as one message. ValueError: the caller put the frame together wrongly; the network is never the cause."""
    parts = _next_hop(frame) if frame.came_as else _table(frame)
    if frame.tensors:
        _append_tensors(parts, frame.tensors, int(frame.flags))
    data = b"".join(parts)
    return data + _CRC.pack(zlib.crc32(data))


def _table(frame: Frame) -> list[Any]:
    """Header, names, row table and timings."""
    n, m, hops = frame.rows, len(frame.tokens), len(frame.route)
    problem = _shape_problem(frame.kind, n, m, hops, frame.hop, len(frame.tensors), frame.flags, frame.reason)
    if problem is not None:
        raise ValueError(problem[1])
    if len(frame.epochs) != n or len(frame.positions) != n or frame.stage_rows.shape != (hops, n):
        raise ValueError(
            f"row table of {n} sessions, {len(frame.epochs)} epochs, {len(frame.positions)} positions, {frame.stage_rows.shape}"
        )
    flags = int(frame.flags) & ~_TRACED | (_TRACED if frame.traceparent else 0)
    name = subjects.check_token(frame.coordinator, "coordinator").encode()
    route = _encode_route(frame.route)
    counts = (frame.hop, len(frame.route), frame.reason, len(frame.tensors), frame.rows, len(frame.timings))
    lengths = (len(route), len(name), len(frame.tokens))
    header = _HEADER.pack(MAGIC, VERSION, frame.kind, flags, bytes.fromhex(frame.model_hash), frame.batch, frame.step, *counts, *lengths)
    parts: list[Any] = [header, route, name]
    if frame.traceparent:
        parts.append(_encode_trace(frame.traceparent))
    for array, dtype in (
        (frame.sessions, _U8),
        (frame.epochs, _U4),
        (frame.positions, _U4),
        (frame.stage_rows, _U4),
        (_lengths(frame), _U4),
        (frame.tokens, _I4),
    ):
        parts.append((array if array.dtype == dtype else array.astype(dtype)).tobytes())
    parts.extend(map(_timing, frame.timings))
    return parts


def _lengths(frame: Frame) -> np.ndarray:
    """The lengths of a PACKED frame's rows; none for another kind. ValueError if they do not add up."""
    if (frame.lengths is None) is (frame.kind is Kind.PACKED):
        raise ValueError(f"lengths of rows belong to PACKED frames, and this is {frame.kind.name}")
    if frame.lengths is None:
        return _NO_LENGTHS
    problem = _lengths_problem(frame.lengths, frame.rows, len(frame.tokens))
    if problem is not None:
        raise ValueError(problem)
    return frame.lengths


def _lengths_problem(lengths: np.ndarray, n: int, m: int) -> str | None:
    counts = lengths & (WANTED - 1)
    if len(counts) != n or not counts.all() or int(counts.sum(dtype=np.uint64)) != m:
        return f"{n} rows whose {len(counts)} lengths do not add up to {m} tokens"
    return None


def _next_hop(frame: Frame) -> list[Any]:
    """The same for a frame that is passed on: its bytes as they arrived, with the next hop and one more timing."""
    before = bytearray(frame.came_as)
    before[_HOP_AT], before[_TENSORS_AT], before[_TIMINGS_AT] = frame.hop, len(frame.tensors), len(frame.timings)
    return [before, _timing(frame.timings[-1])]


def _timing(timing: StageTiming) -> bytes:
    queue_us, compute_us, codec_us, arrived_us, size, bucket, read_us, sample_us = timing
    if max(queue_us, compute_us, codec_us) > _MOST_U32:  # an hour
        queue_us, compute_us, codec_us, read_us, sample_us = (
            min(us, _MOST_U32) for us in (queue_us, compute_us, codec_us, read_us, sample_us)
        )
    return _TIMING.pack(queue_us, compute_us, codec_us, arrived_us, size, bucket, read_us, sample_us)


def _append_tensors(parts: list[Any], tensors: Sequence[np.ndarray], flags: int) -> None:
    bodies = []
    for tensor in tensors:
        code, body = tensor_codec.pack(tensor, bf16=bool(flags & _BF16), zstd=bool(flags & _ZSTD))
        parts.append(_TENSOR_OF[tensor.ndim].pack(code, tensor.ndim, *tensor.shape, len(body)))
        bodies.append(body)
    at = sum(map(len, parts))
    for body in bodies:
        gap = -at % _ALIGN
        parts += (_PADDING[:gap], body)
        at += gap + len(body)


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
    """An upper bound of a frame's size without the bytes of its tensors. Prefill chunks are sized to max_payload with it."""
    fixed = _HEADER.size + _TRACE.size + subjects.MAX_TOKEN + _CRC.size + _HEADERS
    return (
        fixed
        + hops * (_HOP.size + subjects.MAX_TOKEN + _TIMING.size)
        + rows * (20 + 4 * hops)
        + 4 * tokens
        + MAX_TENSORS * (_TENSOR.size + 5 * 4 + _ALIGN)
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def decode(data: bytes, *, model_hash: str | None = None) -> Frame:
    """The frame in `data`. FrameRejected: there is none. `model_hash`: frames of other models are rejected. The arrays share the memory
    of `data`."""
    size = len(data)
    if size < _HEADER.size + _CRC.size:
        raise reject("truncated", f"{size} bytes are less than a header")
    if size > MAX_FRAME_BYTES:
        raise reject("too_large", f"{size:,} bytes")
    if not data.startswith(MAGIC):
        raise reject("magic", "this is no frame")
    if data[len(MAGIC)] != VERSION:
        raise reject("version", f"version {data[len(MAGIC)]}, and this side speaks {VERSION}")
    body = size - _CRC.size
    if zlib.crc32(data) != _SUMMED:
        raise reject("checksum", "its checksum is wrong")
    hash_ = data[_HASH_AT:_BATCH_AT].hex()
    if model_hash is not None and hash_ != model_hash:
        raise reject("model", f"it is of model {hash_}, and here is {model_hash}")
    layout = _layout(data[_KIND_AT:_HASH_AT] + data[_HOP_AT : _HEADER.size])
    if layout.tensors_at > body:
        raise reject("length", f"{layout.tensors_at:,} bytes are announced where {body:,} are left")
    batch, step = _STEP.unpack_from(data, _BATCH_AT)
    route, coordinator = _read_names(data[_HEADER.size : layout.trace_at], layout.hops, layout.name_length)
    n, at = layout.rows, layout.sessions_at
    end = layout.tensors_at
    tokens_at = at + (16 + 4 * layout.hops) * n
    lengths = None
    if layout.kind is Kind.PACKED:
        lengths = np.frombuffer(data, _U4, n, tokens_at)
        tokens_at += 4 * n
        problem = _lengths_problem(lengths, n, layout.tokens)
        if problem is not None:
            raise reject("rows", problem)
    timings = tuple(map(StageTiming._make, _TIMING.iter_unpack(data[layout.timings_at : end])))
    tensors: tuple[np.ndarray, ...] = ()
    if layout.tensors:
        tensors, end = _read_tensors(data, end, body, layout)
    if end != body:
        raise reject("length", f"{body - end} bytes too many")
    frame = Frame(
        layout.kind,
        hash_,
        coordinator,
        route,
        np.frombuffer(data, _U8, n, at),
        np.frombuffer(data, _U4, n, at + 8 * n),
        np.frombuffer(data, _U4, n, at + 12 * n),
        np.frombuffer(data, _U4, layout.hops * n, at + 16 * n).reshape(layout.hops, n),
        np.frombuffer(data, _I4, layout.tokens, tokens_at),
        batch,
        step,
        layout.hop,
        layout.flags,
        layout.reason,
        tensors,
        timings,
        _read_trace(data, layout.trace_at) if layout.traced else None,
        lengths,
        size,
    )
    frame.head = data[: layout.tensors_at]
    return frame


class _Layout(NamedTuple):
    """The counts of a header, and the offsets in the message that follow from them."""

    kind: Kind
    flags: Flags
    traced: bool
    bf16: bool
    zstd: bool
    reason: Nack
    hop: int
    hops: int
    rows: int
    tokens: int
    tensors: int
    name_length: int
    trace_at: int
    sessions_at: int
    timings_at: int
    tensors_at: int


@lru_cache(maxsize=256)
def _layout(counts: bytes) -> _Layout:
    """The layout for a header's counts. Cached, because they are the same for frame after frame."""
    kind_, flags_, hop, hops, reason_, tensors, n, timings, route_length, name_length, m = _COUNTS.unpack(counts)
    kind, reason = _KINDS.get(kind_), _NACKS.get(reason_)
    if kind is None or reason is None:
        raise reject("kind", f"kind {kind_}, reason {reason_}")
    if flags_ & ~_ALL_FLAGS:
        raise reject("flags", f"flags {flags_:#x}")
    flags = _FLAGS[flags_]
    problem = _shape_problem(kind, n, m, hops, hop, tensors, flags, reason)
    if problem is not None:
        raise reject(*problem)
    traced, bf16, zstd = (bool(flags_ & flag) for flag in (_TRACED, _BF16, _ZSTD))
    trace_at = _HEADER.size + route_length + name_length
    sessions_at = trace_at + (_TRACE.size if traced else 0)
    rows_end = sessions_at + n * (16 + 4 * hops + (4 if kind is Kind.PACKED else 0)) + 4 * m
    tensors_at = rows_end + timings * _TIMING.size
    where = (trace_at, sessions_at, rows_end, tensors_at)
    return _Layout(kind, flags, traced, bf16, zstd, reason, hop, hops, n, m, tensors, name_length, *where)


def _shape_problem(kind: Kind, n: int, m: int, hops: int, hop: int, tensors: int, flags: Flags, reason: Nack) -> tuple[str, str] | None:
    """(reason, what is wrong) if the counts contradict each other."""
    if not 1 <= hops <= MAX_HOPS or hop >= hops:
        return "route", f"hop {hop} of {hops}"
    if not 1 <= n <= MAX_ROWS:
        return "rows", f"{n} rows"
    if kind is Kind.PREFILL:
        good = n == 1 <= m
    elif kind is Kind.PACKED:
        good = n <= m
    elif kind is Kind.DECODE or kind is Kind.TOKENS:
        good = m == n
    else:
        good = m == 0
    if not good:
        return "rows", f"{kind.name} with {n} rows and {m} tokens"
    if kind in STEPS:
        good = tensors == (1 if hop else 0)
    else:
        good = tensors == 0 or (kind is Kind.TOKENS and tensors in (1, 3, 4))
    if not good:
        return "tensor", f"{kind.name} at hop {hop} with {tensors} tensors"
    if int(flags) & _FINAL and kind is not Kind.PREFILL:
        return "flags", f"FINAL on {kind.name}"
    if (reason is Nack.NONE) == (kind is Kind.NACK):
        return "kind", f"{kind.name} with reason {reason.name}"
    return None


@lru_cache(maxsize=256)
def _read_names(data: bytes, hops: int, name_length: int) -> tuple[tuple[Hop, ...], str]:
    """(route, coordinator). Cached, because they are the same for frame after frame."""
    route: list[Hop] = []
    at, end = 0, len(data) - name_length
    for _ in range(hops):
        if at + _HOP.size > end:
            raise reject("route", f"{hops} hops are announced, and there are {len(route)}")
        start, stop, length = _HOP.unpack_from(data, at)
        layers = LayerRange(start, stop)
        if stop <= start or (route and route[-1].layers.stop != start):
            raise reject("route", f"layers {layers} after {route[-1].layers if route else 'nothing'}")
        at += _HOP.size + length
        if at > end:
            raise reject("route", f"a name of {length} bytes where {end - at + length} are left")
        route.append(Hop(layers, _name(data[at - length : at])))
    if at != end:
        raise reject("route", f"{end - at} bytes too many")
    return tuple(route), _name(data[end:])


def _name(data: bytes) -> str:
    text = data.decode("ascii", "replace")
    if not subjects.is_token(text):
        raise reject("route", f"{text!r} is no name")
    return text


def _read_trace(data: bytes, at: int) -> str:
    version, trace, span, flags = _TRACE.unpack_from(data, at)
    return f"{version:02x}-{trace.hex()}-{span.hex()}-{flags:02x}"


def _read_tensors(data: bytes, at: int, body: int, layout: _Layout) -> tuple[tuple[np.ndarray, ...], int]:
    """(the tensors whose table is at `at`, where they end)"""

    def require(end: int) -> None:
        if end > body:
            raise reject("length", f"{end - at:,} bytes are announced where {body - at:,} are left")

    table = []
    for _ in range(layout.tensors):
        require(at + _TENSOR.size)
        rank = data[at + 1]
        if rank >= len(_TENSOR_OF):
            raise reject("tensor", f"rank {rank}")
        end = at + _TENSOR_OF[rank].size
        require(end)
        table.append(_tensor(data[at:end]))
        at = end
    result = []
    for code, shape, stored in table:
        at += -at % _ALIGN
        require(at + stored)
        try:
            result.append(
                tensor_codec.unpack(code, shape, data, at, stored, bf16=layout.bf16, zstd=layout.zstd, limit_bytes=MAX_FRAME_BYTES)
            )
        except tensor_codec.WireError as error:
            raise reject("tensor", str(error)) from None
        at += stored
    return tuple(result), at


@lru_cache(maxsize=256)
def _tensor(entry: bytes) -> tuple[int, tuple[int, ...], int]:
    """(type, shape, stored bytes) of an entry of the tensors' table. Cached, because it is the same for frame after frame."""
    code, _, *shape, stored = _TENSOR_OF[entry[1]].unpack(entry)
    return code, tuple(shape), stored
