"""Frames are read back as they were written. All other bytes are rejected, and never cause another exception."""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import FrameRejected
from mesh.protocol import frame_codec
from mesh.protocol.frame import STEPS, WANTED
from mesh.protocol.frame_codec import Flags, Frame, Hop, Kind, Nack, StageTiming, decode, encode
from mesh.types import LayerRange

HASH = "0123456789abcdef"
names = st.text("abcXYZ019_-", min_size=1, max_size=64)
u32 = st.integers(0, 2**32 - 1)
timing = st.tuples(u32, u32, u32, st.integers(0, 2**64 - 1), u32, u32, u32, u32)
dtypes = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])


@st.composite
def any_frame(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from(Kind))
    cuts = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=5)))
    route = tuple(Hop(LayerRange(a, b), draw(names)) for a, b in pairwise(cuts))
    hop = draw(st.integers(0, len(route) - 1))
    n = 1 if kind is Kind.PREFILL else draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) if kind in (Kind.PREFILL, Kind.PACKED) else [1] * n
    m = 0 if kind in (Kind.ACK, Kind.NACK) else sum(counts)
    wanted = draw(st.lists(st.sampled_from([0, WANTED]), min_size=n, max_size=n))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors: tuple[np.ndarray, ...] = ()
    if kind in STEPS and hop:
        tensors = (random.standard_normal((m, draw(st.integers(1, 20)))).astype(draw(dtypes)),)
    elif kind is Kind.TOKENS and draw(st.booleans()):
        k = draw(st.integers(0, 5))
        ids = random.integers(0, 1000, (n, k)).astype(np.int32)
        tensors = (random.random(n, np.float32), ids, random.random((n, k), np.float32))
    if kind is Kind.TOKENS and draw(st.booleans()):
        tensors = (*tensors, random.random((draw(st.integers(1, n)), 5), np.float32))
    flags = Flags(0)
    if kind in STEPS:
        flags = draw(st.sampled_from([Flags(0), Flags.BF16, Flags.ZSTD, Flags.BF16 | Flags.ZSTD]))
    if kind is Kind.PREFILL and draw(st.booleans()):
        flags |= Flags.FINAL
    traceparent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01" if draw(st.booleans()) else None
    return Frame(
        kind,
        HASH,
        draw(names),
        route,
        random.integers(1, 2**63, n).astype(np.uint64),
        np.array(draw(st.lists(u32, min_size=n, max_size=n)), np.uint32),
        np.array(draw(st.lists(u32, min_size=n, max_size=n)), np.uint32),
        random.integers(0, 64, (len(route), n)).astype(np.uint32),
        random.integers(0, 2**31, m).astype(np.int32),
        batch=draw(u32),
        step=draw(st.integers(0, 2**64 - 1)),
        hop=hop,
        flags=flags,
        reason=draw(st.sampled_from([nack for nack in Nack if nack])) if kind is Kind.NACK else Nack.NONE,
        tensors=tensors,
        timings=tuple(StageTiming(*draw(timing)) for _ in range(draw(st.integers(0, 3)))),
        traceparent=traceparent,
        lengths=np.array(counts, np.uint32) | np.array(wanted, np.uint32) if kind is Kind.PACKED else None,
    )


def same(one: Frame, other: Frame, *, bf16: bool = False) -> None:
    for name in ("kind", "model_hash", "coordinator", "route", "batch", "step", "hop", "reason", "timings", "traceparent"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.counts(), one.wants()) == (other.counts(), other.wants())
    for name in ("sessions", "epochs", "positions", "stage_rows", "tokens"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert len(one.tensors) == len(other.tensors)
    for a, b in zip(one.tensors, other.tensors, strict=True):
        want = a.astype(ml_dtypes.bfloat16).astype(a.dtype) if bf16 and a.dtype == np.float32 else a
        assert b.dtype == a.dtype
        np.testing.assert_array_equal(want, b)


@given(any_frame())
def test_written_values_are_read_back(frame: Frame) -> None:
    data = encode(frame)
    read = decode(data, model_hash=HASH)
    same(frame, read, bf16=Flags.BF16 in frame.flags)
    assert read.stored_bytes == len(data)
    limit = frame_codec.overhead_bytes(frame.rows, len(frame.tokens), len(frame.route)) + sum(t.nbytes + 1024 for t in frame.tensors)
    assert len(data) <= limit


@given(any_frame(), st.data())
def test_a_changed_byte_is_rejected(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode(frame))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameRejected):
        decode(bytes(message))


@given(any_frame(), st.data())
def test_a_shortened_or_lengthened_frame_is_rejected(frame: Frame, data: st.DataObject) -> None:
    message = encode(frame)
    for damaged in (message[: data.draw(st.integers(0, len(message) - 1))], message + data.draw(st.binary(min_size=1, max_size=20))):
        with pytest.raises(FrameRejected):
            decode(damaged)


@given(st.binary(max_size=300))
def test_random_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises(FrameRejected):
        decode(data)


@settings(max_examples=400, deadline=None)
@given(any_frame(), st.data())
def test_a_lie_with_a_right_checksum_is_rejected_or_read_never_another_exception(frame: Frame, data: st.DataObject) -> None:
    """A sender that computes a right CRC can write any length or type. Reading must stay inside the message and give a whole frame."""
    message = bytearray(encode(frame)[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del message[data.draw(st.integers(0, len(message) - 1)) :]
    body = bytes(message)
    try:
        read = decode(body + zlib.crc32(body).to_bytes(4, "little"))
    except FrameRejected as error:
        assert error.reason in frame_codec.REASONS
        return
    assert len(read.sessions) == len(read.epochs) == len(read.positions) == read.stage_rows.shape[1]
    assert all(tensor.nbytes <= frame_codec.MAX_FRAME_BYTES for tensor in read.tensors)


@given(any_frame())
def test_another_models_frame_is_rejected_as_such(frame: Frame) -> None:
    with pytest.raises(FrameRejected) as caught:
        decode(encode(frame), model_hash="f" * 16)
    assert caught.value.reason == "model"


def test_another_version_is_rejected_as_such() -> None:
    message = bytearray(encode(_decode_frame()))
    message[4] += 1
    with pytest.raises(FrameRejected) as caught:
        decode(bytes(message))
    assert caught.value.reason == "version"


def _decode_frame(rows: int = 3) -> Frame:
    route = (Hop(LayerRange(0, 2), "a"), Hop(LayerRange(2, 5), "b"))
    index = np.arange(rows, dtype=np.uint32)
    stage_rows = np.stack([index, index + 7])
    return Frame(Kind.DECODE, HASH, "c", route, (index + 1).astype(np.uint64), index, index + 10, stage_rows, index.astype(np.int32))


def test_a_frame_goes_forward_and_answers() -> None:
    frame = _decode_frame()
    assert frame.subject("m") == "mesh.v1.m.layers.0-2.a"
    hidden = np.zeros((3, 4), np.float32)
    second = frame.forward(hidden, StageTiming(1, 2, 3))
    assert second.subject("m") == "mesh.v1.m.layers.2-5.b"
    same(second, decode(encode(second)))
    answer = second.answer(Kind.TOKENS, StageTiming(4, 5, 6), tokens=np.array([7, 8, 9], np.int32))
    assert answer.subject("m") == "mesh.v1.m.tokens.c"
    assert [t.compute_us for t in decode(encode(answer)).timings] == [2, 5]


def test_rows_are_left_out_and_reported() -> None:
    frame = _decode_frame().forward(np.arange(12, dtype=np.float32).reshape(3, 4), StageTiming())
    kept = frame.only(np.array([0, 2]))
    same(kept, decode(encode(kept)))
    np.testing.assert_array_equal(kept.tensors[0][1], [8, 9, 10, 11])
    nack = decode(encode(frame.nack(Nack.HOLE, [1], np.array([4]))))
    assert nack.kind is Kind.NACK and nack.reason is Nack.HOLE
    assert nack.sessions.tolist() == [2] and nack.positions.tolist() == [4]


def _packed_frame(lengths: list[int]) -> Frame:
    made = _decode_frame()
    tokens = np.arange(sum(length & (WANTED - 1) for length in lengths), dtype=np.int32)
    return replace(made, kind=Kind.PACKED, tokens=tokens, lengths=np.array(lengths, np.uint32))


def test_rows_of_a_packed_frame_are_left_out_with_their_tokens() -> None:
    frame = _packed_frame([2, 1 | WANTED, 3 | WANTED]).forward(np.arange(12, dtype=np.float32).reshape(6, 2), StageTiming())
    kept = decode(encode(frame.only(np.array([0, 2]))))
    assert kept.tokens.tolist() == [0, 1, 3, 4, 5] and (kept.counts(), kept.wants()) == ([2, 3], [False, True])
    np.testing.assert_array_equal(kept.tensors[0][:, 0], [0, 2, 6, 8, 10])
    answer = decode(encode(frame.answer(Kind.TOKENS, StageTiming(), tokens=np.array([-1, 8, 9], np.int32))))
    assert answer.positions.tolist() == [11, 11, 14] and answer.tokens.tolist() == [-1, 8, 9]
    nack = decode(encode(frame.nack(Nack.HOLE, [2])))
    assert nack.sessions.tolist() == [3] and not len(nack.tokens)


@pytest.mark.parametrize("lengths", [[2, 1, 4], [6, 0, 1], [6, WANTED, 1], [2**31 - 1, 2**31 - 1, 8], [1, 1]])
def test_lengths_that_do_not_add_up_are_neither_written_nor_read(lengths: list[int]) -> None:
    frame = _packed_frame([2, 1 | WANTED, 3 | WANTED])
    with pytest.raises(ValueError, match="do not add up"):
        encode(replace(frame, lengths=np.array(lengths, np.uint32)))
    good = encode(frame)
    before, after = frame.lengths, np.array(lengths, "<u4")
    assert before is not None and good.count(before.tobytes()) == 1
    if len(after) == len(before):
        lie = good[:-4].replace(before.tobytes(), after.tobytes())
        with pytest.raises(FrameRejected) as caught:
            decode(lie + zlib.crc32(lie).to_bytes(4, "little"))
        assert caught.value.reason == "rows"


def test_only_packed_frames_have_lengths() -> None:
    for wrong in (replace(_packed_frame([1, 1, 1]), lengths=None), replace(_packed_frame([1, 1, 1]), kind=Kind.DECODE)):
        with pytest.raises(ValueError, match="PACKED"):
            encode(wrong)


def test_a_prefill_answers_with_its_last_position() -> None:
    route = (Hop(LayerRange(0, 5), "a"),)
    one = np.ones(1, np.uint32)
    chunk = Frame(
        Kind.PREFILL, HASH, "c", route, one.astype(np.uint64), one, one * 8, one[None], np.arange(4, dtype=np.int32), flags=Flags.FINAL
    )
    answer = chunk.answer(Kind.TOKENS, StageTiming(), tokens=np.array([5], np.int32))
    assert answer.positions.tolist() == [11] and not answer.flags


def test_compression_that_would_unfold_beyond_the_limit_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = replace(_decode_frame().forward(np.zeros((3, 4000), np.float32), StageTiming()), flags=Flags.ZSTD)
    data = encode(frame)
    assert len(data) < 1000
    monkeypatch.setattr(frame_codec, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(FrameRejected) as caught:
        decode(data)
    assert caught.value.reason == "tensor"


def test_a_frame_put_together_wrongly_is_not_written() -> None:
    frame = _decode_frame()
    for wrong in (
        replace(frame, epochs=frame.epochs[:1]),
        replace(frame, hop=2),
        replace(frame, tokens=frame.tokens[:2]),
        replace(frame, hop=1),
        replace(frame, flags=Flags.FINAL),
        replace(frame, hop=1, tensors=(np.zeros((3, 4)),)),
    ):
        with pytest.raises(ValueError):
            encode(wrong)
